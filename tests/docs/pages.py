"""What a page of the documentation holds: its blocks of code, its links, and the commands that it names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT

FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
REASON = re.compile(r"<!-- not run here: (?P<reason>\S.*?) -->\n$", re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
INLINE = re.compile(r"`(?P<text>[^`\n]+)`")
RUNNABLE = ("sh", "python")

MANUAL = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
OTHERS = (ROOT / "CHANGELOG.md", *sorted((ROOT / "examples").glob("*.md")), *sorted((ROOT / "artifacts").glob("*.md")))


@dataclass(frozen=True)
class Block:
    """A fenced block. `reason` says why it is not run here, and is "" where it is."""

    language: str
    text: str
    line: int
    reason: str

    @property
    def runs(self) -> bool:
        return self.language in RUNNABLE and not self.reason


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for fence in FENCE.finditer(text):
        before = text[: fence.start()]
        reason = REASON.search(before.rpartition("\n\n")[2])
        line = before.count("\n") + 1
        found.append(Block(fence["language"], fence["text"], line, reason["reason"] if reason else ""))
    return found


def prose(page: Path) -> str:
    """The page without its blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> Iterator[str]:
    """Targets of links and pictures that lie in the repository."""
    for link in LINK.finditer(prose(page)):
        if not link["target"].startswith(("http://", "https://")):
            yield link["target"]


def anchors(page: Path) -> set[str]:
    """How GitHub names a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> Iterator[list[str]]:
    """Every command that the page shows in a block or names in a sentence, in words."""
    shown = [line for block in blocks(page) if block.language == "sh" for line in block.text.splitlines()]
    for line in [*shown, *(inline["text"] for inline in INLINE.finditer(prose(page)))]:
        for part in re.split(r"\s(?:&&|\|)\s", line):
            with_comment = part if part in shown else part.replace("#", "")
            try:
                words = shlex.split(with_comment, comments=True)
            except ValueError:  # a sentence's quoted code may be a piece of anything
                continue
            if words:
                yield words
