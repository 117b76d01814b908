"""What jeton must know of a model, as two small views: `Encoder` and `VisionLanguage`. One file per family fills them in.

Adding a family: subclass the view, name its parts, and register it under the transformers class names (`registry.adapter`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..layout import Album, Geometry
from ..learned import Shape
from ..method import Unsupported
from ..ops.pixels import cut, grey
from ..place import Lattice

Inputs = Mapping[str, Any]


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Parts:
    """The pieces of a pre-norm block: ``x + drop1(scale1(attention(norm1(x))))``, then ``x + drop2(scale2(mlp(norm2(x))))``.

    residual_first: the block adds ``x + half``, not ``half + x``. The numbers are the same, but a sum has the memory layout of
    what stands first, and some norms round by it."""

    norm1: Callable[..., Tensor]
    attention: nn.Module
    norm2: Callable[..., Tensor]
    mlp: Callable[..., Tensor]
    scale1: Callable[..., Tensor] = _same
    scale2: Callable[..., Tensor] = _same
    drop1: Callable[..., Tensor] = _same
    drop2: Callable[..., Tensor] = _same
    residual_first: bool = False

    def add(self, x: Tensor, half: Tensor) -> Tensor:
        return x + half if self.residual_first else half + x


@dataclass(frozen=True)
class Gated:
    """The pieces of a gated MLP: ``down(act(gate(x)) * up(x))``."""

    gate: nn.Module
    up: nn.Module
    down: nn.Module
    act: Callable[[Tensor], Tensor]


class View:
    """What views have in common.

    example: fields beside the defaults of the class's configuration with which an instance shows what methods can do on the
    family; most need none. home: the module that holds the class, where it is not at the top of transformers.
    """

    example: ClassVar[Mapping[str, Any]] = {}
    home: ClassVar[str | None] = None


class Encoder(View):
    """View of a vision encoder.

    prefix: special tokens in front of the patches. has_class: the first of them is a trained class token. packed: all pictures
    travel in one sequence (no batch axis), so tokens cannot leave inside a block. joint: a packed encoder whose attention sees
    all pictures in one call, kept apart by a mask, so that each query is multiplied with the keys of all. groups: a packed
    encoder from which whole merge groups may leave before it runs (`shortened`); outputs: where its output holds what is made of
    groups. resizable: it takes pictures of other sizes as pixels; fixed: what to say where it does not, why and what would work.
    pooling: the head that is handed a token mask as its second argument, where there is one. pools_special: the head's mean over
    tokens has special tokens in it. functional: its attention calls torch's `scaled_dot_product_attention` itself and nothing of
    transformers' registry. maps: its blocks take and give maps (B, H, W, D), not lists of tokens; window: the side of the windows
    in which some of them attend. argument: what `entrance` calls the pixels. gated_mlp: whether MLPs are. pixel_mean, pixel_std:
    how the family's processor normalises pixels unless told otherwise. example, home: see `View`.
    """

    prefix: int = 0
    has_class: bool = False
    packed: bool = False
    joint: bool = False
    groups: bool = False
    outputs: tuple[str, ...] = ("pooler_output",)
    resizable: bool = True
    fixed: tuple[str, str] = ("takes flattened patches, not pictures", "a smaller max_num_patches in its processor, or pool")
    pooling: nn.Module | None = None
    pools_special: bool = False
    functional: bool = False
    maps: bool = False
    window: int = 0
    argument: str = "pixel_values"
    gated_mlp: bool = False
    pixel_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def name(self) -> str:
        return type(self.model).__name__

    def check(self, top: nn.Module) -> None:
        """Raise `Unsupported` where this very model, held by `top` (itself or a model with a head), is one that no method can act
        on, whatever it is."""

    @property
    def entrance(self) -> nn.Module:
        """The module that is called with the pixels first: the model, unless it is used without being called itself."""
        return self.model

    @property
    def exit(self) -> nn.Module:
        """The module whose output is, or starts with, the encoder's tokens."""
        return self.model

    @property
    def blocks(self) -> list[nn.Module]:
        raise NotImplementedError

    def parts(self, block: nn.Module) -> Parts:
        raise NotImplementedError

    def handed(self, block: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a block hands to its attention beside the tokens, given what it is handed itself: masks (B or 1, H or 1, N or 1,
        N) and pairs of rotary tables (P, d), all for the full sequence. They are cut to the tokens that are left."""
        return kwargs

    def attend(
        self, block: nn.Module, call: Callable[..., Any], x: Tensor, lattice: Lattice | None, given: tuple, handed: dict[str, Any]
    ) -> Any:
        """A block's attention `call` on tokens x (B, N, D), which form a `lattice` where blocks take maps, and what else the
        block hands on."""
        return call(x, *given, **handed)

    def listed(self, output: Tensor) -> Tensor:
        """(B, N, D) the tokens in what the encoder gives."""
        return output

    def arranged(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs with which the tokens stand as `geometry` says; raises where they cannot."""
        return inputs

    @property
    def probe(self) -> nn.Module | None:
        """The head, or the part of it, in which a query of its own attends to all tokens; None where there is none."""
        return None

    def averaged(self, top: nn.Module) -> nn.Module | None:
        """The module that is handed the mean of all patches, in this model or in `top`; None where no head averages."""
        return None

    def pooled(self, features: Tensor, weight: Tensor) -> Tensor:
        """(B, D) what `averaged` is handed, for tokens (B, N, D) that stand for `weight` (B, N) patches each."""
        share = weight / weight.sum(1, keepdim=True)
        return torch.einsum("bn,bnd->bd", share.to(features.dtype), features)

    def attention(self, block: nn.Module) -> nn.Module:
        """The module that calls the attention function (or holds the one that does)."""
        return self.parts(block).attention

    @property
    def patch_size(self) -> int:
        size = self.model.config.patch_size
        return size if isinstance(size, int) else size[0]

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        """Patches per column and row for pixel values (B, C, H, W)."""
        return pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size

    def geometry(self, inputs: Inputs) -> list[Geometry]:
        """One geometry for each picture of the batch."""
        pixels = inputs["pixel_values"]
        return [Geometry.picture(*self.grid(pixels))] * pixels.shape[0]

    def token_mask(self, inputs: Inputs) -> Tensor | None:
        """(B, N) true where a patch is real; None when all are."""
        return None

    def patches(self, pixels: Tensor) -> Tensor:
        """Pixel values of each patch by channel (..., C, V), for pixel values as the encoder takes them."""
        return cut(pixels, self.patch_size)

    def grey(self, inputs: Inputs, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None) -> Tensor:
        """(B, N, V) the grey values 0..255 of every patch, de-normalised; B is 1 where the encoder is packed."""
        patches = self.patches(inputs["hidden_states"])[None] if self.packed else self.patches(inputs["pixel_values"])
        return grey(patches, self.pixel_mean if mean is None else mean, self.pixel_std if std is None else std)

    def shortened(self, inputs: Inputs, kept: Tensor) -> dict:
        """Inputs of a packed encoder for the patches numbered `kept` alone, ascending, whole merge groups; each at its original
        position, in the sequence (and window) it had."""
        raise NotImplementedError

    def smaller(self, inputs: Inputs, picture: Callable[[Tensor, tuple[int, int], int], Tensor], grid: tuple[int, int]) -> dict:
        """Inputs for the same encoder on a smaller picture of `grid` patches, position embeddings interpolated."""
        small = {**inputs, "pixel_values": picture(inputs["pixel_values"], grid, self.patch_size)}
        if "interpolate_pos_encoding" in signature(self.entrance.forward).parameters:
            small["interpolate_pos_encoding"] = True
        return small

    @property
    def checkpointing(self) -> bool:
        """Whether blocks run a second time in the backward pass."""
        return self.model.training and getattr(self.blocks[0], "gradient_checkpointing", False)

    def unpack(self, record: list[Tensor], inputs: Inputs) -> Tensor:
        """One layer's record, per attention call (packed encoders call once per picture or window), in the order of patches."""
        return record[0]

    def keys(self, block: int, n: int) -> int:
        """Keys each token attends to in a block, of n tokens in its picture."""
        return n

    def shape(self, depth: int) -> Shape:
        """What a learned method builds its modules for; `depth` blocks feed what is handed on."""
        return Shape(self.dims[0], self.heads, depth, self.usual_patches, self.prefix)

    @property
    def heads(self) -> int:
        """Attention heads of a block."""
        config = self.model.config
        return getattr(config, "num_attention_heads", None) or config.num_heads

    @property
    def usual_patches(self) -> int:
        """Patches of a picture of the size in the configuration."""
        config = self.model.config
        if not hasattr(config, "image_size"):
            return config.num_patches
        sides = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size,) * 2
        return (sides[0] // self.patch_size) * (sides[1] // self.patch_size)

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @property
    def mlp_width(self) -> int:
        return self.model.config.intermediate_size

    @property
    def dims(self) -> tuple[int, int, bool]:
        """Width, MLP width and whether the MLP is gated, for counting FLOPs."""
        return self.width, self.mlp_width, self.gated_mlp


class VisionLanguage(View):
    """View of a vision-language model.

    base: the module without the head, which sees `input_ids` and pixels. decoder: its language model, which sees embeddings and
    is called `language` there. projector: the module that maps encoder features one by one to embeddings, None where there is
    none. mixes: patches are mixed into tokens on the way (patch mergers, pooling, interpolation), so tokens cannot leave inside
    the encoder one by one, and methods of the site encoder act on what comes out. rotary_rows: rows of the position ids.
    videos: it encodes them by a method of their own. told_by_prompt: only the prompt says which pictures make one image
    (`prompted`). marks: what stands in the prompt between the tokens of one image; it is text to the model, and stays. deepstack:
    the decoder's argument with features that are added to visual tokens behind its first layers, and its method that adds them.
    masked_above: `base` makes the attention masks, so that some tokens see those behind them. needed: arguments without which it
    does not know which ones.
    """

    language: str = "language_model"

    projector: nn.Module | None = None
    mixes: bool = False
    rotary_rows: int = 1
    told_by_prompt: bool = False
    videos: bool = False
    marks: str = ""
    deepstack: tuple[str, str] | None = None
    masked_above: bool = False
    needed: tuple[str, ...] = ()

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.base = model.model if hasattr(getattr(model, "model", None), self.language) else model
        self.decoder = getattr(self.base, self.language)
        self.encoder = self.vision()

    @property
    def name(self) -> str:
        return type(self.model).__name__

    def vision(self) -> Encoder:
        raise NotImplementedError

    def check(self) -> None:
        """Raise `Unsupported` where this very model is configured in a way that no method can act on."""

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.decoder.layers)

    def attention(self, layer: nn.Module) -> nn.Module:
        return layer.self_attn

    def queries_keys(self, layer: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, H, L, d) and k (B, Hk, L, d) of a layer after RoPE, from the hidden states in front of it."""
        attention = self.attention(layer)
        x = layer.input_layernorm(hidden)
        shape = (*x.shape[:-1], -1, attention.head_dim)
        q, k = attention.q_proj(x).view(shape), attention.k_proj(x).view(shape)
        q = attention.q_norm(q) if hasattr(attention, "q_norm") else q
        k = attention.k_norm(k) if hasattr(attention, "k_norm") else k
        return self._rotate(layer)(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    def rotated(self, layer: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries or keys x (B, H, L, d) rotated by cos and sin (B, L, d), the way the family pairs its channels."""
        turned: Tensor = self._rotate(layer)(x, x, cos, sin)[0]
        return turned

    def _rotate(self, layer: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
        """How a layer turns queries and keys: f(q, k, cos, sin)."""
        rotate: Callable[..., tuple[Tensor, Tensor]] = sys.modules[type(self.attention(layer)).__module__].apply_rotary_pos_emb
        return rotate

    def keys_values(self, layer: nn.Module, normed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """k after RoPE and v (B, Hk, L, d) of a layer, from its normed hidden states."""
        attention = self.attention(layer)
        shape = (*normed.shape[:-1], -1, attention.head_dim)
        k, v = attention.k_proj(normed).view(shape), attention.v_proj(normed).view(shape)
        k = attention.k_norm(k) if hasattr(attention, "k_norm") else k
        k = k.transpose(1, 2)
        return self._rotate(layer)(k, k, cos, sin)[1], v.transpose(1, 2)

    def parts(self, layer: nn.Module) -> Parts:
        """The pieces of a pre-norm decoder layer, which may norm what its halves add too (`scale1`, `scale2`)."""
        names = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
        after = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
        if all(hasattr(layer, name) for name in (*names, *after)):
            norm1, attention, scale1, mlp, norm2, scale2 = (getattr(layer, name) for name in (*names, *after))
            return Parts(norm1, attention, norm2, mlp, scale1=scale1, scale2=scale2)
        if any(not hasattr(layer, name) for name in names) or any(hasattr(layer, name) for name in after):
            raise Unsupported(
                f"{self.name} has decoder layers of its own kind ({type(layer).__name__}), whose halves jeton cannot tell apart; "
                f"use a method that only removes tokens, e.g. fastv."
            )
        return Parts(*(getattr(layer, name) for name in names))

    def gated(self, layer: nn.Module) -> Gated:
        """The pieces of a layer's gated MLP."""
        mlp = getattr(layer, "mlp", None)
        names = ("gate_proj", "up_proj", "down_proj", "act_fn")
        if any(not hasattr(mlp, name) for name in names):
            raise Unsupported(
                f"{self.name} has no gated MLP with separate gate and up projections ({type(mlp).__name__}), so its neurons "
                f"cannot be read; use a method that reads attention, e.g. fastv."
            )
        return Gated(*(getattr(mlp, name) for name in names))

    @property
    def rotary(self) -> nn.Module:
        return self.decoder.rotary_emb

    def softcap(self, layer: nn.Module) -> float | None:
        """Where a layer bends its attention's logits, the number they stay below."""
        return None

    @property
    def windowed(self) -> bool:
        """Whether layers of the language model see a window of columns only, all of them or some."""
        config = self.decoder.config
        kinds = getattr(config, "layer_types", None)
        return getattr(config, "sliding_window", None) is not None and (kinds is None or "sliding_attention" in kinds)

    @property
    def checkpointing(self) -> bool:
        """Whether layers run a second time in the backward pass."""
        return self.decoder.training and getattr(self.layers[0], "gradient_checkpointing", False)

    @property
    def feature_block(self) -> int:
        """The encoder block whose output is handed on."""
        index = getattr(self.model.config, "vision_feature_layer", -1)
        index = index if isinstance(index, int) else index[-1]
        depth = len(self.encoder.blocks)
        return index - 1 if index >= 0 else depth + index

    def streams(self) -> dict[str, str]:
        """Kinds of pictures and the method of `base` that encodes them."""
        kinds = ("image", "video") if self.videos else ("image",)
        return {kind: f"get_{kind}_features" for kind in kinds}

    def geometry(self, inputs: Inputs, stream: str) -> list[Geometry]:
        """One geometry for each image (or video) of one encoder call, in order."""
        raise NotImplementedError

    def prompted(self, geometry: tuple[Geometry, ...], input_ids: Tensor, visual: Tensor) -> tuple[Geometry, ...]:
        """The images that prompts (B, L) with `visual` columns show, of the pictures that were encoded, in the same order."""
        return geometry

    def visual(self, input_ids: Tensor, stream: str) -> Tensor:
        """(B, L) true at the columns that hold visual tokens of this kind."""
        return input_ids == getattr(self.model.config, f"{stream}_token_id")

    @property
    def projection(self) -> float:
        """FLOPs of the projector for one token."""
        parts = [] if self.projector is None else self.projector.modules()
        return float(sum(2 * part.in_features * part.out_features for part in parts if isinstance(part, nn.Linear)))

    def between(self, length: int, album: Album) -> float:
        """FLOPs of what stands between encoder and language model in the place of a projector, for these pictures in prompts of
        `length` tokens."""
        return 0.0

    @property
    def dims(self) -> tuple[int, int, int, bool]:
        """Width, key/value width, MLP width and whether the MLP is gated, of the language model."""
        config = self.decoder.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return config.hidden_size, config.num_key_value_heads * head, config.intermediate_size, True
