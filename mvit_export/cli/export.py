"""`mvit-export export`: write a model to files and check each one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from mvit_export.cli.codes import EXIT_CODES, EXIT_ERROR
from mvit_export.cli.help import FEW_BITS, FILES, MODEL, PICTURES
from mvit_export.cli.options import Json, Quiet, TrustCode, Verbose, print_verdict, session
from mvit_export.cli.terminal import Terminal, megabytes, status_text
from mvit_export.cli.text import one_line
from mvit_export.errors import ConversionError, MvitExportError, PartialExportError, UsageError


def export(
    to: Annotated[
        list[str],
        typer.Option(
            help="coreml, onnx, tflite or all; comma-separated or repeated.", show_default=False, rich_help_panel=FILES
        ),
    ],
    variant: Annotated[str | None, typer.Option(help="MobileViT variant: xxs, xs or s.", rich_help_panel=MODEL)] = None,
    weights: Annotated[
        str | None, typer.Option(help="Checkpoint: FILE, folder, hf:ID or timm:ID.", rich_help_panel=MODEL)
    ] = None,
    no_ema: Annotated[
        bool,
        typer.Option(
            "--no-ema", help="Of a checkpoint with averaged weights, read those as trained.", rich_help_panel=MODEL
        ),
    ] = False,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Use the official weights.", rich_help_panel=MODEL)
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Another model: FILE.py:FACTORY, timm:NAME or hf:ID.", rich_help_panel=MODEL)
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="Export the model of this artifact again.", rich_help_panel=MODEL)
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="File of class labels, one per line.", rich_help_panel=MODEL)
    ] = None,
    num_classes: Annotated[
        int | None,
        typer.Option(help="Number of classes of an untrained MobileViT or timm model (1000).", rich_help_panel=MODEL),
    ] = None,
    image_size: Annotated[
        list[str] | None,
        typer.Option(help="Input size in pixels, N or HxW (256). Core ML takes several.", rich_help_panel=MODEL),
    ] = None,
    input_shape: Annotated[
        str | None, typer.Option(help="For --model: the input's whole shape, e.g. 1,3,224,224.", rich_help_panel=MODEL)
    ] = None,
    patch_config: Annotated[
        str | None, typer.Option(help="MobileViT patches: A (2,2,2) or B (8,4,2). (A)", rich_help_panel=MODEL)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of random weights.", min=0, max=2**63 - 1, rich_help_panel=MODEL)] = 0,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            help="fp32, fp16, int8 and more; an unknown name lists all of them. (fp32; Core ML: fp16)",
            rich_help_panel=FILES,
        ),
    ] = None,
    input: Annotated[
        str,
        typer.Option(
            help="tensor: float NCHW; image: 8-bit RGB, with the preprocessing inside the model.", rich_help_panel=FILES
        ),
    ] = "tensor",
    form: Annotated[
        str | None,
        typer.Option(
            help="How MobileViT's blocks are written, e.g. plain; an unknown name lists all of them. (the fastest)",
            rich_help_panel=FILES,
        ),
    ] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset, 18 to 23 (18).", rich_help_panel=FILES)] = None,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch", help="ONNX: accept any batch size.", rich_help_panel=FILES)
    ] = False,
    ort: Annotated[
        bool,
        typer.Option(
            "--ort",
            help="ONNX: write an optimized .ort file, for ONNX Runtime on ARM of this version or newer.",
            rich_help_panel=FILES,
        ),
    ] = False,
    deployment_target: Annotated[
        str | None, typer.Option(help="Core ML: iOS15 to iOS26 (iOS16).", rich_help_panel=FILES)
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder in which to create NAME/FORMAT-PRECISION.", rich_help_panel=FILES)
    ] = Path("artifacts"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing artifacts.", rich_help_panel=FILES)
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Check each file against PyTorch.", rich_help_panel=FILES)
    ] = True,
    jobs: Annotated[
        int | None,
        typer.Option(
            help="How many files to make at the same time (as cores and memory allow).",
            min=1,
            show_default=False,
            rich_help_panel=FILES,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="For int8: accurate, fast, small or FILE.toml (accurate).", rich_help_panel=FEW_BITS),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Pictures that int8 and int16 need, and that other few-bit files are checked on: a folder or .npz.",
            rich_help_panel=FEW_BITS,
        ),
    ] = None,
    calibration_method: Annotated[
        str, typer.Option(help="How ranges are found: minmax, percentile or entropy.", rich_help_panel=FEW_BITS)
    ] = "minmax",
    mean: Annotated[
        str | None,
        typer.Option(help="Subtracted from pixels, one number or three by channel.", rich_help_panel=PICTURES),
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="What pixels are divided by after that.", rich_help_panel=PICTURES)
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help="What pixels are multiplied by before that (1/255).", rich_help_panel=PICTURES)
    ] = None,
    channels: Annotated[
        str | None, typer.Option(help="Their order in the network: RGB or BGR.", rich_help_panel=PICTURES)
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(help="Short side in pixels before the crop, or squash: no crop.", rich_help_panel=PICTURES),
    ] = None,
    trust_code: TrustCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Export a model and check every file (the default)."""
    from mvit_export.formats.choices import parse_shape, parse_size
    from mvit_export.formats.targets import check_installed, check_size_count, plan_targets

    conversion = {
        "to": to, "precision": precision, "input": input, "opset": opset, "dynamic_batch": dynamic_batch,
        "ort": ort, "deployment_target": deployment_target, "form": form,
    }  # fmt: skip
    with session(as_json, quiet, verbose) as terminal:
        from mvit_export.formats.targets import recipe_name

        named = recipe_name(recipe) if recipe else None
        targets = plan_targets(**conversion, recipe=named)  # type: ignore[arg-type]  # before torch is even loaded
        check_installed(targets)
        check_size_count(targets, len({parse_size(size) for size in image_size or ()}))
        import mvit_export

        said = state_pictures(mean, std, scale, channels, resize)
        with terminal.progress("loading the model") as step:
            chosen = {
                "variant": variant, "model": model, "weights": weights, "pretrained": pretrained,
                "num_classes": num_classes, "patch_config": patch_config, "image_size": image_size or None,
                "labels": labels, "input_shape": parse_shape(input_shape) if input_shape else None,
            }  # fmt: skip
            if like:
                loaded = load_again(like, {**chosen, "no_ema": no_ema, **asdict(said)})
            else:
                loaded = mvit_export.load_model(**chosen, seed=seed, ema=not no_ema, preprocessing=said)  # type: ignore[arg-type]
            try:
                results, failures = mvit_export.export(
                    loaded, **conversion, out=out, overwrite=overwrite, verify=verify, recipe=recipe,
                    calibration=calibration, calibration_method=calibration_method, jobs=jobs,
                    on_step=follow_targets(step, len(targets)),
                ), {}  # fmt: skip
            except PartialExportError as error:
                results, failures = error.results, error.failures
        finish_export(terminal, loaded, results, failures)


