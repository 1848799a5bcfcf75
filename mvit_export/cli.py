"""The `mvit-export` command. It parses, calls the library and prints; heavy packages load inside the commands."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from mvit_export import __version__
from mvit_export.cli_base import (
    EXIT_CODES,
    EXIT_ERROR,
    Artifacts,
    BenchmarkBinary,
    Device,
    DevicePython,
    Json,
    Quiet,
    Verbose,
    session,
)
from mvit_export.cli_bench import bench
from mvit_export.cli_eval import evaluate
from mvit_export.cli_tune import tune
from mvit_export.errors import UsageError
from mvit_export.terminal import Terminal, megabytes, status_text

ClickUsageError: Any = typer.BadParameter.__mro__[1]  # Typer carries its own copy of Click since 0.27

EPILOG = """Exit codes: 0 all done and every check passed; 1 a check failed; 2 misuse or bad input; 3 nothing failed,
but something asked for could not be checked here."""


class ExportByDefault(TyperGroup):
    """`mvit-export --to onnx` means `mvit-export export --to onnx`; -v, -q and --json may stand before the command."""

    EVERYWHERE = ("--json", "-q", "--quiet", "-v", "--verbose")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        leading = []
        while args and args[0] in self.EVERYWHERE:
            leading.append(args.pop(0))
        own = {name for param in self.params for name in param.opts} | {"--help"}
        if args and args[0].startswith("-") and args[0] not in own:
            args = ["export", *args]
        elif leading and not args:
            args = ["export"]
        return super().parse_args(ctx, args[:1] + leading + args[1:])


app = typer.Typer(
    cls=ExportByDefault,
    help="Export MobileViT, or any PyTorch vision model, to Core ML, ONNX and TFLite, and prove each file.\n\n"
    "mvit-export --to coreml --variant xxs   exports; `mvit-export export --help` lists the options.",
    epilog=EPILOG,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(value: bool) -> None:
    if value:
        typer.echo(f"mvit-export {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def export(
    to: Annotated[
        list[str], typer.Option(help="coreml, onnx, tflite or all; with commas or repeated.", show_default=False)
    ],
    variant: Annotated[str | None, typer.Option(help="MobileViT variant: xxs, xs or s.")] = None,
    model: Annotated[str | None, typer.Option(help="Another model: FILE.py:FACTORY or timm:NAME.")] = None,
    weights: Annotated[str | None, typer.Option(help="Checkpoint: FILE, folder, hf:ID or timm:ID.")] = None,
    like: Annotated[Path | None, typer.Option(help="An artifact whose model is exported again.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Use the official weights.")] = False,
    num_classes: Annotated[int | None, typer.Option(help="Classes of an untrained MobileViT (1000).")] = None,
    image_size: Annotated[
        list[str] | None, typer.Option(help="Input size, N or HxW in pixels (256); Core ML takes several.")
    ] = None,
    input_shape: Annotated[str | None, typer.Option(help="Whole input shape for --model, e.g. 1,3,224,224.")] = None,
    patch_config: Annotated[str | None, typer.Option(help="MobileViT patches: A (2,2,2) or B (8,4,2). (A)")] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="fp32, fp16, int8 and more; a wrong one lists them. (fp32; Core ML: fp16)")
    ] = None,
    input: Annotated[
        str, typer.Option(help="tensor: float NCHW; image: 8-bit RGB pictures, preprocessing inside the model.")
    ] = "tensor",
    labels: Annotated[Path | None, typer.Option(help="Class labels, one a line.")] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset, 18 to 23 (18).")] = None,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="ONNX: take any batch size.")] = False,
    ort: Annotated[
        bool,
        typer.Option("--ort", help="ONNX: an optimized .ort file, for ONNX Runtime on ARM, this version or newer."),
    ] = False,
    deployment_target: Annotated[str | None, typer.Option(help="Core ML: iOS15 to iOS26 (iOS16).")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Pictures for int8 and int16, and to check other few-bit files on: a folder or .npz."),
    ] = None,
    calibration_method: Annotated[str, typer.Option(help="Ranges by minmax, percentile or entropy.")] = "minmax",
    recipe: Annotated[str | None, typer.Option(help="For int8: accurate, fast, small or FILE.toml (accurate).")] = None,
    form: Annotated[
        str | None, typer.Option(help="How MobileViT's blocks are written, e.g. plain; a wrong one lists them.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder that receives NAME/FORMAT-PRECISION.")] = Path("artifacts"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace artifacts that exist.")] = False,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Check each file against PyTorch.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of untrained weights.", min=0, max=2**63 - 1)] = 0,
    jobs: Annotated[
        int | None,
        typer.Option(help="Files made at once (as cores and memory allow).", min=1, show_default=False),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Export a model and check every file (the default)."""
    from mvit_export.formats import check_installed, check_size_count, parse_shape, parse_size, plan_targets

    conversion = {
        "to": to, "precision": precision, "input": input, "opset": opset, "dynamic_batch": dynamic_batch,
        "ort": ort, "deployment_target": deployment_target, "form": form,
    }  # fmt: skip
    with session(as_json, quiet, verbose) as terminal:
        from mvit_export.converters.recipes import recipe_name

        named = recipe_name(recipe) if recipe else None
        targets = plan_targets(**conversion, recipe=named)  # type: ignore[arg-type]  # before torch is even loaded
        check_installed(targets)
        check_size_count(targets, len({parse_size(size) for size in image_size or ()}))
        import mvit_export

        with terminal.progress("loading the model") as step:
            chosen = {
                "variant": variant, "model": model, "weights": weights, "pretrained": pretrained,
                "num_classes": num_classes, "patch_config": patch_config, "image_size": image_size or None,
                "labels": labels, "input_shape": parse_shape(input_shape) if input_shape else None,
            }  # fmt: skip
            loaded = load_again(like, chosen) if like else mvit_export.load_model(**chosen, seed=seed)  # type: ignore[arg-type]
            results = mvit_export.export(
                loaded, **conversion, out=out, overwrite=overwrite, verify=verify, recipe=recipe,
                calibration=calibration, calibration_method=calibration_method, jobs=jobs,
                on_step=follow_targets(step, len(targets)),
            )  # fmt: skip
        finish_export(terminal, loaded, results)


