"""A method of one's own, on the embedded model: keep the tokens with the largest features."""

from dataclasses import dataclass

import jeton
from jeton.method import Method, Promise, register
from jeton.ops.selection import top_k


@register(title="Keep what is loud", year=2026, source="an example", family="example", stage="encoder", id="loudest")
@dataclass(frozen=True)
class Loudest(Method):
    site = "encoder"
    keep: int | float = 0.25

    def reduce(self, tokens, signals=None):
        return top_k(tokens.features.norm(dim=-1), self.keep, tokens.mask)

    def promise(self, n, depth=12):
        return Promise(jeton.Budget(self.keep).count(n))


print(jeton.compare(methods=["loudest"], keep=[0.1], limit=64))
