"""HoliTom against its card."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import clips
import tiny
from by_hand import dpc_knn
from in_layers import eager
from jeton.engine import apply
from jeton.method import Unsupported, get
from jeton.place import Place
from jeton.tokens import Tokens

QWEN = "Qwen2_5_VLForConditionalGeneration"


def turned(*cosines):
    """Unit vectors each of which has the given cosine with the one before, in ever new directions."""
    out = [torch.zeros(len(cosines) + 1)]
    out[0][0] = 1.0
    for i, cosine in enumerate(cosines):
        new = cosine * out[-1]
        new[i + 1] += math.sqrt(1 - cosine**2)
        out.append(new)
    return torch.stack(out)


def worked():
    """Four frames of 2 x 2 positions whose similarities are those of the card."""
    steps = [(0.9, 0.9, 0.1), (0.9, 0.9, 0.1), (0.9, 0.1, 0.1), (0.1, 0.1, 0.1)]
    x = torch.stack([turned(*each) for each in steps], 1)
    return Tokens(x.flatten(0, 1)[None], place=Place.clip(1, 4, 2, 2))


def clip(frames, height, width, width_of=16, seed=0, still=0.5, batch=1):
    """Random features of which a share stands still for a while."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, frames, height * width, width_of, generator=generator)
    for frame in range(1, frames):
        stays = torch.rand(batch, height * width, generator=generator) < still
        noise = 0.2 * torch.randn(x[:, 0].shape, generator=generator)
        x[:, frame] = torch.where(stays[..., None], x[:, frame - 1] + noise, x[:, frame])
    score = torch.rand(batch, frames * height * width, generator=generator)
    return Tokens(x.flatten(1, 2), place=Place.clip(batch, frames, height, width)), {"attention": score}


def test_the_worked_clip_has_two_segments_saves_four_and_keeps_a_third():
    tokens = worked()
    score = torch.arange(16.0).flip(0)[None]
    step = get("holitom", keep=0.25, drop=0).reduce(tokens, {"attention": score})
    # static: positions 0 and 1 of frames 0 to 2; of the 12 tokens left a third is kept: 2/3 of one, then 2/3, 2/3, 2/3 and 4/3
    assert step.count().tolist() == [4]
    exact = get("holitom", keep=0.25, drop=0, published_rounding=True).reduce(tokens, {"attention": score})
    # one cluster of the static ones, ceil(2/3) of frames 0, 1 and 2, ceil(4/3) of frame 3
    real = exact.index[0][exact.real[0]].tolist()
    assert len(real) == 1 + 3 + 2 and real[0] in (0, 1) and real[1:] == [2, 6, 10, 12, 13]
    dense = exact.dense[0, 0]
    assert (dense[[0, 1, 4, 5, 8, 9]] > 0).all() and dense.sum().item() == pytest.approx(1)
    own, other = (0, 1) if real[0] == 0 else (1, 0)
    assert dense[[own, own + 4, own + 8]].tolist() == pytest.approx([0.6 / 3] * 3)
    assert dense[[other, other + 4, other + 8]].tolist() == pytest.approx([0.4 / 3] * 3)
    assert torch.equal(exact.dense[0, 1:][exact.real[0, 1:]].argmax(1), torch.tensor(real[1:]))
    # a threshold that no similarity reaches leaves nothing static
    loose = get("holitom", keep=0.25, drop=0, threshold=0.95).reduce(tokens, {"attention": score})
    assert (loose.dense[0].count_nonzero(1) <= 1).all()


