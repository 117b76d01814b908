"""Checkpoints are read and written tensor by tensor, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from jeton.merging._common import Folder, Shards, aligned, change, collect, elect, load, read, threshold
from jeton.merging.opcm import OPCM

from .. import tiny


def llama(**more):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 60}
    return tiny.ready(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **more)))


def test_shards_hold_no_more_than_asked_and_read_back_bit_for_bit(tmp_path):
    weights = {f"layer.{n}": torch.randn(16, 16, dtype=torch.float64 if n == 2 else torch.bfloat16) for n in range(7)}
    weights["count"] = torch.tensor([3])
    collect(weights.items(), tmp_path / "out", size=1100)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        held = load_file(file)
        assert len(held) == 1 or sum(value.nbytes for value in held.values()) <= 1100
    back = Folder(tmp_path / "out")
    assert list(back) == sorted(weights)
    for name, value in weights.items():
        assert back[name].dtype == value.dtype and torch.equal(back[name], value)


def test_transformers_reads_what_is_written_and_the_other_way_round(tmp_path):
    base, tuned = llama(), llama()
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight += 0.1
    base.save_pretrained(tmp_path / "base", max_shard_size="20kB")
    tuned.save_pretrained(tmp_path / "tuned")
    assert (tmp_path / "base" / "model.safetensors.index.json").exists()
    OPCM().merge(tmp_path / "base", [tmp_path / "tuned"], tmp_path / "merged", shard=20_000)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = tiny.words(9, 0) % 60
    torch.testing.assert_close(merged(ids).logits, tuned(ids).logits)
    assert not torch.allclose(merged(ids).logits, base(ids).logits, atol=1e-3)


def test_tied_tensors_are_listed_once_and_follow_when_loaded():
    model = llama(tie_word_embeddings=True)
    weights = read(model)
    assert "lm_head.weight" in weights and "model.embed_tokens.weight" not in weights
    load(model, {**weights, "lm_head.weight": torch.zeros(60, 32)})
    assert not model.model.embed_tokens.weight.any()
    with pytest.raises(ValueError, match="are not this model's"):
        load(model, {"lm_head.weight": torch.zeros(60, 32)})


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError, match="broken"), Shards(tmp_path / "out", size=10) as shards:
        shards.add("a", torch.ones(100))
        shards.add("b", torch.ones(100))
        raise RuntimeError("broken")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_merged_is_refused_with_the_reason(tmp_path):
    base = {"a": torch.ones(3), "b": torch.ones(2, 2)}
    with pytest.raises(ValueError, match="model 1 is no fine-tuned form of the base: it lacks b; has also c"):
        aligned(base, [base, {"a": torch.ones(3), "c": torch.ones(1)}])
    with pytest.raises(ValueError, match=r"b of model 0 is \(4,\)"):
        aligned(base, [{"a": torch.ones(3), "b": torch.ones(4)}])
    with pytest.raises(FileNotFoundError, match="no folder of them"):
        read(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="safe_serialization"):
        read(tmp_path)
    save_file(base, tmp_path / "x.safetensors")
    save_file(base, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="in two files"):
        read(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"lists gone.safetensors"):
        read(tmp_path)
    with pytest.raises(ValueError, match="not empty"):
        OPCM().merge(base, [base], tmp_path)
    with pytest.raises(ValueError, match="nothing to merge"):
        OPCM().merge(base, [])


def test_integers_are_left_alone():
    model = nn.BatchNorm1d(3)
    weights = read(model)
    names = aligned(weights, [weights])
    assert "num_batches_tracked" not in names and "running_mean" in names
    assert (
        change({"a": torch.ones(2, dtype=torch.bfloat16)}, {"a": torch.zeros(2, dtype=torch.bfloat16)}, "a").dtype
        == torch.float32
    )


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.999, 1.0])
def test_the_threshold_is_the_exact_quantile_of_all_chunks_together(share):
    x = torch.randn(1003, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 3, 1003)
    found = threshold(lambda: [x[:10], x[10:700], x[700:]], share)
    assert int((x.abs() >= found).sum()) == max(1, round(share * 1003))


def test_signs_are_elected_by_total_change():
    changes = torch.tensor([[2.0, -1.0, 0.0], [1.0, 3.0, 0.0], [-1.0, -1.0, 0.0]])
    assert elect(changes).tolist() == [3.0, 3.0, 0.0]