def state_pictures(
    mean: str | None, std: str | None, scale: str | None, channels: str | None, resize: str | None
) -> Any:
    """What the options say about how pictures become numbers."""
    from mvit_export.data.preprocessing import Stated
    from mvit_export.formats.choices import parse_ratio, parse_three

    return Stated(
        mean=parse_three(mean, "--mean") if mean else None,
        std=parse_three(std, "--std") if std else None,
        scale=parse_ratio(scale, "--scale") if scale else None,
        channels=channels,
        resize=int(resize) if resize and resize.isdecimal() else resize,
    )


def follow_targets(step: Callable[[str], None], total: int) -> Callable[[Any, str], None]:
    """An `on_step` that shows what is being done to each target, e.g. "verify onnx-fp32, convert tflite-fp32 (1/3)"."""
    doing: dict[str, str] = {}
    done = 0

    def on_step(target: Any, what: str) -> None:
        nonlocal done
        doing.pop(target.name, None)
        if what in ("done", "failed"):
            done += 1
        else:
            doing[target.name] = what
        step(f"{', '.join(f'{what} {name}' for name, what in doing.items())} ({done}/{total} done)".lstrip())

    return on_step


def load_again(like: Path, chosen: dict[str, Any]) -> Any:
    """The model of an artifact, unless options ask for another."""
    from mvit_export.families.load import load_like

    given = [f"--{name.replace('_', '-')}" for name, value in chosen.items() if value]
    if given:
        raise UsageError(f"--like takes model, weights and sizes from {like}; leave out {', '.join(given)}")
    return load_like(like)


