"""What a method is: a dataclass with a paper card, found by name or by spec.

A method looks at tokens and at declared signals about them and returns a `Reduction`. It never touches a model.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

from . import registry
from .calibration import Calibration, Study
from .needs import Need, Rule
from .ops.budget import count
from .registry import Card
from .tokens import Reduction, Tokens

Signals = Mapping[str, Any]  # tensors; a learned method also finds its modules there

SITES = ("pixels", "block", "encoder", "entry", "layer")


class Unsupported(RuntimeError):
    """A model lacks what a method needs. The message names the method, the model, what is missing and what would work."""


# -- budgets -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """How many visual tokens to keep: `keep` as a count (int) or a fraction (float in (0, 1]), per image or per crop/frame."""

    keep: int | float
    per: str = "image"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.per not in ("image", "crop", "frame"):
            raise ValueError(f'per must be "image", "crop" or "frame", got {self.per!r}.')

    def count(self, n: int) -> int:
        """Tokens kept of `n`; a fraction rounds to the nearest count and keeps at least one."""
        return count(self.keep, n)


def check_keep(keep: object, name: str = "keep") -> None:
    """Refuse a budget that means nothing, with a sentence."""
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise TypeError(f"{name} must be a count (int) or a fraction (float), got {keep!r}.")
    if isinstance(keep, float):
        if math.isnan(keep) or not 0 < keep <= 1:
            raise ValueError(
                f"{name}={keep} is not a fraction in (0, 1]; write a count as an int, a share as a float, e.g. {name}=64 "
                f"or {name}=0.25."
            )
    elif keep < 1:
        raise ValueError(f"{name}={keep} keeps nothing; at least one token must stay. Write e.g. {name}=64 or {name}=0.25.")


@dataclass(frozen=True)
class Promise:
    """How many tokens a method will leave, known before it runs. `exact` is false where it is only an upper bound. `per` says
    of what: of each "image", or on average of the images of one "prompt", which keep that many together."""

    count: int
    exact: bool = True
    per: str = "image"


# -- the method --------------------------------------------------------------------------------------------------------


class Method:
    """Base of every reduction method. Subclasses are dataclasses whose fields are the paper's hyper-parameters.

    `site` is where it acts (one of `SITES`). `point` says where inside a block: "before" it, in the "middle" between attention
    and MLP, or "after" it. `around` instead names halves of a block ("attention", "mlp") that see fewer tokens, decided on those
    in front of the block and given back behind each half. `restores`: in the end all tokens are there again (site block); a step
    that `undoes` gives back those there were before the last reduction of its method. `ahead`: a step in front of a block whose
    attention shall be the map of the tokens there were, fused as they were, rather than one of those there are.

    `newlines` says what becomes of structure tokens (newlines of any-resolution models): "keep" them beyond the budget, "drop"
    them, or "pool" them with the patches. `prefix_tokens` asks for the encoder's class token in front of the tokens (site
    encoder). `proportional` makes merged tokens weigh log(size) in attention (site block). `virtual` makes the language model
    attend as if every merged token stood at all places of those it was merged from (see engine/virtual.py).
    `zeroes` (site layer) makes nothing leave: in the cache of the layer before, which has run, keys and values become zero where
    tokens stood that a step drops. `resizes` (site pixels) says that it makes a smaller picture, by `grid` and `picture`, in
    place of dropping patches. `of_all` says that its counts go by the tokens images had at first, before other parts of the same
    method took some (site layer). Where `average`, `keep` is what the language model's layers see on average and less is left at
    the end; elsewhere `keep` is what is left. One that `finishes` hands on tokens of its own behind the last block (site block).
    `maps`: what it leaves of a map of tokens is a map, as `Reduction.lattice` says, so that it can act where blocks take maps.

    A method with something to calibrate says how in `calibrated`, with which `objective` (see `tune`) and in how many `calls`, of
    which `warmup` at random; `presets` are published results, by name. `calibration` says how a method that was fitted was found.
    """

    card: ClassVar[Card]
    site: ClassVar[str]
    point: ClassVar[str] = "middle"
    around: tuple[str, ...] = ()
    restores: ClassVar[bool] = False
    undoes: ClassVar[bool] = False
    ahead: bool = False
    newlines: ClassVar[str] = "keep"
    prefix_tokens: ClassVar[bool] = False
    proportional: bool = False
    virtual: bool = False
    zeroes: bool = False
    resizes: ClassVar[bool] = False
    average: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    calibration: Calibration | None = None
    objective: ClassVar[str] = "answer"
    calls: ClassVar[int] = 60
    warmup: ClassVar[int | None] = None
    of_all: ClassVar[bool] = False
    finishes: ClassVar[bool] = False
    maps: ClassVar[bool] = False

    def needs(self) -> dict[str, Need]:
        """The signals `reduce` reads, by the name under which it finds them."""
        return {}

    def parts(self) -> tuple[Method, ...]:
        """The methods it consists of, each at its own site, in the order of a token's life; for most methods itself alone."""
        return (self,)

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        """Decide: tokens (B, N, D) and the declared signals give a `Reduction` of (B, N) to (B, K)."""
        raise NotImplementedError(f"{type(self).__name__} must say how it reduces tokens.")

    def finish(self, tokens: Tokens) -> Tokens:
        """Where it `finishes` (site block): what is handed on behind the last block in place of the tokens that are left there,
        as many as there were at first, in their order. Such a method must be the only one inside the encoder."""
        raise NotImplementedError(f"{type(self).__name__} must say what it hands on.")

    def steps(self, n: int, depth: int) -> list[Method | None]:
        """For the sites block and layer: what to do at each of `depth` blocks or layers, given `n` tokens at the first one.
        Each entry is a method whose `reduce` does that one step, or None for nothing there."""
        raise NotImplementedError(f"{type(self).__name__} acts at site {self.site} and must list its steps.")

    def promise(self, n: int, depth: int = 12) -> Promise:
        """Tokens left of one image (or crop) of `n` tokens, before anything has run. `depth` is the number of encoder blocks
        or layers the tokens pass."""
        raise NotImplementedError(f"{type(self).__name__} must promise its count.")

    def calibrated(self, study: Study) -> Method:
        """The same method with the fields it can calibrate set to the best that it finds in a study."""
        raise TypeError(untunable(self))

    def fit(self, model: Any, data: Iterable[Any], **how: Any) -> Self:
        """A new method with its fields calibrated on a model and data: ``jeton.tune(model, self, data, ...)``, see there. Its
        `calibration` says how it was found, and `save` writes that down."""
        driver = importlib.import_module(f"{__package__}.measure.tune")  # the one way up: tuning runs models
        fitted: Self = driver.tune(model, self, data, **how)
        return fitted

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the calibration of a method that was fitted to a JSON file; ``jeton.get(id, calibration=path)`` reads it."""
        if self.calibration is None:
            raise ValueError(f"{self.spec} was not fitted, so there is no calibration to save; its spec says all there is.")
        self.calibration.save(path)

    def shrinks(self, depth: int) -> int | None:
        """The language-model layer from which on, once the prompt has run, caches hold no token that is gone from the last layer;
        None if every layer holds what it has seen. Layer 0 always does."""
        return None

    def rules(self, depth: int) -> dict[int, Rule]:
        """What it changes in which of the language model's `depth` layers."""
        return {}

    def __or__(self, other: Method) -> Sequence:
        return Sequence(self, other)

    @property
    def spec(self) -> str:
        """The method written as a spec, with the fields that differ from their defaults (values for one batch left out)."""
        shown = [f"{name}={value!r}" for name, value in self.changed.items()]
        return f"{self.card.id}({', '.join(shown)})" if shown else self.card.id

    @property
    def changed(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        fields = [item for item in dataclasses.fields(self) if item.init and item.repr]  # type: ignore[arg-type]
        values = {item.name: (getattr(self, item.name), item.default) for item in fields}
        return {name: value for name, (value, default) in values.items() if value != default}


class Undo(Method):
    """A step that gives back the tokens there were before its method's last reduction, behind a block (site block)."""

    site = "block"
    point = "after"
    undoes = True


class Sequence(Method):
    """Several methods, one after the other, each at its own site: ``Sequence(a, b)`` or ``a | b``."""

    site = "sequence"

    def __init__(self, *methods: Method) -> None:
        flat: list[Method] = []
        for method in methods:
            flat.extend(method.methods if isinstance(method, Sequence) else [method])
        if not flat:
            raise ValueError("Sequence needs at least one method.")
        self.methods: tuple[Method, ...] = tuple(flat)

    def __iter__(self) -> Iterator[Method]:
        return iter(self.methods)

    def __repr__(self) -> str:
        return " | ".join(repr(method) for method in self.methods)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self.methods == other.methods

    def __hash__(self) -> int:
        return hash(self.methods)

    @property
    def spec(self) -> str:
        return " | ".join(method.spec for method in self.methods)

    def parts(self) -> tuple[Method, ...]:
        return tuple(part for method in self.methods for part in method.parts())

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        """Chain the methods on plain tokens. Signals are not available between them: methods that need some must be applied
        to a model."""
        result = Reduction.identity(tokens.features.shape[0], len(tokens), tokens.device, tokens.prefix)
        for method in self.methods:
            step = method.reduce(tokens, signals)
            tokens, result = step.apply(tokens), result.then(step)
        return result

    def promise(self, n: int, depth: int = 12) -> Promise:
        exact = True
        for method in self.methods:
            step = method.promise(n, depth)
            n, exact = step.count, exact and step.exact
        return Promise(n, exact)


# -- registry ----------------------------------------------------------------------------------------------------------

M = TypeVar("M")


def register(**card: Any) -> Callable[[M], M]:
    """Class decorator that files a method, as `registry.register` does any system; a method must be a dataclass."""

    def file(cls: M) -> M:
        if not dataclasses.is_dataclass(cls):
            raise TypeError(f"{cls.__name__} must be a dataclass before it is registered.")  # type: ignore[attr-defined]
        return registry.register(**card)(cls)

    return file


def methods(family: str | None = None) -> list[Card]:
    """The cards of every method that `apply` takes, by id; of one family if given. `jeton.systems` lists the other rooms too."""
    return [card for card in registry.systems(family) if isinstance(card.object, type) and issubclass(card.object, Method)]


def reducers(family: str | None = None) -> list[Card]:
    """The cards of the methods that make tokens fewer; others change how layers run (site "rule")."""
    return [card for card in methods(family) if card.object.site in SITES]


def find(name: str) -> Card:
    """The card of one method; an unknown name suggests the nearest."""
    cards = {card.id: card for card in methods()}
    if name not in cards:
        if name in {card.id for card in registry.systems()}:
            raise ValueError(f"{name!r} is no method that can be applied to a model; `jeton show {name}` says how it is used.")
        raise ValueError(f"there is no method {name!r}.{registry.nearest(name, cards)}")
    return cards[name]


def get(spec: str | Method, **fields: Any) -> Method:
    """A method from its name, its spec or itself: ``get("tome", r=8)``, ``get("tome(r=8) | divprune(keep=64)")``.

    ``calibration=`` beside the fields of a method takes them from a file that `tune` wrote, or from one of the method's presets;
    fields that are given as well win.
    """
    if isinstance(spec, Method):
        if fields:
            raise TypeError(f"fields {sorted(fields)} cannot be set on a method that is already made.")
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"a method is named by a string, such as 'divprune(keep=64)', got {spec!r}.")
    # an id may hold hyphens or begin with a digit, which Python names may not: "_" in front, hyphens as underscores
    text = re.sub(r"(^|\|)\s*([A-Za-z0-9_-]+)", lambda hit: f"{hit[1]}_{hit[2].replace('-', '_')}", spec)
    try:
        parsed = _parse(ast.parse(text, mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"cannot read the spec {spec!r}: write it as 'tome(r=8) | divprune(keep=64)'.") from error
    made = [_make(name[1:], {**options, **fields}) for name, options in parsed]
    if len(made) > 1 and fields:
        raise TypeError("fields can only be given beside a single method; write them inside the spec.")
    return made[0] if len(made) == 1 else Sequence(*made)


def _parse(node: ast.expr) -> list[tuple[str, dict[str, Any]]]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _parse(node.left) + _parse(node.right)
    if isinstance(node, ast.Name):
        return [(node.id, {})]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        try:
            return [(node.func.id, {word.arg or "": ast.literal_eval(word.value) for word in node.keywords})]
        except ValueError as error:
            raise SyntaxError(str(error)) from error
    raise SyntaxError("a spec is names with keyword fields, joined by |")


def _make(name: str, options: dict[str, Any]) -> Method:
    card = find(name.replace("_", "-"))
    if "calibration" in options:
        return _calibrated(card, **options)
    known = [item.name for item in dataclasses.fields(card.object) if item.init]
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1, cutoff=0.4)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise TypeError(f"{card.id} has no field {option!r}.{hint} Its fields are {', '.join(known) or 'none'}.")
    return card.object(**options)


