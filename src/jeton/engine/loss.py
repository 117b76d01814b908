"""Labels for a prompt that got shorter: cut to the columns that are left, so that training with a method applied just works."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .aside import aside, stand_in
from .prompt import Prompt


class Loss:
    """Takes the labels out of the head's call and computes the model's own loss on the columns that are left."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt

    def attach(self) -> None:
        model = self.prompt.view.model
        if model is not self.prompt.view.base:
            self.prompt.run.stand_in(model, functools.partial(self._forward, model))

    def _forward(self, model: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
        """Not a hook: peft calls the forward of the model it wraps without its hooks."""
        names = list(inspect.signature(own).parameters)
        at = names.index("labels") if "labels" in names else len(names)

        @stand_in
        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            labels = kwargs.pop("labels", None)
            if len(args) > at:
                labels, args = args[at], (*args[:at], None, *args[at + 1 :])
            output = own(*args, **kwargs)
            return output if labels is None else self._give(model, labels, kwargs, output)

        return forward

    @aside
    def _give(self, module: nn.Module, labels: Tensor, kwargs: dict, output: Any) -> Any:
        left = self.prompt.left
        if left is not None:
            labels = labels.gather(1, left.index)
            labels = labels if left.valid is None else labels.masked_fill(~left.valid, -100)
        vocabulary = module.config.get_text_config().vocab_size
        items = {name: kwargs[name] for name in ("num_items_in_batch",) if name in kwargs}
        logits = output.logits if hasattr(output, "logits") else output[0]
        loss: torch.Tensor = module.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **items)
        if isinstance(output, tuple):
            return (loss, *output)
        output.loss = loss
        return output
