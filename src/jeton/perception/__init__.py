"""Pipelines of frozen vision experts: one file per system, named by its id.

`experts.py` says what an expert is (a callable: captioner, detector, scorer, language model) and wraps transformers models as
experts; any function with the same signature serves as well. `_common.py` holds what the pipelines share: records, crops, prompts
and the strict reading of a language model's answers.
"""
