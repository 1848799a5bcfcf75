"""From a function of the specification to a list of steps that only look up slots and call.

Everything that can be decided once is decided here: names become slot numbers, constants are read and compressed
weights unfolded, attributes become Python values bound to the op's function, and each value's last use is known. What
cannot be run is collected and reported in one line, before anything runs.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from torch import Tensor

from mvit_export.errors import ArtifactError
from mvit_export.mil.errors import ExecutionError, UnsupportedOpError, first_line, printable
from mvit_export.mil.ops import EXACT, HALF_ACCUMULATION, OPS
from mvit_export.mil.ops.control import State
from mvit_export.mil.package import OPSETS, Package
from mvit_export.mil.values import HELD, ValueReader, tensor_type

if TYPE_CHECKING:
    from coremltools.proto.MIL_pb2 import Argument, Block, Function, Operation

CANNOT = (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError, AttributeError, MemoryError)


@dataclass(frozen=True)
class Op:
    """One operation, as reports and errors name it."""

    type: str
    outputs: tuple[str, ...]
    dtypes: tuple[str, ...]  # of the outputs, in MIL's names, e.g. "FLOAT16"
    place: str  # function and index in its block, e.g. "main[12]"
    module: str | None  # of the PyTorch model, where the package says so

    def __str__(self) -> str:
        module = f", module {self.module}" if self.module else ""
        return f"{self.type} {self.outputs[0] if self.outputs else ''!r} at {self.place}{module}"


@dataclass(frozen=True)
class Step:
    """An op made ready: `call` takes the slots and returns the op's outputs."""

    op: Op
    call: Callable[[list[Any]], Any]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    half: tuple[bool, ...]  # which outputs are to be rounded to fp16
    shapes: tuple[tuple[int | None, ...], ...]  # of the outputs, as declared
    dies: tuple[int, ...] = ()  # slots that nobody reads after this step


@dataclass(frozen=True)
class Graph:
    template: list[Any]  # one entry a slot; constants are filled in
    inputs: dict[str, tuple[int, str, tuple[int | None, ...]]]  # slot, element type, shape
    states: dict[str, tuple[int, str, tuple[int | None, ...]]]
    outputs: dict[str, tuple[int, str]]  # slot, element type ("" if it is no tensor)
    steps: list[Step]


@dataclass(frozen=True)
class Parameter:
    """What an op's function wants under one name."""

    kind: Literal["tensor", "tensors", "list", "scalar"]
    required: bool
    values: tuple[Any, ...] = ()  # the supported ones, if only some are


@functools.cache
def parameters(function: Callable[..., Any]) -> dict[str, Parameter]:
    """The parameters of an op's function, from its annotations."""
    hints = typing.get_type_hints(function)
    return {
        name: parameter(hints.get(name, Tensor), required=p.default is inspect.Parameter.empty)
        for name, p in inspect.signature(function).parameters.items()
    }


def parameter(hint: Any, *, required: bool) -> Parameter:
    options = [option for option in get_args(hint) if option is not type(None)]
    if type(None) in get_args(hint):
        hint = options[0]
    if hint in (Tensor, State):
        return Parameter("tensor", required)
    if get_origin(hint) is list:
        return Parameter("tensors" if get_args(hint) == (Tensor,) else "list", required)
    return Parameter("scalar", required, get_args(hint) if get_origin(hint) is Literal else ())


def to_python(value: Any, kind: str) -> Any:
    """A constant as the Python value that an op's function wants."""
    if not isinstance(value, Tensor):
        return value
    if kind == "scalar":
        return value.item()
    return value.tolist() if value.dim() else [value.item()]


