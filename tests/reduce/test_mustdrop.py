"""MustDrop against its card, and the cache that shrinks after the prompt."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from references import CLOSE, difference, generated, kept_at, layer_columns, view_of
from torch.nn.functional import cosine_similarity
from transformers import DynamicCache
from witness import Replay, snapshot, spied, watching

import jeton
import tiny
from jeton.engine import apply
from jeton.method import get
from jeton.ops.windows import alike, most_alike, windows
from jeton.place import Place
from jeton.tokens import Tokens

LLAVA = "LlavaForConditionalGeneration"
SPECS = ["mustdrop(keep=9)", "mustdrop(total=0.02, single=0.03)"]


# -- windows in the encoder --------------------------------------------------------------------------------------------


def merging(x, side, **fields):
    step = get("mustdrop", **fields).parts()[0]
    tokens = Tokens(x, place=Place.grid(len(x), side, side))
    return step.reduce(tokens).apply(tokens)


def test_a_window_of_collinear_tokens_of_lengths_one_to_nine_merges_to_length_five():
    x = torch.zeros(1, 9, 4)
    x[0, :, 1] = torch.arange(1, 10)
    after = merging(x, 3)
    assert after.features.tolist() == [[[0, 5, 0, 0]]] and after.index.tolist() == [[4]] and after.size.tolist() == [[9]]


def test_sizes_weigh_the_mean():
    x = torch.zeros(1, 9, 2)
    x[0, :, 0] = torch.arange(1, 10)
    size = torch.ones(1, 9)
    size[0, 8] = 3
    tokens = Tokens(x, size=size, place=Place.grid(1, 3, 3))
    after = get("mustdrop").parts()[0].reduce(tokens).apply(tokens)
    assert after.features[0, 0, 0] == pytest.approx((45 + 2 * 9) / 11)


def test_the_likeness_of_a_window_is_the_mean_of_its_72_cosines():
    x = torch.randn(2, 36, 5)
    place = Place.grid(2, 6, 6)
    number, middle, count = windows(place, 3)
    likeness = alike(x, number, count, 3)
    assert count == 4 and middle.nonzero()[:4, 1].tolist() == [7, 10, 25, 28]
    for b in range(2):
        for window in range(4):
            own = x[b, number[b] == window]
            table = cosine_similarity(own[:, None], own[None], dim=-1)
            assert likeness[b, window] == pytest.approx(float((table.sum() - 9) / 72), abs=1e-5)


def test_windows_below_the_threshold_stay_and_each_picture_has_its_own():
    x = torch.randn(3, 36, 8)
    x[0, :] = x[0, 0].clone()  # all four windows alike
    first = torch.tensor([r * 6 + c for r in range(3) for c in range(3)])
    x[1, first] = x[1, 0].clone()
    after = merging(x, 6)
    assert after.count().tolist() == [4, 28, 36]
    assert torch.equal(after.features[2], x[2])
    alone = merging(x[1:2], 6)
    assert torch.equal(alone.index[0], after.index[1][after.real[1]])


@pytest.mark.parametrize("side", [27, 7, 8, 2])
def test_a_grid_not_divisible_by_three_leaves_its_last_rows_and_columns(side):
    x = torch.randn(1, 1, 6).expand(1, side**2, 6).clone()
    after = merging(x, side)
    whole = (side // 3) ** 2
    assert len(after) == side**2 - 8 * whole
    rest = [i for i in range(side**2) if i // side >= side // 3 * 3 or i % side >= side // 3 * 3]
    assert set(rest) <= set(after.index[0].tolist())


def test_with_a_budget_the_most_similar_windows_merge_whatever_their_likeness():
    x = torch.randn(1, 36, 8)
    place = Place.grid(1, 6, 6)
    number, _, count = windows(place, 3)
    likeness = alike(x, number, count, 3)
    step = get("mustdrop", keep=4).parts()[0]
    made = step.reduce(Tokens(x, place=place))
    merged = [int(number[0, i]) for i in made.index[0][made.size[0] == 9]]
    most = (36 - made.k) // 8
    assert most == len(merged) > 0 and made.mask is None
    assert set(merged) == set(likeness[0].argsort(descending=True)[:most].tolist())


def test_ties_go_to_the_lowest_window():
    assert most_alike(torch.tensor([[0.5, 0.5, 0.5]]), 2).tolist() == [[True, True, False]]


# -- dropping in the language model ------------------------------------------------------------------------------------

A = torch.tensor([[0.2, 0.0005, 0.3], [0.1, 0.0004, 0.2]])


def stage(a, **fields):
    fields = {"total": 0.002, "single": 0.001, "key": 0.0, "layers": (1,), **fields}
    signals = {"attention": a.mean(0)[None], "peak": a.amax(0)[None], "class": fields.pop("rated", torch.zeros(1, a.shape[1]))}
    made = get("mustdrop", **fields).parts()[-1].reduce(Tokens(torch.randn(1, a.shape[1], 4)), signals)
    return made.index[0][made.real[0]].tolist()


def test_a_token_leaves_if_all_text_together_and_each_word_ignore_it():
    assert stage(A) == [0, 2]
    louder = A.clone()
    louder[0, 1] = 0.002
    assert stage(louder) == [0, 1, 2]
    assert stage(A, single=0.0001) == [0, 1, 2] and stage(A, total=0.0001) == [0, 1, 2]  # each threshold alone keeps it


def test_key_tokens_survive_any_threshold_and_nothing_else_an_infinite_one():
    rated = torch.tensor([[0.1, 0.9, 0.2]])
    assert stage(A, key=0.08, rated=rated) == [0, 1, 2]
    assert stage(A, key=0.08, rated=rated, total=float("inf"), single=float("inf")) == [1]
    assert stage(A, key=0.34, rated=rated, total=float("inf"), single=float("inf")) == [1, 2]


def test_with_a_budget_key_tokens_come_first_and_then_the_same_criterion():
    rated = torch.tensor([[0.1, 0.9, 0.2]])
    assert stage(A, keep=2, key=0.08, rated=rated) == [1, 2]
    assert stage(A, keep=2) == [0, 2] and stage(A, keep=1) == [2]


def test_presets_are_the_published_thresholds():
    assert get("mustdrop").thresholds == get("mustdrop", preset=192).thresholds == (0.001, 0.001)
    assert get("mustdrop", preset=128).thresholds == (0.0012, 0.001) and get("mustdrop", preset=64).thresholds == (0.011, 0.01)


def test_layers_follow_the_depth():
    def at(method, depth):
        return [layer for layer, step in enumerate(method.steps(100, depth)) if step]

    assert at(get("mustdrop"), 32) == [3, 7, 11, 15] and get("mustdrop").shrinks(32) == 2
    assert at(get("mustdrop", layers=(1, 4)), 8) == [2, 5] and get("mustdrop", layers=(1, 4)).shrinks(8) == 1
    assert get("mustdrop", shrink=False).shrinks(32) is None
    counts = [step.keep for step in get("mustdrop", keep=64).steps(576, 32) if step]
    assert counts == [240, 155, 100, 64]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"preset": 100}, "192, 128, 64"),
        ({"preset": 64, "keep": 3}, "leave out keep"),
        ({"total": -1.0}, "total=-1.0"),
        ({"similarity": 1.5}, "cosine"),
        ({"key": 2.0}, "fraction"),
        ({"layers": ()}, "nothing to do"),
        ({"layers": (3, 1)}, "ascending"),
    ],
)
def test_bad_fields_are_refused_with_a_sentence(fields, words):
    with pytest.raises(ValueError, match=words):
        get("mustdrop", **fields)


def test_thresholds_of_zero_change_no_bit_and_infinite_ones_leave_the_key_set():
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    before = tiny.run(net, inputs)
    with apply(net, "mustdrop", total=0.0, single=0.0, similarity=None):
        assert torch.equal(tiny.run(net, inputs), before)
    inf = float("inf")
    with apply(net, get("mustdrop", total=inf, single=inf, similarity=None)) as run:
        tiny.run(net, inputs)
        assert [image.after for image in run.report().images] == [4] * 4  # ceil(0.08 * 49)
        signals = run.costs.flow.scene.signals
        (rated,) = signals.values()
        for image in range(4):
            own = rated.view(4, 49, -1).mean(2)[image]
            assert (
                sorted(own.argsort(descending=True)[:4].tolist())
                == run.costs.flow.scene.rows.slot[image][run.costs.flow.scene.rows.mask[image]].tolist()
            )


def test_the_text_signals_are_those_of_the_eager_map():
    """Sum and largest over the text behind each image, in a padded batch with two images in a prompt."""
    from in_layers import Looking, eager, images
    from jeton.needs import TextAttention

    net = tiny.model(LLAVA, "eager")
    inputs = tiny.inputs_for(net)
    look = Looking(2, mean=TextAttention(raters="all"), peak=TextAttention(raters="all", peak=True))
    with apply(net, look):
        maps = eager(net, inputs)
    for image, (sample, columns) in enumerate(images(net, inputs)):
        behind = [c for c in range(columns[-1] + 1, inputs["input_ids"].shape[1]) if inputs["input_ids"][sample, c] != tiny.IMAGE]
        rows = maps[1][sample][behind][:, columns]
        assert (look.heard["mean"][image] - rows.mean(0)).abs().max() < 1e-5
        assert (look.heard["peak"][image] - rows.amax(0)).abs().max() < 1e-5
        assert (look.heard["peak"][image] - rows.mean(0)).abs().max() > 1e-3


def test_a_sample_does_not_depend_on_its_batch():
    """Counts by thresholds: with its own windows each picture, each prompt is the same alone."""
    net = tiny.model(LLAVA)
    chosen = tiny.samples(net)
    together = tiny.prompts(net, chosen)
    method = get("mustdrop", total=0.02, single=0.03, similarity=0.15)
    with apply(net, method) as run:
        batch = tiny.run(net, {**together, "position_ids": tiny.positions(net, together)})[:, -1]
        left = [image.after for image in run.report().images]
        for number, sample in enumerate(chosen):
            alone = tiny.prompts(net, [sample])
            single = tiny.run(net, {**alone, "position_ids": tiny.positions(net, alone)})[0, -1]
            assert difference(batch[number], single) < CLOSE
    assert len(set(left)) > 1 and max(left) < 49


# -- the cache after the prompt ----------------------------------------------------------------------------------------


@contextmanager
def hidden_from_the_answer(net, method, decided, longer, prompt, first):
    """The reduced model without a cache whose layers from `first` on hide from tokens behind the prompt what is gone at the
    end."""
    with watching(net) as whole:
        tiny.run(net, longer)
    with apply(net, Replay(method, list(decided))), watching(net) as seen:
        tiny.run(net, longer, use_cache=False)
    final = kept_at(seen, whole, len(seen.layers) - 1, longer)
    at = [layer_columns(seen, whole, layer, longer) for layer in range(len(seen.layers))]

    def hook(layer):
        def change(module, args, kwargs):
            columns, mask = at[layer], kwargs["attention_mask"]
            length = columns.shape[1]
            allowed = torch.ones(length, length, dtype=torch.bool).tril().expand(len(columns), 1, -1, -1)
            if mask is not None:
                allowed = mask if mask.dtype == torch.bool else mask == 0
            gone = (columns >= 0) & ~final.gather(1, columns.clamp(min=0))
            later = columns >= prompt
            allowed = allowed & ~(later[:, None, :, None] & gone[:, None, None, :])
            if mask is not None and mask.is_floating_point():
                allowed = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(mask.dtype).min)
            return args, {**kwargs, "attention_mask": allowed}

        return change

    with apply(net, Replay(method, list(decided))):
        layers = view_of(net).layers
        handles = [layers[i].register_forward_pre_hook(hook(i), with_kwargs=True) for i in range(first, len(layers))]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def reference(net, method, decided, inputs, new, first=1):
    longer = tiny.extended(inputs, new[:, :-1])
    longer["position_ids"] = tiny.positions(net, longer)
    with hidden_from_the_answer(net, method, decided, longer, inputs["input_ids"].shape[1], first):
        return tiny.run(net, longer, use_cache=False)[:, -new.shape[1] :]


@pytest.mark.parametrize("batch", ["padded", "one"])
@pytest.mark.parametrize("spec", SPECS)
def test_decoding_with_a_shrunk_cache_equals_a_mask_over_the_full_one(spec, batch):
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net) if batch == "padded" else tiny.prompts(net, tiny.one_image(net))
    method = get(spec)
    spy, decided = spied(method)
    with apply(net, spy):
        output = generated(net, inputs)
    lengths = [layer.keys.shape[2] for layer in output.past_key_values.layers]
    assert lengths[0] > lengths[1] == lengths[2] == lengths[3]
    new, logits = output.sequences[:, -16:], torch.stack(output.logits, 1)
    right = reference(net, method, decided, inputs, new)
    assert difference(logits, right) < CLOSE and torch.equal(right.argmax(-1), new)
    # the twins: the full cache, and one layer too few
    longer = tiny.extended(inputs, new[:, :-1])
    with apply(net, Replay(method, list(decided))):
        full = tiny.run(net, {**longer, "position_ids": tiny.positions(net, longer)}, use_cache=False)[:, -16:]
    assert difference(logits[:, 1:], full[:, 1:]) > 10 * CLOSE
    assert difference(logits[:, 1:], reference(net, method, decided, inputs, new, first=2)[:, 1:]) > 10 * CLOSE


@pytest.mark.parametrize("spec", SPECS)
def test_caches_that_hold_a_window_shrink_too(spec):
    """What such a cache has lost already lies beyond its window for good."""
    net = tiny.model("PaliGemmaForConditionalGeneration-2")
    inputs, method = tiny.inputs_for(net), get(spec, score="received")
    spy, decided = spied(method)
    with apply(net, spy):
        output = generated(net, inputs)
    new, logits = output.sequences[:, -16:], torch.stack(output.logits, 1)
    right = reference(net, method, decided, inputs, new)
    assert difference(logits, right) < CLOSE and torch.equal(right.argmax(-1), new)
    lengths = [layer.keys.shape[2] for layer in output.past_key_values.layers]
    assert lengths[0] == lengths[2] == 59 < lengths[1] == lengths[3]
    assert output.past_key_values.layers[2].get_seq_length() == lengths[1]  # what has come, be it beyond the window
    assert difference(logits[:, 1:], reference(net, method, decided, inputs, new, first=2)[:, 1:]) > 10 * CLOSE


def test_without_shrinking_the_full_cache_is_seen():
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    with apply(net, "mustdrop", keep=9, shrink=False):
        lengths = [layer.keys.shape[2] for layer in generated(net, inputs, max_new_tokens=2).past_key_values.layers]
    assert lengths[1] > lengths[2] > lengths[3]


def test_beams_are_worth_what_the_masked_model_says():
    net = tiny.model(LLAVA)
    inputs = tiny.for_beams(net)
    method = get(SPECS[0])
    spy, decided = spied(method)
    with apply(net, spy):
        tiny.run(net, inputs)
        once = list(decided)
        output = generated(net, inputs, num_beams=3, max_new_tokens=6, length_penalty=0.0, output_scores=True)
    new = output.sequences[:, -6:]
    logits = reference(net, method, once, inputs, new)
    worth = logits.log_softmax(-1).gather(2, new[..., None]).sum((1, 2))
    assert torch.allclose(output.sequences_scores, worth, atol=1e-3)


@torch.no_grad()
def test_a_second_question_sees_the_shrunk_cache_too():
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    method = get(SPECS[0])
    asked = torch.cat([tiny.words(5, 50 + row) for row in range(3)])
    longer = tiny.extended(inputs, asked)
    longer["position_ids"] = tiny.positions(net, longer)
    spy, decided = spied(method)
    with apply(net, spy):
        cache = net(**inputs, position_ids=tiny.positions(net, inputs), use_cache=True).past_key_values
        second = net(
            input_ids=asked,
            attention_mask=longer["attention_mask"],
            position_ids=longer["position_ids"][:, -5:],
            past_key_values=cache,
            use_cache=True,
        )
    with hidden_from_the_answer(net, method, decided, longer, inputs["input_ids"].shape[1], 1):
        right = tiny.run(net, longer, use_cache=False)[:, -5:]
    assert difference(second.logits, right) < CLOSE


@torch.no_grad()
def test_another_picture_joins_a_shrunk_cache():
    """The second prompt's tokens stand behind what is left of the first in every layer, and caches shrink again."""
    net = tiny.model(LLAVA)
    first, then = (tiny.prompts(net, [tiny.Sample(((),), (3, 4), seed)]) for seed in (1, 2))
    one, two = first["input_ids"].shape[1], then["input_ids"].shape[1]
    mask = torch.ones(1, one + two, dtype=torch.long)
    ids = torch.arange(one + two)[None]
    with apply(net, "mustdrop", keep=9, similarity=None):
        cache = net(**first, position_ids=ids[:, :one], use_cache=True).past_key_values
        assert [layer.keys.shape[2] for layer in cache.layers] == [one, one - 40, one - 40, one - 40]
        before = [layer.keys.clone() for layer in cache.layers]
        net(**{**then, "attention_mask": mask}, position_ids=ids[:, one:], past_key_values=cache, use_cache=True)
        lengths = [layer.keys.shape[2] for layer in cache.layers]
        assert lengths[1:] == [one + two - 80] * 3
        assert all(torch.equal(layer.keys[:, :, : old.shape[2]], old) for layer, old in zip(cache.layers, before, strict=True))


