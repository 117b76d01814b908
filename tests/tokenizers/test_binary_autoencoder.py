import pytest
import torch

from jeton.tokenizers._conv import _Attention
from jeton.tokenizers.binary_autoencoder import BinaryAutoencoder


def small(**changes):
    torch.manual_seed(0)
    fields = {"bits": 4, "subcodes": 2, "width": 8, "multipliers": (1, 2), "blocks": 1, "code_dim": 6}
    return BinaryAutoencoder(**{**fields, **changes}).eval()


@torch.no_grad()
def test_the_latent_is_the_sum_of_the_set_bits():
    model = small()
    zero = torch.zeros(1, 4, 2, dtype=torch.long)
    assert torch.equal(model.decode(zero), model.decoder(torch.zeros(1, 6, 2, 2)))
    for i in range(4):  # bits i of token 2: ids with the most significant bit first
        bits = torch.zeros(1, 4, 4)
        bits[0, 2, i] = 1
        ids = zero.clone()
        ids[0, 2, i // 2] = 2 - i % 2
        latent = torch.zeros(1, 6, 2, 2)
        latent[0, :, 1, 0] = model.rows[i]
        assert torch.equal(model.quantizer.ids_of(bits.bool()), ids)
        assert torch.allclose(model.decode(ids), model.decoder(latent), atol=1e-6)
    assert model.quantizer.ids_of(torch.tensor([[1, 0, 1, 1]]).bool()).tolist() == [[2, 3]]


def test_the_gradient_is_the_same_for_every_drawn_bit():
    model = small().train()
    logits = torch.randn(3, 4, 4, requires_grad=True)
    for _ in range(2):
        latent = model.quantizer(logits).z_q @ model.rows
        (grad,) = torch.autograd.grad(latent.sum(), logits)
        p = logits.detach().sigmoid()
        assert torch.allclose(grad, model.rows.sum(1) * p * (1 - p), atol=1e-5)


@torch.no_grad()
def test_pictures_of_any_size_go_through():
    model, images = small(), torch.rand(2, 3, 8, 12)
    drawn, out = model(images)
    assert drawn.shape == images.shape and out.ids.shape == (2, 24, 2) and model.codebook_size == 4
    assert torch.equal(model.decode(out.ids, (4, 6)), drawn)
    with pytest.raises(ValueError, match="multiples of 2"):
        model.encode(torch.rand(1, 3, 7, 8))
    with pytest.raises(ValueError, match="no grid"):
        model.decode(out.ids)


@torch.no_grad()
def test_tokens_are_the_cells_row_by_row():
    model = small()
    grid = torch.randn(1, 4, 2, 3)
    model.encoder.forward = lambda images: grid
    ids = model.encode(torch.rand(1, 3, 4, 6)).ids
    assert torch.equal(ids[0, 4], model.quantizer.ids_of(grid[0, :, 1, 1] > 0))
    assert torch.equal(ids[0], model.quantizer.ids_of((grid[0].permute(1, 2, 0) > 0).flatten(0, 1)))


@torch.no_grad()
def test_attention_is_added_to_what_is_there():
    part, x = _Attention(8), torch.randn(2, 8, 3, 3)
    assert not torch.allclose(part(x), x, atol=1e-3)
    part.out.weight.zero_(), part.out.bias.zero_()
    assert torch.equal(part(x), x)


def test_it_learns_and_survives_a_folder(tmp_path):
    model, images = small(channels=1).train(), torch.rand(8, 1, 8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    first = sum(model.losses(images).values()).item()
    for _ in range(30):
        loss = sum(model.losses(images).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.8 * first and set(model.losses(images)) == {"pixels", "spread"}
    model.eval().save_pretrained(tmp_path)
    again = BinaryAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(again.encode(images).ids, model.encode(images).ids)
