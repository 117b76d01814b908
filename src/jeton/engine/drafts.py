"""Assisted generation and prompt lookup: `generate` hands candidates over together with the prompt, whose end they would hide."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

ATTRIBUTE = "_get_candidate_generator"


def let_the_prompt_run_alone(model: nn.Module, stand_in: Callable[..., None]) -> None:
    """While a run lasts candidates wait until the prompt has run, so that methods that look at its last tokens see these."""
    if hasattr(model, ATTRIBUTE):
        stand_in(model, _waiting, ATTRIBUTE)


def _waiting(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def make(*args: Any, **kwargs: Any) -> Any:
        generator = own(*args, **kwargs)
        propose = generator.get_candidates

        def nothing_yet(input_ids: Any, *rest: Any, **more: Any) -> Any:
            generator.get_candidates = propose
            propose(input_ids, *rest, **more)  # an assistant reads its prompt now; what it proposes counts as rejected
            return input_ids, None

        generator.get_candidates = nothing_yet
        return generator

    return make
