"""The operations of a saved ML Program as records with shapes, types and small constants, for tools that do not run it.

`graph.py` drops what running does not need (names of parameters, shapes of inputs) and refuses what it cannot run;
a listing keeps all of it and accepts any op.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mvit_export.errors import ArtifactError, printable
from mvit_export.mil.executor import module_table
from mvit_export.mil.package import Package
from mvit_export.mil.steps import Op
from mvit_export.mil.values import ValueReader, tensor_type

if TYPE_CHECKING:
    from coremltools.proto.MIL_pb2 import Argument, Block, Function, NamedValueType, Value

Shape = tuple[int | None, ...]  # None: of any size
READABLE = 64  # constants of at most this many elements are read: axes and strides are, weights are not


@dataclass(frozen=True, eq=False)
class Operand:
    """A value that an operation reads or makes. `constant` is its content if it is constant and small."""

    name: str
    dtype: str  # in MIL's names, e.g. "FLOAT16"
    shape: Shape
    fixed: bool = False  # known before the program runs: a constant or a compressed weight
    constant: Any = field(default=None, repr=False)
    maker: Operation | None = field(default=None, repr=False)  # its op, outputs left out; None for an input


@dataclass(frozen=True, eq=False)
class Operation:
    """One op with all that it reads and makes."""

    op: Op
    inputs: Mapping[str, tuple[Operand, ...]]  # by parameter
    outputs: tuple[Operand, ...]

    @property
    def type(self) -> str:
        return self.op.type

    @property
    def activations(self) -> tuple[Operand, ...]:
        """What it reads and makes that depends on the program's input."""
        return (*(x for group in self.inputs.values() for x in group if not x.fixed), *self.outputs)

    @property
    def weights(self) -> tuple[Operand, ...]:
        """Fixed floating tensors; integers are parameters such as axes, and so are scalars."""
        fixed = (x for group in self.inputs.values() for x in group if x.fixed)
        return tuple(x for x in fixed if x.shape and x.dtype.startswith("FLOAT"))

    def input(self, parameter: str) -> Operand | None:
        """The one value of a parameter; None if it is not given."""
        group = self.inputs.get(parameter, ())
        return group[0] if len(group) == 1 else None

    def constant(self, parameter: str, default: Any) -> Any:
        """The content of a constant parameter, `default` if it is not given or not constant."""
        value = self.input(parameter)
        return default if value is None or value.constant is None else value.constant


def list_operations(package: Package) -> tuple[Operation, ...]:
    """All operations except `const` of all functions, including nested blocks. ArtifactError if damaged."""
    functions = package.spec.mlProgram.functions
    return tuple(op for name in sorted(functions) for op in _Lister(package, name, functions[name]).list())


class _Lister:
    """Turns names into operands, in the order of the program."""

    def __init__(self, package: Package, name: str, function: Function) -> None:
        self.package, self.name, self.function = package, name, function
        self.modules = module_table(package)
        self.reader = ValueReader(package)
        self.known: dict[str, Operand] = {}

    def list(self) -> Iterator[Operation]:
        blocks = self.function.block_specializations
        if self.function.opset not in blocks:
            raise self.damaged(f"function {self.name!r} has no block for opset {self.function.opset}")
        self.learn(self.function.inputs)
        yield from self.block(blocks[self.function.opset], printable(self.name))

    def block(self, block: Block, place: str) -> Iterator[Operation]:
        for index, operation in enumerate(block.operations):
            yield from self.operation(operation, f"{place}[{index}]")

    def operation(self, operation: Any, place: str) -> Iterator[Operation]:
        if operation.type == "const":
            if "val" not in operation.attributes or len(operation.outputs) != 1:
                raise self.damaged(f"the constant at {place} has no value")
            name = operation.outputs[0].name
            self.known[name] = self.literal(name, operation.attributes["val"])
            return
        inputs = {name: self.argument(argument, place) for name, argument in operation.inputs.items()}
        for nested in operation.blocks:
            self.learn(nested.inputs)
            yield from self.block(nested, place)
        maker = Operation(self.describe(operation, place), inputs, ())
        fixed = operation.type.startswith("constexpr_")
        outputs = tuple(Operand(o.name, *tensor_type(o.type), fixed, maker=maker) for o in operation.outputs)
        self.known.update((output.name, output) for output in outputs)
        yield replace(maker, outputs=outputs)

    def describe(self, operation: Any, place: str) -> Op:
        names = tuple(output.name for output in operation.outputs)
        module = next((self.modules[name] for name in names if name in self.modules), None)
        types = tuple(tensor_type(output.type)[0] for output in operation.outputs)
        return Op(printable(operation.type), names, types, place, module)

    def learn(self, declared: Iterable[NamedValueType]) -> None:
        self.known.update((each.name, Operand(each.name, *tensor_type(each.type))) for each in declared)

    def argument(self, argument: Argument, place: str) -> tuple[Operand, ...]:
        return tuple(
            self.literal("", binding.value) if binding.WhichOneof("binding") == "value" else self.find(binding, place)
            for binding in argument.arguments
        )

    def find(self, binding: Any, place: str) -> Operand:
        if binding.name not in self.known:
            raise self.damaged(f"{place} refers to {printable(binding.name)!r}, which nothing has defined")
        return self.known[binding.name]

    def literal(self, name: str, value: Value) -> Operand:
        dtype, shape = tensor_type(value.type)
        small = math.prod(size or 0 for size in shape) <= READABLE and not value.HasField("blobFileValue")
        content = self.reader.read(value) if small else None
        return Operand(name, dtype, shape, True, content.tolist() if isinstance(content, Tensor) else content)

    def damaged(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self.package.path} is damaged: {what}; export it again")