@dataclass
class Builder:
    """State of building one graph."""

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
        """Room for one value; `name` may stand for another value from here on."""
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
        """Take in one operation: as a constant, as a step, or as a problem."""
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
        """Bind an operation's arguments to its function. UnsupportedOpError says what is in the way."""
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
        """Slots of an argument's bindings; constants written in place get slots of their own."""
        return [
            self.literal(self.reader.read(b.value)) if b.WhichOneof("binding") == "value" else self.slot(b.name, str(op))
            for b in argument.arguments
        ]

    def literal(self, value: Any) -> int:
        slot = self.new_slot(None, "", value)
        self.constant.add(slot)
        return slot

    def fold(self, step: Step) -> None:
        """Unfold compressed weights now; a program that compresses anything but constants is not known."""
        if not all(slot in self.constant for slot in step.reads):
            raise self.damaged(f"{step.op} reads a value that is no constant")
        try:
            store(step, evaluate(step, self.template), self.template)
        except ExecutionError as error:
            raise self.damaged(str(error)) from error
        self.constant.update(step.writes)

    def drop_unread(self, outputs: Iterable[int]) -> None:
        """Forget constants that served only to make other constants or attributes."""
        read = {slot for step in self.steps for slot in step.reads} | set(outputs)
        for slot in range(len(self.template)):
            if slot not in read:
                self.template[slot] = None

    def damaged(self, what: str) -> ArtifactError:
        return ArtifactError(f"{self.package.path} is damaged: {what}; export it again")


def caller(
    function: Callable[..., Any], one: dict[str, int], many: dict[str, list[int]], late: dict[str, tuple[int, str]]
) -> Callable[[list[Any]], Any]:
    """A function of the slots alone. The common case, tensors only, does nothing but look up."""
    singles = tuple(one.items())
    if not many and not late:
        return lambda slots: function(**{name: slots[i] for name, i in singles})

    def call(slots: list[Any]) -> Any:
        arguments: dict[str, Any] = {name: slots[i] for name, i in singles}
        arguments |= {name: [slots[i] for i in group] for name, group in many.items()}
        arguments |= {name: to_python(slots[i], kind) for name, (i, kind) in late.items()}
        return function(**arguments)

    return call


def evaluate(step: Step, slots: list[Any]) -> tuple[Any, ...]:
    """The op's outputs, not rounded. ExecutionError names the op if it fails, or makes what was not declared."""
    try:
        made = step.call(slots)
    except CANNOT as error:
        raise ExecutionError(f"{step.op} failed: {first_line(error)}") from error
    outputs = made if isinstance(made, tuple) else (made,)
    if len(outputs) != len(step.writes):
        raise ExecutionError(f"{step.op} failed: it makes {len(outputs)} values, declared are {len(step.writes)}")
    for value, shape, dtype in zip(outputs, step.shapes, step.op.dtypes, strict=True):
        if isinstance(value, Tensor) and not fits(value, shape, dtype):
            made_is = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
            raise ExecutionError(f"{step.op} failed: it makes {made_is}, declared is {dtype} {list(shape)}")
    return outputs


def fits(value: Tensor, shape: tuple[int | None, ...], dtype: str) -> bool:
    """Whether a tensor is of the declared type and shape, None being any size."""
    if value.dtype != HELD[dtype][1] or len(value.shape) != len(shape):
        return False
    return value.shape == shape or all(want is None or want == n for want, n in zip(shape, value.shape, strict=True))


def store(step: Step, outputs: tuple[Any, ...], slots: list[Any]) -> None:
    """Put an op's outputs into their slots, rounded where the program says fp16."""
    for slot, half, output in zip(step.writes, step.half, outputs, strict=True):
        slots[slot] = output.half().float() if half else output


def with_lifetimes(steps: list[Step], *, keep: set[int]) -> list[Step]:
    """The same steps, each knowing which slots can be emptied after it."""
    last: dict[int, int] = {}
    for index, step in enumerate(steps):
        last.update(dict.fromkeys((*step.reads, *step.writes), index))
    dies: list[list[int]] = [[] for _ in steps]
    for slot, index in last.items():
        if slot not in keep:
            dies[index].append(slot)
    return [
        dataclasses.replace(step, dies=tuple(dead)) for step, dead in zip(steps, dies, strict=True)
    ]
