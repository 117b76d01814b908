"""The text side of tokens: what a vocabulary holds, and how a model gets another one.

A tokenizer is one of transformers, one of tokenizers, or the path of a tokenizer.json or of a folder with one.
"""
