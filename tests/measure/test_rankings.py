"""How alike layers rank visual tokens, by hand and on the embedded model."""

from __future__ import annotations

import pytest
import torch

import jeton
import tiny
from in_layers import eager, images
from jeton.demo import prompt
from jeton.measure.rankings import rankings
from jeton.ops.alignment import correlation
from jeton.ops.ranking import spearman

LLAVA = "LlavaForConditionalGeneration"


def test_spearman_by_hand():
    # ranks 1 2 3 4; 4 3 2 1; 1.5 1.5 3 4 (a tie); 2 1 3 4: 1 - 6 * 2 / (4 * 15) = 0.8
    scores = torch.tensor([[0.1, 0.2, 0.3, 9.0], [4.0, 3.0, 2.0, -1.0], [5.0, 5.0, 6.0, 7.0], [2.0, 1.0, 3.0, 4.0]])
    tied = 4.5 / (4.5 * 5) ** 0.5  # covariance of the ranks over the root of both variances
    expected = [[1, -1, tied, 0.8], [-1, 1, -tied, -0.8], [tied, -tied, 1, tied], [0.8, -0.8, tied, 1]]
    torch.testing.assert_close(spearman(scores), torch.tensor(expected, dtype=torch.float64))
    assert correlation(scores[0], scores[3])[1] == pytest.approx(0.8)


@pytest.mark.parametrize("queries", ["text", "last"])
def test_layers_are_compared_by_the_attention_the_schedule_goes_by(queries):
    """A padded batch with two images in a prompt: the correlation of the model's own maps, image by image."""
    net = tiny.model(LLAVA, "eager")
    inputs = tiny.inputs_for(net)
    maps, tables = eager(net, inputs), []
    for sample, columns in images(net, inputs):
        words = (inputs["input_ids"][sample] >= tiny.WORDS).nonzero().flatten().tolist()
        text = [c for c in words if c > columns[-1]] if queries == "text" else [inputs["input_ids"].shape[1] - 1]
        tables.append(spearman(torch.stack([maps[layer][sample][text][:, columns].mean(0) for layer in range(3)])))
    found = rankings(net, [inputs], queries)
    assert found.shape == (3, 3) and (found - torch.stack(tables).mean(0)).abs().max() < 1e-3
    assert (found - rankings(net, [inputs], "last" if queries == "text" else "text")).abs().max() > 0.01


def test_without_a_picture_there_is_nothing_to_rank():
    net = tiny.model(LLAVA)
    with pytest.raises(ValueError, match="no image"):
        rankings(net, [tiny.text_only(net)])


def test_later_layers_of_the_embedded_model_agree_more_than_they_do_with_the_first():
    demo = jeton.load_demo()
    data = (demo.processor(images=each.image, text=prompt(each.question), return_tensors="pt") for each in demo.examples[:24])
    found = rankings(demo.model, data)
    assert found[1, 2] > 0.45 and found[0, 1] < 0.25 and found[0, 2] < found[1, 2] - 0.1
