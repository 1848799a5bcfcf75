"""action.yml: its own shell lines run here, under the shell and options that GitHub's runners use."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, TINY

from mvit_export.formats.table import FORMATS

ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS = {step["name"]: step for step in ACTION["runs"]["steps"]}
HOSTILE = "$(touch pwned) `touch pwned` \"; touch pwned; ' ${{ x }} & a  b"
RECORDER = """#!{python}
import json, os, sys
name = os.path.basename(sys.argv[0])
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
print("printed by", *sys.argv[1:2])
sys.exit(int(os.environ.get("EXIT_" + sys.argv[1].upper().replace("-", "_"), 0)))
"""


@dataclass
class Runner:
    """Runs the action's steps in a folder of their own, as far as this project's lines go: `uses:` is GitHub's."""

    folder: Path
    commands: Path  # what stands first on the PATH
    environment: dict[str, str]

    def run(self, **inputs: str) -> int:
        """The exit code of the first step that fails, else 0. Names of inputs are given with underscores."""
        given = {name: str(spec.get("default", "")) for name, spec in ACTION["inputs"].items()}
        given |= {name.replace("_", "-"): value for name, value in inputs.items()}
        self.outputs: dict[str, dict[str, str]] = {}
        self.steps: list[str] = []
        for step in ACTION["runs"]["steps"]:
            if "run" in step and self.is_wanted(step.get("if"), given):
                self.steps.append(step["name"])
                if code := self.run_step(step, given):
                    return code
        return 0

    def run_step(self, step: dict[str, Any], given: dict[str, str]) -> int:
        output = self.folder / "output"
        output.write_text("")
        script = self.folder / "step.sh"
        script.write_text(step["run"])
        variables = {name: self.fill_in(value, given) for name, value in step.get("env", {}).items()}
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            cwd=self.folder, timeout=300, capture_output=True, text=True,
            env={
                **os.environ, "PATH": f"{self.commands}{os.pathsep}{os.environ['PATH']}", "GITHUB_OUTPUT": str(output),
                "GITHUB_STEP_SUMMARY": str(self.folder / "summary.md"), "GITHUB_ACTION_PATH": str(ROOT),
                "RECORD": str(self.folder / "record"), **self.environment, **variables,
            },
        )  # fmt: skip
        self.printed = done.stdout + done.stderr
        lines = output.read_text().splitlines()
        self.outputs[step.get("id", "")] = dict(line.split("=", 1) for line in lines)
        return done.returncode

    def fill_in(self, text: str, given: dict[str, str]) -> str:
        return re.sub(r"\$\{\{ (.*?) \}\}", lambda match: self.look_up(match.group(1), given), text)

    def look_up(self, name: str, given: dict[str, str]) -> str:
        kind, _, rest = name.partition(".")
        if kind == "inputs":
            return given[rest]
        step, _, output = rest.removeprefix("outputs.").partition(".outputs.")
        assert kind == "steps" and step in {step.get("id") for step in ACTION["runs"]["steps"]}, name
        return self.outputs.get(step, {}).get(output, "")

    def is_wanted(self, condition: str | None, given: dict[str, str]) -> bool:
        if condition is None:
            return True
        match = re.fullmatch(r"\$\{\{ inputs\.([a-z-]+) (==|!=) '(.*)' \}\}", condition)
        assert match, condition
        return (given[match.group(1)] == match.group(3)) == (match.group(2) == "==")

    @property
    def record(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "record").read_text().splitlines()]

    def value(self, output: str) -> str:
        """An output of the whole action."""
        return self.fill_in(ACTION["outputs"][output]["value"], {})


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    """With stand-ins for `mvit-export` and `python` that write down their arguments."""
    folder, commands = tmp_path / "work space", tmp_path / "bin"
    folder.mkdir()
    commands.mkdir()
    for name in ("mvit-export", "python"):
        (commands / name).write_text(RECORDER.format(python=sys.executable))
        (commands / name).chmod(0o755)
    return Runner(folder, commands, {})


def test_no_input_becomes_text_of_a_script() -> None:
    scripts = [step for step in STEPS.values() if "run" in step]
    assert len(scripts) == 7
    for step in scripts:
        assert "${{" not in step["run"], step["name"]
        assert step["shell"] == "bash"


