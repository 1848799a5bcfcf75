"""PyTorch in eager mode: the reference model, rebuilt from the artifact beside the model file.

It needs the whole package, not only this folder.
"""

from __future__ import annotations

from typing import Any, Callable

from .common import Adapter, Call, Opened, import_runtime


class Torch(Adapter):
    name = "torch"

    def __init__(self, option: str, threads: int) -> None:
        super().__init__(option, threads)
        self.torch = import_runtime("torch")
        self.version = self.torch.__version__
        self.torch.set_num_threads(threads)

    def open(self, path: str) -> Opened:
        from pathlib import Path

        from mvit_export.artifact import read_manifest
        from mvit_export.families.load import rebuild_model

        model = rebuild_model(read_manifest(Path(path).parent))
        return Opened(call_model(model, self.torch.inference_mode), "CPU eager")


def call_model(model: Any, without_gradients: Callable[[], Any]) -> Call:
    """float32 arrays in and out; with float64 in, what the model gives for it.

    `without_gradients`: torch.no_grad, or inference_mode if nothing else follows.
    """
    import torch

    from mvit_export.models.outputs import name_outputs

    def call(array: Any) -> dict[str, Any]:
        with without_gradients():
            given = torch.from_numpy(array)
            outputs = name_outputs(model.module(given), model.output_names)
        exact = given.dtype == torch.float64
        return {
            name: (value if exact or value.dtype == torch.int32 else value.float()).numpy()
            for name, value in outputs.items()
        }

    return call
