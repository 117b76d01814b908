"""QuoTA against its card."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import clips
import tiny
from jeton.engine import apply
from jeton.method import Unsupported, get
from jeton.ops.resize import grid_within
from jeton.place import Place
from jeton.reduce.quota import (
    RESIZE,
    Chat,
    FrameScorer,
    Query,
    QueryDecoupler,
    enlarged,
    frame_budgets,
    frames_to_sample,
    sample_frames,
)
from jeton.tokens import Tokens

QWEN = "Qwen2_5_VLForConditionalGeneration"
LLAVA = "LlavaForConditionalGeneration"


def clip(frames=4, side=8, d=5, batch=1, seed=0):
    x = torch.randn(batch, frames * side * side, d, generator=torch.Generator().manual_seed(seed))
    return Tokens(x, place=Place.clip(batch, frames, side, side))


def left(step, frames, tokens):
    """(B, U) tokens left of each frame."""
    unit = tokens.place.unit.gather(1, step.index)
    return torch.stack([((unit == f) & step.real).sum(1) for f in range(frames)], 1)


def test_the_worked_budget():
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.0]])
    share = (100 * scores.double()) ** 2
    assert (share / share.sum()).round(decimals=4).tolist() == [[0.7570, 0.0093, 0.2336, 0.0]]
    budget = frame_budgets(scores, 392)
    assert budget.tolist() == [[296, 3, 91, 0]]
    rows, cols = grid_within(budget, 27, 27)
    assert list(zip(rows[0].tolist(), cols[0].tolist(), strict=True)) == [(17, 17), (2, 1), (10, 9), (0, 0)]
    grids = enlarged(torch.randn(4, 27, 27, 3), scores[0], 392)
    assert [(frame, tuple(grid.shape)) for frame, grid in grids] == [(0, (17, 17, 3)), (1, (2, 1, 3)), (2, (10, 9, 3))]


def test_only_features_before_the_prompt_may_be_enlarged():
    """A prompt has room for a frame's own tokens: what is over goes to the others in the same proportion."""
    scores = torch.tensor([[1.0, 0.2, 0.1, 0.1]])
    x = torch.randn(4, 4, 4, 3)
    grids = dict(enlarged(x, scores[0], 40))
    assert grids[0].shape[:2] == (6, 6) and grids[0].shape[0] > x.shape[1]
    wanted = F.interpolate(x[0].permute(2, 0, 1)[None], (6, 6), mode="bilinear")[0].permute(1, 2, 0)
    torch.testing.assert_close(grids[0], wanted)
    caps = torch.full((1, 4), 16)
    assert frame_budgets(scores, 40, caps).tolist() == [[16, 16, 4, 4]]  # 24 left at 4 : 1 : 1, of which the second takes 16
    assert frame_budgets(scores, 30, caps).tolist() == [[16, 9, 2, 2]]
    tokens = Tokens(x.view(1, 64, 3), place=Place.clip(1, 4, 4, 4))
    step = get("quota", keep=40).reduce(tokens, {"scores": scores})
    assert left(step, 4, tokens).tolist() == [[16, 16, 4, 4]]


@pytest.mark.parametrize("how", RESIZE)
def test_equal_scores_give_equal_grids_within_the_budget(how):
    tokens = clip()
    method = get("quota", keep=100, resize=how)
    given = method.reduce(tokens, {"scores": torch.full((1, 4), 0.3)})
    counts = left(given, 4, tokens)
    assert counts.unique().numel() == 1 and 80 <= int(counts.sum()) <= 100 == method.promise(256).count
    for scores in (None, torch.zeros(1, 4)):
        same = method.reduce(tokens, {} if scores is None else {"scores": scores})
        assert torch.equal(same.index, given.index) and torch.equal(same.dense, given.dense)


@pytest.mark.parametrize("how", RESIZE)
@pytest.mark.parametrize("keep", [1, 2, 3, 37, 0.1, 0.9])
def test_the_budget_is_never_exceeded_and_never_empty(how, keep):
    tokens = clip(batch=3)
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.0], [0.2, 0.2, 0.2, 0.2], [0.0, 0.0, 1.0, 1e-3]])
    method = get("quota", keep=keep, resize=how)
    step = method.reduce(tokens, {"scores": scores})
    counts, share = left(step, 4, tokens), frame_budgets(scores, step.k, torch.full((3, 4), 64))
    assert ((counts >= 1) & (counts <= share))[share > 0].all() and (counts[share == 0] == 0).all()
    assert (step.count() >= 1).all() and (step.count() <= method.promise(256).count).all()
    if how in ("linspace", "merge"):
        assert torch.equal(counts, share)


