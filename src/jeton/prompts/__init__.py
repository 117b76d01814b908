"""Prompt tokens, learned or edited, of text-to-image models and CLIP: one file per system, named by its id.

`_common.py` holds what they share: where the words of a prompt stand among its tokens, and the encoder that reads them. Nothing
here needs diffusers; what a system returns is what a pipeline takes as `prompt_embeds`.
"""

from ._common import TextEncoder, TokenSlots, token_slots

__all__ = ["TextEncoder", "TokenSlots", "token_slots"]
