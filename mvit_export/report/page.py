"""The report as one self-contained HTML file: style and drawings inside, no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mvit_export import __version__
from mvit_export.errors import require
from mvit_export.formats.table import FORMATS
from mvit_export.report import formatting
from mvit_export.report.charts import MOST_ROWS, draw_costs, draw_distributions
from mvit_export.report.reading import Report
from mvit_export.results.fields import tidy

HERE = Path(__file__).parent
PAGE, STYLE = "page.html", "style.css"
VOLATILE = ("created", "load_average")  # may differ between two runs on one machine


def render_html(report: Report) -> str:
    """The page. Raises MissingDependencyError without jinja2 or matplotlib."""
    jinja2 = require("jinja2", extra="report", purpose="to write the report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    template = environment.from_string((HERE / PAGE).read_text(encoding="utf-8"))
    text: str = template.render(
        report=report,
        words=formatting,
        version=__version__,
        style=jinja2.utils.markupsafe.Markup((HERE / STYLE).read_text(encoding="utf-8") + format_colours()),
        drawn=jinja2.utils.markupsafe.Markup,
        distributions=draw_distributions(report.measured),
        costs=draw_costs(report.measured),
        most_drawn=MOST_ROWS,
        undrawn=[row for row in report.measured if not row.samples_ms],
        environments=environments(report),
        exporters=exporters(report),
        runs=len({str(row.environment.get("created")) for row in report.measured}),
    )
    return text


def environments(report: Report) -> list[Mapping[str, Any]]:
    """Where latencies were measured: one record for each machine and set of tools, with its runs' dates and loads."""
    groups: dict[str, dict[str, Any]] = {}
    for row in report.measured:
        steady = {key: value for key, value in row.environment.items() if key not in VOLATILE and value is not None}
        group = groups.setdefault(repr(sorted(steady.items())), {"facts": facts(steady), "labels": {}, "runs": {}})
        group["labels"][row.label] = True
        load = row.environment.get("load_average")
        run = tidy(row.environment.get("created") or "no date")
        group["runs"][run + (f" (load average {listed(load)})" if load else "")] = True
    return [{**group, "labels": list(group["labels"]), "runs": sorted(group["runs"])} for group in groups.values()]


def facts(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(tidy(key).replace("_", " "), listed(value)) for key, value in environment.items()]


def listed(value: Any) -> str:
    """A value of the environment as text: `onnxruntime 1.31, numpy 2.3` or `0, 1`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{tidy(key)} {listed(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(listed, value))
    return f"{value:.3g}" if isinstance(value, float) else tidy(value)


def exporters(report: Report) -> list[tuple[str, list[str]]]:
    """(what exported it, the artifacts) for each set of tools and date."""
    groups: dict[str, list[str]] = {}
    for entry in report.entries:
        manifest = entry.artifact.manifest
        groups.setdefault(f"{listed(manifest.tools)}; {tidy(manifest.created)}", []).append(entry.label)
    return list(groups.items())


def format_colours() -> str:
    """The style of the formats' keys, on light and on dark background."""
    light, dark = (" ".join(f"--{name}: {row.colours[ground]};" for name, row in FORMATS.items()) for ground in (0, 1))
    keys = "".join(f".key.{name} {{ color: var(--{name}); }}\n" for name in FORMATS)
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{keys}"
