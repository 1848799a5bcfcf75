"""What stands around a state dict."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mvit_export.errors import WeightsError
from mvit_export.models.checkpoints import MOST_WRAPPERS, unwrap


def wrapped(times: int) -> dict[str, Any]:
    content: dict[str, Any] = {"a": torch.zeros(1)}
    for _ in range(times):
        content = {"state_dict": content}
    return content


def test_wrappers_are_taken_off() -> None:
    assert list(unwrap(wrapped(MOST_WRAPPERS))) == ["a"]


def test_a_dict_that_holds_itself_is_refused() -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    for endless in (content, wrapped(MOST_WRAPPERS + 1)):
        with pytest.raises(WeightsError, match="inside more than 8 dicts"):
            unwrap(endless)