def test_compact_positions_are_the_cache_length_of_each_layer():
    """What the release does: a decoded token's position in a layer is how many tokens that layer holds."""
    net = tiny.model(LLAVA)
    inputs = tiny.prompts(net, tiny.one_image(net))
    seen = []

    def look(module, args, kwargs):
        if args[0].shape[1] == 1 if args else kwargs["hidden_states"].shape[1] == 1:
            seen.append((module.self_attn.layer_idx, kwargs["position_embeddings"][0], kwargs["past_key_values"]))
            held = kwargs["past_key_values"].layers[module.self_attn.layer_idx].keys.shape[2]
            cos, _ = view_of(net).rotary(torch.zeros(1, 1, 64), torch.tensor([[held]]))
            assert torch.allclose(cos, kwargs["position_embeddings"][0], atol=1e-5)

    with apply(net, "mustdrop", keep=9, positions="compact"):
        handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in view_of(net).layers]
        generated(net, inputs, max_new_tokens=3)
        for handle in handles:
            handle.remove()
    assert len(seen) == 8


def test_a_cache_that_cannot_shrink_is_refused_before_anything_runs():
    net = tiny.model(LLAVA)
    inputs = tiny.prompts(net, tiny.one_image(net))

    class Odd(DynamicCache):
        pass

    from transformers.cache_utils import DynamicSlidingWindowLayer

    cache = Odd()
    cache.layers.append(DynamicSlidingWindowLayer(sliding_window=8))
    with apply(net, "mustdrop", keep=9), pytest.raises(ValueError, match="shrink=False"):
        net(**inputs, past_key_values=cache, use_cache=True)


def test_nothing_remains_and_qwen_is_refused_with_a_way_out():
    net = tiny.model("Qwen2_5_VLForConditionalGeneration")
    before = snapshot(net)
    with pytest.raises(jeton.Unsupported, match=r"mustdrop.*use "):
        apply(net, "mustdrop", score="received")
    assert snapshot(net) == before
    with apply(net, "mustdrop", keep=5, score="received", similarity=None) as run:
        tiny.run(net, tiny.inputs_for(net))
        assert {image.after for image in run.report().images} == {5}
    assert snapshot(net) == before