def _calibrated(card: Card, calibration: Any, **options: Any) -> Method:
    """A method from a preset or a calibration file; it knows the calibration as long as no field was given beside it."""
    presets = card.object.presets
    if calibration in presets:
        return _make(card.id, {**presets[calibration], **options})
    if not isinstance(calibration, str | os.PathLike):
        raise TypeError(
            f"calibration is the path of a file that tune has written, or one of {list(presets)}, got {calibration!r}."
        )
    try:
        found = Calibration.load(calibration)
    except ValueError as error:
        hint = f" {card.id} has the presets {', '.join(map(repr, presets))}." if presets else ""
        raise ValueError(f"{error}{hint}") from error
    if found.method != card.id:
        raise ValueError(f"{calibration} calibrates {found.method}, not {card.id}.")
    made = _make(card.id, {**found.fields, **options})
    return made if options else known(made, found)


def known(method: Method, calibration: Calibration) -> Method:
    """The method with the calibration it comes from beside its fields: not one of them, so it takes no part in comparison."""
    object.__setattr__(method, "calibration", calibration)
    return method


def untunable(method: Method) -> str:
    """The sentence with which `tune` refuses a method."""
    names = [card.id for card in methods() if card.object.calibrated is not Method.calibrated]
    return f"{method.card.id} has nothing to calibrate; methods that have: {', '.join(names)}."
