"""What a method may look at and what it may change: the signals it declares, computed for it alone, and the rules for layers.

A signal is asked for by `Method.needs`; the engine computes it where it arises and hands it to `Method.reduce` by its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Need:
    """A signal a method declares. `layer` counts encoder blocks or language-model layers; negative counts from the one whose
    output is used (-1: the block that makes the features handed on); None means the block the method itself stands in. `heads`:
    the signal is (B, H, N), heads before tokens."""

    layer: int | None = None
    heads: ClassVar[bool] = False


@dataclass(frozen=True)
class ClassAttention(Need):
    """(B, H, N) attention of the class token over the row's tokens, after softmax over all keys (or the scaled logits).

    `joined`: queries and keys of all heads as one of full width (then H is 1). `last`: of the encoder's last block, whatever
    `layer` says; a model that takes the features of an earlier block runs it too."""

    layer: int | None = -1
    logits: bool = False
    joined: bool = False
    last: bool = False
    heads: ClassVar[bool] = True


@dataclass(frozen=True)
class MeanAttention(Need):
    """(B, H, N) attention of the mean query of a picture's tokens over them: what stands in for a class token where there is
    none."""

    layer: int | None = -1
    heads: ClassVar[bool] = True


@dataclass(frozen=True)
class ClassSimilarity(Need):
    """(B, H, N) softmax over all tokens of the inner product of the class token's attention value with theirs, not scaled."""

    layer: int | None = -1
    heads: ClassVar[bool] = True


@dataclass(frozen=True)
class ReceivedAttention(Need):
    """(B, N) attention each token receives, averaged over all queries and heads. Computed in slabs: no N x N map is stored,
    unless a small one that the block then attends with (`Method.ahead`)."""

    layer: int | None = -1


@dataclass(frozen=True)
class AnchorAttention(Need):
    """(B, N) attention each token receives from the picture's anchors, averaged over them and over heads. Anchors are the tokens
    that receive more than `threshold` times the mean (see `ReceivedAttention`); where none does, all are. Two passes in slabs:
    no N x N map is stored."""

    layer: int | None = -1
    threshold: float = 1.0


@dataclass(frozen=True)
class PatchEntropy(Need):
    """(B, N) entropy in bits of the histogram of each patch's 256 grey values. Pixels are brought back from the processor's
    normalisation by `mean` and `std` per channel; None for those the model family is trained with."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Keys(Need):
    """(B, N, d) attention keys averaged over heads; `joined`: of all heads side by side. `last` as for `ClassAttention`."""

    layer: int | None = -1
    joined: bool = False
    last: bool = False


class TextTower(Protocol):
    """Puts patches and questions into one space; `jeton.models.ClipText` is one."""

    width: int

    def similarity(self, patches: Tensor, questions: tuple[str, ...], end: str, normed: bool) -> Tensor:
        """(..., Q) similarity of patches (..., width), as the encoder's last block leaves them, with each question."""


@dataclass(frozen=True)
class TextSimilarity(Need):
    """(B, Q, N) similarity of every token of an encoder's output with each of Q questions, in the space of `tower`.

    `end`: the text feature is read at the end of the text ("eos") or at the last place of its padding ("last"). `normed`: patches
    pass the encoder's last norm before they are projected."""

    tower: TextTower | None = None
    questions: tuple[str, ...] = ()
    end: str = "eos"
    normed: bool = True
    heads: ClassVar[bool] = True


@dataclass(frozen=True)
class ClassLikeness(Need):
    """(B, N) how like the class token each token of an encoder's output is: the cosine, or with `metric` "l1" or "l2" the mean
    absolute or squared difference of their channels, negated."""

    metric: str = "cosine"


@dataclass(frozen=True)
class Values(Need):
    """(B, N, d) attention values averaged over heads."""

    layer: int | None = -1


IN_ENCODER = (
    ClassAttention,
    MeanAttention,
    ClassSimilarity,
    ReceivedAttention,
    AnchorAttention,
    PatchEntropy,
    Keys,
    Values,
    TextSimilarity,
    ClassLikeness,
)
OF_OUTPUT = (TextSimilarity, ClassLikeness)  # read from what the encoder hands out


