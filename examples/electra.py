"""ELECTRA on the language reference that ships with Python: generator and discriminator train together. Needs jeton[train]."""

import pydoc_data.topics

import torch
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

from jeton.objectives.electra import Electra
from jeton.train import Recipe, train

PAD, CLS, SEP, MASK = range(4)
words = " ".join(pydoc_data.topics.topics.values()).split()[:40_000]
known = {word: 4 + at for at, word in enumerate(sorted(set(words)))}
rows = torch.tensor([known[word] for word in words]).view(-1, 32)


def config(width):
    return ElectraConfig(
        vocab_size=4 + len(known), embedding_size=32, hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=2 * width, max_position_embeddings=64,
    )  # fmt: skip


torch.manual_seed(0)
model = Electra(ElectraForMaskedLM(config(16)), ElectraForPreTraining(config(64)), MASK, [PAD, CLS, SEP])
told = train(model, rows, lambda m, ids: m(ids, torch.ones_like(ids)), Recipe(steps=60, rate=2e-3, batch=16), progress=False)
for name, values in told.losses.items():
    print(f"{name}: {values[0]:.2f} at the start, {values[-1]:.2f} after {told.steps[-1]} steps")
print(f"kept: {type(model.discriminator).__name__}, {sum(p.numel() for p in model.discriminator.parameters()):,} parameters")
