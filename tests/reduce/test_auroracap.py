"""AuroraCap's encoder: the published counts from the configuration alone, and the tower as it is at ratio 1."""

from __future__ import annotations

import pytest
import torch

import jeton
import tiny
from jeton.method import get


@pytest.mark.parametrize(("ratio", "r", "left"), [(0.1, 13, 119), (0.2, 12, 166), (0.8, 3, 589)])
def test_the_published_counts(ratio, r, left):
    """378 pixels in patches of 14; features of the last block but one of 48; a class token beside the patches."""
    method = get("auroracap", ratio=ratio, layers=48)
    assert method.promise(27 * 27, 47).count + 1 == left
    assert all(step.r == r for step in method.steps(27 * 27, 47))


def test_without_the_whole_depth_the_ratio_is_met_more_nearly():
    assert get("auroracap", ratio=0.1).promise(729, 47).count == 729 - 13 * 47
    assert get("auroracap", ratio=0.1).promise(576, 23).count == 576 - 22 * 23
    assert get("auroracap", ratio=0.1, layers=24).promise(576, 23).count == 576 - 21 * 23
    with pytest.raises(ValueError, match="fewer blocks"):
        get("auroracap", layers=12).promise(576, 23)
    for fields in ({"ratio": 0}, {"ratio": 2}, {"layers": 0}, {"r": -1}):
        with pytest.raises((ValueError, TypeError)):
            get("auroracap", **fields)


@torch.no_grad()
@pytest.mark.parametrize("name", ["CLIPVisionModel", "SiglipVisionModel"])
def test_at_ratio_one_features_are_the_towers_own(name):
    model = tiny.model(name)
    inputs = tiny.inputs_for(model)
    whole = model(**inputs).last_hidden_state
    with jeton.apply(model, "auroracap", ratio=1.0):
        assert torch.equal(model(**inputs).last_hidden_state, whole)
    with jeton.apply(model, "auroracap", ratio=0.5) as run:
        out, report = model(**inputs).last_hidden_state, run.report()
    assert out.shape[1] == whole.shape[1] - 5 * 4 and report.images[0].after == 49 - 20


@torch.no_grad()
def test_the_last_block_does_not_count_where_its_features_are_not_used():
    model = tiny.model("LlavaForConditionalGeneration")
    for layers, left in ((None, 49 - 4 * 6), (5, 49 - 4 * 4)):
        with jeton.apply(model, "auroracap", ratio=0.5, layers=layers) as run:
            tiny.run(model, tiny.inputs_for(model))
            assert {image.after for image in run.report().images} == {left}


@torch.no_grad()
def test_slow_and_fast_frames_are_two_calls():
    """The first frame whole, the others merged."""
    model = tiny.model("CLIPVisionModel")
    frames = torch.randn(4, 3, 28, 28)
    first = model(pixel_values=frames[:1]).last_hidden_state
    with jeton.apply(model, "auroracap", ratio=0.3):
        others = model(pixel_values=frames[1:]).last_hidden_state
    assert first.shape[1] == 50 and others.shape[:2] == (3, 50 - 5 * 6)