def test_every_input_is_used_and_described() -> None:
    text = (ROOT / "action.yml").read_text(encoding="utf-8")
    assert set(re.findall(r"inputs\.([a-z-]+)", text)) == set(ACTION["inputs"])
    for name, spec in (*ACTION["inputs"].items(), *ACTION["outputs"].items()):
        assert spec["description"], name


def test_uploads_what_the_steps_wrote() -> None:
    assert STEPS["Upload the report"]["with"]["path"] == STEPS["Report"]["env"]["REPORT_DIR"]


@pytest.mark.slow
def test_defaults(runner: Runner) -> None:
    assert runner.run() == 0
    assert runner.record == [
        ["python", "-m", "pip", "install", f"{ROOT}[onnx,tflite,hub,report]"],
        ["mvit-export", "export", "--json", "--no-verify", "--overwrite", "--to=onnx,tflite", "--out=artifacts"],
        ["mvit-export", "verify", "--json", "--", "artifacts"],
        ["mvit-export", "bench", "--json", "--", "artifacts"],
        ["mvit-export", "report", "--format=markdown", "--", "artifacts"],
        ["mvit-export", "report", "--format=junit", "--output=mvit-export-report/junit.xml", "--", "artifacts"],
        ["mvit-export", "report", "--format=html", "--output=mvit-export-report/report.html", "--", "artifacts"],
    ]
    assert (runner.value("status"), runner.value("report")) == ("pass", "mvit-export-report/report.html")
    assert (runner.folder / "summary.md").read_text() == "printed by report\n"
    for name in ("export", "verify", "bench"):
        assert (runner.folder / "mvit-export-report" / f"{name}.json").read_text() == f"printed by {name}\n"


def test_every_input_reaches_its_command_as_one_argument(runner: Runner) -> None:
    code = runner.run(
        to="onnx, coreml", variant="v s", model="my net.py:build me", weights=HOSTILE, precision="fp32, fp16",
        export_args=f"--image-size=240x320\n\n--labels=my labels.txt\n{HOSTILE}\n",
        bench_args="--threads=1,2\n--device=ssh:a b",
        baseline="old runs/bench.json", max_slowdown="5 %", out="-my artifacts", report_dir="my report",
        pip_args="--find-links=my wheels\n--no-deps",
    )  # fmt: skip
    assert code == 0
    install, export, verify, bench, *reports = runner.record
    assert install[3:] == ["install", "--find-links=my wheels", "--no-deps", f"{ROOT}[onnx,coreml,hub,report]"]
    assert export[1:] == [
        "export", "--json", "--no-verify", "--overwrite", "--to=onnx, coreml", "--out=-my artifacts", "--variant=v s",
        "--model=my net.py:build me", f"--weights={HOSTILE}", "--precision=fp32, fp16", "--image-size=240x320",
        "--labels=my labels.txt", HOSTILE,
    ]  # fmt: skip
    assert verify[1:] == ["verify", "--json", "--", "-my artifacts"]
    assert bench[1:] == [
        "bench", "--json", "--baseline=old runs/bench.json", "--max-slowdown=5 %", "--threads=1,2", "--device=ssh:a b",
        "--", "-my artifacts",
    ]  # fmt: skip
    assert [report[-1] for report in reports] == ["-my artifacts"] * 3
    assert runner.value("report") == "my report/report.html"
    assert list(runner.folder.rglob("pwned")) == []


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"to": "onnx]/../x[y"}, "to is onnx\\]/../x\\[y, expected coreml, onnx and tflite with commas, or all"),
        *[({"to": to}, "to is") for to in ("onnx,../other", "", "onnx,", "all,onnx", "ONNX")],
        ({"to": "onnx\ntflite"}, "to is $'onnx\\ntflite', expected one line"),
        ({"report_dir": "r\nstatus=pass"}, "report-dir is $'r\\nstatus=pass', expected one line"),
        ({"out": "a\rb"}, "out is"), ({"model": "a\x1b[2J"}, "model is"), ({"upload_name": "a\nb"}, "upload-name is"),
        ({"python_version": "3\n4"}, "python-version is"), ({"report_dir": ""}, "report-dir is '', expected a folder"),
        ({"bench": "True"}, "bench is True, expected true or false"),
        ({"allow_not_run": "yes"}, "allow-not-run is yes, expected true or false"),
        *[({name: "a\nb"}, "expected one line") for name in ("variant", "weights", "precision", "baseline")],
        ({"max_slowdown": "1%\n"}, "max-slowdown is $'1%\\n', expected one line"),
    ],
)  # fmt: skip
def test_inputs_are_checked_before_anything_runs(runner: Runner, inputs: dict[str, str], message: str) -> None:
    assert runner.run(**inputs) == 2
    assert runner.steps == ["Check the inputs"]
    assert not (runner.folder / "record").exists()
    assert runner.printed.startswith("::error::mvit-export: ") and message in runner.printed
    assert runner.printed.count("\n") == 1 and runner.printed[:-1].isprintable()


