"""glsim inside a model: the patches most like the class token stay, by the metric that is asked for."""

from __future__ import annotations

import pytest
import torch

import jeton
import tiny
from jeton.ops.similarity import to_first


@torch.no_grad()
def test_the_metric_decides():
    model = tiny.model("ViTModel")
    inputs = tiny.inputs_for(model)
    whole, chosen = model(**inputs).last_hidden_state, {}
    for metric in ("cosine", "l1", "l2"):
        with jeton.apply(model, "glsim", keep=9, metric=metric) as run:
            kept = model(**inputs).last_hidden_state[:, 1:]
            chosen[metric] = run.tokens.index[:, 1:]
        best = to_first(whole, metric)[:, 1:].topk(9).indices.sort().values
        assert torch.equal(chosen[metric], 1 + best)
        torch.testing.assert_close(kept, whole[:, 1:].gather(1, best[..., None].expand(-1, -1, 32)))
    assert not torch.equal(chosen["cosine"], chosen["l1"]) and not torch.equal(chosen["l1"], chosen["l2"])
    with pytest.raises(ValueError, match="metric must be"):
        jeton.get("glsim", metric="dot")
