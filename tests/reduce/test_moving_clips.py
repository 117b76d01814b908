"""Frames of a clip as the images of one prompt: each is reduced within its own bounds, by what it shows."""

from __future__ import annotations

import pytest
import torch
from witness import spied

import clips
import tiny
from jeton.engine import apply
from jeton.method import get

SIZE = tiny.SIDE * tiny.PATCH
LLAVA, ONEVISION = "LlavaForConditionalGeneration", "LlavaOnevisionForConditionalGeneration"
QWEN = "Qwen2_5_VLForConditionalGeneration"


def prompt(frames):
    """(F, 3, H, W) frames, in one prompt, words before and behind."""
    images = torch.full((len(frames), tiny.SIDE**2), tiny.IMAGE)
    between = tiny.words(2 * len(frames), 3)[0].view(len(frames), 2)
    ids = torch.cat([between, images], 1).flatten()
    ids = torch.cat([ids, tiny.words(5, 4)[0]])[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": frames * 2 - 1}


def left(method, frames):
    """Visual tokens left of every frame."""
    net = tiny.model(LLAVA)
    with apply(net, method) as run:
        tiny.run(net, prompt(frames))
        return [image.after for image in run.report().images]


def clip(frames=4):
    return clips.moving_digit(frames, SIZE, SIZE, number=3, step=5)


def test_dymu_merges_each_frame_by_what_it_shows_and_looks_at_no_other():
    frames = clip()
    frames[2] = 0.5  # nothing to see
    frames[3] = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    method = get("dymu", thresholds=(0.95,) * 8)
    counts = left(method, frames)
    assert not {*counts[:2]} & {*counts[2:]}  # which way, an untrained encoder does not know
    assert left(method, frames.flip(0)) == counts[::-1]
    other = frames.clone()
    other[3] = frames[0]
    assert left(method, other) == [*counts[:3], counts[0]]


@pytest.mark.parametrize("name", ["aim", "holitom", "tome", "divprune"])
def test_what_happens_to_a_frame_does_not_depend_on_the_others(name):
    """At the first decision; later ones, in the language model, see the whole prompt."""
    net, frames = tiny.model(LLAVA), clip()
    other = frames.clone()
    other[3] = clips.texture(SIZE, SIZE, 9)
    made = []
    for shown in (frames, other):
        spy, decided = spied(get(name, keep=0.3).parts()[0])
        with apply(net, spy):
            tiny.run(net, prompt(shown))
        made.append(decided[0])
    same = [bool(torch.equal(a, b)) for a, b in zip(made[0].assign, made[1].assign)]
    assert same[:3] == [True] * 3 and not same[3]


def test_aim_merges_every_frame_alike_and_then_prunes_the_clip():
    counts = left(get("aim", rounds=1), clip())
    assert len(set(counts)) == 1 and counts[0] <= -(-(tiny.SIDE**2) // 2)


def videos(name, frames):
    """A prompt with one video of these frames (F, 3, H, W)."""
    net = tiny.model(name)
    if name == QWEN:
        return net, clips.prompts([frames])
    inputs = tiny.prompts(net, [tiny.Sample(((len(frames),),), (3, 5), 1)])
    side = net.config.vision_config.image_size
    shown = torch.nn.functional.interpolate(frames, (side, side), mode="bilinear")
    return net, {**inputs, "pixel_values_videos": shown[None] * 2 - 1}


@pytest.mark.parametrize("name", [ONEVISION, QWEN])
def test_aim_takes_real_videos(name):
    """Merged frame by frame, whatever the other frames show; then pruned over the whole clip, down to none."""
    size, decided = 8 * tiny.PATCH, []
    frames = clips.moving_digit(8, size, size, number=3, step=5)
    other = frames.clone()
    other[6:] = clips.texture(size, size, 9)
    for shown in (frames, other):
        net, inputs = videos(name, shown)
        spy, made = spied(get("aim", rounds=1))
        with apply(net, spy) as run:
            assert tiny.run(net, inputs).isfinite().all()
            (image,), sites = run.report().images, run.report().sites
        decided.append(made[0])
        merged, units = int(made[0].real.sum()), 4 if name == QWEN else 8
        per = made[0].n // units  # a structure token behind takes no part
        assert merged == units * (per - per // 2) and image.after == image.before - made[0].n and len(sites) == 2
        frame = torch.arange(made[0].n) // per
        assert torch.equal(frame[made[0].index[0]][made[0].assign[0]], frame)  # nothing joins another frame
    same = (decided[0].assign == decided[1].assign)[0].view(units, per).all(1).tolist()
    last = units - (1 if name == QWEN else 2)
    assert all(same[:last]) and not all(same[last:])


def test_dymu_merges_the_frames_of_a_video_and_hands_them_on_whole():
    """LLaVA-OneVision pools frames behind its encoder: an empty frame costs the encoder less than one with something to see."""
    size, left = 8 * tiny.PATCH, []
    frames = clips.moving_digit(4, size, size, number=3, step=5)
    for shown in (frames, torch.full_like(frames, 0.5)):
        net, inputs = videos(ONEVISION, shown)
        spy, made = spied(get("dymu", thresholds=(0.9,) * 5))
        with apply(net, spy, restore=True) as run:
            assert tiny.run(net, inputs).isfinite().all()
            (image,) = run.report().images
        assert image.after == image.before
        left.append([int(row.sum()) for row in made[-1].real])
    assert len(set(left[1])) == 1 and left[0] != left[1]  # equal frames end alike


def test_quota_follows_the_digit():
    """Frames in which the digit stands on the right half are rated higher and get more of the budget (Qwen2.5-VL's videos)."""
    net = tiny.model(QWEN)
    video = clips.moving_digit(8, 8 * tiny.PATCH, 8 * tiny.PATCH, number=1, step=3)
    wanted = [float(8 * tiny.PATCH - 8 - 3 * frame < 12) for frame in range(8)]
    spy, decided = spied(get("quota", keep=0.5, scores=[wanted]))
    with apply(net, spy):
        tiny.run(net, clips.prompts([video]))
    per = decided[0].assign.shape[1] // 4
    told = [int((row >= 0).sum()) for row in decided[0].assign[0].view(4, per)]
    joined = torch.tensor(wanted).view(4, 2).mean(1)
    assert all((count == 0) == (score == 0) for count, score in zip(told, joined.tolist()))