def test_formats_are_those_of_the_table() -> None:
    (listed,) = re.findall(r"format='\((.*)\)'", STEPS["Check the inputs"]["run"])
    assert listed.split("|") == sorted(FORMATS)


def test_a_check_that_left_no_code_is_no_pass(runner: Runner) -> None:
    given = {name: str(spec.get("default", "")) for name, spec in ACTION["inputs"].items()}
    runner.outputs = {}
    assert runner.run_step(STEPS["Judge"], given) == 1
    runner.outputs = {"verify": {"code": "0"}}
    assert runner.run_step(STEPS["Judge"], given) == 1
    assert "::error::mvit-export: error." in runner.printed
    assert runner.run_step(STEPS["Judge"], given | {"bench": "false"}) == 0


def test_bench_can_be_left_out(runner: Runner) -> None:
    assert runner.run(bench="false") == 0
    assert "Bench" not in runner.steps
    assert not (runner.folder / "mvit-export-report" / "bench.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verify", "bench", "status"),
    [
        (0, 0, "pass"), (1, 0, "fail"), (0, 1, "fail"), (3, 1, "fail"), (0, 3, "not-run"), (3, 0, "not-run"),
        (2, 0, "error"), (1, 2, "error"), (2, 1, "error"), (0, 130, "error"), (3, 139, "error"),
    ],
)  # fmt: skip
def test_the_job_is_judged_after_the_report_is_written(runner: Runner, verify: int, bench: int, status: str) -> None:
    runner.environment = {"EXIT_VERIFY": str(verify), "EXIT_BENCH": str(bench)}
    assert runner.run() == (0 if status == "pass" else 1)
    assert runner.steps[-2:] == ["Report", "Judge"]
    assert runner.value("status") == status
    assert (f"::error::mvit-export: {status}." in runner.printed) == (status != "pass")


@pytest.mark.parametrize(("code", "expected"), [(3, 0), (1, 1), (2, 1)])
def test_allow_not_run_accepts_nothing_else(runner: Runner, code: int, expected: int) -> None:
    runner.environment = {"EXIT_BENCH": str(code)}
    assert runner.run(allow_not_run="true") == expected
    assert runner.value("status") == {3: "not-run", 1: "fail", 2: "error"}[code], "said all the same"


@pytest.mark.parametrize("command", ["EXIT_EXPORT", "EXIT__M", "EXIT_REPORT"])
def test_a_step_that_fails_ends_the_action(runner: Runner, command: str) -> None:
    runner.environment = {command: "2"}
    assert runner.run() == 2
    assert runner.steps[-1] == {"EXIT_EXPORT": "Export", "EXIT__M": "Install", "EXIT_REPORT": "Report"}[command]


@pytest.mark.slow
def test_the_steps_drive_the_real_command(runner: Runner) -> None:
    """Export, verify and report for real: the options that the action writes are options that exist."""
    script = f'#!/bin/sh\nexec "{sys.executable}" -m mvit_export "$@"\n'
    (runner.commands / "mvit-export").write_text(script)
    assert runner.run(to="onnx", model=TINY, precision="fp32", bench="false", out="my artifacts") == 0, runner.printed
    assert runner.value("status") == "pass"
    summary = (runner.folder / "summary.md").read_text(encoding="utf-8")
    assert summary.startswith("## PASS: the parity check passed\n")
    written = runner.folder / "mvit-export-report"
    assert (written / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert 'tests="1" failures="0"' in (written / "junit.xml").read_text(encoding="utf-8")
    assert json.loads((written / "export.json").read_text())["status"] == "not-run"
    assert json.loads((written / "verify.json").read_text())["status"] == "pass"
