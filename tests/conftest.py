"""Shared by all tests: where the helpers are, and a fixed random state."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "contract")]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
