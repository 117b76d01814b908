"""VFlowOpt against its card. The published triples and the solved ratio are in tests/ops/test_schedule.py."""

from __future__ import annotations

import pytest
import torch
from witness import Spy

import tiny
from jeton.calibration import Study
from jeton.engine import apply
from jeton.method import AnchorAttention, PatchEntropy, get
from jeton.models import adapt
from jeton.ops.crops import cropped
from jeton.ops.grid import squares
from jeton.ops.pixels import entropy
from jeton.ops.schedule import mean_share
from jeton.place import Place
from jeton.tokens import Tokens

LLAVA, NEXT, QWEN = "LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"
CLOSE = 1e-5


# -- budgets -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["50%", "25%", "10%"])
def test_published_optima_are_presets(name):
    method = get("vflowopt", calibration=name)
    assert get(method.spec) == method and len(method.ratios) == 3 and method.alpha == 0.0
    n, depth = 100_000, 28
    steps = [step.keep for step in method.steps(n, depth) if step]
    seen = (9 * round(method.entering * n) + 9 * steps[0] + 10 * steps[1]) / depth
    assert seen / n == pytest.approx(mean_share(method.ratios, (9, 18), 28), abs=1e-5)
    assert seen / n == pytest.approx(method.keep, abs=1e-3)


@pytest.mark.parametrize("keep", [0.03, 0.25, 0.4, 0.97, 1.0, 40, 300])
@pytest.mark.parametrize("depth", [4, 28, 32])
def test_layers_see_the_budget_on_average(keep, depth):
    method = get("vflowopt", keep=keep)
    entrance, layers = method.parts()
    now = entrance.promise(576).count
    seen = []
    for step in layers.steps(now, depth):
        now = now if step is None else step.promise(now).count
        seen.append(now)
    k = keep if isinstance(keep, int) else keep * 576
    assert abs(sum(seen) / depth - k) <= 1.0 and seen == sorted(seen, reverse=True)
    assert now == method.promise(576, depth).count


def test_the_default_is_the_published_optimum_at_a_quarter():
    default, published = get("vflowopt"), get("vflowopt", calibration="25%")
    n = 10_000
    assert default.entering == pytest.approx(published.entering) and default.threshold == published.threshold
    assert default.later(2651, 28) == pytest.approx(published.later(2651, 28), abs=0.01 * n)


def test_stages_follow_the_depth_and_ratios_that_overspend_are_refused():
    def at(method, depth):
        return [layer for layer, step in enumerate(method.steps(100, depth)) if step]

    assert at(get("vflowopt"), 28) == [9, 18] and at(get("vflowopt"), 4) == [1, 3]
    assert at(get("vflowopt", layers=(2, 5)), 8) == [2, 5]
    with pytest.raises(ValueError, match=r"alone spend more than keep=0\.1"):
        get("vflowopt", keep=0.1, ratios=(0.9, 0.9)).steps(100, 28)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ratios": (0.5,)}, "two shares"),
        ({"ratios": (0.5, 1.5)}, "each of ratios"),
        ({"threshold": -1.0}, "threshold"),
        ({"cell": 0.5}, "cell"),
        ({"alpha": float("nan")}, "alpha"),
        ({"layers": (5, 2)}, "ascending"),
        ({"calibration": "30%"}, "presets '50%', '25%', '10%'"),
    ],
)
def test_bad_fields_are_refused_with_a_sentence(fields, words):
    with pytest.raises(ValueError, match=words):
        get("vflowopt", **fields)


# -- importance and recycling ------------------------------------------------------------------------------------------------


def test_losers_are_recycled_by_importance():
    """Two by two squares of a 2 x 4 picture; the losers of each become one token, at the better one's place."""
    importance = torch.tensor([[0.9, 0.1, 0.5, 0.6, 0.8, 0.3, 0.7, 0.4]])
    x = torch.tensor([[[1.0], [0.0], [2.0], [3.0], [5.0], [4.0], [6.0], [8.0]]])
    tokens = Tokens(x, place=Place.grid(1, 2, 4))
    entrance = get("vflowopt", keep=7, ratios=(7 / 8, 1.0), cell=2.0).parts()[0]
    step = entrance.reduce(tokens, {"attention": importance})
    assert step.index.tolist() == [[0, 2, 3, 4, 5, 6, 7]]
    assert step.mix(x)[0, 4, 0] == pytest.approx(3.0)  # (0.1 * 0 + 0.3 * 4) / 0.4
    assert torch.equal(step.score, importance)


