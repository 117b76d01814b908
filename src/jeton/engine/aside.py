"""What a run does beside the model: reading prompts, deciding, keeping books. `torch.compile` leaves it as it is, so that a
compiled model's blocks and layers are compiled and nothing is compiled anew from one call to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def aside(function: F) -> F:
    """Decorator: neither this function nor what it calls is ever compiled."""
    made: F = torch.compiler.disable(function)
    return made


def stand_in(function: F) -> F:
    """Decorator: this function decides what runs and is not compiled itself; what it calls is."""
    made: F = torch.compiler.disable(function, recursive=False)
    return made
