"""From a function of the specification to a list of steps that only look up slots and call.

Everything that can be decided once is decided here: names become slot numbers, constants are read, compressed weights
are unfolded, attributes become Python values bound to the op's function, and each value's last use is found. What
cannot be run is collected and reported in one line, before anything runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mvit_export.errors import ArtifactError, first_line, printable
from mvit_export.mil.errors import ExecutionError, UnsupportedOpError
from mvit_export.mil.ops import EXACT, HALF_ACCUMULATION, OPS
from mvit_export.mil.package import OPSETS, Package
from mvit_export.mil.signature import Parameter, parameters, to_python
from mvit_export.mil.steps import CANNOT, Op, Step, caller, evaluate, store, with_lifetimes
from mvit_export.mil.values import HELD, ValueReader, tensor_type

if TYPE_CHECKING:
    from coremltools.proto.MIL_pb2 import Argument, Block, Function, Operation


@dataclass(frozen=True)
class Graph:
    """A function ready to run: what is in which slot, and the steps in order."""

    template: list[Any]  # one entry per slot; constants are filled in
    inputs: dict[str, tuple[int, str, tuple[int | None, ...]]]  # slot, element type, shape
    states: dict[str, tuple[int, str, tuple[int | None, ...]]]
    outputs: dict[str, tuple[int, str]]  # slot, element type ("" if it is not a tensor)
    steps: list[Step]


@dataclass
class Builder:
    """The state while building one graph."""

    package: Package
    name: str
    function: Function
    accumulate: str
    modules: Mapping[str, str]
    slots: dict[str, int] = field(default_factory=dict)
    types: dict[int, str] = field(default_factory=dict)
    template: list[Any] = field(default_factory=list)
    constant: set[int] = field(default_factory=set)
    steps: list[Step] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def build(self) -> Graph:
        """The graph. UnsupportedOpError lists all that cannot be run; ArtifactError if the program is damaged."""
        if self.function.opset not in OPSETS:
            raise ArtifactError(f"{self.package.path} has opset {self.function.opset!r}, known are {', '.join(OPSETS)}")
        self.ios = OPSETS[self.function.opset]
        self.reader = ValueReader(self.package)
        block = self.block()
        inputs, states = self.add_inputs()
        for index, operation in enumerate(block.operations):
            self.add(operation, f"{printable(self.name)}[{index}]")
        if self.problems:
            what = "; ".join(dict.fromkeys(self.problems))
            raise UnsupportedOpError(f"{self.package.path} cannot be run here, not supported: {what}")
        outputs = {name: self.slot(name, "output") for name in block.outputs}
        steps = with_lifetimes(self.steps, keep={*self.constant, *outputs.values()})
        self.drop_unread(outputs.values())
        named = {name: (slot, self.types.get(slot, "")) for name, slot in outputs.items()}
        return Graph(self.template, inputs, states, named, steps)

    def block(self) -> Block:
        blocks = self.function.block_specializations
        if self.function.opset not in blocks:
            raise self.damaged(f"function {self.name!r} has no block for opset {self.function.opset}")
        return blocks[self.function.opset]

    def add_inputs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        inputs: dict[str, Any] = {}
        states: dict[str, Any] = {}
        for feature in self.function.inputs:
            dtype, shape = tensor_type(feature.type)
            if dtype not in HELD:
                self.problems.append(f"input {feature.name!r} of type {dtype}")
            known = states if feature.type.WhichOneof("type") == "stateType" else inputs
            known[feature.name] = (self.new_slot(feature.name, dtype), dtype, shape)
        return inputs, states

    def new_slot(self, name: str | None, dtype: str, value: Any = None) -> int:
        """A slot for one value; from here on `name` may refer to another value."""
        self.template.append(value)
        slot = len(self.template) - 1
        self.types[slot] = dtype
        if name is not None:
            self.slots[name] = slot
        return slot

    def slot(self, name: str, place: str) -> int:
        if name not in self.slots:
            raise self.damaged(f"{place} refers to {name!r}, which nothing has defined")
        return self.slots[name]

    def add(self, operation: Operation, place: str) -> None:
        """Add one operation: as a constant, as a step, or as a problem."""
        types = [tensor_type(output.type)[0] for output in operation.outputs]
        names = tuple(output.name for output in operation.outputs)
        module = next((self.modules[name] for name in names if name in self.modules), None)
        op = Op(printable(operation.type), names, tuple(types), place, module)
        if operation.type == "const":
            self.add_constant(operation, op)
            return
        try:
            step = self.step(operation, op)
        except UnsupportedOpError as error:
            self.problems.append(f"{op} ({error})" if str(error) else str(op))
            for name, dtype in zip(names, types, strict=True):
                self.new_slot(name, dtype)
            return
        if operation.type.startswith("constexpr_"):
            self.fold(step)
        else:
            self.steps.append(step)

    def add_constant(self, operation: Operation, op: Op) -> None:
        if "val" not in operation.attributes or len(op.outputs) != 1:
            raise self.damaged(f"{op} has no value")
        self.constant.add(self.new_slot(op.outputs[0], op.dtypes[0], self.reader.read(operation.attributes["val"])))

    def step(self, operation: Operation, op: Op) -> Step:
        """Bind an operation's arguments to its function. UnsupportedOpError says what prevents it."""
        unknown = [dtype for dtype in op.dtypes if dtype not in HELD and operation.type != "classify"]
        if operation.type not in OPS or operation.blocks:
            raise UnsupportedOpError("nested blocks" if operation.blocks else "")
        if unknown:
            raise UnsupportedOpError(f"element type {unknown[0]}")
        half = tuple(dtype == "FLOAT16" for dtype in op.dtypes)
        table = OPS | HALF_ACCUMULATION if self.accumulate == "fp16" and any(half) else OPS
        call, reads = self.bind(operation, op, table[operation.type])
        writes = tuple(self.new_slot(name, dtype) for name, dtype in zip(op.outputs, op.dtypes, strict=True))
        rounds = (False,) * len(half) if operation.type in EXACT else half
        shapes = tuple(tensor_type(output.type)[1] for output in operation.outputs)
        return Step(op, call, reads, writes, rounds, shapes)

    def bind(
        self, operation: Operation, op: Op, function: Callable[..., Any]
    ) -> tuple[Callable[[list[Any]], Any], tuple[int, ...]]:
        wanted = parameters(function)
        given = {name: self.argument(argument, op) for name, argument in operation.inputs.items()}
        for name, value in operation.attributes.items():
            if name != "name":
                given[name] = [self.literal(self.reader.read(value))]
        missing = [name for name, p in wanted.items() if p.required and name not in given and name != "ios"]
        strange = [name for name in given if name not in wanted or name == "ios"]
        if strange or missing:
            raise UnsupportedOpError(f"parameter {printable(strange[0])}" if strange else f"no parameter {missing[0]}")
        fixed: dict[str, Any] = {"ios": self.ios} if "ios" in wanted else {}
        one: dict[str, int] = {}
        many: dict[str, list[int]] = {}
        late: dict[str, tuple[int, str]] = {}
        for name, slots in given.items():
            p = wanted[name]
            if p.kind == "tensors":
                many[name] = slots
            elif len(slots) != 1:
                raise UnsupportedOpError(f"{len(slots)} values of parameter {printable(name)}")
            elif p.kind == "tensor":
                one[name] = slots[0]
            elif slots[0] in self.constant:
                fixed[name] = self.python(name, p, self.template[slots[0]])
            elif p.values:
                raise UnsupportedOpError(f"{name} is not a constant")
            else:
                late[name] = (slots[0], p.kind)
        reads = (*one.values(), *(s for slots in many.values() for s in slots), *(slot for slot, _ in late.values()))
        return caller(functools.partial(function, **fixed), one, many, late), reads

    def python(self, name: str, p: Parameter, value: Any) -> Any:
        try:
            value = to_python(value, p.kind)
        except CANNOT as error:
            raise UnsupportedOpError(f"{name} is {first_line(error)}") from error
        if p.values and value not in p.values:
            raise UnsupportedOpError(f"{name} = {value!r}, supported: {', '.join(map(str, p.values))}")
        return value

    def argument(self, argument: Argument, op: Op) -> list[int]:
        """Slots of an argument's bindings; constants written in place get their own slots."""
        return [
            self.literal(self.reader.read(b.value))
            if b.WhichOneof("binding") == "value"
            else self.slot(b.name, str(op))
            for b in argument.arguments
        ]

    def literal(self, value: Any) -> int:
        slot = self.new_slot(None, "", value)
        self.constant.add(slot)
        return slot

    def fold(self, step: Step) -> None:
        """Unfold compressed weights now; no known program compresses anything but constants."""
        if not all(slot in self.constant for slot in step.reads):
            raise self.damaged(f"{step.op} reads a value that is not a constant")
        try:
            store(step, evaluate(step, self.template), self.template)
        except ExecutionError as error:
            raise self.damaged(str(error)) from error
        self.constant.update(step.writes)

    def drop_unread(self, outputs: Iterable[int]) -> None:
        """Drop constants that were only needed to make other constants or attributes."""
        read = {slot for step in self.steps for slot in step.reads} | set(outputs)
        for slot in range(len(self.template)):
            if slot not in read:
                self.template[slot] = None

    def damaged(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self.package.path} is damaged: {what}; export it again")
