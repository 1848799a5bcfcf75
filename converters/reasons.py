"""Why a converter gave up, and where: the operator, the module, and the line of the network's own code.

Converters wrap the reason in headings of their own. It is found in the exceptions themselves: in the chain of their
causes, in the graph's node that was being translated, and in the lines of code that it remembers.
"""

from __future__ import annotations

import linecache
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from mvit_export.errors import first_line, printable, text_of
from mvit_export.system.limits import chain

# What converters say, and the same in fewer words. The first group is the operator.
SAYINGS = (
    (
        r"No ONNX function found for <OpOverload\(op='([\w.]+)', overload='\w+'\)>",
        "no ONNX function for the operator {}",
    ),
    (r"Lowering not found: ([\w.]+)", "no TFLite lowering for the operator {}"),
    (r"PyTorch convert function for op '([\w.]+)' not implemented", "no Core ML conversion of the operator {}"),
    (
        r"[Dd]ata-dependent expression (.*?\))(?: \(unhinted.*|\.?$)",
        "the network's course depends on values of a tensor ({})",
    ),
)
FRAME = re.compile(r'^ *File "(.+)", line (\d+), in (\w+)$')
LONGEST = 80  # characters of a line of code
WRAPPERS = ("Exportable", "CoreMLForm")  # of converters/capture.py and converters/coreml, which hold the network
NOT_THE_NETWORKS = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parent}/")


@dataclass(frozen=True)
class Place:
    """Where in the network: the module's path, and a line of code. Each is "" if it is not known."""

    module: str = ""
    line: str = ""

    def __str__(self) -> str:
        parts = (f"in the module {self.module}" if self.module else "", f"at {self.line}" if self.line else "")
        return ", ".join(part for part in parts if part)


def explain(error: BaseException) -> str:
    """One line for whatever a converter raised: what it could not do, and where in the network."""
    what, place = say(innermost(error)), str(find_place(error))
    return f"{what}, {place}" if place else what


def innermost(error: BaseException) -> BaseException:
    """The cause that torch's ONNX exporter puts under its headings; any other error itself."""
    while type(error).__module__.startswith("torch.onnx") and error.__cause__ is not None:
        error = error.__cause__
    return error


def say(error: BaseException) -> str:
    line = first_line(error)
    for pattern, words in SAYINGS:
        if found := re.search(pattern, line):
            return words.format(found[1])
    return line.rstrip(".")


def operator_of(error: BaseException) -> str:
    """The operator that the message is about; a text that is in no name if it is about none."""
    found = [match for pattern, _ in SAYINGS if (match := re.search(pattern, first_line(innermost(error))))]
    return found[0][1] if found else "\0"


def find_place(error: BaseException) -> Place:
    """From the node that was translated, else from the lines that a message quotes, else from the running code."""
    causes = list(causes_of(error))
    for each in chain(error):
        for node in nodes_of(each):
            # What failed before, in another way of converting, may be about something else.
            related = each in causes or operator_of(error) in str(node.target)
            if related and (place := place_of_node(node)) != Place():
                return place
    for each in causes:
        if line := quoted_line(text_of(each)):
            return Place(running_place(each).module, line)
        if (place := running_place(each)) != Place():
            return place
    return Place()


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def nodes_of(error: BaseException) -> Iterator[fx.Node]:
    """The nodes of a graph that the code of a traceback was at work on, the innermost first."""
    for frame, _ in reversed(list(frames_of(error))):
        yield from (value for value in frame.f_locals.values() if isinstance(value, fx.Node))


def place_of_node(node: fx.Node) -> Place:
    return Place(module_of(node.meta.get("nn_module_stack") or {}), quoted_line(node.meta.get("stack_trace") or ""))


def module_of(stack: dict[str, tuple[str, Any]]) -> str:
    """The innermost module of a node's stack {key: (path, class)}, as the network's `named_modules` calls it."""
    inner = [path for path, kind in stack.values() if str(kind).rpartition(".")[2].strip("'>") not in WRAPPERS]
    return inner[-1][len(inner[0]) :].lstrip(".") if inner else ""


def quoted_line(text: str) -> str:
    """The last line of the network's own code in a traceback's text, as FILE:LINE and the code."""
    lines, found = text.splitlines(), ""
    for index, line in enumerate(lines):
        frame = FRAME.match(line)
        if frame and not frame[1].startswith(NOT_THE_NETWORKS):
            code = lines[index + 1].strip() if index + 1 < len(lines) else ""
            found = describe_line(frame[1], int(frame[2]), code)
    return found


def describe_line(file: str, number: int, code: str) -> str:
    shown = file.rpartition("/site-packages/")[2]
    return f"{shown}:{number}" + (f" `{printable(code, LONGEST)}`" if code else "")


def running_place(error: BaseException) -> Place:
    """The innermost line of the network's own code in a traceback, below the call of the network itself."""
    found, names = Place(), None
    for frame, number in frames_of(error):
        module = frame.f_locals.get("self")
        if names is None:
            if (
                isinstance(module, nn.Module)
                and type(module).__name__ == WRAPPERS[0]
                and frame.f_code.co_name == "forward"
            ):
                names = {id(inner): path for path, inner in module.get_submodule("model").named_modules()}
            continue
        file = frame.f_code.co_filename
        if not file.startswith(NOT_THE_NETWORKS) and Path(file).is_file():
            path = names.get(id(module), "") if isinstance(module, nn.Module) else ""
            found = Place(path, describe_line(file, number, linecache.getline(file, number).strip()))
    return found


def frames_of(error: BaseException) -> Iterator[tuple[types.FrameType, int]]:
    """The frames of a traceback and their lines, the outermost first."""
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next
