"""Models are found or refused with a sentence."""

import platform

import pytest
import torch

from jeton.measure.machine import describe
from jeton.measure.subject import load_subject


def test_a_folder_loads_like_any_checkpoint():
    embedded = load_subject()
    found = load_subject(embedded.processor.tokenizer.name_or_path, dtype="bfloat16")
    assert type(found.model) is type(embedded.model) and found.model.dtype == torch.bfloat16 and found.name == "checkpoint"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "no/such/folder/at/all"}, "cannot load a vision-language model from 'no/such/folder/at/all'"),
        ({"dtype": "float7"}, "there is no dtype 'float7'"),
        ({"device": "abacus"}, "the device 'abacus' cannot be used here"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_a_sentence(options, words):
    with pytest.raises(ValueError, match=words):
        load_subject(**options)


def test_the_machine_is_described_without_its_name():
    facts = describe()
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()
    assert platform.node() not in map(str, facts.values())
