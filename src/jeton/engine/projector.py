"""The site `encoder` where the projector maps features one by one: tokens leave before they are projected."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layout import Rows
from ..method import Method
from ..tokens import Reduction
from .aside import aside
from .prompt import Prompt, padded


class ProjectorSite:
    """Also lays out what an encoder shortened by block methods hands on, so that the model packs and checks as always."""

    def __init__(self, prompt: Prompt, methods: list[Method]) -> None:
        self.prompt, self.methods = prompt, methods
        self.patch: Tensor | None = None
        self.shape = (0, 0)

    def attach(self) -> None:
        projector = self.prompt.view.projector
        assert projector is not None
        self.prompt.run.hook(projector.register_forward_pre_hook(self._before))
        self.prompt.run.hook(projector.register_forward_hook(self._after))

    @aside
    def _before(self, module: nn.Module, args: tuple) -> tuple | None:
        prompt, features = self.prompt, args[0]
        scene, shortened = prompt.scene, prompt.encoder.reduction
        self.patch = None
        if scene is None or (not self.methods and shortened is None):
            return None
        self.shape = (features.shape[0], scene.album.patches // features.shape[0])
        with prompt.run.clock.measure("selection"):
            if shortened is not None:
                survivors = self._survivors(shortened)
                if not self.methods:
                    self.patch = survivors
                    return None
                features = self._lay_out(features, survivors)
            tokens = prompt.tokens(padded(features.flatten(0, 1))[self._patches()])
            for method in self.methods:
                tokens = prompt.with_class_tokens(tokens) if method.prefix_tokens else tokens
                tokens = prompt.reduce(method, method, tokens, "encoder")
                if tokens.prefix:  # kept everything: the model's own rows, without the class token
                    tokens = prompt.tokens(tokens.features[:, tokens.prefix :])
            self.patch = self._patches()
        return (tokens.features, *args[1:])

    @aside
    def _after(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if self.prompt.scene is not None:
            self.prompt.scene.projected = output.shape[:-1].numel()
        return None if self.patch is None else self._lay_out(output, self.patch)

    def _lay_out(self, features: Tensor, patch: Tensor) -> Tensor:
        """Features (..., D) of the patches numbered `patch` on the full (pictures, patches, D) map, zero elsewhere."""
        pictures, patches = self.shape
        full = features.new_zeros(pictures * patches + 1, features.shape[-1])
        full[patch.flatten()] = features.reshape(-1, features.shape[-1])
        return full[:-1].view(pictures, patches, -1)

    def _patches(self) -> Tensor:
        """(R, K) the encoder patch of each remaining token, one past the last for none."""
        scene = self.prompt.scene
        assert scene is not None
        patch = scene.album.source[..., 0].gather(1, scene.rows.slot)
        none = patch < 0 if scene.rows.mask is None else (patch < 0) | ~scene.rows.mask
        return patch.masked_fill(none, scene.album.patches)

    def _survivors(self, shortened: Reduction) -> Tensor:
        """(U, k) patches that left the encoder; the rows of the scene become the tokens made of them."""
        scene = self.prompt.scene
        assert scene is not None
        pictures, patches = self.shape
        prefix = self.prompt.encoder.encoder.prefix
        own = shortened.index[:, prefix:] - prefix
        patch = own + torch.arange(pictures, device=own.device)[:, None] * patches
        if shortened.mask is not None:
            patch = patch.masked_fill(~shortened.mask[:, prefix:], pictures * patches)
        elif scene.album.plain:
            scene.rows = Rows(own, None)
            return patch
        alive = torch.zeros(pictures * patches + 1, dtype=torch.bool, device=own.device)
        alive[patch.flatten()] = True
        here = alive[scene.album.source[..., 0].gather(1, scene.rows.slot)]
        scene.rows = Rows(scene.rows.slot, here if scene.rows.mask is None else here & scene.rows.mask)
        return patch
