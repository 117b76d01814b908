"""Training objectives over tokens: one file per system, named by its id.

A loss is a function of tensors with an explicit mask, or a callable that `jeton.train` takes as it is. What several objectives
share (choosing, sampling, weighted cross-entropy) is in `_common.py`.
"""
