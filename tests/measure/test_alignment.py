"""Alignment scores: limit cases, and the driver against the definition."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

import tiny
from jeton.measure.alignment import alignment, correlation
from jeton.ops.alignment import consecutive, of_means, of_tokens
from jeton.ops.alignment import correlation as correlate

LLAVA = "LlavaForConditionalGeneration"


def test_equal_means_score_one_and_orthogonal_means_zero():
    pictures = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    assert float(of_means(pictures, torch.tensor([[2.0, 1.0], [2.0, 3.0], [2.0, 2.0]]))) == pytest.approx(1)
    assert float(of_means(pictures, torch.tensor([[2.0, -2.0]]))) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("seed", range(20))
def test_the_nearest_word_is_never_farther_than_the_mean_one(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = of_tokens(torch.randn(7, 5, generator=generator), torch.randn(9, 5, generator=generator))
    assert scores["mean"] <= scores["max_mean"] <= scores["max"] and scores["median"] <= scores["max"]


def test_token_scores_by_hand():
    """Cosines: 1, 0 and 0.6, 0.8."""
    scores = of_tokens(torch.tensor([[2.0, 0.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 5.0]]))
    expected = {"max": 1.0, "mean": 0.6, "median": 0.6, "max_mean": 0.9}
    assert {name: pytest.approx(float(value), abs=1e-6) for name, value in scores.items()} == expected


def test_tokens_that_do_not_change_are_their_own_successors():
    x = torch.randn(1, 4, 6)
    states = torch.cat([x, 3 * x, -x])
    assert consecutive(states).tolist() == pytest.approx([1, -1])


def test_correlation_by_hand():
    assert correlate(torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 4, 6])) == pytest.approx((1, 1))
    pearson, spearman = correlate(torch.tensor([1.0, 2, 3]), torch.tensor([3.0, 2, -9]))
    assert spearman == pytest.approx(-1) and -1 < pearson < -0.8
    assert correlate(torch.tensor([1.0, 1, 2]), torch.tensor([1.0, 1, 5]))[1] == pytest.approx(1)
    with pytest.raises(ValueError, match="equally long"):
        correlate(torch.ones(2), torch.ones(3))


def test_the_driver_splits_by_the_layout_and_leaves_padding_out():
    """Several images, a padded batch: the same as the definition on each prompt's own columns."""
    net = tiny.model(LLAVA)
    inputs = tiny.inputs_for(net)
    inputs["position_ids"] = tiny.positions(net, inputs)
    found = alignment(net, [inputs])
    with torch.no_grad():
        states = torch.stack(net(**inputs, output_hidden_states=True).hidden_states).double()
    visual = inputs["input_ids"] == tiny.IMAGE
    text = inputs["attention_mask"].bool() & ~visual
    assert len(found.of_means) == 5
    for state in range(5):
        means = states[state][visual].mean(0), states[state][text].mean(0)
        assert found.of_means[state] == pytest.approx(float(cosine_similarity(*means, dim=0)), abs=1e-5)
        rows = [of_tokens(states[state, row, visual[row]], states[state, row, text[row]]) for row in range(3)]
        for name, values in found.of_tokens.items():
            assert values[state] == pytest.approx(float(sum(row[name] for row in rows)) / 3, abs=1e-5)
        assert found.visual_norm[state] == pytest.approx(float(states[state][visual].norm(dim=1).mean()), rel=1e-5)
    change = cosine_similarity(states[2][text], states[1][text], dim=1).mean()
    assert found.text_change[1] == pytest.approx(float(change), abs=1e-5) and len(found.text_change) == 4
    # two batches are one larger one, where means go over tokens
    parts = [tiny.prompts(net, [sample]) for sample in tiny.samples(net)]
    split = alignment(net, parts)
    assert split.of_means == pytest.approx(found.of_means, abs=1e-4)
    assert split.text_norm == pytest.approx(found.text_norm, rel=1e-4)


def test_correlation_over_checkpoints():
    net = tiny.model(LLAVA)
    other = tiny.tiny_llava()
    with torch.no_grad():
        other.model.language_model.layers[1].mlp.down_proj.weight.mul_(3)
    batches = [tiny.prompts(net, tiny.one_image(net))]
    (pearson, spearman), found = correlation([(net, 0.1), (other, 0.9)], batches)
    assert len(found) == 2 and abs(pearson) == pytest.approx(1) and spearman == pytest.approx(pearson)
    assert (found[1].score > found[0].score) == (pearson > 0)


def test_prompts_without_pictures_cannot_be_compared():
    net = tiny.model(LLAVA)
    with pytest.raises(ValueError, match="both a picture and text"):
        alignment(net, [tiny.text_only(net)])
    with pytest.raises(ValueError, match="no language model"):
        alignment(tiny.model("CLIPVisionModel"), [])
