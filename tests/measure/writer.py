"""A small language model trained on the English of Python's own manual, and texts: the manual's and its own."""

from __future__ import annotations

import pydoc_data.topics
import random

import torch
import transformers

from jeton.text._corpus import train_bpe

STEPS, CONTEXT = 300, 96


class Writer:
    def __init__(self) -> None:
        topics = [" ".join(text.split()) for text in pydoc_data.topics.topics.values()]
        random.Random(0).shuffle(topics)
        whole = " ".join(topics)
        train, self.held_out = whole[: len(whole) * 3 // 4], whole[len(whole) * 3 // 4 :]
        plain = train_bpe([train], 600, special=["<s>"])
        self.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain)
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
        self.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=600, **sizes))
        ids = torch.tensor(plain.encode(train).ids)
        optimiser = torch.optim.AdamW(self.model.parameters(), lr=6e-3)
        for step in range(STEPS):
            at = torch.randint(0, len(ids) - CONTEXT, (12,)).tolist()
            batch = torch.stack([ids[start : start + CONTEXT] for start in at])
            optimiser.param_groups[0]["lr"] = 6e-3 * min(1, (step + 1) / 20) * (1 - step / STEPS)
            optimiser.zero_grad()
            self.model(input_ids=batch, labels=batch).loss.backward()
            optimiser.step()
        self.model.eval()

    def ids(self, count: int, length: int) -> torch.Tensor:
        """(count, length) tokens of the manual that were not trained on."""
        ids = torch.tensor(self.tokenizer(self.held_out)["input_ids"])
        return torch.stack([ids[at : at + length] for at in torch.linspace(0, len(ids) - length - 1, count).long().tolist()])

    def human(self, count: int, length: int) -> list[str]:
        return self.tokenizer.batch_decode(self.ids(count, length))

    def written(self, count: int, length: int) -> list[str]:
        """Texts of its own: drawn from the 40 likeliest tokens behind the first eight of human ones, which are cut off."""
        torch.manual_seed(1)
        made = self.model.generate(
            self.ids(count, 8),
            do_sample=True,
            top_k=40,
            max_new_tokens=length,
            min_new_tokens=length,
            pad_token_id=0,
            eos_token_id=None,
        )
        return self.tokenizer.batch_decode(made[:, 8:])
