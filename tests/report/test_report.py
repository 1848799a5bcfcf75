"""What `mvit-export report` writes: every verdict, every figure and every gap, escaped, and the same each time."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import report_data
from conftest import Finished

from mvit_export import report
from mvit_export.artifact import MANIFEST
from mvit_export.errors import ArtifactError, UsageError
from mvit_export.report import formatting
from mvit_export.report.charts import MOST_ROWS
from mvit_export.results.parity import ParityReport

Cli = Callable[..., Finished]
VOID = {"meta", "br", "link", "img"}
NASTY = 'a <script>alert(1)</script> & "b" | `c` *d* $e$ \''


@pytest.fixture(scope="session")
def showcase(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report_data.make_showcase(tmp_path_factory.mktemp("showcase"))


@pytest.fixture(scope="session")
def page(showcase: Path) -> str:
    return html(showcase)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """One bare artifact."""
    return report_data.make_artifact(tmp_path)


def html(*paths: Path) -> str:
    return report.render(report.read_report(paths), format="html")


def markdown(*paths: Path) -> str:
    return report.render(report.read_report(paths), format="markdown")


class Reader(HTMLParser):
    """Collects the words that a person sees, the tags, the ids, and every tag left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        self.ids += [value or "" for key, value in attrs if key == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


# The page


@pytest.mark.slow
def test_page_shows_every_verdict_with_its_figures(page: str) -> None:
    text = Reader(page).text
    assert "FAIL 1 of 7 parity checks failed" in text
    assert text.count("142.3 dB 4.3e-07 2.1e-15 100.0 %") == 5
    assert "mobilevit_xs tflite-fp32 FAIL ai-edge-litert 2.3.0 CPU 31.4 dB 8.1e-02 3.4e-03 89.0 % 9 vs pytorch" in text
    assert "PSNR 31.4 dB, at least 100 expected; max error 8.1e-02 of the scale, at most 1e-05 expected" in text
    assert "mobilevit_xxs coreml-fp16 PASS mil-reference 76.3 dB 6.8e-04 8.0e-09" in text
    assert "proves graph and weights, not Apple's kernels" in text


def test_page_shows_every_measured_figure(page: str, showcase: Path) -> None:
    text = Reader(page).text
    rows = report.read_report([showcase]).measured
    assert len(rows) == 12
    for row in rows:
        assert row.median_interval_ms and row.ratio and row.ratio.interval and row.roofline
        shown = [
            row.label, row.runtime, str(row.threads),
            formatting.ms(row.median_ms), formatting.interval(row.median_interval_ms),
            formatting.ms(row.p90_ms), formatting.ms(row.p99_ms), formatting.ms(row.min_ms),
            formatting.ms(row.load_ms), "warm", formatting.ms(row.load_warm_ms),
            formatting.ms(row.first_ms), formatting.memory(row.peak_rss_mb),
            formatting.times(row.ratio), formatting.interval(row.ratio.interval),
        ]  # fmt: skip
        assert " ".join(shown) in text
        assert formatting.percent(row.roofline.peak_share) in text
    assert "Ratios are to mobilevit_xxs onnx-fp32 onnxruntime 1.31.1 CPU, same threads: below 1 is faster." in text
    assert "2 threads are 1.68x as fast as 1: [1.66, 1.71]" in text
    assert "the time budget ended before the median settled" in text


def test_figures_have_three_digits_and_never_an_exponent() -> None:
    values = (0.0, 0.84, 4.523, 13.24, 131.4, 1046.2, 2.5e6)
    assert [formatting.significant(v) for v in values] == [
        "0.000",
        "0.840",
        "4.52",
        "13.2",
        "131",
        "1,046",
        "2,500,000",
    ]
    assert formatting.interval((0.991, 1.0123)) == "[0.991, 1.012]", "both ends as fine as the lower"
    assert formatting.interval(None) == ""
    assert formatting.ms(None) == formatting.percent(None) == formatting.times(None) == formatting.NONE


def test_page_names_machine_tools_and_dates(page: str) -> None:
    text = Reader(page).text
    for fact in (
        "cpu Intel Xeon Platinum 8370C", "cores 4", "python 3.11.2", "affinity 0, 1", "onnxruntime 1.31.1",
        "run 2026-11-24T09:30:12+00:00 (load average 0.212)", "tools mvit-export 0.1.0, torch 2.13.0",
        "2026-11-24T09:11:05+00:00", "UNTRAINED, seed 0",
    ):  # fmt: skip
        assert fact in text, fact


def test_page_lists_what_was_not_run(tmp_path: Path) -> None:
    bare = report_data.make_artifact(tmp_path, "xs")
    package = report_data.make_artifact(tmp_path, "xxs", "coreml", "fp16")
    report_data.store_parity(package, report_data.verdict(package, "not-run", "op foo is not known to the executor"))
    report_data.store_latency(package, report_data.unmeasured(package, "Core ML predicts on macOS only, this is Linux"))
    text = Reader(html(tmp_path)).text
    assert "NOT-RUN nothing failed, but 2 of 2 parity checks did not run 0 latencies measured, 2 not run" in text
    assert (
        "NOT-RUN mobilevit_xs onnx-fp32 , parity: was never verified: there is no parity.json. "
        f"mvit-export verify {bare}" in text
    )
    assert f"latency: was never measured: there is no latency.json. mvit-export bench {bare}" in text
    assert "NOT-RUN mobilevit_xxs coreml-fp16 , parity: op foo is not known to the executor." in text
    assert "latency in Core ML: Core ML predicts on macOS only, this is Linux." in text


def test_page_of_one_verified_artifact_says_so(place: Path) -> None:
    report_data.store_parity(place, report_data.verdict(place))
    report_data.store_latency(place, report_data.timing(place, 13.2))
    text = Reader(html(place)).text
    assert "PASS the parity check passed 1 latency measured" in text
    assert "Not run" not in text


def test_page_is_self_contained_and_has_no_scripts(page: str) -> None:
    reader = Reader(page)
    assert reader.open == [] and not {"script", "link", "img", "iframe", "object"} & reader.tags
    assert "http:" not in page and "https:" not in page and "@import" not in page
    targets = [value for key, value in reader.attributes if key in ("href", "src", "xlink:href")]
    assert targets and all(value.startswith("#") for value in targets)
    assert not [key for key, _ in reader.attributes if key.startswith("on")]
    assert "default-src 'none'" in page


def test_ids_of_the_drawings_do_not_clash(page: str) -> None:
    reader = Reader(page)
    assert page.count("<svg") == 6
    assert len(reader.ids) == len(set(reader.ids))
    used = set(re.findall(r"(?:href=\"|url\()#([^\")]+)", page))
    assert used <= set(reader.ids)


def test_drawings_take_their_colours_from_the_page(page: str) -> None:
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "var(--ink)" in drawings and "var(--onnx)" in drawings and "var(--tflite)" in drawings
    assert set(re.findall(r"#[0-9a-f]{6}", drawings)) == set(), "a fixed colour would be lost in one of the schemes"
    style = page[page.index("<style>") : page.index("</style>")]
    assert set(re.findall(r"var\((--[a-z-]+)\)", page)) <= set(re.findall(r"(--[a-z-]+):", style))


def test_every_sample_is_drawn(page: str) -> None:
    first = page[page.index('<g id="d0-') : page.index("</svg>")]
    assert len(re.findall(r"<use [^>]*fill: var\(--(?:onnx|tflite)\)[^>]*fill-opacity: 0\.6", first)) == 6 * 60


def test_names_and_reasons_are_escaped(tmp_path: Path) -> None:
    place = report_data.make_artifact(tmp_path / NASTY.replace("/", "∕"))
    report_data.store_parity(place, report_data.verdict(place, "fail", NASTY))
    row = report_data.timing(
        place, 13.2, runtime=NASTY, warnings=[NASTY], ratio={"to": NASTY, "median": 1, "interval": [1, 1]}
    )
    report_data.store_latency(place, row, report_data.timing(place, 14, device=NASTY), cpu=NASTY, tools={NASTY: NASTY})
    text = html(place)
    assert "<script" not in text.lower()
    assert Reader(text).open == []
    assert Reader(text).text.count(NASTY) >= 8, "shown as it is"


def test_a_path_that_is_no_utf8_is_shown_with_question_marks(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    report_data.make_artifact(folder)
    assert "caf?/mobilevit_xxs" in Reader(html(folder)).text
    assert "caf?/mobilevit_xxs" in markdown(folder)


def test_artifacts_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for run in ("old", "new"):
        place = report_data.make_artifact(tmp_path / run)
        report_data.store_latency(place, report_data.timing(place, 13.2))
    entries = report.read_report([tmp_path]).entries
    assert [e.label for e in entries] == [
        f"mobilevit_xxs onnx-fp32 ({tmp_path / run / 'mobilevit_xxs' / 'onnx-fp32'})" for run in ("new", "old")
    ]


def test_an_artifact_named_twice_is_read_once_and_small_models_come_first(showcase: Path) -> None:
    small = showcase / "mobilevit_xxs" / "onnx-fp32"
    entries = report.read_report([showcase / "mobilevit_s", small, showcase, small / "mobilevit_xxs.onnx"]).entries
    assert [entry.label.split("_")[1] for entry in entries] == [
        "xxs coreml-fp16", "xxs onnx-fp32", "xxs tflite-fp32", "xs onnx-fp32", "xs tflite-fp32", "s onnx-fp32",
        "s tflite-fp32",
    ]  # fmt: skip


def test_rows_of_one_artifact_are_told_apart_in_drawings(place: Path) -> None:
    report_data.store_latency(
        place,
        report_data.timing(place, 13),
        report_data.timing(place, 15, runtime="torch 2.13"),
        report_data.timing(place, 99, batch=8),
    )
    rows = report.read_report([place]).measured
    assert formatting.distinguish(rows) == [
        "mobilevit_xxs onnx-fp32, onnxruntime 1.31.1 CPU, batch 1",
        "mobilevit_xxs onnx-fp32, torch 2.13",
        "mobilevit_xxs onnx-fp32, onnxruntime 1.31.1 CPU, batch 8",
    ]
    assert "batch 8" in Reader(html(place)).text


def test_dollars_in_a_label_are_no_mathematics(place: Path) -> None:
    report_data.store_latency(
        place, report_data.timing(place, 13, runtime="a $b$ c"), report_data.timing(place, 15, runtime=r"$\frac$")
    )
    drawings = "".join(re.findall(r"<svg.*?</svg>", html(place), re.DOTALL))
    assert drawings.count("onnx-fp32, a $b$ c</text>") == 3, "in each drawing"
    assert drawings.count(r"onnx-fp32, $\frac$</text>") == 3


def test_two_runs_on_one_machine_are_one_environment(tmp_path: Path) -> None:
    for variant, day in (("xxs", "24"), ("xs", "25")):
        place = report_data.make_artifact(tmp_path, variant)
        report_data.store_latency(
            place, report_data.timing(place, 13), created=f"2026-11-{day}", load_average=[0.5, 0.5, 0.5]
        )
    text = Reader(html(tmp_path)).text
    assert text.count("cpu Intel Xeon Platinum 8370C") == 1
    load = "(load average 0.5, 0.5, 0.5)"
    assert f"runs 2026-11-24 {load}; 2026-11-25 {load}" in text


def test_machines_and_runs_are_not_mixed(tmp_path: Path) -> None:
    """Two machines make two drawings; two runs are said to be no close comparison."""
    one, other = report_data.make_artifact(tmp_path, "xxs"), report_data.make_artifact(tmp_path, "xs")
    report_data.store_latency(one, report_data.timing(one, 13))
    report_data.store_latency(
        other, report_data.timing(other, 80), cpu="Cortex-A76", created="2026-11-25T10:00:00+00:00"
    )
    text = html(tmp_path)
    assert "1 thread, Intel Xeon Platinum 8370C, x86_64, Linux 6.8" in text
    assert "1 thread, Cortex-A76, x86_64, Linux 6.8" in text
    assert "The rows come from 2 runs of mvit-export bench" in Reader(text).text


def test_far_outliers_are_said_not_drawn_and_not_hidden(place: Path) -> None:
    row = report_data.timing(place, 10.0)
    report_data.store_latency(place, {**row, "samples_ms": [*row["samples_ms"], 512.0, 900.0]})
    assert "; 2 beyond, up to 900 ms" in html(place)


def test_a_second_mode_is_drawn_however_far(place: Path) -> None:
    """A tenth of all samples is no outlier, and seen best beside the rest on a log axis."""
    row = report_data.timing(place, 10.0)
    report_data.store_latency(place, {**row, "samples_ms": [*row["samples_ms"], *[110.0] * 7]})
    text = html(place)
    assert "beyond" not in text
    assert "latency (ms, log scale)" in text


@pytest.mark.slow
def test_a_log_axis_only_where_one_model_dwarfs_another(tmp_path: Path, page: str) -> None:
    assert "log scale" not in page
    for variant, median in (("xxs", 1.0), ("s", 300.0)):
        place = report_data.make_artifact(tmp_path, variant)
        report_data.store_latency(place, report_data.timing(place, median))
    assert "latency (ms, log scale)" in html(tmp_path)
    assert "median latency (ms, log scale)" in html(tmp_path)


@pytest.mark.parametrize("samples", [[], [5.0], [5.0] * 30, [0.0, 0.0, 5.0], [5.0 + i % 7 for i in range(5000)]])
def test_odd_samples_are_drawn(place: Path, samples: list[float]) -> None:
    report_data.store_latency(place, report_data.timing(place, 5.0, samples_ms=samples))
    text = html(place)
    assert ("No samples were stored for mobilevit_xxs onnx-fp32 (1 thread)" in Reader(text).text) == (not samples)
    assert ("300 of up to 5,000 samples per row are drawn" in text) == (len(samples) == 5000)


def test_a_row_may_lack_all_but_its_median(place: Path) -> None:
    kept = ("path", "format", "precision", "status", "runtime", "median_ms")
    row = {key: value for key, value in report_data.timing(place, 13.2).items() if key in kept}
    report_data.store_latency(place, row)
    assert "– – – –" in Reader(html(place)).text
    assert "| – |" in markdown(place)


@pytest.mark.slow
def test_thousands_of_rows_are_a_table_and_some_drawings(place: Path) -> None:
    rows = [report_data.timing(place, 10 + index / 100, threads=index % 7 + 1) for index in range(MOST_ROWS + 20)]
    report_data.store_latency(place, *rows)
    found = Reader(html(place))
    assert f"Only the first {MOST_ROWS} of {MOST_ROWS + 20} rows are drawn" in found.text
    assert all(f"{row['median_ms']:.3g}" in found.text for row in rows)
    report_data.store_latency(place, *rows[:3])
    assert "are drawn" not in Reader(html(place)).text


# Damage


DAMAGE = {
    "{": "Expecting property name",
    "[]": "the document is a list, expected an object",
    "null": "the document is null, expected an object",
    '{"artifacts": [], "results": [], "environment": {}}': "has no entry for this artifact",
    '{"artifacts": [3], "results": [3], "environment": {}}': "is a number, expected an object",
    '{"artifacts": {}, "results": {}, "environment": {}}': "is an object, expected a list",
    "[" * 100_000: "is damaged",
    "\x00": "is damaged",
}


@pytest.mark.parametrize("content", DAMAGE)
def test_damaged_files_are_rows_of_what_was_not_run(place: Path, content: str) -> None:
    for name in ("parity.json", "latency.json"):
        (place / name).write_text(content)
    gaps = report.read_report([place]).gaps
    assert [gap.what for gap in gaps] == ["parity", "latency"]
    for gap, name in zip(gaps, ("parity", "latency"), strict=True):
        assert gap.reason.startswith(f"{name}.json ")
        assert DAMAGE[content] in gap.reason
        assert gap.command == f"mvit-export {'verify' if name == 'parity' else 'bench'} {place}"
    assert "NOT-RUN nothing failed, but 1 of 1 parity checks did not run" in Reader(html(place)).text


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"median_ms": "fast"}, "median_ms is text, expected a number"),
        ({"median_ms": True}, "median_ms is true or false, expected a number"),
        ({"median_ms": None}, "measured, but without a median"),
        ({"median_ms": -1}, "median_ms is out of range, expected a number of at least 0"),
        ({"median_ms": 10**400}, "median_ms is out of range, expected a number of at least 0"),
        ({"samples_ms": [1, None]}, "samples_ms is null, expected a number"),
        ({"median_interval_ms": [2, 1]}, "median_interval_ms is not an interval"),
        ({"status": "ok"}, "status is 'ok', expected measured or not-run"),
        ({"status": "not-run"}, "NOT-RUN without a reason"),
        ({"format": "tflite"}, "format is 'tflite', this artifact's is onnx"),
        ({"precision": "fp16"}, "precision is 'fp16', this artifact's is fp32"),
        ({"warnings": "many"}, "warnings is text, expected a list"),
        ({"ratio": 0.9}, "ratio is a number, expected an object"),
        ({"runtime": 1}, "runtime is a number, expected text"),
    ],
)
def test_damaged_latencies_name_the_field(place: Path, changes: dict[str, Any], problem: str) -> None:
    report_data.store_latency(place, {**report_data.timing(place, 13.2), **changes})
    (gap,) = [gap for gap in report.read_report([place]).gaps if gap.what == "latency"]
    assert gap.reason == f"latency.json is damaged: {problem}"


