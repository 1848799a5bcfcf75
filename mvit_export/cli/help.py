"""`--help` of a command: options in groups, in the order of their first option, and examples as typed."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

MODEL, PICTURES, FILES, FEW_BITS = "Model", "Pictures", "Files", "Few bits"
COMPARE, MEASURE, DATA, DEVICES, OUTPUT = "Comparison", "Measurement", "Data", "Devices", "Output"
FORMS, RECIPES, TRUST = "Forms (with --latency)", "Recipes", "Trust"


class Command(TyperCommand):
    """A command whose `epilog` holds examples, one per line, and whose options name their group (`rich_help_panel`).

    Rich's own boxes take 0.1 s to load and are hard to copy from.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            arguments = parameter.param_type_name == "argument"
            title = "Arguments" if arguments else getattr(parameter, "rich_help_panel", None) or OUTPUT  # -h
            if record := parameter.get_help_record(ctx):
                groups.setdefault(title, []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records, col_max=28)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Examples"):
            for line in (self.epilog or "").splitlines():
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
