"""Shared by all tests: one thread, so that timings and sums repeat; the `slow` marker."""

from __future__ import annotations

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than about five seconds")
    torch.set_num_threads(1)
