"""A tokenizer that puts what matters first, and a generator on its ids. Trained here, for seconds: blurred digits, but digits."""

import torch
from sklearn.datasets import load_digits

from jeton.generate.elm import ELM
from jeton.tokenizers.one_d_piece import OneDPiece
from jeton.train import Recipe, train

data, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(data).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels)

torch.manual_seed(0)
tokenizer = OneDPiece(8, 2, tokens=8, width=32, depth=1, heads=2, levels=[4, 4], target="pixels", channels=1)
train(tokenizer, images, lambda model, batch: model.first_stage(batch), Recipe(steps=150, rate=3e-3), progress=False)

with torch.no_grad():
    ids = tokenizer.encode(images).ids
    for k in (1, 2, 4, 8):
        error = (tokenizer.decode(ids[:, :k]) - images).square().mean() / images.var()
        print(f"{k} tokens, {tokenizer.bytes(k):.1f} bytes: {error:.2f} of the variance is lost")

elm = ELM(tokens=8, codes=16, subcodes=1, classes=10, width=32, depth=2, heads=2, grid=None)
pairs = list(zip(ids, labels))
train(elm, pairs, lambda model, batch: model.loss(*batch), Recipe(steps=150, rate=5e-3), progress=False)

made = elm.generate(torch.tensor([0, 1, 7]), scale=2.0, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    drawn = tokenizer.decode(made[..., 0])[:, 0]
for row in drawn.permute(1, 0, 2):
    print("   ".join("".join(" .:*#"[int(4.99 * value.clamp(0, 1))] for value in digit) for digit in row))
