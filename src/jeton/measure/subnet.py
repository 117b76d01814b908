"""Sub-networks of a language model for perceptual input: weights pruned by weight and activation, compared and combined over
tasks and modalities (Shukor and Cord, 2024, arXiv:2405.16700; the rule is Wanda's: Sun et al., 2023, arXiv:2306.11695).

    masks = [wanda_masks(model, task, 0.5) for task in tasks]
    print(iou(masks[0], masks[1]))
    with pruned(model, combine(masks)):      # one sub-network for every task
        ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import watch
from ..engine.run import Run
from ..method import Unsupported
from ..models import VisionLanguage, adapt
from ..ops.wanda import combine, iou, prune

__all__ = ["combine", "iou", "pruned", "wanda_masks"]


@torch.no_grad()
def wanda_masks(model: nn.Module, data: Iterable[Mapping[str, Any]], ratio: float, tokens: str = "all") -> dict[str, Tensor]:
    """{name of the weight: (O, I) bool, true where it goes} for every linear map in the language model's layers.

    In each output row the floor(`ratio` I) entries of lowest ``|W_ij| ‖x_j‖`` go, x_j being input j over all tokens of `data`, an
    iterable of inputs (the paper takes 256 examples); `tokens` restricts it to "visual" or "text" ones. Padding counts for
    nothing. A model without a picture encoder is taken as a whole, with `tokens`="all".
    """
    if tokens not in ("all", "visual", "text"):
        raise ValueError(f'tokens must be "all", "visual" or "text", got {tokens!r}.')
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio={ratio!r} must be the share of weights to prune, from 0 to 1.")
    view = _view(model)
    if view is None and tokens != "all":
        raise Unsupported(f'{type(model).__name__} takes no pictures, so its tokens are all text; use tokens="all".')
    heard = _Listening(view, tokens)
    door: Any = model if view is None else view.decoder
    with contextlib.ExitStack() as stack:
        heard.run = None if view is None else stack.enter_context(watch(model))
        whole: Any = model if view is None else view.base
        hooks = [whole.register_forward_pre_hook(heard.note, with_kwargs=True)]
        hooks += [door.register_forward_pre_hook(heard.begin, with_kwargs=True)]
        hooks += [part.register_forward_pre_hook(heard.hear) for _, part in _linears(model, view)]
        for hook in hooks:
            stack.callback(hook.remove)
        for inputs in data:
            model(**inputs)
    if not heard.tokens_heard:
        raise ValueError("no token of this kind came by: data is empty, or has no pictures.")
    silent = [name for name, part in _linears(model, view) if part not in heard.squares]
    if silent:
        raise Unsupported(
            f"{silent[0]} of {type(model).__name__} does not see every token (experts?); use a model with dense MLPs."
        )
    found = {name: prune(part.weight, heard.squares[part].sqrt(), ratio) for name, part in _linears(model, view)}
    return {f"{name}.weight": mask for name, mask in found.items()}


@contextlib.contextmanager
def pruned(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """The model without the masked weights; on leaving they are what they were."""
    weights = dict(model.named_parameters())
    unknown = sorted(set(masks) - set(weights))
    if unknown:
        raise ValueError(f"{type(model).__name__} has no weight {unknown[0]}; masks fit the model they were made for.")
    kept = {name: weights[name].detach().clone() for name in masks}
    try:
        with torch.no_grad():
            for name, mask in masks.items():
                weights[name].masked_fill_(mask.to(weights[name].device), 0)
        yield model
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                weights[name].copy_(weight)


def _view(model: nn.Module) -> VisionLanguage | None:
    try:
        view = adapt(model)
    except Unsupported:
        return None
    return view if isinstance(view, VisionLanguage) else None


def _linears(model: nn.Module, view: VisionLanguage | None) -> list[tuple[str, nn.Linear]]:
    inside = None if view is None else {part for layer in view.layers for part in layer.modules()}
    found = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    return [(name, part) for name, part in found if (part is not head if inside is None else part in inside)]


class _Listening:
    """Sums of squares of what comes into each linear map."""

    def __init__(self, view: VisionLanguage | None, tokens: str) -> None:
        self.view, self.tokens = view, tokens
        self.run: Run | None = None
        self.mask: Tensor | None = None
        self.real: Tensor | None = None
        self.squares: dict[nn.Module, Tensor] = {}
        self.tokens_heard = False

    def note(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """The mask as the caller gave it: some models hand their language model others."""
        self.mask = kwargs.get("attention_mask")

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Which tokens of this forward count."""
        given = kwargs.get("inputs_embeds")
        ids = given if given is not None else kwargs.get("input_ids", args[0] if args else None)
        assert ids is not None
        batch, length = ids.shape[:2]
        mask = self.mask
        self.real = torch.ones(batch, length, dtype=torch.bool, device=ids.device)
        if mask is not None and mask.dim() == 2:
            self.real = mask[:, -length:].bool()
        if self.tokens == "all":
            return
        shown = torch.zeros(batch * length + 1, dtype=torch.bool, device=ids.device)
        if self.run is not None and self.run.layout is not None:
            shown[self.run.layout.columns.flatten()] = True
        visual = shown[:-1].view(batch, length)
        self.real = self.real & (visual if self.tokens == "visual" else ~visual)

    def hear(self, module: nn.Module, args: tuple) -> None:
        x, real = args[0], self.real
        if real is None or x.shape[:-1].numel() != real.numel():
            return
        own = x.flatten(0, -2)[real.flatten()].double().square().sum(0)  # some models flatten the batch in front of the MLP
        self.squares[module] = self.squares.get(module, 0) + own
        self.tokens_heard |= bool(real.any())
