"""PRIOR: how much each word of a caption weighs, by how well a model that sees no image expects it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jeton.objectives.prior import Prior
from jeton.train import Recipe, train

caption = ["a", "photograph", "of", "a", "{}", "cat", "on", "the", "sofa"]
words = ["<image>", *dict.fromkeys(caption), "black", "white", "red", "grey"]
number = {word: at for at, word in enumerate(words)}


def written(colour):
    return torch.tensor([[number[colour if word == "{}" else word] for word in caption]])


def loss(model, ids):
    return model(input_ids=ids, labels=ids).loss


torch.manual_seed(0)
shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
reference = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **shape))
colours = ["black", "white", "red", "grey"]
captions = torch.cat([written(colour) for colour in colours])
train(reference, lambda step: captions, loss, Recipe(steps=80, rate=1e-2), progress=False)  # text only: it cannot know the colour

prior = Prior(reference, image_ids=[number["<image>"]])
shown = torch.cat([torch.zeros(4, 3, dtype=torch.long), captions], 1)  # three image tokens in front of each caption
weights = prior.weights(shown, torch.ones_like(shown), shown.masked_fill(shown == 0, -100))
for word, weight in zip(written("black")[0].tolist(), weights[0, 3:].tolist()):
    print(f"{words[word]:>10} {weight:.2f}")