def test_entropy_is_weighed_by_a_softmax_over_the_picture():
    n = 9
    attention, bits = torch.rand(1, n), torch.rand(1, n) * 8
    entrance = get("vflowopt", keep=4, alpha=-0.7, cell=2.0).parts()[0]
    step = entrance.reduce(Tokens(torch.randn(1, n, 2), place=Place.grid(1, 3, 3)), {"attention": attention, "entropy": bits})
    torch.testing.assert_close(step.score, attention - 0.7 * bits.softmax(1))
    assert get("vflowopt").needs() == {"attention": AnchorAttention(threshold=34.75955)}
    assert get("vflowopt", alpha=0.1, pixel_mean=(0.1,) * 3).needs()["entropy"] == PatchEntropy((0.1,) * 3)


def test_a_thumbnail_and_its_stitched_crops_are_apart(anyres):
    place = anyres(2, 2, 4, 4)
    sizes = torch.full((1, 5), 16)
    label = squares(place, 3.0, cropped(place, sizes))[0]
    thumbnail, crops = label[:16].view(4, 4), label[16:].view(2, 2, 4, 4).permute(0, 2, 1, 3).reshape(8, 8)
    assert thumbnail.unique().tolist() == [0, 1, 2, 3] and thumbnail[2, 2] == thumbnail[0, 0] != thumbnail[3, 2]
    assert crops.unique().tolist() == list(range(4, 13)) and crops[3, 3] == crops[5, 5] != crops[2, 3]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration-siglip", NEXT])
def test_importance_is_that_of_the_models_own_map(name, attention):
    net, inputs = tiny.model(name, "eager"), None
    inputs = tiny.prompts(net, tiny.one_image(net))
    pixels = inputs["pixel_values"].reshape(-1, *inputs["pixel_values"].shape[-3:])
    maps = net.model.vision_tower(pixel_values=pixels, output_attentions=True).attentions[adapt(net).feature_block].mean(1)
    other, decided = tiny.model(name, attention), []
    with apply(other, Spy(get("vflowopt", keep=8, threshold=1.1), decided)):
        tiny.run(other, inputs)
    score = decided[0].score[0]
    prefix = adapt(net).encoder.prefix
    side = int((maps.shape[1] - prefix) ** 0.5)
    first = maps[0]  # the picture, or its thumbnail
    received = first.mean(0)
    anchors = received > 1.1 * received.mean()
    assert anchors.any() and not anchors.all()
    assert (score[: side**2] - first[anchors].mean(0)[prefix:]).abs().max() < CLOSE
    assert (score[: side**2] - received[prefix:]).abs().max() > 100 * CLOSE  # the twin: all rows


@pytest.mark.parametrize("name", [LLAVA, NEXT, QWEN, "LlavaForConditionalGeneration-siglip"])
def test_importance_is_carried_to_the_layers(name):
    """What leaves there is the least important by the map of the entrance, in a batch of unequal prompts too."""
    net, decided = tiny.model(name), []
    inputs = tiny.inputs_for(net)
    with apply(net, Spy(get("vflowopt", keep=0.5, ratios=(0.7, 0.7), alpha=0.3, cell=2.0, threshold=1.2), decided)):
        tiny.run(net, inputs)
    entrance, *later = decided
    assert len(later) == 2 and int(later[-1].real.sum()) < int(entrance.real.sum())
    score, real = entrance.score.gather(1, entrance.index), entrance.real
    for step in later:
        for row in range(len(score)):
            own = score[row][real[row]]
            kept, count = step.index[row][step.real[row]], int(step.real[row].sum())
            best = own.argsort(descending=True, stable=True)[:count].sort().values
            assert torch.equal(kept, best)
        score, real = score.gather(1, step.index), step.real


def test_beams_share_what_is_carried():
    net = tiny.model(LLAVA)
    inputs = tiny.prompts(net, tiny.samples(net)[::2])
    made = []
    for beams in (1, 2):
        decided = []
        with apply(net, Spy(get("vflowopt", keep=0.3, threshold=1.2, cell=2.0), decided)):
            net.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=beams)
        made.append(decided[-1].index)
    assert torch.equal(made[0].repeat_interleave(2, 0), made[1])