def by_hand(x, score, place, rho0, tau, beta=0.6, neighbours=7, contextual=0.0):
    """The published outer stage of one clip, frame by frame; features as a list in the library's order."""
    frames = place.units
    n = x.shape[0] // frames
    x, score = x.view(frames, n, -1), score.view(frames, n)
    sim = [torch.cosine_similarity(x[t], x[t + 1], dim=1) > tau for t in range(frames - 1)]

    def gain(s, e):
        return sum(all(bool(sim[t][j]) for t in range(s, e)) for j in range(n)) * (e - s) if e > s else 0

    best, start = [0], []
    for e in range(frames):
        choices = [(best[e], e)] + [(best[s] + gain(s, e), s) for s in reversed(range(e))]
        value = max(v for v, _ in choices)
        start.append(next(s for v, s in choices if v == value))
        best.append(value)
    rho = min(1, rho0 / ((frames * n - best[-1]) / (frames * n)))
    out, e = {}, frames - 1

    def clusters(points, k):
        centre = dpc_knn(points, k, min(neighbours, k))
        for c in sorted(set(centre)):
            members = [i for i in range(len(points)) if centre[i] == c and i != c]
            yield c, points[c] if not members else beta * points[c] + (1 - beta) * points[members].mean(0)

    while e >= 0:
        s = start[e]
        static = [j for j in range(n) if e > s and all(bool(sim[t][j]) for t in range(s, e))]
        if round(len(static) * rho):
            for c, value in clusters(x[s : e + 1, static].mean(0), round(len(static) * rho)):
                out[s * n + static[c]] = value
        for f in range(s, e + 1):
            moving = [j for j in range(n) if j not in static]
            m = math.ceil(len(moving) * rho - 1e-9)
            dominant = sorted(moving, key=lambda j: -score[f, j].item())[: round(m * (1 - contextual))]
            out |= {f * n + j: x[f, j] for j in dominant}
            rest = [j for j in moving if j not in dominant]
            if m > len(dominant):
                out |= {f * n + rest[c]: value for c, value in clusters(x[f, rest], m - len(dominant))}
        e = s - 1
    return out


@pytest.mark.parametrize("contextual", [0.0, 0.4])
@pytest.mark.parametrize("rho0", [0.15, 0.3, 0.6])
def test_the_outer_stage_equals_the_published_steps_written_out(rho0, contextual):
    tokens, signals = clip(6, 3, 4, batch=3, still=0.7)
    step = get("holitom", keep=rho0, drop=0, contextual=contextual, published_rounding=True).reduce(tokens, signals)
    after, cut = step.apply(tokens), 0
    for row in range(3):
        wanted = by_hand(tokens.features[row], signals["attention"][row], tokens.place, rho0, 0.8, contextual=contextual)
        real = step.real[row]
        assert step.index[row][real].tolist() == sorted(wanted)
        torch.testing.assert_close(after.features[row][real], torch.stack([wanted[i] for i in sorted(wanted)]))
        cut += len(wanted)
    assert cut < 3 * 72


