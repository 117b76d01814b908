"""Patch Matters: how the image is divided, which sentences are believed, who is asked what, and whether it helps."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch
from PIL import Image

from jeton.perception._common import Groups, Statement, crop, numbered, read_groups, reliable, sentences, templates
from jeton.perception.experts import Detection
from jeton.perception.patch_matters import PatchMatters

COLOURS = {
    "red": (220, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 220), "yellow": (230, 230, 0), "purple": (150, 0, 180),
    "orange": (250, 140, 0), "pink": (250, 160, 200), "brown": (120, 70, 30),
}  # fmt: skip


# -- the format of answers -----------------------------------------------------------------------------------------------

ANSWER = """Here is the result:

SAME
- "A dog lies on the grass."
CONTRADICTORY
- "The dog is brown." (1) | "The dog is black." (2) | "The dog is (almost) red." (3)
UNIQUE
- "A sign says "stop | go"." (2)
- "It rains." (1)
"""


def test_an_answer_in_the_agreed_form_is_read():
    groups = read_groups(ANSWER, 3)
    assert groups == Groups(
        ("A dog lies on the grass.",),
        ((Statement("The dog is brown.", 1), Statement("The dog is black.", 2), Statement("The dog is (almost) red.", 3)),),
        (Statement('A sign says "stop | go".', 2), Statement("It rains.", 1)),
    )
    assert read_groups("**SAME:**\n- none\n### CONTRADICTORY\n(none)\nUNIQUE\nNone.", 3) == Groups()


@pytest.mark.parametrize(
    "broken",
    [
        ANSWER.replace("UNIQUE", "SINGLE"),  # a heading is missing
        ANSWER + "SAME\n",  # or stands twice
        ANSWER.replace('(2)\n- "It', '\n- "It'),  # no number
        ANSWER.replace("(3)", "(4)"),  # there is no text 4
        ANSWER.replace("| ", ""),  # contradictions run into each other
        ANSWER.replace('- "The dog is brown." (1) | "The dog is black." (2) | ', "- "),  # one sentence contradicts nothing
        ANSWER + "I hope this helps!",
        "",
    ],
)
def test_any_other_answer_is_not(broken):
    assert read_groups(broken, 3) is None


def test_texts_are_cut_into_sentences_and_numbered():
    assert sentences("A dog. Is it 1.5 m tall?  Yes!\n\nNo end") == ["A dog.", "Is it 1.5 m tall?", "Yes!", "No end"]
    assert numbered(["a\n b", "c"], "Text") == "Text 1: a b\nText 2: c"


# -- what is believed ----------------------------------------------------------------------------------------------------


def scored(**scores):
    return lambda statements: [scores[one.text] for one in statements]


def pair(a="a", b="b"):
    return Groups(contradictory=((Statement(a, 1), Statement(b, 2)),))


def test_of_a_contradiction_the_best_is_believed_if_it_is_good():
    assert reliable(pair(), scored(a=0.6, b=0.4), 0.3) == ["a"]
    assert reliable(pair(), scored(a=0.4, b=0.6), 0.3) == ["b"]
    assert reliable(pair(), scored(a=0.2, b=0.25), 0.3) == []
    assert reliable(pair(), scored(a=0.3, b=0.3), 0.3) == [] and reliable(pair(), scored(a=0.4, b=0.4), 0.3) == ["a"]


def test_a_lone_sentence_must_score_above_the_threshold():
    groups = Groups(unique=(Statement("c", 1), Statement("d", 3)))
    assert reliable(groups, scored(c=0.31, d=0.30), 0.3) == ["c"]


def test_what_several_say_is_believed_unscored_and_said_once():
    def never(statements):
        raise AssertionError("nothing is doubtful")

    assert reliable(Groups(same=("e", "f", "e")), never, 0.3) == ["e", "f"]
    groups = Groups(("c",), pair().contradictory, (Statement("c", 1),))
    assert reliable(groups, scored(a=0.9, b=0.1, c=0.9), 0.3) == ["c", "a"]


# -- dividing ------------------------------------------------------------------------------------------------------------


def system(detections=(), **options):
    def silent(*_):
        raise AssertionError("not asked")

    return PatchMatters(silent, lambda image: list(detections), silent, silent, **options)


def seen(*boxes, score=0.9):
    return [Detection(box, score, f"thing {at}") for at, box in enumerate(boxes)]


def test_without_objects_the_quadrants_are_the_grid():
    image = Image.new("RGB", (101, 99))
    one = system()
    assert one.objects(image) == [] and one.main_box([], image, []) is None
    assert one.divide([], image).tolist() == [[0, 0, 50, 49], [50, 0, 101, 49], [0, 49, 50, 99], [50, 49, 101, 99]]


def test_quadrants_grow_to_hold_the_objects_that_lie_in_them():
    image = Image.new("RGB", (100, 100))
    crossing = (40.0, 10.0, 60.0, 20.0)  # half in each upper quadrant
    boxes = system().divide(seen(crossing), image)
    assert boxes.tolist() == [[0, 0, 60, 50], [40, 0, 100, 50], [0, 50, 50, 100], [50, 50, 100, 100]]
    leaning = (45.0, 10.0, 75.0, 20.0)  # one sixth left, five sixths right
    assert system().divide(seen(leaning), image)[:2].tolist() == [[0, 0, 50, 50], [45, 0, 100, 50]]
    assert system(inside=0.1).divide(seen(leaning), image)[0].tolist() == [0, 0, 75, 50]


def test_overlapping_objects_are_one_before_they_are_placed():
    image = Image.new("RGB", (100, 100))
    two = seen((30.0, 10.0, 50.0, 20.0), (36.0, 10.0, 60.0, 20.0))  # IoU 14 / 30; together they reach into both
    assert system().divide(two, image)[:2].tolist() == [[0, 0, 60, 50], [30, 0, 100, 50]]
    assert system(neighbours=0.5).divide(two, image)[:2].tolist() == [[0, 0, 60, 50], [36, 0, 100, 50]]


def test_objects_are_those_above_the_threshold_or_the_best_two():
    image = Image.new("RGB", (50, 50))
    three = [Detection((0, 0, 9, 9), score, str(score)) for score in (0.1, 0.31, 0.3)]
    assert [one.score for one in system(three).objects(image)] == [0.31]
    assert [one.score for one in system(three, sure=0.5).objects(image)] == [0.31, 0.3]
    assert system(three[:1]).objects(image) == []
    assert system([Detection((60, 0, 70, 9), 0.9, "outside")]).objects(image) == []


def test_the_main_region_is_the_hull_of_what_a_short_caption_speaks_of():
    image = Image.new("RGB", (100, 100))
    found = [
        Detection((10, 10, 20, 20), 0.9, "dog"),
        Detection((60, 60, 90, 90), 0.9, "Ball"),
        Detection((0, 0, 5, 5), 0.9, "dog"),
    ]
    asked = []

    def one(answer):
        def language_model(chats, temperature):
            asked.append((chats[0][1]["content"], temperature))
            return [answer]

        return PatchMatters(lambda *a: ["A dog plays."], None, None, language_model)

    problems = []
    assert one("[dog, sofa]").main_box(found, image, problems).tolist() == [0, 0, 20, 20]
    assert asked[0] == ("Sentence: A dog plays.\nNames: dog, Ball", 0.2)
    assert one("['ball']").main_box(found, image, problems).tolist() == [60, 60, 90, 90]
    assert one("[none]").main_box(found, image, problems) is None  # all of them, which is most of the image
    assert one("[none]").main_box(found[:1], image, problems).tolist() == [10, 10, 20, 20]
    assert not problems
    assert one("the dog").main_box(found[:1], image, problems).tolist() == [10, 10, 20, 20] and "the dog" in problems[0]


def test_crops_are_rounded_outwards_and_cut_to_the_image():
    image = Image.new("RGB", (10, 8))
    assert crop(image, torch.tensor([1.2, -3.0, 4.1, 7.5])).size == (4, 8)
    with pytest.raises(ValueError, match="shows nothing"):
        crop(image, torch.tensor([11.0, 0.0, 12.0, 5.0]))


# -- who is asked what ---------------------------------------------------------------------------------------------------


def scene(objects, size=120):
    """A grey picture with coloured blocks: {colour: (x, y, side)}."""
    pixels = np.full((size, size, 3), 128, np.uint8)
    for colour, (x, y, side) in objects.items():
        pixels[y : y + side, x : x + side] = COLOURS[colour]
    return Image.fromarray(pixels)


def visible(image):
    """{colour: pixels} in an image."""
    pixels = np.asarray(image).reshape(-1, 3)
    counts = {name: int((pixels == np.array(rgb)).all(1).sum()) for name, rgb in COLOURS.items()}
    return {name: count for name, count in counts.items() if count}


def boxes_of(objects):
    return [Detection((x, y, x + side, y + side), 0.9, colour) for colour, (x, y, side) in objects.items()]


def block(colour):
    return f"There is a {colour} block."


def named(text):
    return re.findall(r"There is a (\w+) block\.", text)


MARKS = {
    "You compare": "match", "Sort their sentences": "group", "reliable statements": "write", "Rewrite the first": "enrich",
    "Write one description of the whole": "merge",
}  # fmt: skip


class Scripted:
    """All experts at once, deterministic, and what they were asked."""

    def __init__(self, objects, omit=0.0, invent=0.0, blur=0.0, seed=0, group=None):
        self.found, self.omit, self.invent, self.blur, self.group = boxes_of(objects), omit, invent, blur, group
        self.draw, self.asked, self.scored, self.chats = random.Random(seed), [], [], []

    def caption(self, images, prompt, temperature):
        said = []
        for image in images:
            there = visible(image)
            colours = [
                c for c, pixels in there.items() if self.draw.random() >= self.omit * (2 if pixels < 0.02 * image.width**2 else 1)
            ]
            colours += [c for c in COLOURS if c not in there and self.draw.random() < self.invent]
            said.append(" ".join(map(block, colours)))
            self.asked.append((image.size, sorted(there), prompt, temperature, said[-1]))
        return said

    def score(self, image, texts):
        self.scored.append((image.size, tuple(texts)))
        there = visible(image)
        return [(0.6 if named(text)[0] in there else 0.1) + self.draw.uniform(-self.blur, self.blur) for text in texts]

    def speak(self, chats, temperature):
        return [self.answer(chat[0]["content"], chat[1]["content"], temperature) for chat in chats]

    def answer(self, rules, task, temperature):
        name = next(name for mark, name in MARKS.items() if mark in rules)
        self.chats.append((name, task, temperature))
        if name == "match":
            sentence, labels = task.splitlines()
            known = [label for label in labels.removeprefix("Names: ").split(", ") if label in named(sentence)]
            return f"[{', '.join(known) or 'none'}]"
        if name == "group":
            if self.group is not None:
                return self.group
            texts = [named(line) for line in task.splitlines()]
            every = list(dict.fromkeys(colour for text in texts for colour in text))
            same = [f'- "{block(c)}"' for c in every if sum(c in text for text in texts) > 1]
            alone = [
                f'- "{block(c)}" ({at})' for at, text in enumerate(texts, 1) for c in text if sum(c in t for t in texts) == 1
            ]
            return "\n".join(["SAME", *(same or ["- none"]), "CONTRADICTORY", "- none", "UNIQUE", *(alone or ["- none"])])
        if name == "write":
            return task.replace("- ", "").replace("\n", " ")
        if name == "enrich":
            return " ".join(map(block, dict.fromkeys(named(task))))
        regions = task.splitlines()[1:]  # merge: what no region bears out is left out
        return " ".join(map(block, dict.fromkeys(named(" ".join(regions)))))

    def system(self, **options):
        return PatchMatters(self.caption, lambda image: self.found, self.score, self.speak, **options)


QUARTERS = {"red": (10, 10, 30), "green": (80, 10, 30), "blue": (10, 80, 30), "yellow": (80, 80, 30)}


def test_three_captions_of_each_region_and_one_of_the_image():
    experts = Scripted(QUARTERS)
    told = experts.system()(scene(QUARTERS))
    question = "Describe this image in detail."
    regions = [((60, 60), [colour], question, 0.7, block(colour)) for colour in QUARTERS for _ in range(3)]
    whole = ((120, 120), sorted(QUARTERS), question, 0.2)
    assert experts.asked[0][:4] == (
        *whole[:2],
        "Describe this image in one short sentence.",
        0.2,
    )  # everything is named: no main region
    assert experts.asked[1:13] == regions and experts.asked[13][:4] == whole and len(experts.asked) == 14
    for region, colour in zip(told.quadrants, QUARTERS, strict=True):
        assert (
            region.texts == (block(colour),) * 3
            and region.groups == Groups(same=(block(colour),))
            and region.caption == block(colour)
        )
    assert told.main is None and told.problems == () and told.merged == told.quadrants
    assert sorted(named(told.caption)) == sorted(QUARTERS)


def test_the_language_model_is_asked_at_the_right_temperatures_with_coordinates():
    experts = Scripted(QUARTERS)
    experts.system()(scene(QUARTERS))
    asked = [(name, temperature) for name, _, temperature in experts.chats]
    assert asked == [("match", 0.2), *[("group", 0.2)] * 4, *[("write", 0.6)] * 4, ("merge", 0.2)]
    assert experts.chats[1][1] == "\n".join(f"Text {at}: {block('red')}" for at in (1, 2, 3))
    lines = experts.chats[-1][1].splitlines()
    assert lines[0].startswith("Picture: There is a ") and lines[4] == f"Region 4: [0.50, 0.50, 1.00, 1.00] {block('yellow')}"


def test_the_main_region_enters_the_caption_of_the_image():
    objects = {"red": (50, 50, 30)}
    experts = Scripted(objects)
    told = experts.system()(scene(objects))
    assert told.main.box.tolist() == [50, 50, 80, 80] and told.main.texts == (block("red"),) * 3
    assert [size for size, *_ in experts.asked].count((30, 30)) == 3
    assert ("enrich", f"Picture: {block('red')}\nMain part: {block('red')}", 0.6) in experts.chats
    assert Scripted(objects).system(main=0.05)(scene(objects)).main is None  # IoU of 1 / 16 is then too much


def test_quadrants_that_overlap_are_joined_and_the_others_stay():
    objects = {"red": (10, 10, 95)}  # lies in the upper left quadrant most, but in all of them with more than a tenth
    wide = {"blue": (0, 5, 30), "red": (30, 5, 30)}
    experts = Scripted({})
    experts.found = [Detection((10.0, 5.0, 110.0, 35.0), 0.9, "row")]
    told = experts.system()(scene(wide))
    assert told.quadrants[0].box.tolist() == [0, 0, 110, 60] and told.quadrants[1].box.tolist() == [10, 0, 120, 60]
    joined, *others = told.merged
    assert joined.box.tolist() == [0, 0, 120, 60] and joined.texts == tuple(one.caption for one in told.quadrants[:2])
    assert [one.box.tolist() for one in others] == [[0, 60, 60, 120], [60, 60, 120, 120]]
    assert len(experts.system(pair=0.9)(scene(wide)).merged) == 4
    experts = Scripted({})
    experts.found = [Detection((10.0, 10.0, 105.0, 105.0), 0.9, "all")]
    four = experts.system(inside=0.1)(scene(objects))
    hulls = [[0, 0, 120, 105], [10, 0, 120, 120], [0, 10, 120, 120], [0, 0, 105, 120]]
    assert [one.box.tolist() for one in four.merged] == hulls


def test_a_lone_sentence_of_a_pair_is_scored_on_the_hull_or_on_its_own_quadrant():
    wide = {"blue": (0, 5, 8), "red": (30, 5, 60)}  # blue is seen by the left quadrant alone
    sizes = {}
    for where in ("hull", "own"):
        experts = Scripted({})
        experts.found = [Detection((10.0, 5.0, 110.0, 35.0), 0.9, "row")]
        told = experts.system(unique_on=where)(scene(wide))
        assert sorted(named(told.merged[0].caption)) == ["blue", "red"]
        sizes[where] = [size for size, texts in experts.scored if texts == (block("blue"),)]
    assert sizes == {"hull": [(120, 60)], "own": [(120, 60), (110, 60)]}
    experts = Scripted({})
    experts.found = [Detection((10.0, 5.0, 110.0, 35.0), 0.9, "row")]
    told = experts.system(unique_on="own")(scene({"blue": (112, 5, 8), "red": (30, 5, 60)}))  # the right one alone
    assert sorted(named(told.merged[0].caption)) == ["blue", "red"]
    with pytest.raises(ValueError, match="unique_on"):
        Scripted({}).system(unique_on="both")


def test_an_answer_that_cannot_be_read_keeps_everything_and_says_so():
    experts = Scripted(QUARTERS, invent=0.5, group="I am sorry, I cannot do that.")
    told = experts.system()(scene(QUARTERS))
    assert len(told.problems) == 4 and "I am sorry" in told.problems[0] and told.problems[0].startswith("caption 1")
    for region in told.quadrants:
        assert region.groups is None
        assert list(region.kept) == list(dict.fromkeys(block(c) for text in region.texts for c in named(text)))
    assert not experts.scored


def test_a_region_of_which_nothing_is_believed_is_not_written_about():
    objects = {"red": (10, 10, 30)}
    experts = Scripted(objects)
    told = experts.system()(scene(objects))
    assert [region.caption for region in told.quadrants] == [block("red"), "", "", ""]
    assert len(experts.chats[-1][1].splitlines()) == 2  # the image and one region
    nothing = Scripted({})
    assert nothing.system()(scene({})).caption == "" and [name for name, *_ in nothing.chats] == ["group"] * 4


def test_own_prompts_are_used_and_must_be_complete():
    with pytest.raises(ValueError, match="lacks enrich, group, match, merge"):
        system(prompts={"write": {}})
    mine = {**templates("patch_matters"), "group": {"system": "Sort {count}.", "user": "{texts}"}}
    asked = []

    def speak(chats, temperature):
        asked.extend(chat[0]["content"] for chat in chats)
        return ["SAME\nCONTRADICTORY\nUNIQUE"] * len(chats)

    one = PatchMatters(lambda images, *_: ["x."] * len(images), lambda image: [], None, speak, prompts=mine, count=2)
    assert one(scene({})).caption == "x." and asked == ["Sort 2."] * 4
    with pytest.raises(ValueError, match="count=0"):
        system(count=0)
    short = PatchMatters(lambda images, *_: ["x."], lambda image: [], None, speak)
    with pytest.raises(ValueError, match="1 captions for 12"):
        short(scene({}))


# -- whether it helps ----------------------------------------------------------------------------------------------------


def quality(scorer_sees, invent=0.08):
    """Precision and recall of named colours over forty scenes: of the final captions and of single captions of the whole
    image."""
    right = {"final": 0, "single": 0}
    said, there = dict(right), 0
    for seed in range(40):
        draw = random.Random(1000 + seed)
        corners = draw.sample([(x, y) for x in (5, 40, 70, 100) for y in (5, 40, 70, 100)], 5)
        objects = {c: (x, y, draw.choice((8, 14))) for c, (x, y) in zip(draw.sample(list(COLOURS), 5), corners, strict=True)}
        experts = Scripted(objects, omit=0.25, invent=invent, blur=0.15, seed=seed)
        if not scorer_sees:
            experts.score = lambda image, texts: [1.0] * len(texts)
        told = experts.system()(scene(objects))
        there += len(objects)
        for name, text in (("final", told.caption), ("single", told.overall)):
            colours = set(named(text))
            said[name] += len(colours)
            right[name] += len(colours & set(objects))
    return {name: (right[name] / said[name], right[name] / there) for name in right}


def test_final_captions_are_more_precise_than_single_ones_and_miss_no_more():
    told = quality(scorer_sees=True)
    assert told["final"][0] > told["single"][0] + 0.02 and told["final"][1] >= told["single"][1]
    blind = quality(scorer_sees=False)  # captions of regions alone do not do it
    assert blind["final"][0] < blind["single"][0]