def finish_export(
    terminal: Terminal, loaded: Any, results: Sequence[Any], failures: Mapping[str, MvitExportError]
) -> NoReturn:
    """Print what was made, whether it is proven, what could not be made, and what to do next."""
    from mvit_export.results.status import PASS, worst_status

    info = loaded.info
    shapes = ", ".join("x".join(map(str, shape)) for shape in loaded.input_shapes)
    terminal.print(f"{info.name}: {info.params:,} parameters, {info.macs / 1e6:.1f}M MACs, input {shapes}")
    if loaded.weights.trained is False:
        terminal.print(
            f"UNTRAINED: random weights from seed {loaded.weights.seed}; pass --pretrained or --weights for real ones"
        )
    rows = [print_result(terminal, result) for result in results]
    notes = notes_of(loaded, results)
    for note in notes:
        terminal.print(f"note    {note}")
    if results:
        terminal.print(f"Next:  mvit-export verify {results[0].artifact.path.parent}")
        terminal.print(f"       mvit-export inspect {results[0].artifact.path}")
    for error in failures.values():
        terminal.complain(error)
    verdicts = [verdict for result in results for verdict in result.verdicts]
    status = "error" if failures else worst_status(verdict.status for verdict in verdicts)
    document = {"status": status, "model": info.name, "trained": loaded.weights.trained}
    terminal.print_json({**document, "artifacts": rows, "notes": notes, **failed_fields(failures)})
    # Verification that the user declined does not count as a check that was missed.
    raise typer.Exit(EXIT_ERROR if failures else EXIT_CODES[status if verdicts else PASS])


def print_result(terminal: Terminal, result: Any) -> dict[str, Any]:
    """A line for each verdict on one artifact, and its row in the document of `--json`."""
    from mvit_export.results.status import NOT_RUN

    manifest, path = result.artifact.manifest, str(result.artifact.path)
    size = megabytes(result.artifact.model_bytes)
    for verdict in result.verdicts:
        print_verdict(terminal, verdict, size)
    if not result.verdicts:
        terminal.print(status_text(NOT_RUN), f"{path}  {size}  --no-verify was given")
    return {
        "path": path, "format": manifest.format, "precision": manifest.precision,
        "bytes": result.artifact.model_bytes, "parity": [verdict.to_json() for verdict in result.verdicts],
    }  # fmt: skip


def failed_fields(failures: Mapping[str, MvitExportError]) -> dict[str, Any]:
    """What an error's document has, and a row for each target that failed; nothing if none did."""
    if not failures:
        return {}
    message = f"{', '.join(failures)} could not be exported"
    rows = [
        {"target": name, "type": type(error).__name__, "message": one_line(error)} for name, error in failures.items()
    ]
    return {"error": {"type": ConversionError.__name__, "message": message}, "failed": rows}


def notes_of(loaded: Any, results: Any) -> list[str]:
    """What was decided for the user, and what calibration warns of, a line each."""
    from mvit_export.data.preprocessing import UNSTATED, describe_unstated

    quantized = [result.artifact.manifest.quantization or {} for result in results]
    warnings = [w for found in quantized for w in (found.get("calibration") or {}).get("warnings", [])]
    calibrated = any(found.get("calibration") for found in quantized)
    pictures = calibrated or any(result.artifact.manifest.target.input == "image" for result in results)
    known = loaded.preprocessing
    taken = [describe_unstated(known)] if pictures and known and known.source == UNSTATED else []
    return list(dict.fromkeys([*loaded.notes, *taken, *(f"calibration: {warning}" for warning in warnings)]))
