"""Which PyTorch module an op came from.

What survives on disk: a saved op has one attribute, its own name, made from torch's node names ("silu_12_cast_fp16");
neither scopes nor stack traces are serialized, and the names of weights mislead, since equal constants are merged. The
converter knows more while it holds coremltools' in-memory program, so it asks here and stores the answer in the
package's user-defined metadata, where `load` finds it:

- from torch.export: number the graph's nodes before converting (`number_nodes`); coremltools carries the numbers
  through all passes as debug handles, and each node knows the module it was called in. Exact.
- from torch.jit.trace: coremltools keeps the last part of each scope. With the model at hand the full path is
  recovered; if two modules fit, the parts are returned as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import coremltools as ct
    from torch import nn
    from torch.export import ExportedProgram

MODULES_KEY = "mvit-export.modules"


def number_nodes(exported: ExportedProgram) -> dict[int, str]:
    """Give every node of the graph a debug handle, in place; returns handle -> path of the innermost module."""
    modules = {}
    for handle, node in enumerate(exported.graph.nodes, 1):
        node.meta["debug_handle"] = handle
        stack = list(node.meta.get("nn_module_stack", {}).values())
        if stack and stack[-1][0]:
            modules[handle] = stack[-1][0].removeprefix("L['self'].")
    return modules


def module_names(
    mlmodel: ct.models.MLModel, *, handles: Mapping[int, str] | None = None, model: nn.Module | None = None
) -> dict[str, str]:
    """Output name -> module path for every op of a freshly converted model whose module is known.

    `handles` come from `number_nodes` for a model that was converted from torch.export, `model` is the module that
    was traced. Without the in-memory program (a model that was loaded from disk) the result is empty.
    """
    from coremltools.converters.mil.mil.scope import ScopeSource

    program = getattr(mlmodel, "_mil_program", None)
    paths = [] if model is None else [name for name, _ in model.named_modules() if name]
    names = {}
    for function in program.functions.values() if program else ():
        for op in function.operations:
            handle = (op.scopes.get(ScopeSource.EXIR_DEBUG_HANDLE) or [None])[0]
            scope = op.scopes.get(ScopeSource.TORCHSCRIPT_MODULE_NAME)
            module = (handles or {}).get(handle) if handle is not None else traced_path(scope, paths)
            if module and op.op_type != "const":
                names.update({output.name: module for output in op.outputs})
    return names


def traced_path(scope: list[str] | None, paths: list[str]) -> str | None:
    """The module whose path contains the parts of a traced scope in order, ending with the last.

    A scope lists attribute names from the outside in and then the value's own name; containers that are only looped
    over, such as a ModuleList, are left out of it: ["2", "1", "0", "attention", "qkv.1"] means
    stages.2.1.encoders.0.attention.
    """
    parts = (scope or [])[:-1]
    if not parts or parts[0].startswith("__COREML__"):
        return None
    fits = [path for path in paths if is_subsequence(parts, path.split("."))]
    shortest = [path for path in fits if path.count(".") == min(p.count(".") for p in fits)]
    return shortest[0] if len(shortest) == 1 else ".".join(parts)


def is_subsequence(parts: list[str], path: list[str]) -> bool:
    """Whether `parts` occur in `path` in this order, with gaps allowed, and both end with the same part."""
    rest = iter(path)
    return path[-1] == parts[-1] and all(part in rest for part in parts)


def store_module_names(mlmodel: ct.models.MLModel, names: Mapping[str, str]) -> None:
    """Put `module_names` into the model's user-defined metadata, before it is saved."""
    metadata: Any = mlmodel.user_defined_metadata
    metadata[MODULES_KEY] = json.dumps(dict(names), separators=(",", ":"))
