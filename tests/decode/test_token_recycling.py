"""Token Recycling: the tree, the matrix, and that the output is the target's own."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import jeton
import tiny
from jeton.decode._common import Shape, Target, draw, verify, warpers
from jeton.decode.token_recycling import PATHS, TEMPLATE, TokenRecycling
from jeton.train import Recipe, train

V = 24


def llama(vocab=V, layers=2, **more):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=512, **more,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


def greedy(model, new, **inputs):
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])  # or it takes tokens 0 for padding
    return model.generate(**inputs, max_new_tokens=new, do_sample=False, pad_token_id=0)


def decoders(model):
    """The matrix cold, hot and full of garbage."""
    yield TokenRecycling(model)
    hot = TokenRecycling(model)
    hot.generate(input_ids=torch.randint(0, model.vocab_size, (1, 6)), max_new_tokens=24)
    yield hot
    garbage = TokenRecycling(model)
    garbage.matrix.random_(0, model.vocab_size)
    yield garbage


def test_the_template_is_the_published_one():
    assert len(TEMPLATE) == 81 and [len(level) for level in TEMPLATE.levels] == [8, 21, 25, 15, 8, 3]
    assert all(path[:-1] in PATHS for path in PATHS[1:]) and len(set(PATHS)) == 81
    assert [PATHS[n] for n in TEMPLATE.levels[-1]] == ["000000", "000001", "000100"]


def test_a_node_sees_itself_and_its_ancestors():
    shape = Shape((-1, 0, 0, 1))
    assert shape.ancestors().tolist() == [
        [True, False, False, False], [True, True, False, False], [True, False, True, False], [True, True, False, True],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="parents before their children"):
        Shape((-1, 2, 0))


def test_every_node_has_the_logits_of_its_own_path():
    model, prompt = llama(), torch.randint(0, V, (2, 7))
    prompt[1, :3] = 0
    mask = torch.ones_like(prompt)
    mask[1, :3] = 0
    shape = Shape((-1, 0, 0, 1, 3, 2))
    with torch.no_grad():
        target = Target(model, {"input_ids": prompt, "attention_mask": mask})
        tokens = torch.randint(0, V, (2, 6))
        logits = target.forward(shape, tokens)
        for row in range(2):
            for node in range(6):
                path, at = [], node
                while at >= 0:
                    path.insert(0, tokens[row, at])
                    at = shape.parents[at]
                whole = torch.cat([prompt[row][mask[row].bool()], torch.tensor(path, dtype=torch.long)])
                assert torch.allclose(logits[row, node], model(input_ids=whole[None]).logits[0, -1], atol=1e-5)


def test_the_longest_path_wins_and_the_first_of_equal_ones():
    shape = Shape((-1, 0, 0, 1, 2, 4))
    tokens = torch.tensor([[5, 1, 2, 3, 4, 6], [5, 1, 1, 9, 9, 9]])
    wanted = torch.tensor([[2, 0, 4, 0, 6, 7], [1, 8, 0, 0, 0, 0]])
    nodes, real, following = verify(shape, tokens, wanted)
    assert nodes[0][real[0]].tolist() == [0, 2, 4, 5] and following[0] == 7
    # both children hold 1: the first is taken, though what the second wants would fit its own child
    assert nodes[1][real[1]].tolist() == [0, 1] and following[1] == 8


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_output_is_the_target_s_own_whatever_the_matrix_holds(attention):
    model = llama(attn_implementation=attention)
    for decoder in decoders(model):
        for length in (1, 9):
            prompt = torch.randint(0, V, (1, length))
            out = decoder.generate(input_ids=prompt, max_new_tokens=40)
            assert torch.equal(out.sequences, greedy(model, 40, input_ids=prompt))
            assert out.told.tokens == 40


def test_batches_padded_on_the_left_give_what_each_row_gives_alone():
    model = llama()
    prompt, mask = torch.randint(0, V, (3, 8)), torch.ones(3, 8, dtype=torch.long)
    mask[0, :5], mask[2, :1] = 0, 0
    out = TokenRecycling(model).generate(input_ids=prompt, attention_mask=mask, max_new_tokens=30)
    for row in range(3):
        alone = greedy(model, 30, input_ids=prompt[row : row + 1, mask[row].bool()])
        assert torch.equal(out.sequences[row, 8:], alone[0, int(mask[row].sum()) :])


def test_it_stops_at_the_end_token_of_each_row():
    model, prompt = llama(), torch.randint(0, V, (2, 5))
    free = greedy(model, 30, input_ids=prompt)
    end = int(free[0, 12])
    out = TokenRecycling(model).generate(input_ids=prompt, max_new_tokens=30, eos_token_id=end, pad_token_id=0)
    for row in range(2):
        answer = free[row, 5:].tolist()
        until = answer.index(end) + 1 if end in answer else 30
        found = out.sequences[row, 5:].tolist()
        assert found[:until] == answer[:until] and set(found[until:]) <= {0}


def test_after_a_step_the_matrix_holds_the_best_of_every_node_the_last_one_counting():
    model, prompt = llama(), torch.randint(0, V, (1, 6))
    decoder = TokenRecycling(model)
    decoder.matrix.random_(0, V)
    with torch.no_grad():
        root = model(input_ids=prompt).logits[:, -1:].argmax(-1)
        tokens = decoder.draft(root)
        decoder.generate(input_ids=prompt, max_new_tokens=2)
        expected = {}
        for node in range(81):
            path, at = [], node
            while at >= 0:
                path.insert(0, int(tokens[0, at]))
                at = TEMPLATE.parents[at]
            logits = model(input_ids=torch.cat([prompt, torch.tensor([path], dtype=torch.long)], 1)).logits[0, -1]
            expected[int(tokens[0, node])] = logits.topk(8).indices
    for token, best in expected.items():
        assert torch.equal(decoder.matrix[token], best)


def test_a_periodic_text_is_drafted_whole():
    model, period = llama(layers=1), torch.randperm(V)[:7]
    text = period.repeat(10)
    train(
        model,
        lambda step: text[None],
        lambda m, ids: m(input_ids=ids, labels=ids).loss,
        Recipe(steps=80, rate=1e-2),
        progress=False,
    )
    decoder = TokenRecycling(model)
    out = decoder.generate(input_ids=text[None, :7], max_new_tokens=56)
    assert torch.equal(out.sequences[0], text[:63])
    assert out.told.gained[0] == 1.0  # the matrix is cold
    hot = decoder.generate(input_ids=text[None, :7], max_new_tokens=56)
    assert hot.told.mean_accepted >= 5 and hot.told.forwards < out.told.forwards


def test_sampling_leaves_the_distribution_as_it_is():
    """The two tokens after the first one, over many rows, against the products of conditional probabilities."""
    model, prompt = llama(vocab=6, layers=1), torch.randint(0, 6, (1, 4))
    drawn, first = _sampled(model, prompt.expand(6000, -1))

    def after(*more):
        ids = torch.cat([prompt, torch.tensor([more], dtype=torch.long)], 1)
        return (model(input_ids=ids).logits[0, -1] / 1.5).softmax(-1)

    with torch.no_grad():
        start = int(first.mode().values)
        both = torch.stack([after(start)[a] * after(start, a) for a in range(6)])
        rows = drawn[first == start]
        counts = torch.zeros(6, 6).index_put((rows[:, 0], rows[:, 1]), torch.ones(len(rows)), accumulate=True) / len(rows)
        share = torch.bincount(first, minlength=6) / len(first)
        assert (share - after()).abs().max() < 4 * (0.25 / len(first)) ** 0.5
    error = (both * (1 - both) / len(rows)).sqrt()
    assert len(rows) > 1000 and ((counts - both).abs() < 4 * error + 1e-4).all()


def _sampled(model, prompt):
    """Two tokens per row, drawn by walking a tree whose children hold tokens 0..5 and some of them twice."""
    shape = Shape((-1, *[0] * 4, *[1] * 3, *[2] * 3))
    chain, generator = warpers(1.5, None, None), torch.Generator().manual_seed(0)
    with torch.no_grad():
        target = Target(model, {"input_ids": prompt})
        below = torch.tensor([0, 1, 1, 3, 0, 2, 2, 5, 5, 1]).expand(len(prompt), -1)
        tokens = torch.cat([draw(target.first, chain, generator), below], 1)
        nodes, real, following = verify(shape, tokens, draw(target.forward(shape, tokens), chain, generator))
        keep = int(real.sum(1).max())
        target.commit(nodes[:, :keep], real[:, :keep])
        after = torch.where(real[:, 1:2], tokens.gather(1, nodes[:, 1:2]), following)
        third = torch.where(real[:, 2:3], tokens.gather(1, nodes[:, 2:3]), following)
        none = ~real[:, 1]  # nothing was accepted: one more draw, after what followed
        third[none] = draw(target.forward(Shape((-1,)), following), chain, generator)[none]
        return torch.cat([after, third], 1), tokens[:, 0]


@pytest.mark.parametrize(
    "spec", [None, "divprune(keep=14)", "fastv(layer=1, keep=14)", "fastervlm(keep=14) | fastv(layer=2, keep=7)"]
)
def test_it_works_on_vision_language_models_and_under_apply(spec):
    demo = jeton.load_demo()
    from jeton.demo import prompt

    examples = demo.examples[:3]
    inputs = demo.processor(
        images=[each.image for each in examples], text=[prompt(each.question) for each in examples], return_tensors="pt",
        padding=True, padding_side="left",
    )  # fmt: skip

    def both():
        own = demo.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        out = TokenRecycling(demo.model).generate(**inputs, max_new_tokens=6)
        return own, out.sequences

    if spec is None:
        own, found = both()
    else:
        with jeton.apply(demo.model, spec):
            own, found = both()
    assert torch.equal(found, own)


@pytest.mark.parametrize("shown", [True, False])
def test_positions_by_time_height_and_width(shown):
    model = tiny.model("Qwen2_5_VLForConditionalGeneration")
    inputs = tiny.inputs_for(model) if shown else tiny.text_only(model)
    out = TokenRecycling(model).generate(**inputs, max_new_tokens=12, eos_token_id=[], pad_token_id=0)
    own = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(out.sequences, own)


def test_what_cannot_be_decoded_is_refused():
    model = llama()
    with pytest.raises(ValueError, match="one token"):
        TokenRecycling(model).generate(input_ids=torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="padded on the left"):
        TokenRecycling(model).generate(input_ids=torch.ones(1, 3, dtype=torch.long), attention_mask=torch.tensor([[1, 1, 0]]))
    with pytest.raises(ValueError, match="at least 1"):
        TokenRecycling(model).generate(input_ids=torch.ones(1, 3, dtype=torch.long), max_new_tokens=0)
    with pytest.raises(ValueError, match="k=8"):
        TokenRecycling(model, k=4)
