"""Every entry of config.json, changed: a folder that we take has Transformers' logits; else it is refused.

An entry that changes the mathematics and is ignored gives numbers that look plausible and are wrong.

Run alone: python -m pytest tests/hugging_face/test_config_fields.py
"""

from __future__ import annotations

import json
import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_doremi.errors import ConfigError
from megatron_doremi.hugging_face.architectures import ARCHITECTURES
from megatron_doremi.hugging_face.config_file import NotExpressible, read_config
from megatron_doremi.hugging_face.conversion import write_native
from megatron_doremi.hugging_face.inference import load_model
from megatron_doremi.hugging_face.model_folder import model_entry, open_model

os.environ["HF_HUB_OFFLINE"] = "1"

IDS = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "intermediate_size": 40,
    "initializer_range": 0.2,
    **IDS,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
# Settings of each class that our model has.
BASES = {
    "llama": GROUPED,
    "arcee": {**GROUPED, "hidden_act": "gelu"},
    "mistral": {**GROUPED, "sliding_window": None},
    "qwen3": {**GROUPED, "head_dim": 8},
    "starcoder2": GROUPED,
    "stablelm": {**GROUPED, "rope_parameters": ROPE},
    "gpt_neox": {**SIZES, "use_parallel_residual": False, "rope_parameters": ROPE},
    "gpt2": {
        **{"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48, "n_inner": 40, **IDS},
        "initializer_range": 0.2,
    },
}
ACTIVATIONS = "relu gelu silu swish tanh gelu_new gelu_fast gelu_python gelu_pytorch_tanh quick_gelu gelu_10 mish relu2"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SCALINGS = (
    *({"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}, {"type": "default"}, LLAMA3),
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 24},
    *({"factor": 2.0}, {"type": "linear", "rope_type": "default", "factor": 2.0}),
)
FLAGS = """
    is_causal add_cross_attention is_decoder is_encoder_decoder parallel_attn use_parallel_residual qk_layernorm
    use_qk_norm use_qkv_bias attention_bias mlp_bias use_bias use_sliding_window use_bidirectional_attention
    scale_embedding attn_temperature_tuning reorder_and_upcast_attn scale_attn_by_inverse_layer_idx scale_attn_weights
"""
# By entry, in any class: values that change the mathematics of the class, or of another.
ENTRIES = {
    **dict.fromkeys(FLAGS.split(), (True, False)),
    **dict.fromkeys(("hidden_act", "activation_function", "hidden_activation"), ACTIVATIONS.split()),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "layer_norm_epsilon", "norm_eps"), (0.1, 0.01)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "logits_scaling", "logit_scale"), (0.5,)),
    **dict.fromkeys(("embedding_multiplier", "attention_multiplier", "residual_multiplier", "clip_qkv"), (0.1,)),
    **dict.fromkeys(("rope_theta", "rotary_emb_base"), (500.0, 100)),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), (0.5, 1.0)),
    "rope_scaling": SCALINGS,
    "rope_parameters": (*SCALINGS, {"rope_theta": 500.0}, {**ROPE, "partial_rotary_factor": 0.5}, {"default": ROPE}),
    "layer_types": [[a, b] for a in ("full_attention", "sliding_attention") for b in ("full_attention", "chunked")],
    "sliding_window": (0, 4, 47, 48, 100, None),
    "max_window_layers": (0, 1),
    "no_rope_layers": ([0, 1],),
    "head_dim": (6, 16, None),
    "num_key_value_heads": (1, 4, None),
    "n_inner": (None, 128),
    "tie_word_embeddings": (True, False, None),
    "quantization_config": ({"quant_method": "fp8"},),
    "pruned_heads": ({"0": [1]},),
    "text_config": ({"hidden_act": "relu"},),
}
# Entries together; None: absent from the file, as in folders of version 4, which has no rope_parameters.
TOGETHER = (
    {"rope_parameters": None},
    {"rope_parameters": None, "rope_theta": 500.0},
    {"rope_parameters": None, "rotary_emb_base": 500.0, "rotary_pct": 1.0},
    {"rope_parameters": None, "rotary_pct": 1.0},
    {"rope_parameters": None, "partial_rotary_factor": 1.0},
    {"rope_parameters": None, "partial_rotary_factor": 1.0, "rotary_pct": 1.0, "rotary_emb_base": 50.0},
    {"rope_parameters": {**ROPE, "rope_theta": 500.0}, "rope_scaling": {"type": "default"}},
    {"rope_parameters": {**ROPE, "rope_theta": 500.0}, "rope_theta": 100.0},
    {"rope_parameters": ROPE, "rope_scaling": {"type": "default", "rope_theta": 300.0, "partial_rotary_factor": 1.0}},
    {"n_head": 4, "num_attention_heads": 8},
    {"n_positions": 48, "max_position_embeddings": 64},
    {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    {"use_sliding_window": False, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2},
)
# Of no effect on logits, and of none on us.
IGNORED = {"architectures", "model_type", "transformers_version", "id2label", "label2id", "return_dict"}


def alternatives(value):
    """Other values for an entry of a class, by the type of its default."""
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int):
        return (value + 1, 2 * value) if value < 100 else ()
    if isinstance(value, float):
        return (0.25, 0.1)
    return (True, 2, 0.5, "x") if value is None else ()


