"""Labels as text, whoever gives them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvit_export.errors import UsageError
from mvit_export.models.outputs import read_labels


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("two\nlines", r"^labels: label 2 is 'two\\nlines', expected text on one line; rename it$"),
        ("two\u2028lines", "expected text on one line"),
        ("two\rlines", "expected text on one line"),
        ("bell\x07", "expected text on one line"),
        ("\x1b[2Jgone", "expected text on one line"),
        ("caf\udce9", "expected text on one line"),
        ("end\n", r"^label 2 is 'end\\n', expected no spaces or line breaks around it; strip it$"),
        (" wide ", "expected no spaces or line breaks around it"),
        ("", r"^labels has an empty label at line 2$"),
        (7, r"^label 2 is 7 \(int\), expected text$"),
        (None, r"^label 2 is None \(NoneType\), expected text$"),
    ],
)
def test_labels_from_python_are_refused_as_in_a_file(label: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_labels(["first", label], 2)


def test_what_a_file_may_hold(tmp_path: Path) -> None:
    names = ("n01440764\ttench", "a family \U0001f468\u200d\U0001f469", "no\u00a0break", "caf\u00e9, cup")
    file = tmp_path / "labels.txt"
    file.write_text("\n".join(names) + "\n", encoding="utf-8")
    assert read_labels(file, 4) == read_labels(names, 4) == names


def test_a_control_character_in_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    file.write_bytes(b"first\nsec\x1b[2Jond\n")
    with pytest.raises(UsageError, match=r"labels\.txt: label 2 is 'sec\\x1b\[2Jond', expected text on one line"):
        read_labels(file, 2)