def test_a_damaged_record_of_one_device_is_no_pass(place: Path) -> None:
    report_data.store_parity(place, report_data.verdict(place))
    (place / "parity.ssh-pi.json").write_text("{")
    found = report.read_report([place])
    assert (found.status, found.headline) == ("not-run", "nothing failed, but 1 of 2 parity checks did not run")
    assert found.gaps[0].reason.startswith("parity.ssh-pi.json is damaged")
    (suite,) = ET.fromstring(report.render(found, format="junit"))
    assert [len(case.findall("skipped")) for case in suite] == [0, 1]


def test_records_of_every_device_are_shown(place: Path) -> None:
    for device in ("local", "ssh:pi"):
        report_data.store_parity(place, report_data.verdict(place), device=device)
        report_data.store_latency(place, report_data.timing(place, 13.2, device=device), device=device)
    text = Reader(html(place)).text
    assert "PASS all 2 parity checks passed 2 latencies measured" in text
    assert "onnxruntime 1.31.1 CPU ssh:pi" in text
    assert "1 thread, ssh:pi (Intel Xeon Platinum 8370C, x86_64, Linux 6.8)" in text


def test_nan_is_damage(place: Path) -> None:
    report_data.store_latency(place, report_data.timing(place, 13.2, p99_ms=1.5))
    file = place / "latency.json"
    file.write_text(file.read_text().replace('"p99_ms": 1.5', '"p99_ms": NaN'))
    assert "p99_ms is out of range" in report.read_report([place]).gaps[1].reason


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"status": "perfect"}, "status is 'perfect', expected pass or fail or not-run"),
        ({"metrics": None}, "a PASS without figures"),
        ({"status": "fail"}, "FAIL without a reason"),
        ({"precision": "fp16"}, "precision is 'fp16', this artifact's is fp32"),
    ],
)
def test_damaged_verdicts_are_no_verdicts(place: Path, changes: dict[str, Any], problem: str) -> None:
    report_data.store_parity(place, report_data.verdict(place))
    document = json.loads((place / "parity.json").read_text())
    document["artifacts"][0].update(changes)
    (place / "parity.json").write_text(json.dumps(document))
    found = report.read_report([place])
    assert found.gaps[0].reason == f"parity.json is damaged: {problem}"
    assert found.status == "not-run"


