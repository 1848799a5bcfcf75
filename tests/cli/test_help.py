"""`--help`: options in groups, whole sentences, and examples that the command takes as they stand."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import typer

from mvit_export.cli.main import COMMANDS, EXAMPLES, app

GROUP: Any = typer.main.get_command(app)


@pytest.mark.parametrize("name", COMMANDS)
def test_options_have_a_group_and_examples_stand_as_typed(name: str) -> None:
    command = GROUP.commands[name]
    for option in command.params:
        assert option.param_type_name == "argument" or option.rich_help_panel, option.name
    text = command.get_help(command.context_class(command, info_name=name))
    sections = [line.strip(" :") for line in text.splitlines() if line.endswith(":") and not line.startswith("  ")]
    assert sections[-2:] == ["Output", "Examples"] and len(sections) == len(set(sections))
    assert text.rstrip().endswith("\n".join(f"  {line}" for line in EXAMPLES[name].splitlines()))


@pytest.mark.parametrize("line", [line for text in EXAMPLES.values() for line in text.splitlines()])
def test_examples_are_taken(line: str) -> None:
    program, *words = shlex.split(line)
    context = GROUP.make_context(program, words)
    name, command, rest = GROUP.resolve_command(context, [*context._protected_args, *context.args])
    assert line in EXAMPLES[name]
    command.make_context(name, rest, parent=context)


def test_commands_stand_in_the_order_of_use_with_whole_sentences() -> None:
    text = GROUP.get_help(GROUP.context_class(GROUP, info_name="mvit-export"))
    places = [text.index(f"\n  {name} ") for name in COMMANDS]
    assert places == sorted(places)
    assert "..." not in text.partition("Commands:")[2]
