"""Generators: ids of visual tokens, one after the other or a few at a time. They know of a tokenizer its ids and its
vocabulary."""

SYSTEMS = ("elm",)