@pytest.mark.slow
def test_a_changed_model_is_refused(place: Path, cli: Cli) -> None:
    with (place / "mobilevit_xxs.onnx").open("r+b") as file:
        file.write(b"other")
    with pytest.raises(ArtifactError, match="was changed after the export"):
        report.read_report([place])
    done = cli("report", place, cwd=place.parent)
    assert (done.code, done.out) == (2, "")
    assert len(done.err.splitlines()) == 1
    assert not (place.parent / "report.html").exists()


# Markdown


def test_markdown_holds_both_tables_and_what_was_not_run(showcase: Path) -> None:
    text = markdown(showcase)
    assert text.startswith("## FAIL: 1 of 7 parity checks failed\n")
    assert (
        "| `mobilevit_xs tflite-fp32` | fp32 | **FAIL** | 31.4 dB | 8.1e-02 | 3.4e-03 | ai-edge-litert 2.3.0 CPU | "
        "PSNR 31.4 dB, at least 100 expected; max error 8.1e-02 of the scale, at most 1e-05 expected |" in text
    )
    rows = report.read_report([showcase]).measured
    for row in rows:
        assert f"| `{row.label}` | {row.runtime} | local | {row.threads} | {formatting.median(row)} |" in text
        assert f"| {formatting.ratio(row.ratio)} |" in text
    assert "- `mobilevit_s tflite-fp32`, 2 threads: 2 threads are 1.68x as fast as 1" in text
    assert "### NOT-RUN\n\n- `mobilevit_xxs coreml-fp16` latency in Core ML: Core ML predicts on macOS only" in text
    assert "Measured on Intel Xeon Platinum 8370C, x86_64, Linux 6.8." in text
    assert "Ratios are to mobilevit_xxs onnx-fp32 onnxruntime 1.31.1 CPU, same threads: below 1 is faster." in text


