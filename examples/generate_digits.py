"""Digits as bits, and a language model that writes them: a tokenizer and a generator, both trained here in seconds."""

import torch
from sklearn.datasets import load_digits

from jeton.generate.elm import ELM
from jeton.tokenizers.binary_autoencoder import BinaryAutoencoder
from jeton.train import Recipe, train

data, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(data).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels)

torch.manual_seed(0)
tokenizer = BinaryAutoencoder(bits=8, channels=1, width=16, multipliers=(1, 2), blocks=1, code_dim=32, spread=0.1)
recipe = Recipe(steps=150, rate=4e-3, batch=64)
train(tokenizer, images, lambda model, batch: model.losses(batch), recipe, progress=False)
with torch.no_grad():
    ids = tokenizer.encode(images).ids  # 16 tokens of 2 sub-codes of 4 bits
    error = (tokenizer.decode(ids) - images).square().mean() / images.var()
print(f"16 tokens of 8 bits lose {error:.2f} of the variance")

elm = ELM(tokens=16, codes=16, subcodes=2, classes=10, width=48, depth=2, heads=3, grid=(4, 4))
recipe = Recipe(steps=200, rate=5e-3, batch=64)
train(elm, list(zip(ids, labels)), lambda model, batch: model.loss(*batch), recipe, progress=False)

made = elm.generate(torch.tensor([0, 1, 3, 7]), scale=2.0, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    drawn = tokenizer.decode(made)[:, 0]
for row in drawn.permute(1, 0, 2):
    print("   ".join("".join(" .:*#"[int(4.99 * value.clamp(0, 1))] * 2 for value in digit) for digit in row))
