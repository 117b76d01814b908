"""CoreMatching against its card: core tokens, core neurons, and decoding with these alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from references import CLOSE, difference, generated, view_of
from torch import nn
from witness import Replay, Spy, snapshot, spied

import jeton
import tiny
from jeton.demo import examples, prompt
from jeton.demo.data import make_scene
from jeton.demo.questions import KINDS, ask
from jeton.engine import apply
from jeton.engine.rules import Core
from jeton.method import get
from jeton.ops.neurons import overlap, positive
from jeton.tokens import Tokens

LLAVA = "LlavaForConditionalGeneration"


def patterns(score, neurons=10):
    """Active neurons of tokens that share so many of all with a core of all neurons."""
    active = torch.zeros(1, len(score), neurons, dtype=torch.bool)
    for token, count in enumerate(score):
        active[0, token, :count] = True
    return active


def kept(score, **fields):
    signals = {"neurons": patterns(score), "shared": torch.ones(1, 10, dtype=torch.long)}
    made = get("corematching", neurons=1.0, **fields).reduce(Tokens(torch.randn(1, len(score), 4)), signals)
    return made.index[0][made.real[0]].tolist()


def test_tokens_above_the_elbow_stay():
    assert kept([10, 9, 8, 2, 1, 1, 0, 0]) == [0, 1, 2]
    assert kept([1, 10, 0, 9, 2, 8, 0, 1]) == [1, 3, 5]


def test_equal_overlaps_keep_everything():
    assert kept([4] * 6) == list(range(6))


def test_a_budget_keeps_the_best_by_the_same_score():
    assert kept([1, 10, 0, 9, 2, 8, 0, 1], keep=4) == [1, 3, 4, 5]
    assert kept([5, 5, 5, 5], keep=2) == [0, 1]  # ties to the lowest


def test_the_core_are_the_neurons_most_tokens_activate_and_a_token_may_stand_in_for_it():
    active = torch.tensor([[[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 1]]]).bool()
    tokens = Tokens(torch.randn(1, 3, 2))
    counted = {"neurons": active, "shared": torch.tensor([[1, 2, 9, 9]])}
    assert get("corematching", neurons=0.5, keep=1).reduce(tokens, counted).index.tolist() == [[1]]
    one = {"neurons": active, "shared": torch.tensor([[True, True, False, False]])}
    assert get("corematching", match="token", keep=1).reduce(tokens, one).index.tolist() == [[0]]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"neurons": 0.0}, "neurons"),
        ({"top": 1.5}, "top"),
        ({"match": "x"}, "match"),
        ({"token": 0}, "token"),
        ({"layers": ()}, "nothing"),
    ],
)
def test_bad_fields_are_refused_with_a_sentence(fields, words):
    with pytest.raises(ValueError, match=words):
        get("corematching", **fields)


def test_layers_follow_the_depth_and_cut_progressively():
    def at(method, depth):
        return [(layer, step.keep) for layer, step in enumerate(method.steps(100, depth)) if step]

    assert at(get("corematching"), 32) == [(5, None)] and at(get("corematching", keep=0.25), 4) == [(1, 25)]
    assert at(get("corematching", layers=(2, 4), keep=25), 8) == [(2, 50), (4, 25)]


# -- on a model --------------------------------------------------------------------------------------------------------


class Heard(Spy):
    """Remembers the signals of every decision too."""

    def reduce(self, tokens, signals=None):
        self.decided.append((tokens, dict(signals)))
        return self.inner.reduce(tokens, signals)


def gated_inputs(net, inputs, **more):
    """What comes into the down projection of every layer, (B, L, F)."""
    found = []
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: found.append(args[0].clone()))
        for layer in view_of(net).layers
    ]
    try:
        tiny.run(net, inputs, **more)
    finally:
        for handle in handles:
            handle.remove()
    return found


@pytest.mark.parametrize("match", ["core", "token"])
def test_the_signals_are_the_signs_of_the_layer_before(match):
    """In a padded batch with two images in a prompt: each token's pattern; counts over the prompt's real tokens; one text
    token."""
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    heard = []
    with apply(net, Heard(get("corematching", layers=(2,), keep=9, match=match, token=3), heard)) as run:
        tiny.run(net, inputs)
        samples = run.layout.sample
    (_, signals), gated = heard[0], gated_inputs(net, inputs)[1] > 0
    real = inputs["attention_mask"].bool()
    for image, sample in enumerate(samples):
        columns = run.layout.position[image]
        assert torch.equal(signals["neurons"][image], gated[sample, columns])
        if match == "core":
            assert torch.equal(signals["shared"][image], gated[sample][real[sample]].sum(0))
        else:
            assert torch.equal(signals["shared"][image], gated[sample, -3])


def test_all_neurons_and_all_tokens_change_no_bit():
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    plain = generated(net, inputs, max_new_tokens=6)
    with apply(net, "corematching", neurons=1.0, keep=1.0):
        same = generated(net, inputs, max_new_tokens=6)
    with apply(net, "corematching", neurons=0.4, keep=1.0):
        fewer = generated(net, inputs, max_new_tokens=6)
    logits = [torch.stack(each.logits, 1) for each in (plain, same, fewer)]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0][:, 0], logits[2][:, 0])
    assert difference(logits[2][:, 1], logits[0][:, 1]) > 100 * CLOSE


def zeroed(net, method, decided, inputs, new, share):
    """Logits without a cache where the answer's tokens have the dense MLP's activations outside the core at zero."""
    with apply(net, Replay(get(method, neurons=1.0) if isinstance(method, str) else method, list(decided))):
        gated = gated_inputs(net, {**inputs, "position_ids": tiny.positions(net, inputs)}, use_cache=False)
    longer = tiny.extended(inputs, new[:, :-1])
    longer["position_ids"] = tiny.positions(net, longer)
    behind = new.shape[1] - 1
    masks, mask = [], inputs["attention_mask"].bool()
    for layer in gated:
        # every prompt loses the same number, and padding stands in front
        real = torch.arange(layer.shape[1]) >= (~mask).sum(1, keepdim=True)
        count = ((layer > 0) & real[..., None]).sum(1)
        wanted = round(share * count.shape[1])
        best = sorted_stable(count)[:, :wanted]
        masks.append(torch.zeros_like(count, dtype=torch.bool).scatter(1, best, True))

    def hook(mask):
        def change(module, args):
            x = args[0].clone()
            x[:, -behind:] = x[:, -behind:] * mask[:, None]
            return (x,)

        return change

    with apply(net, Replay(get(method, neurons=1.0) if isinstance(method, str) else method, list(decided))):
        handles = [
            layer.mlp.down_proj.register_forward_pre_hook(hook(mask))
            for layer, mask in zip(view_of(net).layers, masks, strict=True)
        ]
        try:
            return tiny.run(net, longer, use_cache=False)[:, -new.shape[1] :]
        finally:
            for handle in handles:
                handle.remove()


def sorted_stable(count):
    return torch.tensor([sorted(range(len(row)), key=lambda i: (-row[i], i)) for row in count.tolist()])


@pytest.mark.parametrize("batch", ["one", "two"])
def test_decoding_with_core_neurons_equals_the_dense_mlp_with_the_others_at_zero(batch, monkeypatch):
    """Sliced weights for one prompt, zeroed activations for several; the same function."""
    net = tiny.model(LLAVA)
    chosen = [tiny.samples(net)[0], tiny.Sample(((),), (6, 7), 8)][: 1 + (batch == "two")]
    inputs = tiny.prompts(net, chosen)
    method = get("corematching", keep=20, neurons=0.4)
    spy, decided = spied(method)
    cores, settle = [], Core._settle
    monkeypatch.setattr(Core, "_settle", lambda core, gated: (cores.append(core), settle(core, gated)))
    with apply(net, spy):
        output = generated(net, inputs, max_new_tokens=8)
    assert len(cores) == 4 and all((core.sliced is not None) == (batch == "one") for core in cores)
    new, logits = output.sequences[:, -8:], torch.stack(output.logits, 1)
    right = zeroed(net, "corematching(keep=20)", decided, inputs, new, 0.4)
    assert difference(logits, right) < CLOSE
    assert difference(logits[:, 1:], zeroed(net, "corematching(keep=20)", decided, inputs, new, 0.6)[:, 1:]) > 100 * CLOSE


def test_padding_activates_no_neurons():
    net = tiny.model(LLAVA)
    short, long, found = tiny.Sample(((),), (2, 4), 5), tiny.Sample(((),), (4, 60), 6), []
    for chosen in ([short], [short, long]):
        with apply(net, "corematching", keep=20, neurons=0.4) as run:
            tiny.run(net, tiny.prompts(net, chosen), use_cache=True)
            found.append([core.index[0].sort().values for core in run.rules.prompt.memory.core.values()])
    assert len(found[0]) == 4 and all(map(torch.equal, *found))


def test_beams_share_the_sliced_weights_and_say_what_the_zeroed_model_says():
    net = tiny.model(LLAVA)
    inputs = tiny.prompts(net, tiny.one_image(net))
    spy, decided = spied(get("corematching", keep=20))
    with apply(net, spy):
        tiny.run(net, inputs)
        once = list(decided)
        output = generated(net, inputs, num_beams=3, max_new_tokens=6, length_penalty=0.0, output_scores=True)
    new = output.sequences[:, -6:]
    worth = zeroed(net, "corematching(keep=20)", once, inputs, new, 0.4).log_softmax(-1).gather(2, new[..., None]).sum((1, 2))
    assert torch.allclose(output.sequences_scores, worth, atol=1e-3)


def test_sliced_weights_really_are_smaller():
    from torch.utils.flop_counter import FlopCounterMode

    net = tiny.model(LLAVA)
    inputs = tiny.prompts(net, tiny.one_image(net))
    counted = []
    for neurons in (1.0, 0.25):
        with apply(net, "corematching", keep=20, neurons=neurons):
            cache = net(**inputs, use_cache=True).past_key_values
            word = torch.tensor([[20]])
            mask = torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.long)
            net(input_ids=word, past_key_values=cache, attention_mask=mask)
            with FlopCounterMode(display=False) as flops:
                net(input_ids=word, past_key_values=cache, attention_mask=torch.ones(1, mask.shape[1] + 1, dtype=torch.long))
        counted.append(flops.get_total_flops())
    assert counted[0] - counted[1] == 4 * 3 * 2 * 64 * 60  # layers x maps x 2 x width x neurons less


def test_weights_that_cannot_be_sliced_are_refused_and_nothing_remains():
    net = tiny.BUILDERS[LLAVA]()
    before = snapshot(net)

    class Wrapped(nn.Linear):
        pass

    plain = view_of(net).layers[1].mlp.up_proj
    odd = Wrapped(64, 80, bias=False)
    odd.load_state_dict(plain.state_dict())
    view_of(net).layers[1].mlp.up_proj = odd
    with pytest.raises(jeton.Unsupported, match="Wrapped"):
        apply(net, "corematching")
    with apply(net, "corematching", neurons=1.0):
        tiny.run(net, tiny.inputs_for(net))
    view_of(net).layers[1].mlp.up_proj = plain
    assert snapshot(net) == before


# -- behaviour on the embedded model ---------------------------------------------------------------------------------------


def asked_boxes():
    """For every scene and question of the held-out set the box of the digit it is about, from the scenes drawn once more."""
    rng, found = np.random.default_rng(examples._SEED), {}
    for number in range(200):
        scene = make_scene(rng, "held-out")
        questions = ask(scene.digits)
        found |= {(number, question.text): scene.digits[question.digit].box for question in questions}
        for kind in KINDS:
            choices = [question for question in questions if question.kind == kind]
            if choices:
                rng.integers(len(choices))
    return found


def test_patches_of_the_digit_asked_about_share_neurons_with_the_last_token():
    """On the scenes of odd number; layer and reference token were chosen on the others."""
    demo, boxes, seen = jeton.load_demo(), asked_boxes(), {}
    layer = demo.model.model.language_model.layers[1]
    handle = layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.update(gated=args[0]))
    above = []
    for each in demo.examples:
        if each.kind not in ("digit", "colour") or each.scene % 2 == 0:
            continue
        inputs = demo.processor(images=each.image, text=prompt(each.question), return_tensors="pt")
        with torch.no_grad():
            demo.model(**inputs)
        active = positive(seen["gated"], 1.0)
        score = overlap(active[:, inputs["input_ids"][0] == demo.model.config.image_token_id], active[:, -1])[0]
        left, top, right, bottom = boxes[each.scene, each.question]
        middle = torch.arange(12) * 7 + 3.5
        inside = ((middle > top) & (middle < bottom))[:, None] & ((middle > left) & (middle < right))[None]
        above.append(bool(score[inside.flatten()].max() > score.median()))
    handle.remove()
    assert len(above) == 196 and sum(above) / len(above) >= 0.9


# -- the release: zeros in the cache ---------------------------------------------------------------------------------------


RELEASE = {"zero_kv": True, "match": "token", "neurons": 1.0}


def test_zeros_are_written_behind_layers_5_to_18_of_32_and_nothing_leaves():
    method = get("corematching", **RELEASE)
    steps = method.steps(576, 32)
    assert [layer - 1 for layer, step in enumerate(steps) if step] == list(range(5, 19)) and method.promise(576, 32).count == 576
    assert [layer for layer, step in enumerate(get("corematching", layers=(2, 3), **RELEASE).steps(9, 4)) if step] == [2, 3]


@pytest.mark.parametrize("fields", [RELEASE, {**RELEASE, "match": "core", "keep": 5}], ids=["release", "core"])
def test_keys_and_values_of_other_tokens_become_zero_behind_their_layer(fields):
    """Padded batch, two images in a prompt: caches, the prompt's own logits, and decoded tokens from a cache zeroed by hand."""
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    decided = []
    with torch.no_grad():
        plain = net(**inputs, use_cache=True)
        with apply(net, Spy(get("corematching", **fields), decided)) as run:
            zeroed = net(**inputs, use_cache=True)
            layout, length = run.layout, run.costs.length
            report = run.report()
    assert torch.equal(plain.logits, zeroed.logits) and length == inputs["input_ids"].shape[1]
    acting = [layer - 1 for layer, step in enumerate(get("corematching", **fields).steps(36, 4)) if step]
    assert acting == [1, 2] and len(decided) == 2 and report.flops_share == 1
    gone = dict(zip(acting, [reduction.assign < 0 for reduction in decided], strict=True))
    assert not torch.equal(gone[1], gone[2])  # each layer's own neurons decide
    for number, (before, after) in enumerate(zip(plain.past_key_values.layers, zeroed.past_key_values.layers, strict=True)):
        mask = torch.zeros(before.keys.shape[0], length, dtype=torch.bool)
        for image, sample in enumerate(layout.sample):
            if number in gone:
                mask[sample, layout.position[image]] = gone[number][image]
        assert mask.any() == (number in gone)
        for name in ("keys", "values"):
            assert torch.equal(getattr(after, name), getattr(before, name).masked_fill(mask[:, None, :, None], 0))
            setattr(before, name, getattr(after, name).clone())
    more = {**tiny.extended(inputs, tiny.words(1, 3).expand(len(mask), 1))}
    token = {"input_ids": more["input_ids"][:, -1:], "attention_mask": more["attention_mask"]}
    with torch.no_grad():
        by_hand = net(**token, past_key_values=plain.past_key_values).logits
        with apply(net, "corematching", **fields):
            fresh = net(**inputs, use_cache=True).past_key_values
            assert difference(net(**token, past_key_values=fresh).logits, by_hand) < CLOSE
        assert difference(net(**more).logits[:, -1:], by_hand) > 100 * CLOSE  # a zero key is not the key


def test_zeros_are_not_written_into_a_cache_of_another_kind():
    from transformers import StaticCache

    net = tiny.model(LLAVA)
    inputs = tiny.prompts(net, tiny.one_image(net))
    cache = StaticCache(config=net.config.text_config, max_cache_len=80)
    with apply(net, "corematching", **RELEASE), pytest.raises(ValueError, match="cache_implementation"):
        net(**inputs, past_key_values=cache)
