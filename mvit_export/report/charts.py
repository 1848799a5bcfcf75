"""The drawings of a report: where the samples lie, and latency against what a model costs on paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mvit_export.errors import require
from mvit_export.formats.table import FORMATS
from mvit_export.report import formatting
from mvit_export.report.reading import Latency
from mvit_export.report.svg import COLOURS, inline_svg

WIDTH = 4.8  # inches; a page shrinks a drawing to a phone's width, so it is narrow and its text large
ROW = 0.7
LONGEST = 40  # letters of a label
MOST_ROWS = 100  # of all drawings together; nobody sees more, and each takes time
DRAWN = 300  # points of one row; a file with ten thousand samples would take seconds to show
WIDE = 10.0  # largest over smallest from which a linear axis hides the small ones
FAR = 3.0  # times the median: what lies beyond may be cut off and put into words, if it is rare
COMMON = 0.95  # share of a row's samples that is drawn in any case
LIMIT = 0.3  # half the height of a row's cloud


@dataclass(frozen=True)
class Panel:
    """Rows that may be compared: one machine, device and thread count."""

    title: str
    rows: tuple[Latency, ...]


@dataclass(frozen=True)
class Drawing:
    """`shapes` is the key to its markers: (format, how it is drawn and called)."""

    svg: str
    caption: str = ""
    shapes: tuple[tuple[str, str], ...] = ()


def panels(rows: Sequence[Latency]) -> list[Panel]:
    """Measured rows grouped by machine and threads; the machine is named if there are several."""
    groups: dict[tuple[str, str], list[Latency]] = {}
    for row in rows:
        groups.setdefault((row.machine, formatting.threads(row)), []).append(row)
    several = len({machine for machine, _ in groups}) > 1
    ordered = sorted(groups.items(), key=lambda item: (item[0][0], item[1][0].threads or 0))
    return [
        Panel(f"{threads}, {machine}" if several else threads, tuple(group)) for (machine, threads), group in ordered
    ]


def draw_distributions(rows: Sequence[Latency]) -> list[Drawing]:
    """One drawing for each panel with samples."""
    found = [Panel(p.title, tuple(row for row in p.rows if row.samples_ms)) for p in panels(rows[:MOST_ROWS])]
    return [distribution(panel, f"d{index}") for index, panel in enumerate(p for p in found if p.rows)]


def draw_costs(rows: Sequence[Latency]) -> list[Drawing]:
    """Latency against MACs and against file size for each panel."""
    drawings = []
    for index, panel in enumerate(panels(rows[:MOST_ROWS])):
        for axis in (MACS, BYTES):
            if drawing := cost(panel, axis, f"c{index}{axis.key}"):
                drawings.append(drawing)
    return drawings


# Distributions


def distribution(panel: Panel, name: str) -> Drawing:
    """Every sample as a point in a cloud whose width shows their density, and the median with its interval."""
    figure, axes = canvas(0.9 + ROW * len(panel.rows), left=0.02)
    start, end = drawn_range(panel.rows)
    log = is_wide([start, end])
    space = (end - start) or end or 1
    if log:
        axes.set_xscale("log")
    # Positions on an axis, not lengths from zero: it may start where the samples do.
    axes.set_xlim(*((start * 0.85, end * 1.15) if log else (start - 0.04 * space, end + 0.03 * space)))
    axes.set_ylim(len(panel.rows) - 0.5, -0.72)
    axes.set_yticks([])
    for position, (row, label) in enumerate(zip(panel.rows, formatting.distinguish(panel.rows), strict=True)):
        draw_row(axes, row, label, position, end=end, log=log)
    finish(axes, panel.title, "latency (ms, log scale)" if log else "latency (ms)")
    return Drawing(inline_svg(figure, name=name, title=f"Latency samples, {panel.title}"), thinned(panel))


def drawn_range(rows: Sequence[Latency]) -> tuple[float, float]:
    """The axis's range in ms: all samples, unless a few lie so far off that they would squeeze the others."""
    most = max(max(row.samples_ms) for row in rows)
    common = max(float(np.quantile(row.samples_ms, COMMON, method="lower")) for row in rows)
    usual = max(common, FAR * max(row.median_ms or 0 for row in rows))
    return min(min(row.samples_ms) for row in rows), min(most, usual)


