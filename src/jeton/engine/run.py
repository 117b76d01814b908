"""`apply`: plugs methods into a model at their sites, and takes them out again leaving no trace."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.utils
from PIL.Image import Image
from torch import Tensor, nn

from ..layout import Layout
from ..learned import Learned
from ..method import Method, Unsupported, get
from ..models import Encoder, VisionLanguage, adapt
from ..needs import IN_ENCODER, Need
from ..tokens import Reduction, Tokens
from .cache import CacheSite
from .checks import check
from .clock import Clock
from .costs import Costs
from .drafts import let_the_prompt_run_alone
from .encoder import EncoderSite
from .entrance import Entrance
from .gallery import Gallery
from .groups import Groups
from .layers import LayerSite
from .lessons import Lessons, Student
from .loss import Loss
from .masks import WindowSite
from .outlet import Outlet
from .picture import seen, sheet
from .projector import ProjectorSite
from .prompt import Prompt
from .report import Report
from .rules import RuleSite
from .tap import Taps
from .virtual import VirtualSite

_RUNNING: weakref.WeakKeyDictionary[nn.Module, Run] = weakref.WeakKeyDictionary()


def apply(
    model: nn.Module,
    method: str | Method,
    *,
    positions: str = "keep",
    newlines: str | None = None,
    restore: bool = False,
    train: bool = False,
    **fields: Any,
) -> Run:
    """Reduce the visual tokens of `model` with `method` until the returned run is removed.

    Works as a context manager (``with jeton.apply(model, "divprune", keep=64) as run``) or until ``run.remove()``.

    method, fields: an id with its fields, a spec such as ``"tome(r=8) | divprune(keep=64)"``, or a method.
    positions: "keep" leaves every token its original position id (then removing a token equals masking it); "compact" renumbers
    them without gaps, which is a different function and what some papers mean.
    newlines: what becomes of structure tokens (newlines of any-resolution models): "keep", "drop" or "pool" (let them compete);
    None leaves it to the method.
    restore: methods inside the encoder shorten the encoder alone: behind its last block every patch gets the features of the
    token it was merged into, and what follows sees them all. So methods that merge work in front of a projector that mixes
    neighbouring patches, and dense features come out of an encoder that stands alone. Methods behind it act on what is restored.
    train: for an encoder (with or without a task head) and a method that is trained: tokens stay and are masked, so that
    gradients reach what decides about them. `run.student()` is what to train, `run.losses()` what the method adds to the loss,
    `run.save` writes what was learned; see `jeton.learned`.

    Raises `Unsupported` if the model lacks what the method needs, `ValueError` for bad arguments, `RuntimeError` if the model
    already has a method applied.
    """
    if positions not in ("keep", "compact"):
        raise ValueError(f'positions must be "keep" or "compact", got {positions!r}.')
    if newlines not in (None, "keep", "drop", "pool"):
        raise ValueError(f'newlines must be "keep", "drop" or "pool", got {newlines!r}.')
    made = get(method, **fields)
    return Run(model, list(made.parts()), made.spec, positions, newlines, restore, train).attach()


def watch(model: nn.Module) -> Run:
    """Attach only the counters and the clock: the report of the unreduced model."""
    return Run(model, [], "none", "keep", None, False, False).attach()


class Run:
    """One method, or a sequence of them, on one model."""

    def __init__(
        self,
        model: nn.Module,
        methods: list[Method],
        spec: str,
        positions: str,
        newlines: str | None,
        restore: bool,
        train: bool,
    ) -> None:
        self.view = adapt(model)
        self.encoder = self.view if isinstance(self.view, Encoder) else self.view.encoder
        self._parts: list[Any] = [model, self.encoder.model]
        if isinstance(self.view, VisionLanguage):
            self._parts += [self.view.model, self.view.base, self.view.decoder]
        running = next((run for part in self._parts if (run := _RUNNING.get(part)) is not None), None)
        if running is not None:
            raise RuntimeError(
                f"{type(model).__name__} already has {running.spec} applied; call its run.remove() first, or apply both at once "
                f'as "{running.spec} | {spec}".'
            )
        self.model, self.methods, self.newlines, self.restore, self.train = model, methods, newlines, restore, train
        self.spec: str = spec
        self.compact = positions == "compact"
        # what is restored acts at all its places as it is
        self.virtual = any(method.virtual and not (restore and method.site == "block") for method in methods)
        check(self)
        self.device = next((weight.device for weight in model.parameters() if not weight.is_meta), torch.device("cpu"))
        self.clock = Clock(self.device)
        self.taps = Taps(model)
        self.costs = Costs(self)
        self._handles: list[Any] = []
        self._undo: list[Callable[[], None]] = []
        self._inside = self._ahead = False
        self.outlet: Outlet | None = None
        self.rules: RuleSite | None = None
        depth = self.view.feature_block + 1 if isinstance(self.view, VisionLanguage) else len(self.encoder.blocks)
        self.learned = Lessons(self.encoder, depth, methods, train)
        late: set[Need] = {
            need
            for method in methods
            if method.site in ("encoder", "entry", "layer")
            for need in method.needs().values()
            if isinstance(need, IN_ENCODER)
        }
        self.site = EncoderSite(self, self.encoder, depth, methods, late, isinstance(self.view, Encoder))

    # -- plugging in and out ---------------------------------------------------------------------------------------------

    def attach(self) -> Run:
        _forget_compiled()
        try:
            self.site.attach()
            if isinstance(self.view, VisionLanguage):
                self._attach_language(self.view)
            else:
                self.outlet = Outlet(self, [m for m in self.methods if m.site in ("encoder", "entry")])
                self.outlet.attach()
            self.taps.open()
        except BaseException:
            self.remove()
            raise
        _RUNNING.update(dict.fromkeys(self._parts, self))
        return self

    def _attach_language(self, view: VisionLanguage) -> None:
        early = [m for m in self.methods if m.site == "encoder"]
        entry = [m for m in self.methods if m.site == "entry"]
        layered = [m for m in self.methods if m.site == "layer"]
        structure = self.newlines or next((m.newlines for m in early + entry + layered), "keep")
        prompt = Prompt(self, view, self.site)
        early_groups = [m for m in self.methods if m.site == "pixels" and self.encoder.packed]
        gallery = Gallery(prompt, structure, Groups(prompt, early_groups))
        gallery.attach()
        Entrance(prompt, gallery, early + entry if view.mixes else entry, self.virtual).attach()
        if view.projector is not None:
            ProjectorSite(prompt, [] if view.mixes else early).attach()
        LayerSite(prompt, layered).attach()
        if self.methods:
            WindowSite(prompt).attach()
        if self.virtual:
            VirtualSite(prompt).attach()
        CacheSite(prompt, self.methods).attach()
        self.rules = RuleSite(prompt, self.methods)
        self.rules.attach()
        Loss(prompt).attach()
        let_the_prompt_run_alone(view.model, self.stand_in)

    def remove(self) -> None:
        """Take everything out again. Calling it twice does nothing."""
        if self._handles or self._undo:
            _forget_compiled()
        for handle in self._handles:
            handle.remove()
        for undo in reversed(self._undo):
            undo()
        self._handles.clear()
        self._undo.clear()
        self.taps.close()
        for part in self._parts:
            if _RUNNING.get(part) is self:
                del _RUNNING[part]

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def hook(self, handle: Any) -> None:
        self._handles.append(handle)

    def undo(self, action: Callable[[], None]) -> None:
        self._undo.append(action)

    def stand_in(
        self, module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]], name: str = "forward"
    ) -> None:
        """Until the run is removed `make(own)` stands in for a function of the module, by default its forward; within what
        accelerate does around that to bring weights and inputs to their device, if anything."""
        name = "_old_forward" if name == "forward" and "_old_forward" in vars(module) else name
        own = vars(module).get(name)
        setattr(module, name, make(getattr(module, name)))
        self.undo(functools.partial(put_back, module, name, own))

    # -- what the user asks ----------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """Tokens, FLOPs and times so far; token counts are of the last prefill."""
        return self.costs.report()

    def reset(self) -> None:
        """Forget the counts and times so far."""
        self.clock.clear()
        self.costs.clear()

    @property
    def tokens(self) -> Tokens | None:
        """The tokens an encoder that stands alone gave last: features, mask, original index and size."""
        return None if self.outlet is None else self.outlet.tokens

    @property
    def restored(self) -> Tokens | None:
        """The same for every token there was in front of the first block: each has what it was merged into, and where tokens were
        dropped it is zero and masked. Not where tokens also left behind the encoder, or were replaced by a method's own."""
        tokens, reduction = self.tokens, self.reduction
        if tokens is None or reduction is None:
            return tokens
        if len(tokens) != reduction.k:
            raise ValueError(
                f"{self.spec} leaves {len(tokens)} tokens and its blocks made {reduction.k}: methods behind the encoder cannot "
                f"be undone; apply the one inside its blocks alone."
            )
        back = reduction.restore(tokens)
        real = back.real if self.site.start_mask is None else back.real & self.site.start_mask
        return Tokens(back.features, real, prefix=tokens.prefix, place=self.site.place)

    @property
    def reduction(self) -> Reduction | None:
        """What the blocks of the encoder did in the last forward, special tokens in front included."""
        return self.site.reduction

    @property
    def softened(self) -> list[Tokens]:
        """In training: the tokens as each step of the last forward left them."""
        return self.site.softened

    def losses(self) -> dict[str, Tensor]:
        """In training: what the method adds to the loss of its task, of the last forward, by name."""
        method = self.methods[0]
        assert isinstance(method, Learned)
        found = method.losses(self.softened, self.modules_of(method), self.learned.shape)
        parts = self.site.imitated
        return {**found, "attention": torch.stack(parts).mean()} if parts else found

    def student(self) -> Student:
        """The model and what is learned beside it, as one module to train."""
        return Student(self.model, self.learned)

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write what each method has learned to ``folder/<id>.safetensors``; `weights=` reads it. The model saves itself."""
        return self.learned.save(folder)

    def modules_of(self, method: Method) -> nn.Module | None:
        """What a method has learned, or is learning."""
        return self.learned.of(method)

    @property
    def layout(self) -> Layout | None:
        """The span map of the last prefill."""
        return None if self.costs.flow is None else self.costs.flow.layout

    def assignment(self, image: int = 0, layer: int | None = None) -> list[Tensor]:
        """For one image of the last forward, per picture (thumbnail, crop or frame) a map (h, w) of its tokens: -1 where dropped,
        else the number of the new token it went to. With `layer`, as things stood behind that block of the encoder."""
        return self.costs.assignment(image, layer)

    def picture(self, layer: int | None = None, image: int = 0, of: Any = None, size: int = 336) -> Image:
        """One image of the last forward with its reduction drawn over it: dropped patches dark, merged ones in one colour with an
        outline; crops or frames side by side, each `size` pixels wide.

        layer: the block of the encoder behind which to look, negative ones counted from the last; None for what is left at the
        end, in a vision-language model behind its last layer. of: what to draw on, a PIL image or a list of one for each crop or
        frame; None for the pixels the encoder saw. Raises ValueError where these are no pictures (families that cut them into
        patches beforehand).
        """
        maps = self.assignment(image, layer)
        pictures = seen(self, image) if of is None else list(of) if isinstance(of, list | tuple) else [of]
        return sheet(pictures, maps, size)

    # -- refused while it runs ----------------------------------------------------------------------------------------------

    def check_keep(self, method: Method, most: int) -> None:
        """Refuse a count above what every image has."""
        keep = getattr(method, "keep", None)
        if isinstance(keep, int) and not isinstance(keep, bool) and keep > most:
            raise ValueError(
                f"{method.card.id} was asked to keep {keep} tokens, but no image of this batch has more than {most}; "
                f"ask for fewer, or for a fraction such as keep=0.25."
            )

    def refuse_checkpointing(self, module: nn.Module, again: bool) -> None:
        """Refuse what runs layers a second time in the backward pass, when the state of their forward is gone."""
        if again:
            raise Unsupported(
                f"{self.spec} acts between layers of {type(module).__name__}, which gradient checkpointing runs again later; "
                "call model.gradient_checkpointing_disable(), or use a method of the site encoder or entry."
            )

    # -- what the sites tell -----------------------------------------------------------------------------------------------

    def say(self, note: str) -> None:
        self.costs.note = note

    def check_keeps(self, candidates: int) -> None:
        """Refuse counts above the tokens that may be dropped of the largest image."""
        sites = ("encoder", "entry", "layer", "pixels") if self.encoder.packed else ("encoder", "entry", "layer")
        for method in self.methods:
            if method.site in sites:
                self.check_keep(method, candidates)

    def encoding(self) -> None:
        """Pictures are about to be encoded."""
        if not self._inside:  # `generate` encodes first and runs the model afterwards: both make the first token
            self._begin()
            self._ahead = True

    def encoded(self) -> None:
        if not self._inside:
            self.clock.add("first_token", self._start)

    def start(self, pictures: bool) -> None:
        """The model's forward starts."""
        self._inside = True
        if pictures and not self._ahead:
            self._begin()
        self._start = self.clock.now()
        self._ahead = False

    def finish(self, pictures: bool) -> None:
        self._inside = False
        if pictures:
            self.clock.add("first_token", self._start)

    def _begin(self) -> None:
        for stage in ("first_token", "encoder", "selection", "prefill"):
            self.clock.begin(stage)
        self._start = self.clock.now()

    def enter(self) -> None:
        """The language model starts."""
        self._door = self.clock.now()

    def leave(self, pictures: bool) -> None:
        if not pictures:
            self.clock.begin("decode")
        self.clock.add("prefill" if pictures else "decode", self._door)


def put_back(module: Any, name: str, own: Any) -> None:
    """An attribute of an instance as it was; None if the instance had none of its own."""
    if own is None:
        vars(module).pop(name, None)
    else:
        setattr(module, name, own)


_COMPILED = [0]


def _forget_compiled() -> None:
    """torch.compile does not look whether hooks have come or gone: what it has made so far must not be used again."""
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if graphs != _COMPILED[0]:
        _COMPILED[0] = graphs
        torch.compiler.reset()