@pytest.mark.parametrize("how", ["bilinear", "adaptive", "separable"])
def test_all_of_a_frame_stays_as_it_was(how):
    """8 x 8 to 8 x 8 is the identity, beside frames that shrink or go."""
    tokens = clip()
    step = get("quota", keep=80, resize=how).reduce(tokens, {"scores": torch.tensor([[1.0, 0.05, 0.0, 0.0]])})
    after = step.apply(tokens)
    assert torch.equal(after.features[0, :64], tokens.features[0, :64]) and left(step, 4, tokens)[0, 2:].tolist() == [0, 0]


def test_power_and_order_of_frames():
    scores = torch.tensor([[0.2, 0.4]])
    assert frame_budgets(scores, 50).tolist() == [[10, 40]] and frame_budgets(scores, 30, power=1).tolist() == [[10, 20]]
    assert frame_budgets(100 * scores, 50).tolist() == [[10, 40]]
    tokens = clip(2)
    step = get("quota", keep=20).reduce(tokens, {"scores": torch.tensor([[0.2, 0.9]])})
    assert (step.index[0][step.real[0]].diff() > 0).all()


@pytest.mark.parametrize("how", RESIZE)
def test_a_planted_scorer_beats_equal_shares(how):
    """One frame of eight shows a digit, the others noise. A classifier that knows clean digits reads what is left of the clip."""
    pictures, labels = clips.digits()
    known, seen = slice(0, 1000), slice(1000, 1080)
    generator = torch.Generator().manual_seed(0)
    video = 0.05 * torch.randn(80, 8, 64, generator=generator)
    where = torch.randint(0, 8, (80,), generator=generator)
    video[torch.arange(80), where] += pictures[seen].flatten(1)
    tokens = Tokens(video.reshape(80, 512, 1), place=Place.clip(80, 8, 8, 8))

    def accuracy(scores):
        step = get("quota", keep=64, resize=how).reduce(tokens, {"scores": scores})
        back = step.restore(step.apply(tokens)).features.view(80, 8, 64).sum(1)
        nearest = torch.cdist(back, pictures[known].flatten(1)).argmin(1)
        return float((labels[known][nearest] == labels[seen]).float().mean())

    planted = F.one_hot(where, 8).float()
    with_scores, without = accuracy(planted), accuracy(torch.ones(80, 8))
    assert with_scores > 0.9 and with_scores > without + 0.15


# -- in a model --------------------------------------------------------------------------------------------------------------


def video(count=2):
    made = [clips.moving_digit(8, 32, 48, 3), clips.moving_digit(6, 24, 40, 7, seed=1)]
    return clips.prompts(made[:count])


def counts(run, image):
    return [len(grid[grid >= 0].unique()) for grid in run.assignment(image)]


@pytest.mark.parametrize("how", RESIZE)
def test_scores_reach_the_frames_of_their_video(how):
    net = tiny.model(QWEN)
    scores = [[0.9, 0.1, 0.5, 0.0], [0.0, 0.0, 1.0]]
    with apply(net, "quota", keep=0.25, resize=how, scores=scores) as run:
        tiny.run(net, video())
        images = run.report().images
        first, second = counts(run, 0), counts(run, 1)
        assert "0.9" not in run.spec
    budget = frame_budgets(torch.tensor([scores[0]]), 24, torch.full((1, 4), 24))[0].tolist()
    assert all(got <= most for got, most in zip(first, budget, strict=True)) and first[0] > first[2] > first[1] == first[3] == 0
    assert second[:2] == [0, 0] and second[2] > 8 and [i.after for i in images] == [sum(first), sum(second)]


def test_numbers_of_frames_that_the_model_joins_are_averaged():
    net, inputs = tiny.model(QWEN), video(1)
    pairs = [[0.8, 1.0, 0.2, 0.0, 0.5, 0.5, 0.0, 0.0]]
    outputs = []
    for scores in ([[0.9, 0.1, 0.5, 0.0]], pairs, lambda: pairs, [torch.tensor([0.9, 0.1, 0.5, 0.0])]):
        with apply(net, "quota", keep=0.25, scores=scores):
            outputs.append(tiny.run(net, inputs)[:, -1])
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    odd = ([[0.9, 0.1, 0.5, 0.3]], [[0.8, 1.0, 0.2, 0.0, 0.5, 0.5, 0.3]])  # seven frames: the last one stands alone
    for scores in odd:
        with apply(net, "quota", keep=0.25, scores=scores):
            outputs.append(tiny.run(net, inputs)[:, -1])
    assert torch.equal(*outputs[-2:])
    with apply(net, "quota", keep=0.25, scores=[[0.0, 0.5, 0.1, 0.9]]):
        assert not torch.equal(outputs[0], tiny.run(net, inputs)[:, -1])


