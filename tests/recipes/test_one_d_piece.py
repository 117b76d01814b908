import dataclasses
import json

import pytest
import torch

from jeton.recipes import _photos, one_d_piece
from jeton.tokenizers.one_d_piece import OneDPiece

pytest.importorskip("accelerate")
pytest.importorskip("skimage")


def test_crops_are_of_a_seed_and_held_out_photographs_are_not_trained_on():
    assert not set(_photos.PHOTOS["train"]) & set(_photos.PHOTOS["held-out"])
    first = _photos.crops(4, 32, seed=1)
    assert first.shape == (4, 3, 32, 32) and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, _photos.crops(4, 32, seed=1)) and not torch.equal(first, _photos.crops(4, 32, seed=2))
    assert _photos.whole(64).shape == (3, 3, 64, 64)


def test_it_trains_measures_and_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(one_d_piece, "RECIPE", dataclasses.replace(one_d_piece.RECIPE, steps=3, batch=4))
    monkeypatch.setattr(one_d_piece, "HELD_OUT", 8)
    monkeypatch.setattr(one_d_piece, "TRAINED", 16)
    monkeypatch.setattr(one_d_piece, "DIGITS", dataclasses.replace(one_d_piece.DIGITS, steps=3, batch=4))
    measured = one_d_piece.run(tmp_path, progress=False)
    assert (tmp_path / "digits" / "rate-8.png").exists() and measured["digits"]["JPEG"]
    assert json.loads((tmp_path / "results.json").read_text())["parameters"] == measured["parameters"]
    assert (tmp_path / "rate-16.png").exists() and (tmp_path / "rate-256.png").exists()
    small, large = (measured[name] for name in measured if "of" in name and isinstance(measured[name], dict))
    assert [row["tokens"] for row in small["one-d-piece"]] == list(one_d_piece.LENGTHS)
    assert large["one-d-piece"][0]["bytes"] == pytest.approx(256 * small["one-d-piece"][0]["bytes"])
    again = OneDPiece.from_pretrained(tmp_path)
    assert again.codebook_size == 1000 and again.drop == "batch"


@pytest.mark.slow
def test_digits_come_out_the_better_the_more_tokens_are_read(tmp_path):
    """Held-out digits; one token of 0.75 bytes already tells more than the mean of all."""
    pytest.importorskip("sklearn")
    measured = one_d_piece.digits(tmp_path, progress=False)
    curve = [row["psnr"] for row in measured["one-d-piece"]]
    assert curve == sorted(curve) and curve[0] > measured["the mean picture"] + 1 and curve[-1] > curve[0] + 5
    assert measured["one-d-piece"][-1]["bytes"] == pytest.approx(12)
