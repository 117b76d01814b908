"""Labels for a prompt that got shorter: cut to the columns that are left, so that training with a method applied just works."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .prompt import Prompt


class Loss:
    """Takes the labels out of the head's call and computes the model's own loss on the columns that are left."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.labels: Tensor | None = None

    def attach(self) -> None:
        model = self.prompt.view.model
        if model is self.prompt.view.base:
            return
        self.prompt.run.hook(model.register_forward_pre_hook(self._take, with_kwargs=True))
        self.prompt.run.hook(model.register_forward_hook(self._give, with_kwargs=True))

    def _take(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        self.labels = kwargs.pop("labels", None)
        return args, kwargs

    def _give(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        labels, left = self.labels, self.prompt.left
        self.labels = None
        if labels is None:
            return None
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