def save(folder, model_type, settings):
    """A random model of a class, whose norms and biases are no constants."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)


def with_changes(entry, changes):
    """An entry of config.json with others; without rope_parameters where they are None."""
    dropped = {name for name in ("rope_parameters",) if changes.get(name, 0) is None}
    return {name: value for name, value in {**entry, **changes}.items() if name not in dropped}


def opened_with(base, folder, model_type, changes):
    """A folder with other entries, opened: the base's weights where they fit, else those of a model that Transformers
    draws with these settings. Raises ConfigError."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder, copy_function=os.link)
    path = folder / "config.json"
    path.unlink()
    path.write_text(json.dumps(with_changes(json.loads((base / "config.json").read_text()), changes)))
    try:
        return open_model(folder, "--load")
    except NotExpressible:
        raise
    except ConfigError as error:
        shutil.rmtree(folder)
        try:
            save(folder, model_type, {**BASES[model_type], **changes})
        except Exception:
            raise error from None
        path.write_text(json.dumps(with_changes(json.loads(path.read_text()), changes)))
        return open_model(folder, "--load")


def their_logits(folder, tokens):
    """None if Transformers cannot load or run the folder."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits
    except Exception:
        return None


def our_logits(opened, tokens):
    return load_model(opened.gpt, opened.weights, torch.device("cpu"), torch.float32).logits(tokens)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_what_is_taken_has_transformers_logits(model_type, tmp_path):
    from transformers import AutoConfig

    base, folder = tmp_path / "base", tmp_path / "changed"
    save(base, model_type, BASES[model_type])
    own = AutoConfig.for_model(model_type).to_dict()
    entries = {name: alternatives(value) for name, value in own.items() if name not in IGNORED}
    cases = [{name: value} for table in (entries, ENTRIES) for name, values in table.items() for value in values]
    tokens = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(2))
    compared, refused, wrong = 0, 0, []
    for changes in ({}, *cases, *TOGETHER):
        try:
            opened = opened_with(base, folder, model_type, changes)
        except ConfigError:
            assert changes, "the base is expressible"
            refused += 1
            continue
        theirs = their_logits(folder, tokens)
        if theirs is None:
            continue
        ours = our_logits(opened, tokens)
        compared += 1
        difference = float((ours - theirs).abs().max())
        if not difference < 1e-5 * max(1.0, float(theirs.abs().max())):
            wrong.append(f"{changes}: {difference:.2g}")
    assert not wrong, "\n".join(wrong)
    assert min(compared, refused) > 25


def test_code_of_the_same_class_is_not_needed(tmp_path):
    entry = {"auto_map": {"AutoConfig": "a.B", "AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **BASES["llama"], **entry}))
    assert read_config(tmp_path, "--load")[0].model_type == "llama"


# The smallest: (class, entries, what is said).
REFUSED = (
    ("llama", {"is_causal": False}, "is_causal: False"),
    ("llama", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
    ("llama", {"rope_theta": 500.0}, "rope_theta: 500.0"),
    ("llama", {"rope_parameters": {"full_attention": ROPE}}, "the same values for all layers"),
    # Transformers reads StableLm's share in partial_rotary_factor alone, GPT-NeoX's in rotary_pct; both default to 1/4.
    ("stablelm", {"rope_parameters": None, "rotary_pct": 1.0}, "partial_rotary_factor: 0.25"),
    ("gpt_neox", {"rope_parameters": None, "partial_rotary_factor": 1.0}, "partial_rotary_factor: 0.25"),
    ("gpt_neox", {"head_dim": 6}, "head_dim: 6"),
    ("gpt2", {"num_attention_heads": 8}, "4, as n_head"),
    # Code in a folder is never run, and its class may compute something else.
    ("llama", {"auto_map": {"AutoModelForCausalLM": "owner/name--modeling.OtherForCausalLM"}}, "OtherForCausalLM"),
)


@pytest.mark.parametrize(("model_type", "changes", "said"), REFUSED)
def test_the_entry_is_named(model_type, changes, said, tmp_path):
    entry = {"model_type": model_type, **BASES[model_type], "rope_parameters": ROPE, **changes}
    (tmp_path / "config.json").write_text(json.dumps(entry))
    with pytest.raises(NotExpressible) as error:
        read_config(tmp_path, "--load")
    assert said in " ".join(str(error.value).split())


NUMBERS = (
    ("llama", {"rope_theta": math.nan}, "rope_theta: nan rule: a finite number"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": math.inf}}, "rope_parameters.rope_theta: inf"),
    ("llama", {"rope_theta": 0}, "rope_theta: 0 rule: a base above 0"),
    ("llama", {"rms_norm_eps": math.nan}, "rms_norm_eps: nan"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers: 1,000,000,000 rule: at most 10,000"),
    # Of classes that our model cannot express, too.
    ("olmo2", {"num_hidden_layers": 10**9}, "num_hidden_layers: 1,000,000,000"),
    ("olmo2", {"rope_theta": -5.0}, "rope_theta: -5.0"),
    ("olmo2", {"initializer_range": math.nan}, "initializer_range: nan"),
    ("mixtral", {"num_local_experts": 10**9}, "num_local_experts: 1,000,000,000"),
    ("gemma3", {"text_config": {"num_hidden_layers": 10**9}}, "text_config.num_hidden_layers: 1,000,000,000"),
    ("unheard", {"scales": [1.0, math.nan]}, "scales: nan"),
)


@pytest.mark.parametrize(("model_type", "changes", "said"), NUMBERS)
def test_a_number_with_which_no_class_computes_is_refused(model_type, changes, said, tmp_path):
    """NaN passed as a base that contradicts itself, so that Transformers would run it; 10^9 layers were built."""
    base = BASES.get(model_type, BASES["llama"])
    entry = {"model_type": model_type, **base, "rope_parameters": ROPE, **changes}
    (tmp_path / "config.json").write_text(json.dumps(entry))
    with pytest.raises(ConfigError) as error:
        read_config(tmp_path, "--load")
    assert not isinstance(error.value, NotExpressible)
    assert said in " ".join(str(error.value).split())


def test_a_range_without_an_end_is_none_of_them(tmp_path):
    """Mamba2's folders have one; Transformers runs them."""
    entry = {"model_type": "mamba2", "time_step_limit": [0.0, math.inf]}
    (tmp_path / "config.json").write_text(json.dumps(entry))
    with pytest.raises(NotExpressible, match="it has no attention"):
        read_config(tmp_path, "--load")


