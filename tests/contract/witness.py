"""Witnesses: what really went through a model, what a method decided, and what a run left behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from jeton.method import Method, Promise, get
from jeton.models import VisionLanguage, adapt
from jeton.needs import Need, Rule
from jeton.tokens import Reduction, Tokens

# -- what went through -------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What arrived at the language model's door and its layers, what was added behind them, and over how many tokens the
    encoder's blocks attended."""

    embeds: Tensor | None = None
    mask: Any = None
    ids: Tensor | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    deep: list[Tensor] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)

    def real(self) -> Tensor:
        """(B, n) true where a column at the door is no padding."""
        assert self.embeds is not None
        masks = [mask for mask in (self.mask.values() if isinstance(self.mask, dict) else [self.mask]) if mask is not None]
        if not masks:
            return torch.ones(self.embeds.shape[:2], dtype=torch.bool)
        columns = [mask.bool() if mask.dim() == 2 else shown(mask).expand(self.embeds.shape[0], -1) for mask in masks]
        return torch.stack(columns).any(0)[:, -self.embeds.shape[1] :]

    def lengths(self, layer: int) -> Tensor:
        """(B,) columns of a layer that are no padding."""
        seen = self.layers[layer]
        hidden, mask = seen["hidden"], seen["mask"]
        if mask is None:
            return torch.full((hidden.shape[0],), hidden.shape[1])
        return shown(mask).expand(hidden.shape[0], -1).sum(1)


def shown(mask: Tensor) -> Tensor:
    """(B, n) the columns that somebody else may look at, under a mask (B, 1, L, n), and the last one: those without padding, if
    windows are longer than images."""
    allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    rows, keys = allowed.shape[1:]
    own = torch.eye(keys, dtype=torch.bool)[keys - rows :]
    own[-1] = False
    return (allowed & ~own).any(1)


