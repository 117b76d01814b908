"""Merge fine-tuned models: one after the other into one (OPCM), and all into one vector with a mask per task (TALL-masks)."""

from copy import deepcopy

import torch
from torch import nn

from jeton.merging import load
from jeton.merging.opcm import OPCM
from jeton.merging.tall_masks import TallMasks

torch.manual_seed(0)
x, labels = torch.randn(600, 20), torch.randn(3, 20, 4) + 1.5 * torch.randn(20, 4)
tasks = {f"task {n}": (x, (x @ weights).argmax(1)) for n, weights in enumerate(labels)}


def tuned(start, inputs, answers):
    model = deepcopy(start)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(80):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(inputs[:400]), answers[:400]).backward()
        optimiser.step()
    return model


def accuracy(task, weights):
    inputs, answers = tasks[task]
    return float((load(deepcopy(base), weights)(inputs[400:]).argmax(1) == answers[400:]).float().mean())


base = tuned(nn.Sequential(nn.Linear(20, 256), nn.GELU(), nn.Linear(256, 4)), x, (x @ labels.mean(0)).argmax(1))
models = {task: tuned(base, *data) for task, data in tasks.items()}
print("fine-tuned:", {task: round(accuracy(task, model.state_dict()), 2) for task, model in models.items()})

# models, state dicts, or folders of safetensors: OPCM().merge("base", ["a", "b"], out="merged")
merged = OPCM().merge(base, list(models.values()))
print("opcm, one model:", {task: round(accuracy(task, merged), 2) for task in tasks})

localized = TallMasks().localize(base, models)
print("tall-masks, one bit a weight:", {task: round(accuracy(task, localized.restore(task)), 2) for task in tasks})