def test_markdown_cells_stay_in_their_columns(tmp_path: Path) -> None:
    place = report_data.make_artifact(tmp_path / "a|b`c")
    other = report_data.make_artifact(tmp_path / "d|e")
    for folder in (place, other):
        report_data.store_parity(folder, report_data.verdict(folder, "fail", NASTY + "\nsecond line"))
        report_data.store_latency(folder, report_data.timing(folder, 13.2, runtime=NASTY, warnings=[NASTY]))
    text = markdown(tmp_path)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {9, 13}
    assert r"\<script\>" in text
    outside = re.sub(r"`[^`]*`", "", text.replace("\\`", ""))
    assert re.search(r"(?<!\\)[<]", outside) is None


def test_markdown_names_the_command_that_would_run(place: Path) -> None:
    text = markdown(place)
    assert (
        f"- `mobilevit_xxs onnx-fp32` parity: was never verified: there is no parity.json: `mvit-export verify {place}`"
        in text
    )
    assert "0 latencies measured, 1 not run." in text


# Accuracy


def test_accuracy_is_shown_with_what_it_is_worth(place: Path) -> None:
    gate = {"max_drop": 0.5, "status": "fail", "reason": "1.32 points of top-1 lost [0.02, 2.61], at most 0.5 allowed"}
    report_data.store_accuracy(place, report_data.scores(place, gate=gate, warnings=["confidence has moved away"]))
    figures = "onnxruntime 1.31.1 CPU 98.68 % 99.78 % 7.44 % 99.12 % 2.4e-03 -0.22 [-0.87, 0.43]"
    text = Reader(html(place)).text
    assert f"{figures} {gate['reason']} confidence has moved away" in text
    assert "454 pictures of digits/val, against PyTorch mobilevit_xxs 256x256." in text
    shown = markdown(place)
    assert "| 98.68 % | 99.78 % | 7.44 % | 99.12 % | 2.4e-03 | -0.22 \\[-0.87, 0.43\\] |" in shown
    assert "- `mobilevit_xxs onnx-fp32`: **FAIL** 1.32 points of top-1 lost" in shown