def draw_row(axes: Any, row: Latency, label: str, position: int, *, end: float, log: bool) -> None:
    """The cloud; the label above it, and on the right what the axis cuts off and the median."""
    samples = np.sort(row.samples_ms)
    inside, colour = samples[samples <= end], COLOURS[row.format]
    grid, heights = density(inside, log=log)
    if len(grid):
        low, high = position - LIMIT * heights, position + LIMIT * heights
        axes.fill_between(grid, low, high, color=colour, alpha=0.25, linewidth=0)
    shown = inside[np.linspace(0, len(inside) - 1, min(len(inside), DRAWN)).round().astype(int)]
    spread = np.interp(shown, grid, heights) if len(grid) else np.ones(len(shown))
    turns = np.arange(len(shown)) * 0.618034 % 1 - 0.5  # evenly spread, and always the same
    style = {"markersize": 2.6, "color": colour, "alpha": 0.6, "markeredgewidth": 0}
    axes.plot(shown, position + 1.8 * LIMIT * turns * spread, "o", **style)
    draw_median(axes, row, position)
    above = {"va": "bottom", "parse_math": False, "transform": axes.get_yaxis_transform()}
    axes.text(0, position - LIMIT - 0.04, shorten(label), color=COLOURS["ink"], fontsize=9.5, **above)
    figures = formatting.ms(row.median_ms) + beyond(row, end)
    axes.text(1, position - LIMIT - 0.04, figures, ha="right", color=COLOURS["muted"], fontsize=9, **above)


def draw_median(axes: Any, row: Latency, position: int) -> None:
    bottom, top = position + LIMIT, position - LIMIT
    if row.median_interval_ms:
        axes.fill_betweenx([bottom, top], *row.median_interval_ms, color=COLOURS["ink"], alpha=0.25, linewidth=0)
    axes.plot([row.median_ms] * 2, [bottom, top], color=COLOURS["ink"], linewidth=1)


def beyond(row: Latency, end: float) -> str:
    """What the axis cuts off, in words."""
    far = [value for value in row.samples_ms if value > end]
    return f"; {len(far)} beyond, up to {formatting.ms(max(far))}" if far else ""


def thinned(panel: Panel) -> str:
    most = max(len(row.samples_ms) for row in panel.rows)
    return f"{DRAWN} of up to {most:,} samples per row are drawn." if most > DRAWN else ""


def density(samples: np.ndarray, *, log: bool) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian kernel estimate, peak 1, with Silverman's bandwidth; empty if all samples are the same."""
    values = np.log(samples) if log and len(samples) and samples[0] > 0 else samples
    if len(values) < 3 or values[0] == values[-1]:
        return np.empty(0), np.empty(0)
    quartiles = np.percentile(values, [25, 75])
    width = min(values.std(), np.ptp(quartiles) / 1.34) or values.std()
    bandwidth = 0.9 * width * len(values) ** -0.2
    grid = np.linspace(values[0], values[-1], 160)
    heights = np.exp(-0.5 * ((grid[:, None] - values[None]) / bandwidth) ** 2).sum(axis=1)
    return np.exp(grid) if values is not samples else grid, heights / heights.max()


# Latency against cost


@dataclass(frozen=True)
class Cost:
    key: str
    title: str
    unit: str
    of: Callable[[Latency], float | None]


MACS = Cost("macs", "MACs", "millions", lambda row: row.macs)
BYTES = Cost("bytes", "file size", "MB", lambda row: row.bytes)


def cost(panel: Panel, axis: Cost, name: str) -> Drawing | None:
    """A scatter plot of medians; None if fewer than two rows have this cost."""
    labels = without_prefix(formatting.distinguish(panel.rows))
    points = [
        (value / 1e6, row.median_ms, row, label)
        for row, label in zip(panel.rows, labels, strict=True)
        if (value := axis.of(row)) and row.median_ms
    ]
    if len(points) < 2:
        return None
    figure, axes = canvas(3.0)
    scales = []
    for values, limit, scale in (
        ([point[0] for point in points], axes.set_xlim, axes.set_xscale),
        ([point[1] for point in points], axes.set_ylim, axes.set_yscale),
    ):
        log = is_wide(values)
        scale("log" if log else "linear")
        limit(min(values) / 1.6 if log else 0, max(values) * (1.6 if log else 1.12))
        scales.append(", log scale" if log else "")
    for x, y, row, _ in points:
        draw_point(axes, x, y, row)
    place_labels(axes, [(x, y, shorten(label)) for x, y, _, label in points])
    axes.set_ylabel(f"median latency (ms{scales[1]})", color=COLOURS["muted"], fontsize=9)
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.6)
    title = f"{panel.title}: latency against {axis.title}"
    finish(axes, title, f"{axis.title} ({axis.unit}{scales[0]})")
    formats = sorted({row.format for _, _, row, _ in points})
    shapes = tuple((fmt, f"{FORMATS[fmt].shape} {FORMATS[fmt].title}") for fmt in formats)
    return Drawing(inline_svg(figure, name=name, title=title), shapes=shapes)