@dataclass(frozen=True)
class LastAttention(Need):
    """(B, H, N) attention of the prompt's last token over the row's tokens, at a language-model layer, after softmax over all
    keys. None means the layer before the one the method stands in front of; with `ahead`, that very layer, computed from its own
    norm and projections before it runs."""

    layer: int | None = None
    ahead: bool = False
    heads: ClassVar[bool] = True


@dataclass(frozen=True)
class LastSimilarity(Need):
    """(B, H, N) softmax over all keys of the inner product of the last token's attention value with those of the row's tokens,
    scaled as attention is, at a language-model layer. None means the layer before the one the method stands in front of."""

    layer: int | None = None
    heads: ClassVar[bool] = True


@dataclass(frozen=True)
class LayerValues(Need):
    """(B, N, d) attention values averaged over heads, at a language-model layer. None means the layer before the one the method
    stands in front of."""

    layer: int | None = None


@dataclass(frozen=True)
class TextAttention(Need):
    """(B, N) attention of the text behind the row's image over the row's tokens, averaged over heads and raters, at a
    language-model layer, after softmax over all keys. None means the layer before the one the method stands in front of.

    Raters are the text tokens whose relevance to the image is above the mean: the softmax over this text of V Tᵀ, averaged over
    the visual tokens, from the embeddings at the entrance; with `raters` "all", or where none is above, all of the text. Where no
    text follows, the last token that is left of the prompt is the rater. With `peak`, the largest of the raters' attention
    (averaged over heads) instead of the mean.

    With `unbiased` attention is first divided by its bias by position, which rotary embeddings give a vector of ones (see
    `ops.rotation.bias`). With `strongest` only that many heads are averaged (all, where there are fewer): those in which the
    image has the most of the raters' attention, ties to the lowest."""

    raters: str = "relevant"
    peak: bool = False
    unbiased: bool = False
    strongest: int | None = None

    def __post_init__(self) -> None:
        if self.peak and self.strongest is not None:
            raise ValueError("peak is over the mean of all heads; leave strongest out, or peak.")


@dataclass(frozen=True)
class RaterRank(Need):
    """(B, 1) int64 rank of the matrix of raters' attention to the row's tokens (raters, N), averaged over heads, at a
    language-model layer. Raters and `layer` as for `TextAttention`."""

    raters: str = "relevant"


@dataclass(frozen=True)
class VisualAttention(Need):
    """(B, N) attention that each token of the row receives from the tokens of the same row, averaged over these queries and over
    heads, after softmax over all keys; of the language-model layer the method stands in front of, computed ahead."""


@dataclass(frozen=True)
class LayerKeys(Need):
    """(B, N, d) attention keys after RoPE, averaged over heads, of the language-model layer the method stands in front of."""


