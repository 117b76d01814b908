"""Token Recycling: what the target thought of before becomes the next draft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import register
from ._common import Decoded, Shape, Target, Writer, draw, ends_of, verify, warpers

# children of each path: "" is the root; a path lists candidate numbers, so "02" is the third candidate of the root's first
_CHILDREN = {
    "": 8,
    **{"0": 8, "1": 4, "2": 3, "3": 2, "4": 1, "5": 1, "6": 1, "7": 1},
    **{"00": 8, "01": 3, "02": 2, "03": 1, "04": 1, "05": 1, "06": 1, "07": 1},
    **{"10": 2, "11": 1, "20": 1, "30": 1, "40": 1, "50": 1},
    **{"000": 5, "001": 2, "002": 1, "003": 1, "004": 1, "010": 1, "020": 1, "100": 1, "200": 1, "300": 1},
    **{"0000": 3, "0001": 1, "0002": 1, "0010": 1, "0100": 1, "1000": 1},
    **{"00000": 2, "00010": 1},
}


def _paths() -> tuple[str, ...]:
    """Every node's path, level by level and in order within a level."""
    level, paths = [""], [""]
    while level:
        level = [path + str(child) for path in level for child in range(_CHILDREN.get(path, 0))]
        paths += level
    return tuple(paths)


PATHS = _paths()
TEMPLATE = Shape(tuple(PATHS.index(path[:-1]) if path else -1 for path in PATHS))
RANKS = tuple(int(path[-1]) if path else 0 for path in PATHS)


@register(
    title="Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling",
    year=2024,
    source="arXiv:2408.08696",
    family="decode",
    stage="decoding",
    headline="about 2 times faster on 7B to 33B models with less than 2 MB of storage",
)
class TokenRecycling:
    """Drafts from a matrix M (V, k = 8) that holds, for every token, the k tokens the target last thought most likely after it.

    The root is the last token whose keys and values are not in the cache. A fixed tree of 80 nodes below it, depth 6, is filled
    level by level: the i-th child of a node that holds token t gets M[t, i]. One forward of the target reads the whole tree; the
    longest path on which every token is the one the target wants after its parent is committed, and what it wants after the last
    of them becomes the next root. Then M[t] is set to the 8 most likely tokens for all 81 nodes, rejected ones too; where a token
    stands at several nodes the last one counts. M starts at zeros and is kept from prompt to prompt: one object for one model.
    The release reads the prompt without its last token, which it takes for the first root; here the whole prompt is read first,
    so that methods which look at its last token see the same.

    Greedy decoding gives exactly the tokens of `model.generate` (up to ties and rounding of a differently shaped forward); with
    `do_sample` one token is drawn at each node, which leaves the distribution as it is. Rows of a batch accept different numbers.

        decoder = TokenRecycling(model)
        out = decoder.generate(**inputs, max_new_tokens=128)
        out.sequences, out.told.mean_accepted

    Works on causal and vision-language models of transformers, also under `jeton.apply`.
    """

    def __init__(self, model: nn.Module, k: int = 8) -> None:
        if k != 8:
            raise ValueError(f"the published tree is made for k=8 candidates, got {k}.")
        self.model = model
        vocabulary = model.get_output_embeddings().weight.shape[0]
        self.matrix = torch.zeros(vocabulary, k, dtype=torch.long, device=model.device)
        self._ranks = torch.tensor(RANKS, device=model.device)
        self._parents = torch.tensor(TEMPLATE.parents, device=model.device)
        self._levels = [slice(level[0], level[-1] + 1) for level in TEMPLATE.levels]  # nodes of a level stand together

    @torch.no_grad()
    def generate(
        self,
        *,
        max_new_tokens: int = 128,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        generator: torch.Generator | None = None,
        **inputs: Any,
    ) -> Decoded:
        """Continue prompts: `inputs` is what the processor or tokenizer gives. Raises ValueError for prompts padded on the
        right, Unsupported for attention that takes no tree."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
        target, ends = Target(self.model, inputs), ends_of(self.model, eos_token_id)
        pad = pad_token_id if pad_token_id is not None else ends[0] if ends else 0
        writer, chain = Writer(inputs["input_ids"], max_new_tokens, ends, pad), warpers(temperature, top_k, top_p)
        root = draw(target.first, chain, generator) if do_sample else target.first.argmax(-1)
        done = writer.begin(root)
        while not done:
            tokens = self.draft(root)
            logits = target.forward(TEMPLATE, tokens)
            wanted = draw(logits, chain, generator) if do_sample else logits.argmax(-1)
            nodes, real, root = verify(TEMPLATE, tokens, wanted)
            keep = int(real.sum(1).max())  # the one wait for the device: how far the longest path goes
            nodes, real = nodes[:, :keep], real[:, :keep]
            target.commit(nodes, real)
            self.learn(tokens, logits)
            # what is new: the accepted tokens below the root, and the next root
            path = torch.cat([tokens.gather(1, nodes[:, 1:]), root], 1)
            done = writer.add(path, torch.cat([real[:, 1:], torch.ones_like(real[:, :1])], 1))
        return writer.finish()

    def draft(self, root: Tensor) -> Tensor:
        """(B, 81) the template filled below the roots (B, 1)."""
        tokens = root.expand(-1, len(TEMPLATE)).clone()
        for span in self._levels:
            tokens[:, span] = self.matrix[tokens[:, self._parents[span]], self._ranks[span]]
        return tokens

    def learn(self, tokens: Tensor, logits: Tensor) -> None:
        """Write the most likely successors of every node's token into the matrix."""
        flat, best = tokens.flatten(), logits.topk(self.matrix.shape[1], dim=-1).indices.flatten(0, 1)
        # nodes that hold the same token all write what the last of them says, so that the order of writing does not matter
        last = (flat[:, None] == flat[None]).long().mul(torch.arange(len(flat), device=flat.device)).argmax(1)
        self.matrix[flat] = best[last]