def without_prefix(labels: Sequence[str]) -> list[str]:
    """`xxs onnx-fp32` if every label begins with `mobilevit_`."""
    prefixes = {label.partition("_")[0] for label in labels}
    return [label.partition("_")[2] or label for label in labels] if len(prefixes) == 1 else list(labels)


def shorten(label: str) -> str:
    """Both ends of a label too long for a drawing; the tables have all of it."""
    return label if len(label) <= LONGEST else f"{label[: LONGEST // 2]}…{label[-LONGEST // 2 :]}"


def draw_point(axes: Any, x: float, y: float, row: Latency) -> None:
    if row.median_interval_ms:
        axes.plot([x, x], row.median_interval_ms, color=COLOURS[row.format], linewidth=1.2)
    axes.plot(
        [x], [y], FORMATS[row.format].marker, markersize=7, color=COLOURS[row.format],
        markeredgecolor=COLOURS["surface"],
        markeredgewidth=0.8,
    )  # fmt: skip


def place_labels(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Names beside the points, moved up or down until none overlap; a thin line leads back from far away."""
    (left, floor), (right, top) = axes.transAxes.transform([(0, 0), (1, 1)])
    spots = [(*axes.transData.transform((x, y)), label) for x, y, label in points]
    taken = [Box(x - 5, y - 5, x + 5, y + 5) for x, y, _ in spots]
    columns: dict[float, list[tuple[tuple[float, float], str, float]]] = {}  # by where their texts start or end
    for x, y, label in sorted(spots, key=lambda spot: -spot[1]):
        width = LETTER * len(label)
        right_of = x + 9 + width <= right or x - left < right - x
        edge = x + 9 if right_of else x - 9  # where the text starts or ends
        start = edge if right_of else edge - width
        moved = [Box(start, at - LINE / 2, start + width, at + LINE / 2) for at in nearby(y, floor, top)]
        box = next((box for box in moved if not any(map(box.overlaps, taken))), moved[0])
        taken.append(box)
        columns.setdefault(edge, []).append(((x, y), label, (box.bottom + box.top) / 2))
    for edge, column in columns.items():  # in the order of their points, which were placed from the top
        heights = sorted((height for _, _, height in column), reverse=True)
        for (point, label, _), height in zip(column, heights, strict=True):
            write_label(axes, label, point, (edge, height))


def write_label(axes: Any, label: str, point: tuple[float, float], place: tuple[float, float]) -> None:
    """A label that starts or ends at `place`, with a line to its point if it had to move away."""
    right_of, where = place[0] > point[0], {"xycoords": "figure pixels", "annotation_clip": False}
    text = {"ha": "left" if right_of else "right", "va": "center_baseline", "fontsize": 8.5, "parse_math": False}
    axes.annotate(label, place, color=COLOURS["ink"], **text, **where)
    if abs(place[1] - point[1]) > LINE:
        style = {"arrowstyle": "-", "color": COLOURS["muted"], "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4}
        axes.annotate("", point, place, textcoords="figure pixels", arrowprops=style, **where)


LETTER, LINE = 4.9, 11.5  # points of a letter's width and a line's height in a label


@dataclass(frozen=True)
class Box:
    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: Box) -> bool:
        beside = self.right <= other.left or other.right <= self.left
        return not (beside or self.top <= other.bottom or other.top <= self.bottom)


def nearby(y: float, low: float, high: float) -> list[float]:
    """Heights for a label between `low` and `high`, the nearest to `y` first."""
    places = [y, *np.arange(low + LINE / 2, high - LINE / 2, LINE / 8)]
    return sorted(places, key=lambda place: abs(place - y))


# Both


def canvas(height: float, *, left: float = 0.13) -> tuple[Any, Any]:
    """A figure of `height` inches with one pair of axes; at 72 dpi its pixels are the SVG's points."""
    require("matplotlib", extra="report", purpose="to draw the report")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=72)
    axes = figure.add_axes((left, 0.5 / height, 0.98 - left, 1 - 0.78 / height))
    return figure, axes


def finish(axes: Any, title: str, label: str) -> None:
    """Titles, ticks and grid in the page's colours."""
    axes.set_title(title, loc="left", color=COLOURS["ink"], fontsize=11, fontweight="bold", parse_math=False)
    axes.set_xlabel(label, color=COLOURS["muted"], fontsize=9)
    axes.grid(axis="x", color=COLOURS["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=COLOURS["muted"], labelsize=8.5, length=0, which="both")
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            plain_log_ticks(axis)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(COLOURS["line"])


def plain_log_ticks(axis: Any) -> None:
    """1, 2, 5, 10 as numbers, not as powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def is_wide(values: Sequence[float]) -> bool:
    """Whether a linear axis would squeeze the small ones."""
    return min(values) > 0 and max(values) / min(values) > WIDE