@pytest.mark.parametrize("rho0", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("frames", [1, 2, 4, 6])
def test_identical_frames_become_one(frames, rho0):
    tokens, _ = clip(1, 3, 4)
    score = {"attention": torch.rand(1, 12 * frames)}
    still = Tokens(tokens.features.repeat(1, frames, 1), place=Place.clip(1, frames, 3, 4))
    step = get("holitom", keep=rho0, drop=0).reduce(still, score)
    left = round(12 * min(1, rho0 * frames))
    assert step.count().tolist() == [left]
    after = step.apply(still)
    assert frames == 1 or bool((after.size[step.real] >= frames).all())
    if left == 12:
        torch.testing.assert_close(after.features[0][step.real[0]], tokens.features[0])
    first = step.index[step.real]
    assert bool((first < 12).all())


@pytest.mark.parametrize("keep", [0.05, 0.1, 0.3, 7, 40])
@pytest.mark.parametrize("drop", [0, 0.5])
def test_the_budget_of_a_clip_is_exact_unless_it_stands_still(keep, drop):
    tokens, signals = clip(6, 3, 4, batch=4, still=0.4)
    signals["last"] = torch.rand(4, 72)
    method = get("holitom", keep=keep, drop=drop)
    step = method.reduce(tokens, signals)
    wanted = method.promise(72).count
    left = 72 - 5 * 12
    assert bool((step.count() <= wanted).all()) and bool((step.count() >= min(wanted, left)).all())
    assert wanted == (keep if isinstance(keep, int) else round(round(72 * min(1, keep / (1 - drop))) * (1 - drop)))


def test_pictures_that_do_not_move_are_never_merged_over_time():
    tokens, signals = clip(3, 3, 4, still=1.0)
    crops = replace(tokens, place=replace(tokens.place, time=torch.zeros_like(tokens.place.unit)))
    assert get("holitom", keep=0.5, drop=0).reduce(crops, signals).dense.count_nonzero(2).amax() == 1
    assert get("holitom", keep=0.5, drop=0).reduce(tokens, signals).dense.count_nonzero(2).amax() > 1


@pytest.mark.parametrize("fields", [{}, {"contextual": 0.4}, {"published_rounding": True}], ids=str)
def test_nothing_waits_for_the_device_on_a_clip(fields):
    tokens = Tokens(torch.randn(2, 72, 5, device="meta"), place=Place.clip(2, 6, 3, 4, device="meta"))
    signals = {"attention": torch.rand(2, 72, device="meta"), "last": torch.rand(2, 72, device="meta")}
    step = get("holitom", keep=10, **fields).reduce(tokens, signals)
    assert len(step.apply(tokens)) == step.k == 10


def test_a_clip_alone_equals_the_same_clip_beside_longer_and_larger_ones():
    short, quiet = clip(3, 2, 3, seed=1)
    long, loud = clip(5, 3, 4, seed=2)
    place = {}
    for name in ("unit", "row", "col", "height", "width", "time"):
        a, b = (getattr(each.place, name) for each in (short, long))
        place[name] = torch.cat([torch.nn.functional.pad(a, (0, 42), value=-1), b])
    both = Tokens(
        torch.cat([torch.nn.functional.pad(short.features, (0, 0, 0, 42), value=7.0), long.features]),
        mask=torch.arange(60) < torch.tensor([[18], [60]]),
        place=Place(**place, units=5, sides=(3, 4)),
    )
    score = torch.cat([torch.nn.functional.pad(quiet["attention"], (0, 42), value=9.0), loud["attention"]])
    for fields in ({}, {"contextual": 0.4}, {"published_rounding": True}):
        method = get("holitom", keep=0.4, drop=0, **fields)
        together = method.reduce(both, {"attention": score})
        for row, (alone, signals) in enumerate(((short, quiet), (long, loud))):
            single = method.reduce(alone, signals)
            assert together.index[row][together.real[row]].tolist() == single.index[0][single.real[0]].tolist()
            n, k = len(alone), int(single.count())
            torch.testing.assert_close(together.dense[row, :k, :n], single.dense[0, :k])
            assert (together.assign[row, n:] == -1).all()


# -- inside the language model ---------------------------------------------------------------------------------------------


def inner(tokens, score, keep=1, rule="halving"):
    step = get("holitom", keep=keep, rule=rule, inner_layer=1).steps(len(tokens), 2)[1]
    return step.reduce(tokens, {"attention": score})


def test_dropped_tokens_fold_into_their_survivor_in_order():
    a, b, c = torch.tensor([4.0, 0.0]), torch.tensor([0.0, 8.0]), torch.tensor([16.0, 16.0])
    score = torch.tensor([[3.0, 2.0, 1.0]])
    one = inner(Tokens(torch.stack([a, b, c])[None]), score).apply(Tokens(torch.stack([a, b, c])[None])).features[0, 0]
    other = inner(Tokens(torch.stack([a, c, b])[None]), score).apply(Tokens(torch.stack([a, c, b])[None])).features[0, 0]
    assert torch.equal(one, ((a + b) / 2 + c) / 2) and torch.equal(other, ((a + c) / 2 + b) / 2)
    assert not torch.equal(one, other)
    mean = inner(Tokens(torch.stack([a, b, c])[None]), score, rule="mean_all")
    torch.testing.assert_close(mean.apply(Tokens(torch.stack([a, b, c])[None])).features[0, 0], (a + b + c) / 3)


@pytest.mark.parametrize("keep", [1, 5, 20])
def test_the_inner_stage_equals_the_published_loop(keep):
    generator = torch.Generator().manual_seed(keep)
    x, score = torch.randn(2, 30, 6, generator=generator), torch.rand(2, 30, generator=generator)
    after = inner(Tokens(x), score, keep).apply(Tokens(x))
    for row in range(2):
        kept = sorted(score[row].argsort(descending=True)[:keep].tolist())
        state = x[row].clone()
        for i in range(30):
            if i not in kept:
                best = max(kept, key=lambda j: float(torch.cosine_similarity(x[row, i], x[row, j], dim=0)))
                state[best] = (state[best] + state[i]) / 2
        assert after.index[row].tolist() == kept
        torch.testing.assert_close(after.features[row], state[kept])


# -- on a model ----------------------------------------------------------------------------------------------------------------


def video(**more):
    return clips.prompts([clips.moving_digit(8, 32, 48, 3, **more), clips.moving_digit(6, 24, 40, 7, seed=1, **more)])


def test_no_inner_stage_and_nothing_static_is_the_outer_stage_alone_on_real_video():
    net = tiny.model(QWEN)
    inputs = video()
    before = tiny.run(net, inputs)
    with apply(net, "holitom", keep=1.0, drop=0):
        assert torch.equal(tiny.run(net, inputs), before)
    with apply(net, "holitom", keep=1.0):
        assert torch.equal(tiny.run(net, inputs), before)
    with apply(net, "holitom", keep=0.5, drop=0):
        outer = tiny.run(net, inputs)
    assert not torch.equal(outer[:, -1], before[:, -1])


def test_a_still_scene_is_kept_once_and_the_moving_digit_frame_by_frame():
    """Tokens that stand for several frames lie where the texture shows; those the digit passes do not."""
    net = tiny.model(QWEN)
    inputs = clips.prompts([clips.moving_digit(8, 32, 48, 3, step=2)])
    with apply(net, "holitom", keep=0.5, drop=0, threshold=0.9) as run:
        tiny.run(net, inputs)
        maps, layout = run.assignment(0), run.layout
        reduction = run.costs.flow.scene.trail[-1].reduction
        before, after = run.report().images[0].before, run.report().images[0].after
    assert layout.album.place.time[0].unique().tolist() == [0, 1, 2, 3] and before == 96
    sizes = (reduction.dense[0] > 0).sum(1)[reduction.real[0]]
    assert int(sizes.max()) > 1 and after <= 48
    stacked = torch.stack(maps)
    still = (stacked[0] >= 0) & (stacked == stacked[0]).all(0)
    assert still.any() and not still.all()


def test_the_last_layers_attention_decides_inside_the_language_model():
    net = tiny.model(QWEN, "eager")
    inputs = clips.prompts([clips.moving_digit(8, 32, 48, 3)])
    whole = eager(net, inputs)
    columns = (inputs["input_ids"][0] == tiny.VIDEO).nonzero()[:, 0]
    rows = whole[1][0, -1, columns]
    with apply(net, "holitom", keep=0.5, inner_layer=2) as run:
        tiny.run(net, inputs)
        trail = run.costs.flow.scene.trail
        layers = run.report().layer_tokens
    assert len(trail) == 1  # the outer stage keeps all at rho0 = 1
    kept = trail[0].reduction.index[0].tolist()
    assert kept == sorted(rows.argsort(descending=True)[:48].tolist())
    assert layers == (104.0, 104.0, 56.0, 56.0)


def test_both_stages_work_in_a_batch_with_generation():
    net = tiny.model(QWEN)
    inputs = video()
    with apply(net, "holitom", keep=0.25) as run:
        answer = net.generate(**inputs, max_new_tokens=4, do_sample=False)
        report = run.report()
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 4
    assert [image.before for image in report.images] == [96, 45]
    assert all(image.after <= round(round(image.before * 0.5) * 0.5) for image in report.images)


def test_wrong_fields_are_refused():
    for fields in ({"drop": 1}, {"beta": 2}, {"contextual": -1}, {"threshold": 3}, {"rule": "mean"}, {"window": 0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            get("holitom", **fields)
    with pytest.raises(ValueError, match="cannot act at layer 9"), apply(tiny.model(QWEN), "holitom", inner_layer=9):
        pass
    with pytest.raises(Unsupported, match="language model"):
        apply(tiny.model("CLIPVisionModel"), "holitom")
