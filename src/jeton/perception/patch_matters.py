"""Patch Matters: parts of an image are captioned several times, and what holds becomes the caption of the whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL.Image import Image
from torch import Tensor

from ..ops.boxes import area, clip, hull, intersection, iou, merge_neighbours, quadrants
from ..registry import register
from ._common import Groups, Statement, Templates, chat, crop, numbered, read_groups, reliable, sentences, templates
from .experts import Captioner, Detection, Detector, LanguageModel, Scorer

# neighbouring quadrants, of the order top left, top right, bottom left, bottom right
PAIRS = ((0, 1), (1, 3), (3, 2), (2, 0))


@dataclass(frozen=True)
class Region:
    """A part of the image: `box` (4,) in pixels, the texts about it, the sentences believed, and the caption made of them
    (empty where nothing is believed). `groups` is None where the language model's grouping could not be read: then all
    sentences are believed."""

    box: Tensor
    texts: tuple[str, ...]
    groups: Groups | None
    kept: tuple[str, ...]
    caption: str


@dataclass(frozen=True)
class Description:
    """The caption and what it was made of: the caption of the whole image alone, the main region (None where it was not
    looked at), the four quadrants, and the regions that entered the caption. `problems` says which answers could not be
    read."""

    caption: str
    overall: str
    main: Region | None
    quadrants: tuple[Region, ...]
    merged: tuple[Region, ...]
    problems: tuple[str, ...]


@register(
    title="Patch Matters: Training-free Fine-grained Image Caption Enhancement via Local Perception",
    year=2025,
    source="arXiv:2504.06666",
    family="perception",
    stage="captioning",
)
@dataclass(eq=False)
class PatchMatters:
    """Detailed captions with fewer hallucinations, from frozen experts (see `jeton.perception.experts`).

    1. Divide. Detected boxes scored above `sure` (the best two where none is, if there are two) whose IoU exceeds
       `neighbours` become one; each quadrant of the image grows to hold the boxes that lie in it with more than `inside` of
       their area. The main region is the hull of the objects that a short caption speaks of (matched by the language model),
       of all objects if it names none.
    2. Caption each region `count` times at temperature `varied`, the image once at `steady`. A main region whose IoU with the
       image exceeds `main` says nothing new and is left out.
    3. Within a region the language model sorts the sentences of its captions: what several say is kept; of contradicting ones the
       best is kept if it scores above `believe` on the region's crop; what one alone says is kept if it does. It writes the
       region's caption from the kept sentences. The main region's goes into the caption of the image.
    4. Neighbouring quadrants whose IoU exceeds `pair` are grouped and filtered in the same way, from their two captions, on
       the hull of both. A quadrant that is part of no pair stays as it is.
    5. The language model merges the caption of the image with those of the at most four regions and their coordinates.

    A region of which nothing is believed is not written about. An answer that does not keep to its format is reported in
    `problems`, and everything is kept: all sentences, or all detected boxes. `prompts` replaces the texts in
    patch_matters.toml.

    The released code reads the captions of neighbouring regions instead of three of one, drops a quadrant next to two merged
    pairs, writes captions from the unfiltered texts too, and where no object is named takes the whole image for the main
    region; not so here. It scores what one quadrant of a pair alone says on that quadrant rather than on the hull:
    `unique_on="own"`. Grouping is asked at `steady`, as there.
    """

    captioner: Captioner
    detector: Detector
    scorer: Scorer
    language_model: LanguageModel
    question: str = "Describe this image in detail."
    short_question: str = "Describe this image in one short sentence."
    count: int = 3
    varied: float = 0.7
    steady: float = 0.2
    writing: float = 0.6
    sure: float = 0.3
    neighbours: float = 0.3
    inside: float = 0.3
    main: float = 0.4
    pair: float = 0.4
    believe: float = 0.3
    unique_on: str = "hull"
    prompts: Templates = field(default_factory=lambda: templates("patch_matters"), repr=False)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"each region must be captioned at least once, got count={self.count}.")
        if self.unique_on not in ("hull", "own"):
            raise ValueError(f'unique_on must be "hull" or "own", got {self.unique_on!r}.')
        missing = set(templates("patch_matters")) - set(self.prompts)
        if missing:
            raise ValueError(f"prompts lacks {', '.join(sorted(missing))}.")

    def __call__(self, image: Image) -> Description:
        problems: list[str] = []
        objects = self.objects(image)
        boxes = self.divide(objects, image)
        main = self.main_box(objects, image, problems)
        if main is not None:
            boxes = torch.cat([boxes, main[None]])
        texts = self.captions(image, boxes)
        regions = self.aggregate(image, boxes, texts, "caption", problems)
        overall = whole = self.captioner([image], self.question, self.steady)[0]
        if main is not None and regions[4].caption:
            enriched = chat(self.prompts["enrich"], overall=overall, main=regions[4].caption)
            whole = self.language_model([enriched], self.writing)[0]
        merged = self.neighbouring(image, regions[:4], problems)
        caption = self.merge(image, whole, merged)
        return Description(
            caption, overall, regions[4] if main is not None else None, tuple(regions[:4]), tuple(merged), tuple(problems)
        )

    # -- divide ----------------------------------------------------------------------------------------------------------

    def objects(self, image: Image) -> list[Detection]:
        """The detections to go by, those outside the image left out."""
        found = sorted(self.detector(image), key=lambda one: -one.score)
        boxes = clip(_tensor(found), image.width, image.height)
        found = [one for one, real in zip(found, (area(boxes) > 0).tolist(), strict=True) if real]
        sure = [one for one in found if one.score > self.sure]
        return sure or (found[:2] if len(found) > 1 else [])

    def divide(self, objects: Sequence[Detection], image: Image) -> Tensor:
        """(4, 4) the quadrants, grown to hold the objects near them."""
        grid = quadrants(image.width, image.height)
        boxes = merge_neighbours(clip(_tensor(objects), image.width, image.height), self.neighbours)
        near = intersection(grid, boxes) / area(boxes) > self.inside
        return torch.stack([hull(torch.cat([grid[at : at + 1], boxes[near[at]]])) for at in range(4)])

    def main_box(self, objects: Sequence[Detection], image: Image, problems: list[str]) -> Tensor | None:
        """(4,) the hull of the objects a short caption speaks of; None where there is none or it is most of the image."""
        if not objects:
            return None
        labels = list(dict.fromkeys(one.label for one in objects))
        said = self.captioner([image], self.short_question, self.steady)[0]
        ask = chat(self.prompts["match"], caption=said, labels=", ".join(labels))
        answer = self.language_model([ask], self.steady)[0]
        names = re.findall(r"\[([^\[\]]*)\]", answer)
        if not names:
            problems.append(f"match: {answer!r}")
        named = {name.strip(" '\"").lower() for name in names[-1].split(",")} if names else set()
        chosen = [one for one in objects if one.label.lower() in named] or list(objects)
        box = hull(clip(_tensor(chosen), image.width, image.height))
        whole = box.new_tensor([[0, 0, image.width, image.height]])
        return None if iou(box[None], whole).item() > self.main else box

    # -- caption and aggregate -------------------------------------------------------------------------------------------

    def captions(self, image: Image, boxes: Tensor) -> list[tuple[str, ...]]:
        """For each box, `count` captions of its crop."""
        crops = [crop(image, box) for box in boxes for _ in range(self.count)]
        said = self.captioner(crops, self.question, self.varied)
        if len(said) != len(crops):
            raise ValueError(f"the captioner gave {len(said)} captions for {len(crops)} images.")
        return [tuple(said[at : at + self.count]) for at in range(0, len(said), self.count)]

    def aggregate(
        self,
        image: Image,
        boxes: Tensor,
        texts: Sequence[tuple[str, ...]],
        name: str,
        problems: list[str],
        own: Sequence[Tensor] | None = None,
    ) -> list[Region]:
        """One region for each box (R, 4): its texts sorted, filtered and rewritten. `own` gives, for each region, the boxes
        (texts, 4) that a sentence only one text has is scored on; by default the region's own."""
        asked = [chat(self.prompts["group"], count=len(some), texts=numbered(some, "Text")) for some in texts]
        answers = self.language_model(asked, self.steady) if asked else []
        groups, kept = [], []
        for at, (some, answer) in enumerate(zip(texts, answers, strict=True)):
            group = read_groups(answer, len(some))
            groups.append(group)
            if group is None:
                problems.append(f"{name} {at + 1}: {answer!r}")
                kept.append(list(dict.fromkeys(sentence for text in some for sentence in sentences(text))))
            else:
                places = None if own is None else own[at]
                kept.append(self._filter(image, boxes[at], group, places))
        written = [chat(self.prompts["write"], statements="\n".join(f"- {one}" for one in some)) for some in kept if some]
        captions = iter(self.language_model(written, self.writing) if written else [])
        return [
            Region(box, some, group, tuple(believed), next(captions) if believed else "")
            for box, some, group, believed in zip(boxes, texts, groups, kept, strict=True)
        ]

    def _filter(self, image: Image, box: Tensor, groups: Groups, own: Tensor | None) -> list[str]:
        def score(statements: Sequence[Statement]) -> list[float]:
            scores = self.scorer(crop(image, box), [one.text for one in statements])
            if own is not None:
                for at, one in enumerate(statements):
                    if one in groups.unique:
                        scores[at] = self.scorer(crop(image, own[one.source - 1]), [one.text])[0]
            return scores

        return reliable(groups, score, self.believe)

    def neighbouring(self, image: Image, regions: Sequence[Region], problems: list[str]) -> list[Region]:
        """Pairs of quadrants that overlap, as one region each; then the quadrants that are in no pair."""
        boxes = torch.stack([region.box for region in regions])
        overlap = iou(boxes, boxes).tolist()
        pairs = [(a, b) for a, b in PAIRS if overlap[a][b] > self.pair and regions[a].caption and regions[b].caption]
        joined: list[Region] = []
        if pairs:
            hulls = torch.stack([hull(boxes[list(pair)]) for pair in pairs])
            texts = [(regions[a].caption, regions[b].caption) for a, b in pairs]
            own = [boxes[list(pair)] for pair in pairs] if self.unique_on == "own" else None
            joined = self.aggregate(image, hulls, texts, "pair", problems, own)
        covered = {at for pair in pairs for at in pair}
        return joined + [region for at, region in enumerate(regions) if at not in covered]

    def merge(self, image: Image, whole: str, regions: Sequence[Region]) -> str:
        """The final caption."""
        regions = [region for region in regions if region.caption]
        if not regions:
            return whole
        size = torch.tensor([image.width, image.height] * 2)
        places = ["[" + ", ".join(f"{edge:.2f}" for edge in (region.box / size).tolist()) + "]" for region in regions]
        told = numbered([f"{place} {region.caption}" for place, region in zip(places, regions, strict=True)], "Region")
        return self.language_model([chat(self.prompts["merge"], count=len(regions), overall=whole, regions=told)], self.steady)[0]


def _tensor(objects: Sequence[Detection]) -> Tensor:
    """(N, 4)."""
    return torch.tensor([one.box for one in objects], dtype=torch.float32).reshape(-1, 4)
