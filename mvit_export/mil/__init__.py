"""Core ML on any machine: runs and inspects saved ML Programs (.mlpackage) without Apple's frameworks.

    from mvit_export.mil import load
    program = load("x.mlpackage")
    outputs = program(image=array)

`executor.py` runs, `package.py` and `blob.py` read, `ops/` is the table of ops, `report.py` the tensor statistics,
`modules.py` leads back to PyTorch modules.
"""

from mvit_export.mil.errors import ExecutionError, UnsupportedOpError
from mvit_export.mil.executor import Program, load
from mvit_export.mil.modules import module_names, number_nodes, store_module_names
from mvit_export.mil.report import TensorStats, Trace
from mvit_export.mil.steps import Op

__all__ = [
    "ExecutionError",
    "Op",
    "Program",
    "TensorStats",
    "Trace",
    "UnsupportedOpError",
    "load",
    "module_names",
    "number_nodes",
    "store_module_names",
]
