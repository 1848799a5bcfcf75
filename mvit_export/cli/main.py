"""The `mvit-export` command. It parses, calls the library and prints; heavy packages load inside the commands."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from mvit_export import __version__
from mvit_export.cli.bench import bench
from mvit_export.cli.codes import EXIT_ERROR
from mvit_export.cli.doctor import doctor
from mvit_export.cli.evaluate import evaluate
from mvit_export.cli.export import export
from mvit_export.cli.help import Command
from mvit_export.cli.inspect import inspect
from mvit_export.cli.predict import predict
from mvit_export.cli.report import report
from mvit_export.cli.terminal import Terminal
from mvit_export.cli.tune import tune
from mvit_export.cli.verify import verify
from mvit_export.errors import OutputError, UsageError

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

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Whole sentences; Click would cut them off."""
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, self.commands[name].get_short_help_str(200)) for name in self.list_commands(ctx)]
            )


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


COMMANDS: dict[str, Callable[..., None]] = {
    "export": export,
    "verify": verify,
    "bench": bench,
    "eval": evaluate,
    "predict": predict,
    "inspect": inspect,
    "report": report,
    "tune": tune,
    "doctor": doctor,
}
EXAMPLES = {
    "export": """mvit-export --to coreml --variant xxs --pretrained
mvit-export --to onnx,tflite --variant s --weights finetuned.pt --labels labels.txt
mvit-export --to tflite --model timm:mobilevitv2_050 --precision fp16
mvit-export --to onnx --variant xxs --precision int8 --calibration pictures/""",
    "verify": """mvit-export verify artifacts/mobilevit_xxs
mvit-export verify artifacts/mobilevit_xxs --against golden --device ssh:me@raspberrypi
mvit-export verify artifacts/mobilevit_xxs/onnx-fp32 --locate""",
    "bench": """mvit-export bench artifacts/mobilevit_xxs
mvit-export bench artifacts/mobilevit_xxs/tflite-fp16 --device adb:SERIAL --benchmark-binary benchmark_model
mvit-export bench artifacts/new/onnx-fp32 --baseline artifacts/old/onnx-fp32 --max-slowdown 5%""",
    "eval": """mvit-export eval artifacts/mobilevit_xxs --data validation/
mvit-export eval artifacts/mobilevit_xxs --data validation.npz --max-drop 1""",
    "predict": """mvit-export predict artifacts/mobilevit_xxs/onnx-fp32 cat.jpg
mvit-export predict artifacts/mobilevit_xxs/tflite-fp16 pictures/ -o answers.json""",
    "inspect": """mvit-export inspect artifacts/mobilevit_xxs
mvit-export inspect Other.mlpackage -v""",
    "report": """mvit-export report artifacts/mobilevit_xxs
mvit-export report artifacts/mobilevit_xxs --format markdown""",
    "tune": """mvit-export tune artifacts/mobilevit_xxs/tflite-fp32 --latency
mvit-export tune artifacts/mobilevit_xxs/onnx-fp32 --data validation/ --calibration pictures/""",
    "doctor": """mvit-export doctor
mvit-export doctor --setup arm64""",
}
for name, command in COMMANDS.items():  # in the order of `--help`
    app.command(name, cls=Command, epilog=EXAMPLES[name])(command)


def clean_up_when_ended() -> None:
    """Treat SIGTERM and SIGHUP like Ctrl-C, so that scratch folders are removed and devices released."""
    for name in ("SIGTERM", "SIGHUP"):
        if signal.getsignal(getattr(signal, name)) == signal.SIG_DFL:  # under nohup it stays ignored
            signal.signal(getattr(signal, name), signal.default_int_handler)


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    arguments = (sys.argv[1:] if args is None else args) or ["--help"]
    clean_up_when_ended()
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # since 1.29 ONNX Runtime would report models to its maker
    try:
        os.getcwd()
    except OSError:
        with Terminal(as_json="--json" in arguments) as terminal:
            terminal.error(UsageError("the working folder has been deleted; change to another"))
        raise SystemExit(EXIT_ERROR) from None
    try:
        code = app(arguments, standalone_mode=False, prog_name="mvit-export")
        if sys.stdout is not None and not sys.stdout.closed:  # a user's own code may have closed it
            sys.stdout.flush()
    except OSError as error:  # help or version, which are not printed through a Terminal
        code = EXIT_ERROR if not isinstance(error, BrokenPipeError) else 0
        sys.stdout = None  # or Python tries again when it ends
        if code:
            with Terminal() as terminal:
                terminal.error(OutputError(f"stdout cannot be written: {error.strerror or error}"))
    except SystemExit as ended:  # Click's own, where the reader of help has gone: that is no failed check
        if not isinstance(ended.__context__, BrokenPipeError):
            raise
        code, sys.stdout = 0, None
    except ClickUsageError as error:
        with Terminal(as_json="--json" in arguments, verbose=bool({"-v", "--verbose"} & {*arguments})) as terminal:
            terminal.error(UsageError(f"{error.format_message().rstrip('.')}; see mvit-export --help"))
        code = EXIT_ERROR
    raise SystemExit(code if isinstance(code, int) else 0)
