"""QuoTA: a helper model rates the frames of a video against the question, and they share the token budget by their ratings."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..method import Budget, Given, Method, Need, Promise, Signals, check_keep, register
from ..ops import resize
from ..ops.budget import allocate, count, counts, proportional, unit_sizes
from ..ops.grid import boxes
from ..tokens import Reduction, Tokens

RESIZE = ("bilinear", "adaptive", "linspace", "merge", "separable")


@register(
    title="QuoTA: Query-oriented Token Assignment via CoT Query Decouple for Long Video Comprehension",
    year=2025,
    source="arXiv:2503.08689",
    family="vlm",
    stage="entry",
    headline="+3.2 % on average over six video benchmarks at the same token budget",
)
@dataclass(frozen=True)
class Quota(Method):
    """Share a fixed budget between frames by how much each has to do with the question, and shrink each grid to its share.

    Frame f with score s_f gets c_f = floor(K s_f^power / sum of s^power) of the K tokens; a frame with 0 is dropped. Where all
    scores are 0, and where none are given, all frames weigh the same. The shares are realised by `resize`: "bilinear" (v1 of
    the release) interpolates the frame's grid to floor(sqrt(c)) rows and columns, one side longer by one if that still fits
    (on a grid that is not square, in its proportions); "adaptive" (v2) averages cells of that grid; "linspace" (v3) picks c
    tokens evenly; "merge" (v4) merges them down to c by rounds of bipartite soft matching; "separable" (v5) does so along the
    rows and then along the columns of the grid.

    `scores`: one list of numbers from 0 to 1 for each video of the batch, or a function that gives these lists when videos are
    encoded. They come from a scorer, a callable ``scorer(frames, query) -> scores`` such as `FrameScorer`; the query may have
    been split up by a `QueryDecoupler`. Pictures that are no video weigh the same, crops included.

    A prompt that is written already has room for a frame's own tokens and no more. So no share is above those, in any of the
    forms, and what is over goes to the other frames in the same proportion; the release caps all forms but v1, which may enlarge
    a frame. `enlarged` does that, on features before the prompt is written. `keep` is K, of which grids and floors leave some
    unused; the default is the paper's 64 frames' worth of 96. If no share comes to one token, the largest get one each. Merged
    tokens count by their size over all rounds, while the release forgets sizes after each; separable merging keeps columns in
    their order, which the release gives up.
    """

    site = "entry"
    newlines = "drop"
    keep: int | float = 64 / 96
    power: float = 2.0
    resize: str = "bilinear"
    scores: Sequence[Any] | Callable[[], Sequence[Any]] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if isinstance(self.power, bool) or not isinstance(self.power, int | float) or not self.power > 0:
            raise ValueError(f"power, to which scores are raised, must be above 0, got {self.power!r}.")
        if self.resize not in RESIZE:
            raise ValueError(f"resize must be one of {', '.join(RESIZE)}, got {self.resize!r}.")
        if self.scores is not None and not callable(self.scores) and not isinstance(self.scores, Sequence | Tensor):
            raise TypeError(f"scores must be a list of numbers for each video, or a function that gives it, got {self.scores!r}.")

    def needs(self) -> dict[str, Need]:
        return {} if self.scores is None else {"scores": Given(values=self.scores)}

    def promise(self, n: int, depth: int = 12) -> Promise:
        return Promise(Budget(self.keep).count(n), exact=False)

    def reduce(self, tokens: Tokens, signals: Signals | None = None) -> Reduction:
        n, place = len(tokens), tokens.place
        if place is None:
            raise ValueError("quota resizes the grids of frames, but these tokens have no place; use uniform or divprune.")
        k = count(self.keep, n)
        if k == n and tokens.mask is None:
            return Reduction.identity(len(tokens.features), n, tokens.device)
        sizes = unit_sizes(place.unit, place.units, tokens.real & (place.unit >= 0))
        scores = signals["scores"] if signals and "scores" in signals else torch.ones_like(sizes, dtype=torch.float32)
        share = frame_budgets(scores, counts(self.keep, sizes.sum(1)), sizes, self.power)
        if self.resize == "linspace":
            return resize.linspace(place, share, k, tokens.mask)
        if self.resize == "merge":
            return resize.merged(tokens, share, k)
        box = boxes(place, tokens.mask)
        rows, cols = resize.grid_within(share, box.height, box.width)
        if self.resize == "separable":
            return resize.merged_by_axes(tokens, rows, cols, k)
        return (resize.bilinear if self.resize == "bilinear" else resize.adaptive)(place, rows, cols, k, tokens.mask)


def frame_budgets(scores: Tensor, total: Tensor | int, caps: Tensor | None = None, power: float = 2.0) -> Tensor:
    """(B, U) tokens of each frame: ``floor(total s^power / sum)`` of scores (B, U), those below 0 as 0. `caps` (B, U) are the
    most each can take (0: there is no such frame), and what is over goes to the others; without caps any number goes to each."""
    weight = scores.double().clamp(min=0) ** power
    there = torch.ones_like(weight, dtype=torch.bool) if caps is None else caps > 0
    weight = weight.masked_fill(~there, 0)
    weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, there.double())
    total = torch.as_tensor(total, device=weight.device).expand(weight.shape[0])
    caps = total[:, None].expand_as(weight).contiguous() if caps is None else caps
    share = (proportional(weight, total, caps) + 1e-9).floor().long()
    return torch.where(share.sum(1, keepdim=True) > 0, share, allocate(weight, total, caps))


def enlarged(features: Tensor, scores: Tensor, total: int, power: float = 2.0) -> list[tuple[int, Tensor]]:
    """The release's v1 on the features (F, H, W, D) of one video, before any prompt is written: (frame, grid (h, w, D)) for every
    frame that gets tokens, in time order. No share is capped, so a frame may get more tokens than it had."""
    share = frame_budgets(scores[None].to(features.device), total, power=power)
    rows, cols = resize.grid_within(share, features.shape[1], features.shape[2])
    out = []
    for frame, size in enumerate(zip(rows[0].tolist(), cols[0].tolist(), strict=True)):
        if size[0]:
            grid = F.interpolate(features[frame].permute(2, 0, 1)[None].float(), size, mode="bilinear", align_corners=False)
            out.append((frame, grid[0].permute(1, 2, 0).to(features.dtype)))
    return out


def frames_to_sample(seconds: float, base: int = 96, per_hour: int = 64) -> int:
    """How many frames of a video are looked at: `base`, and `per_hour` more for each hour, rounded down."""
    if not seconds >= 0:
        raise ValueError(f"a video lasts 0 seconds or more, got {seconds}.")
    return base + int(seconds / 3600 * per_hour)


def sample_frames(frames: int, rate: float, base: int = 96, per_hour: int = 64) -> tuple[list[int], list[float]]:
    """The numbers of the frames to look at, evenly spread from the first to the last of a video of `frames` at `rate` per second,
    and their times in seconds, which belong into the prompt."""
    if frames < 1 or not rate > 0:
        raise ValueError(f"a video has frames and a rate above 0, got {frames} frames at {rate} per second.")
    wanted = min(frames, frames_to_sample(frames / rate, base, per_hour))
    chosen = [0] if wanted == 1 else [i * (frames - 1) // (wanted - 1) for i in range(wanted)]
    return chosen, [i / rate for i in chosen]


# -- the question --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Query:
    """A question, and the objects one must see to answer it; none where seeing single objects does not answer it."""

    text: str
    objects: tuple[str, ...] = ()

    def about_a_frame(self) -> str:
        """What a scorer is asked about each frame."""
        if self.objects:
            asked = f"Is any of the following visible in this picture: {', '.join(self.objects)}?"
        else:
            asked = f"{self.text}\nDoes this picture show enough to answer the question above?"
        return f"{asked}\nA. Yes\nB. No\nReply with the letter of the right option only."


@dataclass(frozen=True)
class QueryDecoupler:
    """Splits a question up, in three steps of thought of a chat model: does answering it take seeing certain objects? Which ones?
    And which of these are things that can be seen? `chat` turns a message into a reply; `Chat` makes one of a model."""

    chat: Callable[[str], str]

    def __call__(self, question: str) -> Query:
        reply = self.chat(f"{_STEPS}\n\nQuestion: {question}")
        if not re.search(r"step\s*1\s*:\s*yes", reply, re.IGNORECASE):
            return Query(question)
        found = re.search(r"step\s*3\s*:\s*(\[[^\]]*\])", reply, re.IGNORECASE)
        return Query(question, _names(found[1]) if found else ())


_STEPS = """You help to find the frames of a video that matter for a question. Think in three steps and write one line for each.
Step 1: must certain physical objects be seen in the video to answer? Write "Step 1: yes" or "Step 1: no"; after "no", stop.
Step 2: which objects? Write "Step 2: " and a list of short names in quotes and square brackets, e.g. ["red kite", "gate"].
Step 3: leave only things with a body that a camera can see, no places in the picture, no ideas, not the video itself.
Write "Step 3: " and the list that is left, or "Step 3: null" if none is."""


def _names(text: str) -> tuple[str, ...]:
    """The strings of a list that a model wrote; nothing where it is no such list."""
    try:
        found = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return ()
    return tuple(name.strip() for name in found if isinstance(name, str) and name.strip())


@dataclass(frozen=True)
class Chat:
    """A transformers model (`model`, with its tokenizer or processor) that answers a message with text, greedily."""

    model: Any
    processor: Any
    max_new_tokens: int = 256

    @torch.no_grad()
    def __call__(self, message: str) -> str:
        turn = [{"role": "user", "content": [{"type": "text", "text": message}]}]
        text = self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        inputs = self.processor(text=[text], return_tensors="pt").to(self.model.device)
        answer = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        return self.processor.batch_decode(answer[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


@dataclass(frozen=True)
class FrameScorer:
    """Rates frames by a vision-language model of transformers with its processor: the probability, over the whole vocabulary, of
    the token `yes` as the first one of its answer to `Query.about_a_frame`. Each frame has its own prompt, `batch` at a time. The
    paper uses Qwen2-VL-2B."""

    model: Any
    processor: Any
    yes: str = "A"
    batch: int = 16

    @torch.no_grad()
    def __call__(self, frames: Sequence[Any], query: str | Query) -> Tensor:
        """(F,) scores of the frames, PIL pictures or arrays (h, w, 3), from 0 to 1."""
        query = Query(query) if isinstance(query, str) else query
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": query.about_a_frame()}]}]
        text = self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        token, scores = self._token(), []
        for start in range(0, len(frames), self.batch):
            part = list(frames[start : start + self.batch])
            inputs = self.processor(text=[text] * len(part), images=part, padding=True, return_tensors="pt")
            inputs = inputs.to(self.model.device)
            logits = self.model(**inputs).logits
            mask = inputs["attention_mask"]
            last = mask.shape[1] - 1 - mask.flip(1).to(torch.uint8).argmax(1)  # padding may stand on either side
            scores.append(logits[torch.arange(len(part), device=logits.device), last].float().softmax(1)[:, token])
        return torch.cat(scores) if scores else torch.zeros(0)

    def _token(self) -> int:
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        ids = tokenizer(self.yes, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(f"{self.yes!r} is {len(ids)} tokens to this model; choose a word for `yes` that is one.")
        return int(ids[0])