def test_an_output_layer_under_two_names_is_refused(tmp_path):
    """Transformers reads one of them, we read the other."""
    save(tmp_path, "gpt_neox", BASES["gpt_neox"])
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = 2 * tensors["embed_out.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"embed_out\.weight and lm_head\.weight"):
        open_model(tmp_path, "--load")


def test_a_sliding_window_covers_what_is_read(tmp_path):
    """One as long as the positions was taken for windows of more tokens, too."""
    save(tmp_path, "mistral", {**BASES["mistral"], "sliding_window": 48})
    opened = open_model(tmp_path, "--load", seq_length=48)
    tokens = torch.randint(0, 61, (2, 64), generator=torch.Generator().manual_seed(2))
    differences = [
        our_logits(opened, tokens[:, :length]) - their_logits(tmp_path, tokens[:, :length]) for length in (48, 64)
    ]
    assert differences[0].abs().max() < 1e-5
    assert differences[1].abs().max() > 1e-2
    with pytest.raises(NotExpressible, match="sliding_window: 48"):
        open_model(tmp_path, "--load", seq_length=49)
    # A converted model keeps the window, which our model does not have.
    native = tmp_path / "native"
    (native / "weights").mkdir(parents=True)
    write_native(native / "weights", opened.weights, opened.gpt, None, lambda: None)
    (native / "config.json").write_text(json.dumps(model_entry(opened, {})))
    assert open_model(native, "--load", seq_length=48).sliding_window == 48
    with pytest.raises(ConfigError, match="sliding_window: 48"):
        open_model(native, "--load", seq_length=49)
