"""The registry: a card for every system jeton has, whatever it is (a reduction method, a layer, a loss, a tool), found by id."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

# the rooms that hold systems; where a room holds other things too, its SYSTEMS names the files to look into
ROOMS = (
    "reduce",
    "cache",
    "decode",
    "tokenizers",
    "signals",
    "text",
    "generate",
    "backbones",
    "heads",
    "bridge",
    "objectives",
    "prompts",
    "merging",
    "perception",
    "measure",
)

_REGISTRY: dict[str, Card] = {}
T = TypeVar("T")


@dataclass(frozen=True)
class Card:
    """Where a system comes from and where it works. `headline` is what its authors claim, `object` the class or function."""

    id: str
    title: str
    year: int
    source: str
    family: str
    stage: str
    training_free: bool
    headline: str
    object: Any = field(repr=False, compare=False)

    def row(self) -> dict[str, Any]:
        """The card as plain data, one row of `jeton methods --json`."""
        return {name: getattr(self, name) for name in ("id", "family", "stage", "title", "year", "source", "training_free")}


def register(
    *,
    title: str,
    year: int,
    source: str,
    family: str,
    stage: str,
    training_free: bool = True,
    headline: str = "",
    id: str | None = None,
) -> Callable[[T], T]:
    """Decorator that files a class or function under its id (by default the module's name, underscores as hyphens) and sets its
    `card`. `family` is the kind of system (vlm, vit, bridge, tokenizer ...), `stage` where in a token's life it acts, `headline`
    what its authors claim for it, on their models and data."""

    def file(thing: T) -> T:
        name = id or thing.__module__.rpartition(".")[2].replace("_", "-")
        known = _REGISTRY.get(name)
        if known is not None and known.object.__qualname__ != thing.__qualname__:  # type: ignore[attr-defined]
            raise ValueError(f"the id {name!r} is already taken by {known.object.__name__}.")
        card = Card(name, title, year, source, family, stage, training_free, headline, thing)
        thing.card = card  # type: ignore[attr-defined]
        _REGISTRY[name] = card
        return thing

    return file


def systems(family: str | None = None) -> list[Card]:
    """The cards of every registered system, by id; of one family if given."""
    _load()
    return [card for _, card in sorted(_REGISTRY.items()) if family is None or card.family == family]


def find(name: str) -> Card:
    """The card of one system; an unknown name suggests the nearest."""
    cards = {card.id: card for card in systems()}
    if name not in cards:
        raise ValueError(f"there is no system {name!r}.{nearest(name, cards)}")
    return cards[name]


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that suggests what was meant."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else " See jeton.systems() for all of them."


def _load() -> None:
    """Import every system's file once, so that the registry is complete. Nothing else may name the rooms."""
    for room in ROOMS:
        package = importlib.import_module(f"{__package__}.{room}")
        files = getattr(package, "SYSTEMS", None) or [
            module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")
        ]
        for name in files:
            importlib.import_module(f"{package.__name__}.{name}")