def test_a_video_in_a_batch_is_rated_as_alone_and_beams_share_its_scores():
    net = tiny.model(QWEN)
    scores = [[0.9, 0.1, 0.5, 0.0], [0.1, 0.0, 1.0]]
    both = video()
    with apply(net, "quota", keep=0.3, scores=scores):
        together = tiny.run(net, {**both, "position_ids": tiny.positions(net, both)})[:, -1]
        beams = net.generate(**both, max_new_tokens=4, num_beams=3, do_sample=False)
    single = clips.prompts([clips.moving_digit(6, 24, 40, 7, seed=1)], (3, 5))
    single["input_ids"] = both["input_ids"][1:, -single["input_ids"].shape[1] :]
    with apply(net, "quota", keep=0.3, scores=scores[1:]):
        alone = tiny.run(net, {**single, "position_ids": tiny.positions(net, single)})[:, -1]
        answer = net.generate(**single, max_new_tokens=4, num_beams=3, do_sample=False)
    torch.testing.assert_close(together[1:], alone, atol=1e-4, rtol=1e-4)
    assert torch.equal(beams[1, -4:], answer[0, -4:])


@pytest.mark.parametrize("how", RESIZE)
def test_nothing_waits_for_the_device_on_a_clip(how):
    tokens = Tokens(torch.randn(2, 256, 5, device="meta"), place=Place.clip(2, 4, 8, 8, device="meta"))
    step = get("quota", keep=30, resize=how).reduce(tokens, {"scores": torch.rand(2, 4, device="meta")})
    assert len(step.apply(tokens)) == step.k == 30


def test_pictures_beside_videos_take_no_scores():
    net = tiny.model(QWEN)
    inputs = tiny.inputs_for(net)  # four images and one video of two frames
    with apply(net, "quota", keep=0.4, scores=[[0.0, 1.0]]) as run:
        tiny.run(net, inputs)
        layout = run.layout
        shown = [counts(run, image) for image in range(layout.images)]
    assert shown[-1][0] == 0 and shown[-1][1] > 0 and all(each[0] > 0 for each in shown[:-1])


def test_scores_that_do_not_fit_are_refused_before_anything_runs():
    net, inputs = tiny.model(QWEN), video()
    for scores, message in (
        ([[1.0, 1, 1, 1]], "1 videos, but 2 are encoded"),
        ([[1.0] * 4, [1.0] * 4], "4 numbers are given for a video that has 3 frames"),
        ([[1.0] * 4, []], "0 numbers"),
        ([[1.0] * 4, [1.0, float("nan"), 1.0]], "finite"),
    ):
        with apply(net, "quota", scores=scores), pytest.raises(ValueError, match=message):
            tiny.run(net, inputs)
    with pytest.raises(TypeError, match="list of numbers"):
        get("quota", scores=3)
    with pytest.raises(ValueError, match="resize must be one of"):
        get("quota", resize="cubic")
    with pytest.raises(ValueError, match="power"):
        get("quota", power=0)
    with pytest.raises(Unsupported, match="takes no videos"):
        apply(tiny.model(LLAVA), "quota", scores=[[1.0]])
    with pytest.raises(ValueError, match="no place"):
        get("quota", keep=3).reduce(Tokens(torch.randn(1, 9, 2)))


# -- the question and the frames ------------------------------------------------------------------------------------------------


