"""The site `pixels` of encoders that pack all pictures into one sequence: whole merge groups leave before the encoder runs."""

from __future__ import annotations

from torch import Tensor

from ..method import Method, Unsupported
from ..needs import Need, PixelVariance
from ..ops.pixels import variance
from ..tokens import Tokens
from .prompt import Prompt, padded


class Groups:
    """Asks methods which language-model tokens stay, each standing for the patches it will be made of."""

    def __init__(self, prompt: Prompt, methods: list[Method]) -> None:
        self.prompt, self.methods = prompt, methods

    def choose(self, pixels: Tensor) -> Tensor | None:
        """The patches (n,) of one call that stay, ascending; None when all do. The scene's rows shrink with them."""
        prompt, scene = self.prompt, self.prompt.scene
        assert scene is not None
        if not self.methods:
            return None
        with prompt.run.clock.measure("selection"):
            for method in self.methods:
                tokens = prompt.tokens(pixels.new_zeros(*scene.rows.slot.shape, 1))
                tokens = prompt.reduce(method, method, tokens, "pixels", lambda need: self._signal(need, pixels))
                self._only_drops(method, tokens)
            if not scene.trail:
                return None
            made_of = scene.album.source
            made_of = made_of.gather(1, scene.rows.slot[..., None].expand(-1, -1, made_of.shape[-1]))
            kept = made_of.flatten() if scene.rows.mask is None else made_of[scene.rows.mask].flatten()
        scene.encoded_patches = len(kept)
        return kept

    def _signal(self, need: Need, pixels: Tensor) -> Tensor:
        """(R, K) the largest variance among the patches of each token; tokens are groups, so every patch exists."""
        if not isinstance(need, PixelVariance):
            raise TypeError(f"{need} cannot be read before the encoder has run.")
        scene = self.prompt.scene
        assert scene is not None
        source = scene.album.source.gather(1, scene.rows.slot[..., None].expand(-1, -1, scene.album.source.shape[-1]))
        return padded(variance(self.prompt.encoder.encoder.patches(pixels)))[source].amax(2)

    def _only_drops(self, method: Method, tokens: Tokens) -> None:
        if tokens.size is not None:
            raise Unsupported(
                f"{method.card.id} merges patches of {self.prompt.view.name} before its encoder, where groups can only leave; "
                "use a method that drops, or one of the site entry."
            )