@dataclass(frozen=True, eq=False)
class Given(Need):
    """(B, U) numbers from outside, one for each frame of each video. `values`: one list of numbers for each video that is encoded
    together, in their order, or a function without arguments that gives these lists whenever videos are encoded. Where a model
    joins consecutive frames (Qwen2.5-VL: two) their numbers are averaged. Pictures that are no videos have 1."""

    values: Any = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Given) and self.values is other.values

    def __hash__(self) -> int:
        return id(self.values)

    def rows(self, frames: list[int]) -> Tensor:
        """(R, U) float32 for videos that have so many frames in the model, 0 behind the last."""
        lists = self.values() if callable(self.values) else self.values
        lists = [torch.as_tensor(each, dtype=torch.float32).flatten().cpu() for each in lists]
        if len(lists) != len(frames):
            raise ValueError(f"numbers are given for {len(lists)} videos, but {len(frames)} are encoded; give one list for each.")
        return torch.stack([self._fitted(each, count, max(frames)) for each, count in zip(lists, frames, strict=True)])

    @staticmethod
    def _fitted(numbers: Tensor, frames: int, width: int) -> Tensor:
        joined = -(-len(numbers) // frames)
        if len(numbers) == 0 or -(-len(numbers) // joined) != frames:
            raise ValueError(
                f"{len(numbers)} numbers are given for a video that has {frames} frames in the model; give one for each frame, "
                f"or for each of those that the model joins."
            )
        if not bool(torch.isfinite(numbers).all()):
            raise ValueError(f"the numbers given for the frames of a video must be finite, got {numbers.tolist()}.")
        parts = torch.stack([part.mean() for part in numbers.split(joined)])
        return torch.nn.functional.pad(parts, (0, width - frames))


@dataclass(frozen=True)
class PageRank(Need):
    """(B, N) importance of the row's tokens in a language-model layer: sqrt(mean over heads of p²), where p (L) begins as 1 / L
    on all L tokens of the prompt, text too, and becomes p M in each of `rounds`, with M = softmax(logits / temperature) under the
    layer's causal mask. `block` queries are looked at at a time. None means the layer before the one the method stands in front
    of."""

    temperature: float = 0.1
    rounds: int = 5
    block: int = 128


@dataclass(frozen=True)
class PairedText(Need):
    """(B, D) mean embedding of the text that belongs to the row's image, at the language model's entrance: the text between it
    and the next image of its prompt, behind the last image all that follows. Images side by side share the text behind them;
    where none follows, all text of the prompt counts."""


@dataclass(frozen=True)
class PromptNumber(Need):
    """(B,) number of the prompt in which the row's image stands; the images of a prompt are rows in prompt order."""


@dataclass(frozen=True)
class PixelVariance(Need):
    """(B, N) float32, site pixels only: how much the pixels of each token vary, as the encoder gets them (normalised). Of a patch
    it is the unbiased variance of each channel over time and pixels, averaged over channels; of a token made of several patches
    the largest. Special tokens have zero."""


@dataclass(frozen=True)
class Carried(Need):
    """(B, N) the score that an earlier part of the method with this id has handed on (`Reduction.score`), for the tokens that are
    left."""

    of: str = ""


@dataclass(frozen=True)
class Entered(Need):
    """(B, 1) how many tokens of the row entered the language model, whatever has left since."""


@dataclass(frozen=True)
class Neurons(Need):
    """(B, N, F) bool: which of the F gated activations ``act(gate x) * up x`` of a language-model layer's MLP are positive, for
    each token of the row. None means the layer before the one the method stands in front of. With `token`, (B, F) for one token
    of the row's prompt instead, counted from its end (1: the last). With `top` below 1, only that share of a token's positive
    activations, the largest, counts as positive."""

    token: int | None = None
    top: float = 1.0


@dataclass(frozen=True)
class NeuronCounts(Need):
    """(B, F) how many tokens of the row's prompt, text included, make each of the F gated activations of a language-model layer's
    MLP positive (`top` as in `Neurons`). None means the layer before the one the method stands in front of."""

    top: float = 1.0


@dataclass(frozen=True)
class Trained(Need):
    """The method's own modules (an nn.Module, in float32), trained beforehand; see `jeton.learned`."""


# -- what a method may change in a layer -------------------------------------------------------------------------------

WHO = ("decode", "context", "only_context", "visual")


@dataclass(frozen=True)
class Skip:
    """Some tokens run through a part of a language-model layer only.

    part: "ffn" (``x + attention``), "attention" (``x + ffn``), "block" (x as it is), or "parallel", where nothing is left out but
    both halves read the same normed input: ``x + attention(norm1 x) + ffn(norm1 x)``.
    who: "decode" (single tokens that continue a cache), "context" (those and the prompt), "only_context" (the prompt) or "visual"
    (the prompt's visual tokens).

    Every token leaves its keys and values in the layer's cache, computed by the layer from the token in front of it, so that all
    layers hold the same columns and tokens that are not skipped see what they always see.
    """

    part: str
    who: str = "decode"


@dataclass(frozen=True)
class CoreNeurons:
    """While decoding, the layer's MLP uses only its core neurons: the `share` of its gated activations that most tokens of the
    prompt made positive in prefill (ties to the lowest; `top` as in `Neurons`)."""

    share: float
    top: float = 1.0


Rule = Skip | CoreNeurons