def follow_targets(step: Callable[[str], None], total: int) -> Callable[[Any, str], None]:
    """An `on_step` that shows what is being done to each target, e.g. "verify onnx-fp32, convert tflite-fp32 (1/3)"."""
    doing: dict[str, str] = {}
    done = 0

    def on_step(target: Any, what: str) -> None:
        nonlocal done
        doing.pop(target.name, None)
        if what == "done":
            done += 1
        else:
            doing[target.name] = what
        step(f"{', '.join(f'{what} {name}' for name, what in doing.items())} ({done}/{total} done)".lstrip())

    return on_step


def load_again(like: Path, chosen: dict[str, Any]) -> Any:
    """The model of an artifact, unless options ask for another one."""
    from mvit_export.models.load import load_like

    given = [f"--{name.replace('_', '-')}" for name, value in chosen.items() if value]
    if given:
        raise UsageError(f"--like takes model, weights and sizes from {like}; leave out {', '.join(given)}")
    return load_like(like)


def finish_export(terminal: Terminal, loaded: Any, results: Any) -> NoReturn:
    """Print what was made, whether it is proven, and what to do next."""
    from mvit_export.parity import NOT_RUN, PASS, overall_status

    info = loaded.info
    shapes = ", ".join("x".join(map(str, shape)) for shape in loaded.input_shapes)
    terminal.print(f"{info.name}: {info.params:,} parameters, {info.macs / 1e6:.1f}M MACs, input {shapes}")
    if loaded.weights.trained is False:
        terminal.print(
            f"UNTRAINED: random weights from seed {loaded.weights.seed}; pass --pretrained or --weights for real ones"
        )
    rows, verdicts = [], []
    for result in results:
        manifest, path = result.artifact.manifest, str(result.artifact.path)
        size = megabytes(result.artifact.model_bytes)
        rows.append(
            {
                "path": path, "format": manifest.format, "precision": manifest.precision,
                "bytes": result.artifact.model_bytes, "parity": [verdict.to_json() for verdict in result.verdicts],
            }
        )  # fmt: skip
        for verdict in result.verdicts:
            print_verdict(terminal, verdict, size)
        if not result.verdicts:
            terminal.print(status_text(NOT_RUN), f"{path}  {size}  --no-verify was given")
        verdicts += result.verdicts
    for warning in dict.fromkeys(w for result in results for w in calibration_warnings(result.artifact.manifest)):
        terminal.print(f"note    calibration: {warning}")
    status = overall_status(verdicts)
    folder = results[0].artifact.path.parent
    terminal.print(f"Next:  mvit-export verify {folder}")
    terminal.print(f"       mvit-export inspect {results[0].artifact.path}")
    terminal.print_json({"status": status, "model": info.name, "trained": loaded.weights.trained, "artifacts": rows})
    # Verification that the user declined is no check asked for and missed.
    raise typer.Exit(EXIT_CODES[status if verdicts else PASS])