def test_accuracy_is_missed_only_beside_others_that_have_it(tmp_path: Path) -> None:
    first, second = report_data.make_artifact(tmp_path, "xxs"), report_data.make_artifact(tmp_path, "xs")
    assert not [gap for gap in report.read_report([tmp_path]).gaps if gap.what == "accuracy"]
    assert "Accuracy" not in markdown(tmp_path)
    report_data.store_accuracy(first, report_data.scores(first))
    (gap,) = [gap for gap in report.read_report([tmp_path]).gaps if gap.what == "accuracy"]
    assert (gap.path, gap.reason) == (str(second), "was never measured: there is no accuracy.json")
    assert gap.command == f"mvit-export eval {second} --data DIR"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"top1": None}, "measured, but without top-1"),
        ({"precision": "int8"}, "precision is 'int8', this artifact's is fp32"),
        ({"drop_interval": [2, 1]}, "drop_interval is not an interval"),
        ({"gate": {"status": "maybe"}}, "status is 'maybe', expected pass or fail"),
        ({"status": "not-run"}, "NOT-RUN without a reason"),
    ],
)
def test_a_damaged_accuracy_is_a_gap(place: Path, changes: dict[str, Any], problem: str) -> None:
    report_data.store_accuracy(place, report_data.scores(place, **changes))
    found = report.read_report([place])
    assert [gap.reason for gap in found.gaps if gap.what == "accuracy"] == [f"accuracy.json is damaged: {problem}"]
    assert found.scored == ()


