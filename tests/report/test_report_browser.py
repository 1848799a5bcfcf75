"""The report in a real browser: both colour schemes, a phone and a desktop."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_data
from PIL import Image

from mvit_export import report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FOUND = next((path for name in BROWSERS if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOUND is None, reason="no Chromium on the PATH (apt-get install chromium)"),
]
DARK = "--blink-settings=preferredColorScheme=0"
Browse = Callable[..., "subprocess.CompletedProcess[str]"]

# A page around the report: it lays it out at a width and writes down what does not fit. The report itself has no
# scripts; a `srcdoc` frame is the only one that a local page may look into.
PROBE = """<body><iframe id="frame" style="border: 0; width: {width}px; height: 2000px" srcdoc="{page}"></iframe>
<pre id="found"></pre><script>
document.getElementById("frame").onload = (event) => {{
  const inside = event.target.contentDocument;
  const overlaps = [];
  for (const drawing of inside.querySelectorAll("svg")) {{
    const texts = [...drawing.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
    texts.forEach(([one, a], i) => texts.slice(i + 1).forEach(([other, b]) => {{
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > 1 && high > Math.min(a.height, b.height) / 3) overlaps.push(one + " / " + other);
    }}));
  }}
  document.getElementById("found").textContent = JSON.stringify({{
    content: inside.documentElement.scrollWidth, window: inside.documentElement.clientWidth, overlaps,
    smallest: Math.min(...[...inside.querySelectorAll("svg text")].map((text) => text.getBoundingClientRect().height)),
  }});
}};
</script></body>"""


@pytest.fixture(scope="module")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Browse:
    profile = tmp_path_factory.mktemp("profile")

    def run(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
        command = [
            str(FOUND), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
            "--enable-logging=stderr", f"--user-data-dir={profile}", *options, page.as_uri(),
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return write(folder, report_data.make_showcase(folder / "artifacts"))


def write(folder: Path, artifacts: Path) -> Path:
    file = folder / "report.html"
    file.write_text(report.render(report.read_report([artifacts]), format="html"), encoding="utf-8")
    return file


def screenshot(browse: Browse, page: Path, out: Path, *options: str) -> np.ndarray:
    """Pixels of the first two screens, (height, width, 3)."""
    done = browse(page, "--window-size=1200,1600", f"--screenshot={out}", *options)
    assert "Refused" not in done.stderr and "violates" not in done.stderr, "its own policy must admit all of it"
    with Image.open(out) as image:
        return np.asarray(image.convert("RGB"))


def measure(browse: Browse, page: Path, width: int) -> dict[str, Any]:
    probe = page.with_name(f"probe-{width}.html")
    probe.write_text(PROBE.format(width=width, page=html.escape(page.read_text(encoding="utf-8"))), encoding="utf-8")
    done = browse(probe, f"--window-size={width + 100},2000", "--virtual-time-budget=5000", "--dump-dom")
    found = re.search(r'<pre id="found">(\{.*?\})</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    result: dict[str, Any] = json.loads(html.unescape(found.group(1)))
    return result


def test_page_is_drawn_in_both_colour_schemes(browse: Browse, page: Path, tmp_path: Path) -> None:
    light = screenshot(browse, page, tmp_path / "light.png")
    dark = screenshot(browse, page, tmp_path / "dark.png", DARK)
    assert light.shape == dark.shape == (1600, 1200, 3)
    assert light.mean() > 225 and dark.mean() < 60
    for pixels in (light, dark):
        background = (pixels == pixels[5, 5]).all(axis=2)
        assert 0.5 < background.mean() < 0.97, "neither blank nor covered"


@pytest.mark.parametrize("width", [400, 800, 1200])
def test_nothing_is_wider_than_the_window_or_lies_upon_another(browse: Browse, page: Path, width: int) -> None:
    found = measure(browse, page, width)
    assert found["window"] == width
    assert found["content"] <= width
    assert found["overlaps"] == []
    assert found["smallest"] >= 8, "text of the drawings, in CSS pixels"


def test_labels_of_many_points_at_one_place_do_not_cover_each_other(browse: Browse, tmp_path: Path) -> None:
    """Formats and precisions of one model differ little, in cost and often in latency."""
    for variant, median in (("xxs", 12.0), ("s", 44.0)):
        for index, (fmt, precision) in enumerate(
            (f, p) for f in ("onnx", "tflite", "coreml") for p in ("fp32", "fp16")
        ):
            place = report_data.make_artifact(tmp_path / "artifacts", variant, fmt, precision)
            report_data.store_latency(place, report_data.timing(place, median * (1 + 0.01 * index)))
    assert measure(browse, write(tmp_path, tmp_path / "artifacts"), 600)["overlaps"] == []


def test_long_names_wrap_on_a_phone(browse: Browse, tmp_path: Path) -> None:
    place = report_data.make_artifact(tmp_path / ("long" * 40))
    report_data.store_parity(place, report_data.verdict(place, "fail", "word" * 100))
    report_data.store_latency(
        place, report_data.timing(place, 13.2, runtime="r" * 150, warnings=["w" * 300]), cpu="c" * 200
    )
    for width in (400, 1200):
        assert measure(browse, write(tmp_path, place), width)["content"] <= width
