"""How image features reach a language model: projectors, resamplers and compressors that are trained. One file per system.

A bridge takes the place of the projector of a transformers LLaVA or LLaVA-NeXT:

    model = bridge.attach(llava, "tokenpacker", scale=2)   # encoder and language model are the given model's own
    processor = bridge.fit(processor, model)               # writes as many placeholders as the bridge makes tokens
    ...                                                    # train it, e.g. with jeton.train
    model.save_pretrained(path), processor.save_pretrained(path)

Once this package is imported, `AutoModelForImageTextToText.from_pretrained(path)` brings the whole model back. `jeton.apply`,
`jeton compare --model` and `generate` work on it as on any.
"""

from ._common import Bridge
from ._model import (
    BridgedLlava,
    BridgedLlavaConfig,
    BridgedLlavaModel,
    BridgedLlavaNext,
    BridgedLlavaNextConfig,
    BridgedLlavaNextModel,
    attach,
    fit,
    shorten,
)

__all__ = [
    "Bridge",
    "BridgedLlava",
    "BridgedLlavaConfig",
    "BridgedLlavaModel",
    "BridgedLlavaNext",
    "BridgedLlavaNextConfig",
    "BridgedLlavaNextModel",
    "attach",
    "fit",
    "shorten",
]