@contextmanager
def watching(net: nn.Module) -> Iterator[Seen]:
    """Hooks behind everything a run has hooked: enter after `apply`."""
    seen, handles = Seen(), []
    view = adapt(net)
    encoder = view.encoder if isinstance(view, VisionLanguage) else view

    # where blocks cut maps into windows, their attention does not see how many patches there are
    attentions = [encoder.parts(part).mlp if encoder.maps else encoder.attention(part) for part in encoder.blocks]

    def block(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.blocks.append((args[0] if args else kwargs["hidden_states"]).shape[-2])

    def door(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.embeds, seen.mask, seen.ids = (kwargs.get(name) for name in ("inputs_embeds", "attention_mask", "position_ids"))
        seen.layers.clear()
        seen.deep.clear()

    def layer(module: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.layers.append(
            {
                "hidden": hidden,
                "mask": kwargs.get("attention_mask"),
                "rotary": kwargs.get("position_embeddings"),
                "ids": kwargs.get("position_ids"),
            }
        )

    adds = view.deepstack[1] if isinstance(view, VisionLanguage) and view.deepstack else ""
    own = getattr(view.decoder, adds) if adds else None

    def adding(hidden: Tensor, *args: Any) -> Tensor:
        made = own(hidden, *args)
        seen.deep.append(made - hidden)
        return made

    before = view.decoder.__dict__.get(adds) if adds else None
    if adds:
        setattr(view.decoder, adds, adding)

    handles += [part.register_forward_pre_hook(block, with_kwargs=True) for part in attentions]
    if isinstance(view, VisionLanguage):
        handles.append(view.decoder.register_forward_pre_hook(door, with_kwargs=True))
        handles += [part.register_forward_pre_hook(layer, with_kwargs=True) for part in view.layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        if before is not None:
            setattr(view.decoder, adds, before)
        elif adds:
            delattr(view.decoder, adds)


def match(rows: Tensor, table: Tensor) -> Tensor:
    """(B, n) for each row of `rows` (B, n, ...) the number of the equal row of `table` (B, L, ...), the first if several; -1 if
    there is none."""
    equal = (rows[:, :, None] == table[:, None]).flatten(3).all(3)
    return torch.where(equal.any(2), equal.to(torch.uint8).argmax(2), -1)


# -- what a method decided -----------------------------------------------------------------------------------------------


class Stand(Method):
    """Stands in for another method: same site, same needs, same plan. Subclasses say what happens to a decision."""

    def __init__(self, inner: Method, decided: list[Reduction]) -> None:
        self.inner, self.decided = inner, decided
        copied = (
            "card",
            "site",
            "point",
            "newlines",
            "prefix_tokens",
            "proportional",
            "virtual",
            "zeroes",
            "resizes",
            "of_all",
            "keep",
            "finishes",
            "around",
            "restores",
            "undoes",
            "ahead",
            "maps",
        )
        for name in copied:
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))

    @property
    def spec(self) -> str:
        return self.inner.spec

    def needs(self) -> dict[str, Need]:
        return self.inner.needs()

    def steps(self, n: int, depth: int) -> list[Method | None]:
        return [None if step is None else type(self)(step, self.decided) for step in self.inner.steps(n, depth)]

    def parts(self) -> tuple[Method, ...]:
        parts = self.inner.parts()
        return (self,) if parts[0] is self.inner else tuple(type(self)(part, self.decided) for part in parts)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return self.inner.promise(n, depth)

    def finish(self, tokens: Tokens) -> Tokens:
        return self.inner.finish(tokens)

    def shrinks(self, depth: int) -> int | None:
        return self.inner.shrinks(depth)

    def rules(self, depth: int) -> dict[int, Rule]:
        return self.inner.rules(depth)

    def __getattr__(self, name: str) -> Any:  # `grid` and `picture` of methods that shrink pixels
        return getattr(self.__dict__["inner"], name)


class Spy(Stand):
    """Remembers every decision."""

    def reduce(self, tokens: Tokens, signals: Any = None) -> Reduction:
        reduction = self.inner.reduce(tokens, signals)
        real = tokens.mask if reduction.is_identity else reduction.mask  # where nothing goes, padding is what it was
        self.decided.append(replace(reduction, mask=real))
        return reduction


class Replay(Stand):
    """Decides what was decided before, in the same order, over and over: the same kept sets whatever the tokens say now.

    The next decision about so many tokens is taken: parts that act while pictures are encoded may decide less often than others.
    """

    def reduce(self, tokens: Tokens, signals: Any = None) -> Reduction:
        at = next(i for i, made in enumerate(self.decided) if made.n == len(tokens))
        reduction = self.decided.pop(at)
        self.decided.append(reduction)
        return reduction


def spied(method: Method) -> tuple[Spy, list[Reduction]]:
    decided: list[Reduction] = []
    return Spy(method, decided), decided


def kept(decisions: Sequence[Reduction]) -> list[list[list[int]]]:
    """The kept indices of each decision, row by row, without padding."""
    return [[row[real].tolist() for row, real in zip(r.index, r.real, strict=True)] for r in decisions]


class Listening(Method):
    """Asks for every signal a model has, and keeps everything."""

    card = get("random").card

    def __init__(self, site: str, asked: dict[str, Need]) -> None:
        self.site, self.asked = site, asked
        self.heard: dict[str, Tensor] = {}

    spec = "listening"

    def needs(self) -> dict[str, Need]:
        return self.asked

    def reduce(self, tokens: Tokens, signals: Any = None) -> Reduction:
        self.heard.update(signals or {})
        return Reduction.identity(tokens.features.shape[0], len(tokens), tokens.device, tokens.prefix)

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(n)

    def steps(self, n: int, depth: int) -> list[Method | None]:
        return [None] * (depth - 1) + [self]


# -- what ran underneath ---------------------------------------------------------------------------------------------------


class Shapes(TorchDispatchMode):
    """Collects the shapes of all results in which two axes at the end are at least `n` long."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.found: dict[tuple[int, ...], str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor) and value.dim() >= 2 and min(value.shape[-2:]) >= self.n:
                self.found.setdefault(tuple(value.shape), str(func))
        return out


# -- what is left behind -----------------------------------------------------------------------------------------------------


def snapshot(net: nn.Module) -> dict[str, Any]:
    """Everything a run could have left on a model: attributes, hooks, stand-in functions, attention implementations.

    What the models themselves leave is passed over: Qwen's position of the last prompt, and transformers' hooks for outputs.
    """
    found: dict[str, Any] = {}
    for name, module in net.named_modules():
        for key, value in vars(module).items():
            if key == "rope_deltas" or "output_captur" in key:
                continue
            if isinstance(value, dict) and "hooks" in key:
                value = [hook for hook in value.values() if "output_captur" not in getattr(hook, "__qualname__", "")]
                found[f"{name}.{key}"] = [id(hook) for hook in value]
            else:
                found[f"{name}.{key}"] = value if isinstance(value, int | float | str | bool | None) else id(value)
        config = getattr(module, "config", None)
        if config is not None:
            found[f"{name}.config"] = (
                id(config),
                sorted((k, repr(v)) for k, v in vars(config).items() if not hasattr(v, "to_dict")),
            )
    return found
