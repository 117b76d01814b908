import pytest
import torch

from jeton.measure.rate import as_file, file_curve, payload, plot, psnr, tiles, token_curve, untile
from jeton.tokenizers.one_d_piece import OneDPiece


def test_psnr_by_hand():
    black, grey = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.1)
    assert psnr(black, grey).tolist() == pytest.approx([20, 20])
    assert psnr(black, grey - 0.2).tolist() == [100, 100]  # clamped to the range of pictures, and at 1e-10


def test_payload_is_what_differs_between_pictures():
    torch.manual_seed(0)
    noise, flat = torch.rand(3, 32, 32), torch.full((3, 32, 32), 0.5)
    for form in ("JPEG", "WEBP"):
        (rich, back), (poor, same) = as_file(noise, form, 50), as_file(flat, form, 50)
        assert 0 < payload(poor, form) < payload(rich, form) < len(rich)
        assert back.shape == (3, 32, 32) and psnr(flat[None], same[None]) > 40
    assert rich[:4] == b"RIFF" and rich[12:16] == b"VP8 " and rich[23:26] == b"\x9d\x01\x2a"  # 30 bytes in front of the data


def test_tiles_are_put_back():
    images = torch.rand(2, 3, 8, 12)
    parts = tiles(images, 4)
    assert parts.shape == (12, 3, 4, 4) and torch.equal(parts[1], images[0, :, :4, 4:8])
    assert torch.equal(untile(parts, 8, 12), images)


def test_curves(tmp_path):
    torch.manual_seed(0)
    model = OneDPiece(16, 8, 4, 32, 1, 2, codebook_size=16, target="pixels").eval()
    images = torch.rand(2, 3, 32, 32)
    rows = token_curve(model, images, (1, 4))
    assert [row["bytes"] for row in rows] == [2.0, 8.0]  # 4 tiles of k tokens of 4 bits
    files = file_curve(images, "JPEG", (5, 75))
    assert files[0]["bytes"] < files[1]["bytes"] and files[0]["psnr"] < files[1]["psnr"]
    plot({"tokens": rows, "JPEG": files}, "test", tmp_path / "rate.png")
    assert (tmp_path / "rate.png").stat().st_size > 1000