def calibration_warnings(manifest: Any) -> list[str]:
    return ((manifest.quantization or {}).get("calibration") or {}).get("warnings", [])


@app.command()
def verify(
    artifacts: Artifacts,
    against: Annotated[
        str, typer.Option(help="pytorch: the model rebuilt from its weights; golden: the stored vectors, no torch.")
    ] = "pytorch",
    weights: Annotated[str | None, typer.Option(help="Where the checkpoint is now, if it has moved.")] = None,
    locate: Annotated[
        bool, typer.Option("--locate", help="Name the first layer at which a file leaves PyTorch.")
    ] = False,
    device: Device = "local",
    device_python: DevicePython = None,
    benchmark_binary: BenchmarkBinary = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check exported files against the PyTorch model."""
    with session(as_json, quiet, verbose) as terminal:
        from mvit_export import parity

        results: list[parity.ParityResult] = []
        if locate and device != "local":
            raise UsageError("--locate looks into files with the runtimes of this machine; leave out --device")
        with terminal.progress("verify") as step, runtimes_on(device, device_python, benchmark_binary) as elsewhere:
            for path in artifacts:

                def on_case(done: int, total: int, path: Path = path) -> None:
                    step(f"verify {path}: input {done} of {total}")

                results += parity.verify(
                    path, against=against, weights=weights, find_layer=locate, on_case=on_case, **elsewhere
                )
        for result in results:
            print_verdict(terminal, result)
            if result.located:
                terminal.print(f"        {result.located}")
            elif result.status == parity.FAIL and against == "pytorch" and not locate and device == "local":
                terminal.print(f"        which layer: mvit-export verify --locate {result.path}")
        terminal.print_json(parity.summarise(results))
        raise typer.Exit(EXIT_CODES[parity.overall_status(results)])


def runtimes_on(device: str, python: str | None, binary: Path | None) -> AbstractContextManager[dict[str, Any]]:
    """Keywords for `parity.verify`; none for this machine, whose runtimes it knows."""
    if (device, python, binary) == ("local", None, None):
        return nullcontext({})
    from mvit_export.benchmarks.remote import device_sessions

    return device_sessions(device, python=python, binary=binary)


def print_verdict(terminal: Terminal, result: Any, *extra: str) -> None:
    """PASS  path  figures  runtime, or the reason."""
    parts = [result.path, *extra]
    if result.metrics is not None:
        metrics = result.metrics
        parts.append(f"{metrics.psnr_db:.1f} dB, max error {metrics.max_rel:.1e} of scale")
        parts.append(f"{result.inputs} inputs vs {result.against} in {result.runtime}")
    if result.note:
        parts.append(f"({result.note})")
    if result.reason:
        parts.append(result.reason)
    terminal.print(status_text(result.status), "  ".join(parts))


@app.command()
def inspect(artifacts: Artifacts, as_json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> None:
    """Show inputs, outputs, sizes and operators; of Core ML, what is eligible for the Neural Engine.

    Takes any .mlpackage too. -v lists every op.
    """
    with session(as_json, quiet, verbose) as terminal:
        from mvit_export.inspection import describe, inspect_path

        reports = [report for path in artifacts for report in inspect_path(path)]
        for report in reports:
            for line in describe(report, verbose=verbose):
                terminal.print(line)
        terminal.print_json({"status": "pass", "artifacts": reports})


@app.command()
def report(
    artifacts: Artifacts,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="File to write (html: report.html; markdown, junit: stdout).", metavar="FILE"
        ),
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="html, markdown or junit (by the name of FILE, else html).", show_default=False)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write one page on artifacts: verdicts, latencies, and what was not run.

    It reports and does not judge: the exit code is 0 once the report is written, whatever it says. HTML is one
    self-contained file; markdown is for a CI summary; junit is parity as JUnit XML.
    """
    with session(as_json, quiet, verbose) as terminal:
        from mvit_export.report import choose_format, read_report, render, write_report

        kind = choose_format(format, output)
        target = Path("report.html") if output is None and kind == "html" else output
        if target is None and as_json:
            raise UsageError(f"--json and --format {kind} would share stdout; name a file with -o")
        with terminal.progress("report") as step:
            found = read_report(artifacts)
            step(f"drawing {len(found.entries)} artifacts")
            text = render(found, format=kind)
        if target is None:
            terminal.write(text)
        else:
            write_report(text, target, report=found)
            terminal.print(status_text(found.status), f"{found.headline}; {found.latency_line}")
            terminal.print(f"Report: {target}")
        terminal.print_json({"status": "pass", "path": str(target), "format": kind, **found.to_json()})


@app.command()
def doctor(
    setup: Annotated[str | None, typer.Option(help="First build what a device needs: arm64, ARM emulation.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show which targets, runtimes and devices work here."""
    with session(as_json, quiet, verbose) as terminal:
        from mvit_export.benchmarks import arm64, devices
        from mvit_export.doctor import examine
        from mvit_export.formats import choose

        if setup is not None:
            choose(setup, ["arm64"], what="--setup")
            with terminal.progress("arm64") as step:
                terminal.print(f"arm64 is ready in {arm64.setup(on_step=lambda what: step(f'arm64: {what}'))}")
        with terminal.progress("importing converters and runtimes"):
            findings = [*examine(), *devices.findings()]
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            mark = "yes" if finding.works else "no "
            terminal.print(f"{finding.kind:<8} {finding.name:<{width}}  {mark}  {finding.detail}")
        terminal.print_json({"status": "pass", "findings": [finding.to_json() for finding in findings]})


app.command()(bench)
app.command()(tune)
app.command("eval")(evaluate)


def clean_up_when_ended() -> None:
    """A polite end, as of `timeout` or a closed terminal, is an interruption: scratch folders go, devices are left."""
    for name in ("SIGTERM", "SIGHUP"):
        if signal.getsignal(getattr(signal, name)) == signal.SIG_DFL:  # nohup's is to be ignored
            signal.signal(getattr(signal, name), signal.default_int_handler)


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    arguments = (sys.argv[1:] if args is None else args) or ["--help"]
    clean_up_when_ended()
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # from 1.29 on ONNX Runtime would report models to its maker
    try:
        code = app(arguments, standalone_mode=False, prog_name="mvit-export")
    except ClickUsageError as error:
        with Terminal(as_json="--json" in arguments, verbose=bool({"-v", "--verbose"} & {*arguments})) as terminal:
            terminal.error(UsageError(f"{error.format_message().rstrip('.')}; see mvit-export --help"))
        code = EXIT_ERROR
    raise SystemExit(code if isinstance(code, int) else 0)