def test_accuracy_that_could_not_be_had_is_listed(place: Path) -> None:
    report_data.store_accuracy(
        place, report_data.scores(place, status="not-run", reason="Core ML predicts on macOS only")
    )
    (gap,) = [gap for gap in report.read_report([place]).gaps if gap.what.startswith("accuracy")]
    assert gap.reason == "Core ML predicts on macOS only"


# JUnit


def test_junit_has_a_case_for_each_artifact_and_runtime(showcase: Path, tmp_path: Path) -> None:
    package = report_data.make_artifact(tmp_path, "s", "coreml", "fp16")
    report_data.store_parity(
        package, report_data.verdict(package), report_data.verdict(package, "not-run", "no torch <here>")
    )
    report_data.make_artifact(tmp_path, "s", "tflite", "fp16")
    root = ET.fromstring(report.render(report.read_report([showcase, tmp_path]), format="junit"))
    (suite,) = root
    for element in (root, suite):
        totals = {key: element.get(key) for key in ("tests", "failures", "errors", "skipped")}
        assert totals == {"tests": "10", "failures": "1", "errors": "0", "skipped": "2"}
    cases = {(case.get("classname"), case.get("name")): case for case in suite}
    assert len(cases) == 10
    failure = cases["mobilevit_xs tflite-fp32", "ai-edge-litert 2.3.0 CPU"].find("failure")
    assert failure is not None and (failure.get("message") or "").startswith("PSNR 31.4 dB, at least 100 expected")
    skipped = cases["mobilevit_s coreml-fp16", "parity"].find("skipped")
    assert skipped is not None and skipped.get("message") == "no torch <here>"
    missing = cases["mobilevit_s tflite-fp16", "parity"].find("skipped")
    assert missing is not None and "run: mvit-export verify" in (missing.get("message") or "")
    passed = cases["mobilevit_xxs onnx-fp32", "onnxruntime 1.31.1 CPU"]
    assert [child.tag for child in passed] == ["system-out"]
    assert passed[0].text == "PSNR 142.3 dB, max error 4.3e-07 of scale; 9 inputs against pytorch"


