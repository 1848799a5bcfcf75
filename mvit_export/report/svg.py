"""From a matplotlib figure to SVG for use inside a page: its colours follow the page, its ids are unique."""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from typing import Any

from mvit_export.formats.table import FORMATS

# Matplotlib writes fixed colours; these stand for the page's CSS variables of the same names until `adapt`.
COLOURS = {
    "ink": "#010101",
    "muted": "#020202",
    "line": "#030303",
    "surface": "#040404",
    **{name: f"#05{index:02x}05" for index, name in enumerate(FORMATS)},
}
SETTINGS: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "mvit-export"}  # text as text; reproducible ids
DROPPED = ("metadata", "style")  # the style would apply beyond the drawing
FONT = re.compile(r"font-family:[^;]*;?\s*")  # the page's own


def inline_svg(figure: Any, *, name: str, title: str) -> str:
    """The figure as one `<svg>` element. `name` starts every id in it; `title` is read aloud in its place."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that matplotlib's font lacks are drawn in the reader's font
        figure.savefig(buffer, format="svg", transparent=True)
    root = ET.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in [child for child in parent if local(child.tag) in DROPPED]:
            parent.remove(child)
    for element in root.iter():
        element.tag = local(element.tag)
        element.attrib = {local(key): adapt(local(key), value, name) for key, value in element.attrib.items()}
    heading = ET.Element("title")
    heading.text = title
    root.insert(0, heading)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    return ET.tostring(root, encoding="unicode")


def local(name: str) -> str:
    return name.rpartition("}")[2]


def adapt(key: str, value: str, name: str) -> str:
    """One attribute, with ids made unique to the figure and colours those of the page."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-", 1)
    value = value.replace("url(#", f"url(#{name}-")
    if key == "style":
        value = FONT.sub("", value)
        for variable, colour in COLOURS.items():
            value = value.replace(colour, f"var(--{variable})")
    return value
