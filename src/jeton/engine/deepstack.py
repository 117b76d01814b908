"""Features that are added to visual tokens behind the first layers of a language model (DeepStack): they stay with their tokens.

At the entrance they are laid out token by token, and every reduction that acts on the tokens acts on them too.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ..method import Unsupported
from .aside import aside
from .flow import Flow
from .prompt import Prompt, padded


class Deepstack:
    """Stands in for the language model's own method that adds them: jeton knows where each token stands by then."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt

    def attach(self) -> None:
        declared, decoder = self.prompt.view.deepstack, self.prompt.view.decoder
        if declared is None:
            return
        name = declared[1]
        own = getattr(decoder, name, None)
        if own is None:
            raise Unsupported(
                f"jeton keeps DeepStack features with their tokens in {type(decoder).__name__}.{name}, which this version of "
                "transformers does not have; use transformers 5.17 to 5.23, or a model without DeepStack, e.g. Qwen2.5-VL."
            )

        @aside
        @functools.wraps(own)
        def add(hidden: Tensor, mask: Any, level: Any) -> Tensor:
            return self._added(hidden, level) if isinstance(level, int) else own(hidden, mask, level)

        setattr(decoder, name, add)
        self.prompt.run.undo(lambda: decoder.__dict__.pop(name, None))

    def take(self, flow: Flow, kwargs: dict) -> None:
        """Take the features out of the decoder's arguments, and leave their numbers there."""
        declared = self.prompt.view.deepstack
        levels = None if declared is None else kwargs.get(declared[0])
        if declared is None or levels is None:
            return
        assert not any(flow.layout.album.structure), "structure tokens would lose their features"
        at, batch, length = flow.columns, flow.layout.batch, flow.length
        # features come in the order of the prompts' visual columns
        shown = at.new_zeros(batch * length + 1).index_fill(0, at.flatten(), 1)
        row = (shown.cumsum(0) - 1)[flow.at]
        flow.scene.deep = [padded(level)[row] for level in levels]
        kwargs[declared[0]] = range(len(levels))

    def _added(self, hidden: Tensor, level: int) -> Tensor:
        flow = self.prompt.flow
        assert flow is not None
        deep = flow.scene.deep[level].to(hidden.device, hidden.dtype)
        flat = padded(hidden.flatten(0, 1))
        return flat.index_add(0, flow.at.flatten().to(hidden.device), deep.flatten(0, 1))[:-1].view_as(hidden)
