"""What the KV cache keeps, and how: one file per system, named by its id.

A system is a kind of cache layer, which transformers' own `update` feeds, plus what it must change around a model while it runs.
"""
