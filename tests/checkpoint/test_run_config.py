"""A model shape in a file without a newer field: the field takes its default, which is what that run trained.

Run alone: python -m pytest tests/checkpoint/test_run_config.py
"""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from megatron_doremi.checkpoint.run_config import GPTEntry, IdentityEntry
from megatron_doremi.errors import ConfigError
from megatron_doremi.phases.identity import differences
from megatron_doremi.shapes import GPTConfig, with_defaults
from megatron_doremi.storage.formats import check_entry

SIZES = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 4,
    "kv_channels": 8,
    "vocab_size": 50,
    "max_positions": 16,
}
# For each field that has a default, another value.
OTHER = {
    "normalization": "LayerNorm",
    "norm_epsilon": 1e-6,
    "swiglu": True,
    "openai_gelu": True,
    "qk_layernorm": True,
    "position_embedding_type": "learned_absolute",
    "rotary_base": 5e5,
    "tied_embeddings": False,
    "bias_linear": False,
    "make_vocab_size_divisible_by": 64,
    "init_method_std": 0.01,
    "reset_position_ids": True,
    "reset_attention_mask": True,
    "eod": 3,
}


def read(entry):
    return check_entry(entry, "config.json", GPTEntry, "give the folder of a run").gpt()


def test_defaults_are_the_same_wherever_a_shape_is_read():
    gpt = GPTConfig(**SIZES)
    assert read(SIZES) == gpt
    assert with_defaults(SIZES) == asdict(gpt)
    assert asdict(gpt).keys() == SIZES.keys() | OTHER.keys()


@pytest.mark.parametrize("name", OTHER)
def test_a_missing_field_takes_its_default(name):
    """On resume it is compared as if it had been recorded: equal to the default, different from any other value."""
    gpt = GPTConfig(**SIZES)
    old = asdict(gpt)
    del old[name]
    assert read(old) == gpt
    recorded = IdentityEntry.model_validate({"gpt": old}).entries()
    assert recorded == {"gpt": asdict(gpt)}
    assert differences(recorded, {"gpt": asdict(gpt)}, "checkpoint", []) == ([], [])
    other = replace(gpt, **{name: OTHER[name]})
    ((fault,), _) = differences(recorded, {"gpt": asdict(other)}, "checkpoint", [])
    assert fault.value.startswith(f"gpt was { {name: getattr(gpt, name)} }, and is")
    # Resets need the token that ends a document.
    other = replace(other, eod=3)
    assert read(asdict(other)) == other


@pytest.mark.parametrize("name", SIZES)
def test_a_missing_size_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        read({key: value for key, value in SIZES.items() if key != name})


def test_resets_need_the_end_of_a_document():
    with pytest.raises(ConfigError, match="eod must be a token id"):
        read({**SIZES, "reset_attention_mask": True})
    with pytest.raises(ConfigError, match="eod must be a token id"):
        read({**SIZES, "reset_position_ids": True, "eod": SIZES["vocab_size"]})


def test_an_unknown_field_is_refused():
    with pytest.raises(ConfigError, match="rotary_angle"):
        read({**SIZES, "rotary_angle": 1.0})