class Tokenizer:
    """Letters as tokens of the tiny models; an answer of a chat is what was planted."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [tiny.WORDS + ord(letter) % 89 for letter in text]}


class Processor:
    """As transformers' processors: a template, pictures and text in, a batch of tensors out."""

    def __init__(self, side="left", planted=""):
        self.tokenizer, self.side, self.planted, self.asked = Tokenizer(), side, planted, []

    def apply_chat_template(self, turns, add_generation_prompt, tokenize):
        assert add_generation_prompt and not tokenize
        self.asked.append(turns[0]["content"][-1]["text"])
        return self.asked[-1][:12]

    def __call__(self, text, images=None, padding=False, return_tensors="pt"):
        rows = []
        for number, each in enumerate(text):
            shown = [tiny.IMAGE] * tiny.SIDE**2 if images is not None else []
            rows.append([11, *shown, *self.tokenizer(each)["input_ids"], *([13] * (number % 2))])  # of different lengths
        longest = max(map(len, rows))
        left = self.side == "left"
        ids = [[0] * (longest - len(r)) + r if left else r + [0] * (longest - len(r)) for r in rows]
        mask = [[0] * (longest - len(r)) + [1] * len(r) if left else [1] * len(r) + [0] * (longest - len(r)) for r in rows]
        batch = Batch(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
        if images is not None:
            size = tiny.SIDE * tiny.PATCH
            pixels = [torch.tensor(np.asarray(image), dtype=torch.float32).permute(2, 0, 1)[None] / 128 - 1 for image in images]
            batch["pixel_values"] = torch.cat([F.interpolate(each, (size, size)) for each in pixels])
        return batch

    def batch_decode(self, ids, skip_special_tokens):
        assert ids.shape[1] == 5
        return [self.planted]


class Batch(dict):
    def to(self, device):
        return self


def frames(count):
    clip = clips.moving_digit(count, 28, 28, 5)
    return [(255 * picture.clamp(0, 1)).permute(1, 2, 0).byte().numpy() for picture in clip]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_score_is_the_probability_of_the_letter_after_one_prompt_per_frame(side):
    net = tiny.model(LLAVA)
    processor = Processor(side)
    scores = FrameScorer(net, processor, batch=2)(frames(5), "which digit is it?")
    assert scores.shape == (5,) and ((scores > 0) & (scores < 1)).all() and scores.unique().numel() == 5
    assert "which digit is it?" in processor.asked[0] and "A. Yes" in processor.asked[0]
    number = tiny.WORDS + ord("A") % 89
    for at, picture in enumerate(frames(5)):
        inputs = Processor()([processor.asked[0][:12]] * 2, images=[picture] * 2)  # of a pair the second is a token longer
        row = {name: value[at % 2][None] for name, value in inputs.items()}
        real = row["attention_mask"][0].bool()
        row["input_ids"], row["attention_mask"] = row["input_ids"][:, real], row["attention_mask"][:, real]
        wanted = net(**row).logits[0, -1].softmax(0)[number]
        torch.testing.assert_close(scores[at], wanted.detach(), atol=1e-5, rtol=1e-4)
    assert FrameScorer(net, processor)([], "?").shape == (0,)


def test_scores_of_a_scorer_go_straight_into_the_method():
    scorer = FrameScorer(tiny.model(LLAVA), Processor())
    with apply(tiny.model(QWEN), "quota", keep=0.3, scores=[scorer(frames(8), "?"), scorer(frames(6), "?")]) as run:
        tiny.run(tiny.model(QWEN), video())
        assert all(image.after < image.before for image in run.report().images)


def test_the_letter_must_be_one_token():
    with pytest.raises(ValueError, match="'Yes' is 3 tokens"):
        FrameScorer(tiny.model(LLAVA), Processor(), yes="Yes")(frames(1), "?")


@pytest.mark.parametrize(
    ("reply", "objects"),
    [
        ('Step 1: yes\nStep 2: ["red kite", "left corner", "gate"]\nStep 3: ["red kite", "gate"]', ("red kite", "gate")),
        ("step 1 : Yes\nSTEP 3: ['dog']", ("dog",)),
        ("Step 1: no", ()),
        ('Step 1: no\nStep 3: ["dog"]', ()),
        ("Step 1: yes\nStep 2: ['joy']\nStep 3: null", ()),
        ("Step 1: yes\nStep 3: [dog, cat", ()),
        ("Step 1: yes\nStep 3: [__import__('os')]", ()),
        ("", ()),
    ],
)
def test_a_question_is_split_into_the_objects_to_look_for(reply, objects):
    asked = []
    query = QueryDecoupler(lambda message: asked.append(message) or reply)("What flies over the gate?")
    assert query == Query("What flies over the gate?", objects)
    assert "What flies over the gate?" in asked[0] and "Step 3" in asked[0]
    text = query.about_a_frame()
    assert all(name in text for name in objects) and ("What flies" in text) == (not objects)


def test_a_model_answers_as_a_chat():
    net = tiny.model(LLAVA)
    chat = Chat(net, Processor(planted='Step 1: yes\nStep 3: ["kite"]'), max_new_tokens=5)
    assert QueryDecoupler(chat)("where?").objects == ("kite",)


def test_longer_videos_are_looked_at_more_often():
    assert [frames_to_sample(s) for s in (0, 60, 1800, 3600, 5400)] == [96, 97, 128, 160, 192]
    chosen, times = sample_frames(30 * 3600, 30.0)
    assert len(chosen) == 160 and chosen[0] == 0 and chosen[-1] == 107999 and times[-1] == pytest.approx(3599.97, abs=0.01)
    assert sample_frames(10, 5.0, base=4) == ([0, 3, 6, 9], [0.0, 0.6, 1.2, 1.8])
    assert sample_frames(3, 1.0)[0] == [0, 1, 2] and sample_frames(1, 1.0) == ([0], [0.0])
    for wrong in ((0, 1.0), (5, 0.0)):
        with pytest.raises(ValueError):
            sample_frames(*wrong)
    with pytest.raises(ValueError):
        frames_to_sample(-1)
