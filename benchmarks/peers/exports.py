"""One export as a user without this project would write it, alone in its process: import, build, load, convert, write.

The libraries are called with their defaults, except for what names the input `image` and the output `logits`, and what
keeps the file in fp32. Ends with exit code 3 and one line on stderr if a library is missing.

    python -m mvit_export.benchmarks.peers.exports timm-torch.onnx xxs WEIGHTS FOLDER [--size 256]
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mvit_export.errors import MissingDependencyError, printable, require
from mvit_export.formats.table import FORMATS

if TYPE_CHECKING:
    from torch import Tensor, nn

MISSING = 3  # the exit code
FORMAT_OF = {"torch.onnx": "onnx", "litert_torch": "tflite", "onnx2tf": "tflite", "coremltools": "coreml"}
DISTRIBUTIONS = {
    "torch.onnx": ("torch", "onnx", "onnxscript"), "litert_torch": ("torch", "litert-torch"),
    "onnx2tf": ("torch", "onnx", "onnxscript"), "coremltools": ("torch", "coremltools"),
}  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """Whose network, and what converts it."""

    library: str
    family: str  # of the library's names for weights
    tool: str

    @property
    def format(self) -> str:
        return FORMAT_OF[self.tool]

    @property
    def name(self) -> str:
        return f"{self.library} -> {self.tool}"

    @property
    def key(self) -> str:
        """What it is called as an argument and as a folder."""
        return f"{self.library}-{self.tool}"

    @property
    def distributions(self) -> tuple[str, ...]:
        return (self.library, *DISTRIBUTIONS[self.tool])


PEERS = (
    Peer("timm", "timm", "torch.onnx"),
    Peer("transformers", "hf", "torch.onnx"),
    Peer("timm", "timm", "litert_torch"),
    Peer("transformers", "hf", "litert_torch"),
    Peer("timm", "timm", "onnx2tf"),
    Peer("timm", "timm", "coremltools"),
)


@dataclass(frozen=True)
class Export:
    """What to write, and where. `onnx2tf_python` runs onnx2tf, which needs other versions than ours."""

    network: nn.Module
    image: Tensor
    file: Path
    onnx2tf_python: str = sys.executable


def export_onnx(export: Export) -> None:
    import torch

    torch.onnx.export(
        export.network, (export.image,), export.file, dynamo=True, input_names=["image"], output_names=["logits"]
    )


def export_litert(export: Export) -> None:
    litert_torch = require("litert_torch", extra="tflite", purpose="to compare with its export")
    model = litert_torch.convert(with_names(export.network), sample_kwargs={"image": export.image})
    model.export(str(export.file))


def with_names(network: nn.Module) -> nn.Module:
    """litert_torch takes names from the arguments of `forward` and from the keys of a dict that it returns."""
    from torch import nn

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, image: Tensor) -> dict[str, Tensor]:
            return {"logits": self.network(image)}

    return Named().eval()


def export_onnx2tf(export: Export) -> None:
    """By way of an ONNX file. `-kat` keeps the input's NCHW shape."""
    check_onnx2tf(export.onnx2tf_python)
    source, made = export.file.with_suffix(".onnx"), export.file.parent / "onnx2tf"
    export_onnx(Export(export.network, export.image, source))
    command = [export.onnx2tf_python, "-m", "onnx2tf", "-i", str(source), "-o", str(made), "-kat", "image"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"onnx2tf failed: {error_line(done.stdout)}")
    (made / f"{source.stem}_float32.tflite").replace(export.file)


def check_onnx2tf(python: str) -> None:
    """Version 2 needs Python 3.12; the last for older ones, 1.29, fails at the LayerNormalization of timm's file."""
    if python == sys.executable:
        found = importlib.util.find_spec("onnx2tf") is not None
    else:
        found = subprocess.run([python, "-c", "import onnx2tf"], capture_output=True).returncode == 0
    if not found:
        raise MissingDependencyError(
            "onnx2tf is not in this environment, whose versions it does not support; make one of its own and pass its "
            "Python as --onnx2tf-python"
        )


def export_coreml(export: Export) -> None:
    import torch

    ct = require("coremltools", extra="coreml", purpose="to compare with its export")
    inputs, outputs = [ct.TensorType(name="image", shape=export.image.shape)], [ct.TensorType(name="logits")]
    traced = torch.jit.trace(export.network, export.image)
    model = ct.convert(traced, inputs=inputs, outputs=outputs, compute_precision=ct.precision.FLOAT32)
    model.save(str(export.file))


EXPORTERS: dict[str, Callable[[Export], None]] = {
    "torch.onnx": export_onnx,
    "litert_torch": export_litert,
    "onnx2tf": export_onnx2tf,
    "coremltools": export_coreml,
}


def error_line(text: str) -> str:
    """The line of a failed command's output that names the error, as at the end of a traceback; else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return printable((named or lines or ["it said nothing"])[-1], 300)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=[peer.key for peer in PEERS])
    parser.add_argument("variant")
    parser.add_argument("weights", type=Path, help="safetensors file in the names of the peer's network")
    parser.add_argument("folder", type=Path, help="where mobilevit_VARIANT with its suffix goes")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--onnx2tf-python", default=sys.executable)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    try:
        run(arguments)
    except MissingDependencyError as error:
        print(error, file=sys.stderr)
        sys.exit(MISSING)


def run(arguments: argparse.Namespace) -> None:
    import torch

    from mvit_export.benchmarks.peers.networks import build_network

    peer = next(peer for peer in PEERS if peer.key == arguments.peer)
    network = build_network(peer.family, arguments.variant, arguments.weights)
    file = arguments.folder / f"mobilevit_{arguments.variant}{FORMATS[peer.format].suffix}"
    image = torch.rand(1, 3, arguments.size, arguments.size)
    with torch.no_grad():
        EXPORTERS[peer.tool](Export(network, image, file, arguments.onnx2tf_python))


if __name__ == "__main__":
    main()