def test_junit_is_valid_xml_whatever_the_reason_holds(place: Path) -> None:
    failed = report_data.verdict(place, "fail", f"{NASTY}\x00\x1b[31m\x0b\ud800")
    (place / "parity.json").write_text(json.dumps(ParityReport((failed,)).to_json()))
    (suite,) = ET.fromstring(report.render(report.read_report([place]), format="junit"))
    failure = suite[0].find("failure")
    assert failure is not None and (failure.get("message") or "").startswith(NASTY)


# The command


@pytest.mark.slow
def test_report_writes_one_file_and_exits_0_whatever_it_says(showcase: Path, tmp_path: Path, cli: Cli) -> None:
    done = cli("report", showcase, cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert done.out == ("FAIL    1 of 7 parity checks failed; 12 latencies measured, 1 not run\nReport: report.html\n")
    assert os.listdir(tmp_path) == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.slow
def test_report_is_the_same_each_time(showcase: Path, tmp_path: Path, cli: Cli) -> None:
    for seed in ("1", "2"):
        assert cli("report", showcase, "-o", tmp_path / seed, env={"PYTHONHASHSEED": seed}).code == 0
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.slow
def test_markdown_and_junit_go_to_stdout(showcase: Path, tmp_path: Path, cli: Cli) -> None:
    done = cli("report", showcase, "--format", "markdown", "-q", cwd=tmp_path)
    assert (done.code, done.out, done.err) == (0, markdown(showcase), "")
    done = cli("report", showcase, "--format", "junit", cwd=tmp_path)
    assert ET.fromstring(done.out).tag == "testsuites"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("name", "start"), [("a.md", "## FAIL"), ("a.XML", "<?xml"), ("a", "<!doctype html>")])