@pytest.mark.parametrize("name", ["CLIPVisionModel", "SiglipVisionModel", "Siglip2VisionModel", "ViTModel", QWEN])
def test_every_family_gives_the_pixels_of_its_patches(name):
    """Entropy through the engine equals that of patches cut by hand from a picture of whole grey values."""
    net = tiny.model(name)
    view = adapt(net)
    encoder = getattr(view, "encoder", view)
    size = tiny.PATCH
    generator = torch.Generator().manual_seed(0)
    rows, cols = (4, 6) if name == QWEN else (tiny.SIDE, tiny.SIDE)
    levels = torch.randint(0, 6, (rows, cols, size, size), generator=generator) * 51  # by patch
    levels[0, 0] = 51
    colour = ((levels / 255)[..., None, :, :].expand(-1, -1, 3, -1, -1) - torch.tensor(encoder.pixel_mean).view(3, 1, 1)) / (
        torch.tensor(encoder.pixel_std).view(3, 1, 1)
    )
    if name == QWEN:
        merged = colour.unflatten(1, (cols // 2, 2)).unflatten(0, (rows // 2, 2)).transpose(1, 2).flatten(0, 3)
        inputs = {"hidden_states": merged[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1)}
        levels = levels.unflatten(1, (cols // 2, 2)).unflatten(0, (rows // 2, 2)).transpose(1, 2).flatten(0, 3)[None]
        expected = entropy(levels.flatten(2).repeat(1, 1, 2))
    elif name == "Siglip2VisionModel":
        inputs = {"pixel_values": colour.permute(0, 1, 3, 4, 2).flatten(2).flatten(0, 1)[None]}
        expected = entropy(levels.flatten(2).flatten(0, 1)[None])
    else:
        inputs = {"pixel_values": colour.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)[None]}
        expected = entropy(levels.flatten(2).flatten(0, 1)[None])
    torch.testing.assert_close(entropy(encoder.grey(inputs)), expected)
    assert expected[0, 0] == 0 and (expected[0, 1:] > 1).all()


def test_ratios_of_one_change_no_bit():
    for name in (LLAVA, NEXT, QWEN):
        net = tiny.model(name)
        inputs = tiny.inputs_for(net)
        before = tiny.run(net, inputs)
        with apply(net, "vflowopt", ratios=(1.0, 1.0, 1.0), alpha=0.2):
            assert torch.equal(tiny.run(net, inputs), before)
        with apply(net, "vflowopt", ratios=(1.0, 1.0, 0.9), alpha=0.2):
            assert not torch.equal(tiny.run(net, inputs), before)


# -- calibration -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 100])
@pytest.mark.parametrize("depth", [4, 28])
def test_every_candidate_costs_the_budget(keep, depth):
    n, seen = 576, []

    def measure(method):
        if method is not None:
            method.check(depth)
            entered = method.parts()[0].promise(n).count
            middle, last = method.later(entered, depth)
            one, two = method._places(depth)
            seen.append((one * entered + (two - one) * middle + (depth - two) * last) / depth)
        return 0.0

    get("vflowopt", keep=keep).calibrated(Study(measure, depth, n, calls=60, sampler="random"))
    budget = keep if isinstance(keep, int) else keep * n
    assert len(seen) == 60 and all(abs(each - budget) <= 1.0 for each in seen)


def test_tuning_raises_the_last_tokens_cosine_over_the_default():
    net = tiny.model(LLAVA)
    inputs = [tiny.prompts(net, [sample]) for sample in tiny.samples(net)]
    fitted = get("vflowopt", keep=0.3).fit(net, inputs, calls=30, warmup=10, sampler="tpe")
    found = fitted.calibration
    default = found.trials[0].score
    assert found.objective == "cosine" and found.full == pytest.approx(1.0) and len(found.trials) == 30
    assert found.trials[0].point["threshold"] == get("vflowopt").threshold
    assert found.score == max(trial.score for trial in found.trials) > default + 0.01
    assert fitted.keep == 0.3 and len(fitted.ratios) == 2
