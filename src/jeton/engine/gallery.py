"""Where pictures are encoded: before any prompt is at hand (`generate` does so), or inside the model's forward.

Each call of the encoder makes a `Scene`. It is kept beside the features it made, and found again when they enter a prompt.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..layout import Album, Layout, Rows, read_layout
from ..needs import Given, Need
from ..tokens import Reduction
from .aside import aside, stand_in
from .flow import Flow, Scene, Step
from .groups import Groups
from .prompt import Prompt


class Gallery:
    def __init__(self, prompt: Prompt, structure: str, groups: Groups) -> None:
        self.prompt, self.structure, self.groups = prompt, structure, groups
        self.scenes: dict[str, tuple[Any, Scene]] = {}
        self.busy = False

    def attach(self) -> None:
        """Wrap the model's own methods that encode pictures."""
        base = self.prompt.view.base
        for stream, name in self.prompt.view.streams().items():
            self.prompt.run.stand_in(base, functools.partial(self._encoding, stream), name)

    def _encoding(self, stream: str, encode: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(encode).parameters)

        @stand_in
        @functools.wraps(encode)
        def encoding(*args: Any, **kwargs: Any) -> Any:
            if self.busy:  # one of these methods may call another
                return encode(*args, **kwargs)
            self._open(stream, {**dict(zip(names, args, strict=False)), **kwargs})
            self.busy = True
            try:
                output = encode(*args, **kwargs)
                self._close(stream, output)
            finally:
                self.busy = False
                self.prompt.scene = self.prompt.encoder.only = None
            return output

        return encoding

    @aside
    def _open(self, stream: str, inputs: dict[str, Any]) -> None:
        """Before the encoder runs: the geometry is known, budgets are checked."""
        prompt = self.prompt
        pixels = next(value for name, value in inputs.items() if name.startswith("pixel_values"))
        device = pixels[0].device
        album = Album.of(tuple(prompt.view.geometry(inputs, stream)), device)
        rows = album.candidates(self.structure)
        # where images and videos are encoded apart, or only prompts say what makes an image, those have to be seen first
        if len(prompt.view.streams()) == 1 and not prompt.view.told_by_prompt:
            prompt.run.check_keeps(rows.slot.shape[1])
        prompt.run.encoding()
        prompt.scene = Scene(album, rows, given=self._given(album, stream))
        prompt.encoder.only = self.groups.choose(pixels)

    def _given(self, album: Album, stream: str) -> dict[Need, Tensor]:
        """(R, U) numbers from outside, for the units of every picture."""
        units, device = album.place.units, album.source.device
        frames = [len(item.kinds) for item in album.geometry]
        asked = [need for method in self.prompt.run.methods for need in method.needs().values() if isinstance(need, Given)]
        if stream == "video":
            return {need: need.rows(frames).to(device) for need in asked}
        return {need: torch.ones(len(album), units, device=device) for need in asked}

    @aside
    def _close(self, stream: str, output: Any) -> None:
        prompt = self.prompt
        scene, site = prompt.scene, prompt.encoder
        assert scene is not None
        scene.encoded, scene.special = site.reduction, site.special
        scene.signals.update({need: site.flat(need) for need in site.records if need not in scene.signals})
        held = output if isinstance(output, tuple) else weakref.ref(output)
        self.scenes[stream] = (held, scene)
        prompt.run.encoded()

    def waits(self) -> bool:
        """True if pictures that have lost tokens already have not been met in a prompt yet."""
        return any(scene.reduced and not scene.met for _, scene in self.scenes.values())

    def show(self, input_ids: torch.Tensor, encoded: dict[str, Any] | None) -> Flow | None:
        """The flow of a prompt that shows what was encoded last; None if its features came from elsewhere."""
        found: list[tuple[str, Scene]] = []
        for stream, (held, scene) in self.scenes.items():
            output = held() if isinstance(held, weakref.ref) else held
            given = None if encoded is None else encoded.get(stream)
            if encoded is None or _same(given, output):
                found.append((stream, scene))
        if not found:
            return None
        masks = [self.prompt.view.visual(input_ids, stream) for stream, _ in found]
        if len(found) == 1:
            scene = self._told(found[0][1], input_ids, masks[0])
            layout, images = read_layout(masks[0], scene.album)
            return Flow.start(layout, scene.shown(layout.album, images), self.structure)
        return self._together(masks, [scene for _, scene in found])

    def _told(self, scene: Scene, input_ids: torch.Tensor, visual: torch.Tensor) -> Scene:
        """The scene with its pictures put together to images, where only the prompt says how. No token has left yet: patches of
        such models are mixed before methods see them."""
        if not self.prompt.view.told_by_prompt:
            return scene
        geometry = self.prompt.view.prompted(scene.album.geometry, input_ids, visual)
        album = Album.of(geometry, scene.album.source.device)
        return replace(scene, album=album, rows=album.candidates(self.structure), given=self._given(album, "image"))

    def _together(self, masks: list[torch.Tensor], scenes: list[Scene]) -> Flow:
        """Images and videos in one batch of prompts: one album, in prompt order. Tokens gone already were dropped whole."""
        parts = [read_layout(mask, scene.album) for mask, scene in zip(masks, scenes, strict=True)]
        album, starts = scenes[0].album, [0]
        for scene in scenes[1:]:
            starts.append(len(album))
            album = album.join(scene.album)
        order = sorted(
            (layout.sample[i], int(layout.position[i, 0]), start + number, layout.position[i, : layout.album.counts[i]])
            for (layout, numbers), start in zip(parts, starts, strict=True)
            for i, number in enumerate(numbers)
        )
        shown = album.pick([number for _, _, number, _ in order])
        width = shown.source.shape[1]
        position = torch.stack([torch.nn.functional.pad(columns, (0, width - len(columns))) for *_, columns in order])
        first = parts[0][0]
        marked = [part.between for part, _ in parts if part.between is not None]
        between = torch.stack(marked).any(0) if marked else None
        layout = Layout(shown, tuple(sample for sample, *_ in order), position, first.batch, first.length, between)
        signals = {need: torch.cat([scene.signals[need] for scene in scenes]) for need in scenes[0].signals}
        at, units = [number for _, _, number, _ in order], shown.place.units
        given = {
            need: torch.cat(
                [torch.nn.functional.pad(each.given[need], (0, units - each.given[need].shape[1])) for each in scenes]
            )[at]
            for need in scenes[0].given
        }
        rows, trail = shown.candidates(self.structure), []
        if any(scene.trail for scene in scenes):
            left = torch.nn.utils.rnn.pad_sequence([slots for scene in scenes for slots in scene.left()], batch_first=True)
            here = left[at].gather(1, rows.slot)
            drop = Reduction.select(here if rows.mask is None else here & rows.mask)
            trail = [Step(rows, drop, 0, Rows(rows.slot.gather(1, drop.index), drop.mask))]
            rows = trail[0].after
        ran = sum(scene.album.patches if scene.encoded_patches is None else scene.encoded_patches for scene in scenes)
        projected = sum(scene.projected for scene in scenes)
        scene = Scene(shown, rows, signals=signals, projected=projected, given=given, encoded_patches=ran, trail=trail)
        return Flow.start(layout, scene, self.structure)


def _same(given: Any, output: Any) -> bool:
    """Whether these are the features of a call of the encoder. accelerate makes outputs anew, perhaps on another device."""
    if given is None or output is None or given is output:
        return given is not None and given is output
    pairs = list(itertools.zip_longest(_features(given), _features(output)))
    return bool(pairs) and all(_equal(*pair) for pair in pairs)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a is b:
        return a is b
    return a.shape == b.shape and torch.equal(a, b.to(a.device))


def _features(output: Any) -> list[Tensor]:
    made = getattr(output, "pooler_output", None)
    return [made] if isinstance(made, Tensor) else list(made or [])