def test_the_name_of_the_file_says_the_format(showcase: Path, tmp_path: Path, cli: Cli, name: str, start: str) -> None:
    assert cli("report", showcase, "-o", tmp_path / name).code == 0
    assert (tmp_path / name).read_text(encoding="utf-8").startswith(start)


@pytest.mark.slow
def test_json_counts_and_lists_what_was_not_run(showcase: Path, tmp_path: Path, cli: Cli) -> None:
    done = cli("report", showcase, "--json", cwd=tmp_path)
    assert done.code == 0
    assert done.json == {
        "status": "pass",
        "path": "report.html",
        "format": "html",
        "verdict": "fail",
        "parity": {"pass": 6, "fail": 1, "not-run": 0},
        "measured": 12,
        "scored": 0,
        "not_run": [
            {
                "path": str(showcase / "mobilevit_xxs" / "coreml-fp16"),
                "what": "latency in Core ML",
                "reason": "Core ML predicts on macOS only, this is Linux",
                "command": None,
            }
        ],
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing does not exist, expected an artifact directory; mvit-export --to … makes one"),
        (["--format", "pdf", "HERE"], "--format 'pdf' is not known, expected one of html, markdown, junit"),
        (["-o", "no/folder/r.html", "HERE"], "-o no/folder/r.html cannot be written: No such file or directory"),
        (["-o", "folder", "HERE"], "-o folder cannot be written: it is no regular file"),
        (["-o", ".", "HERE"], "-o . cannot be written: it is no regular file"),
        (
            ["--json", "--format", "markdown", "HERE"],
            "--json and --format markdown would share stdout; name a file with -o",
        ),
    ],
)
def test_bad_input_is_one_line_and_2(place: Path, tmp_path: Path, cli: Cli, arguments: list[str], message: str) -> None:
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    done = cli("report", *[place if word == "HERE" else word for word in arguments], cwd=tmp_path)
    assert (done.code, done.err) == (2, f"mvit-export: error: {message}\n")
    assert sorted(tmp_path.rglob("*")) == before, "nothing half-written"


def test_a_report_never_overwrites_an_artifact(place: Path) -> None:
    for name in (MANIFEST, "mobilevit_xxs.onnx", "new.html"):
        with pytest.raises(UsageError, match="lies inside the artifact"):
            report.write_report("text", place / name, report=report.read_report([place]))
    assert not (place / "new.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("module", ["jinja2", "matplotlib"])
def test_html_without_its_packages_names_the_extra_and_markdown_does_without(showcase: Path, module: str) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        start = "from mvit_export.cli.main import main"
        code = f"import sys; sys.modules[{module!r}] = None; {start}; main({list(arguments)})"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    done = run("report", str(showcase), "-o", "never.html")
    message = f"{module} is not installed, needed to {'draw' if module == 'matplotlib' else 'write'} the report"
    assert (done.returncode, done.stderr) == (
        2,
        f"mvit-export: error: {message}: pip install 'mvit-export[report]'\n",
    )
    assert not Path("never.html").exists()
    assert run("report", str(showcase), "--format", "markdown").returncode == 0


def test_report_reads_what_verify_writes(tiny_artifact: Callable[..., Path], tmp_path: Path, cli: Cli) -> None:
    place = tmp_path / "onnx-fp32"
    shutil.copytree(tiny_artifact("onnx"), place)
    checked = cli("verify", place, "--json")
    (row,) = checked.json["artifacts"]
    text = Reader(html(place)).text
    assert f"PASS {row['runtime']} {row['metrics']['psnr_db']:.1f} dB {row['metrics']['max_rel']:.1e}" in text
    assert "PASS the parity check passed" in text
