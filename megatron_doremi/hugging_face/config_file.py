"""config.json of a Hugging Face folder: the shape that it describes, and the entry that describes a shape.

A value with which the class computes something that our model does not is a fault, never ignored. What has no effect on
a forward pass without dropout (dropout rates, caches, ids of tokens) is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_doremi.checkpoint.run_config import GPTEntry
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.hugging_face.architectures import ARCHITECTURES, Architecture, activation_names, flag_for
from megatron_doremi.hugging_face.faults import CONVERT_ANOTHER, not_ours, number_faults, own_class
from megatron_doremi.hugging_face.rope_entries import rotary_base
from megatron_doremi.shapes import GPTConfig
from megatron_doremi.storage.files import read_json_object
from megatron_doremi.storage.formats import check_entry

# Why known classes cannot be expressed.
_OTHERS = {
    "olmo": "its norms have no weights",
    "olmo2": "it normalizes the outputs of attention and feed-forward layer, and queries over all heads together",
    "olmo3": "it normalizes the outputs of attention and feed-forward layer, and uses sliding windows",
    "qwen2": "it has biases in the projections of queries, keys and values alone",
    "phi": "attention and feed-forward layer are parallel",
    "gemma": "its norms add 1 to their weights, and it scales the embedding",
    "gemma2": "it normalizes the outputs of attention and feed-forward layer, and bounds its logits",
    "gemma3_text": "it normalizes the outputs of attention and feed-forward layer, and uses sliding windows",
    "gpt_neo": "it has local attention",
    "gptj": "attention and feed-forward layer are parallel",
    "opt": "its positions start at 2",
    "bloom": "it has a bias of attention in place of positions",
    "mpt": "it has a bias of attention in place of positions",
    "falcon": "attention and feed-forward layer are parallel",
    "mixtral": "it chooses among experts",
    "mamba": "it has no attention",
    "mamba2": "it has no attention",
}


class NotExpressible(ConfigError):
    """A class, or settings of it, that our model cannot express. Transformers may run it."""


def is_hugging_face(entry: Mapping[str, Any]) -> bool:
    """Whether the object in a config.json is Hugging Face's description of a model."""
    return "model_type" in entry or "architectures" in entry


def read_config(folder: Path, flag: str, seq_length: int = 0) -> tuple[Architecture, GPTConfig]:
    """Reads config.json of a Hugging Face folder.

    Args:
        flag: the flag or argument that names the folder, for messages.
        seq_length: tokens of the windows that the model reads, which a sliding window must cover; 0: not known yet.

    Raises:
        NotExpressible: with all faults: a class, or values, that our model cannot express.
        ConfigError: no such file, or malformed values.
    """
    subject = f"{flag} {folder}: config.json"
    entry = read_json_object(folder / "config.json", subject, "give a Hugging Face folder with its config.json")
    raise_if_any(number_faults(entry, subject))
    architecture = _architecture(entry, subject)
    values = {**architecture.defaults, **entry}
    shape: dict[str, Any] = {ours: values[theirs] for theirs, ours in architecture.sizes.items() if theirs in values}
    faults = _unsupported(architecture, values, seq_length, subject)
    shape |= architecture.needs
    if architecture.has_rope:
        base, rope_faults = rotary_base(architecture, entry, subject)
        shape["rotary_base"] = base
        faults += rope_faults
    activation = values.get(architecture.activation, "silu" if shape["swiglu"] else "gelu")
    shape["openai_gelu"] = not shape["swiglu"] and activation in activation_names(False, openai_gelu=True)
    if activation not in activation_names(shape["swiglu"], shape["openai_gelu"]):
        known = activation_names(True, False) if shape["swiglu"] else ("gelu", "gelu_new", "gelu_pytorch_tanh")
        faults.append(not_ours(subject, architecture.activation, activation, " or ".join(map(repr, known))))
    if architecture.biases:
        biases = {name: values.get(name) for name in architecture.biases}
        shape["bias_linear"] = values.get(architecture.biases[0])
        if len(set(map(repr, biases.values()))) > 1:
            value = ", ".join(f"{name}: {value!r}" for name, value in biases.items())
            faults.append(Fault(subject, value, "biases in all linear layers or in none", CONVERT_ANOTHER))
    if faults:
        raise NotExpressible(faults)
    return architecture, check_entry(_complete(shape), subject, GPTEntry, "download the folder again").gpt()


def _architecture(entry: Mapping[str, Any], subject: str) -> Architecture:
    model_type = entry.get("model_type")
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    reason = f" ({_OTHERS[model_type]})" if isinstance(model_type, str) and model_type in _OTHERS else ""
    rule = f"one of {', '.join(ARCHITECTURES)}"
    raise NotExpressible(Fault(subject, f"model_type: {model_type!r}{reason}", rule, CONVERT_ANOTHER))


def _unsupported(architecture: Architecture, values: Mapping[str, Any], seq_length: int, subject: str) -> list[Fault]:
    """Faults of entries with which the class computes something else."""
    faults = _contradictions(architecture, values, subject)
    for name, allowed in architecture.requires.items():
        value = values.get(name)
        if name == "sliding_window" and _covers(value, values.get("max_position_embeddings"), seq_length):
            continue
        if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
            faults.append(not_ours(subject, name, value, f"{name} {allowed[0]!r}"))
    if values.get("is_causal", True) is not True:
        faults.append(not_ours(subject, "is_causal", values["is_causal"], "is_causal True"))
    layers = values.get("layer_types")
    if layers is not None and not (isinstance(layers, list) and all(kind == "full_attention" for kind in layers)):
        faults.append(not_ours(subject, "layer_types", layers, "'full_attention' in every layer"))
    if own := own_class(values, architecture.class_name):
        faults.append(not_ours(subject, "auto_map", own, f"{architecture.class_name}, as of model_type"))
    if values.get("quantization_config") is not None:
        rule, remedy = "weights in float32, bfloat16 or float16", "convert the model that was not quantized"
        faults.append(Fault(subject, "quantization_config", rule, remedy))
    return faults


def _contradictions(architecture: Architecture, values: Mapping[str, Any], subject: str) -> list[Fault]:
    """Faults of entries under another name than the one that we read, with another value, that the class reads too."""
    stated = {other: (name, values.get(name)) for other, name in architecture.aliases.items()}
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if not architecture.own_width and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        stated["head_dim"] = ("hidden_size / num_attention_heads", hidden // heads)
    return [
        not_ours(subject, other, values[other], f"{value!r}, as {name}")
        for other, (name, value) in stated.items()
        if values.get(other) is not None and values[other] != value
    ]


def _covers(window: Any, positions: Any, seq_length: int) -> bool:
    """Whether a sliding window is as long as the model's context and as what it reads, and so has no effect."""
    return isinstance(window, int) and isinstance(positions, int) and window >= max(positions, seq_length)


def _complete(shape: dict[str, Any]) -> dict[str, Any]:
    """Fills in the sizes that follow from others where an entry is missing or null."""
    hidden, heads = shape.get("hidden_size"), shape.get("num_attention_heads")
    if shape.get("num_query_groups") is None:
        shape["num_query_groups"] = heads
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and shape.get("kv_channels") is None:
        shape["kv_channels"] = hidden // heads
    if isinstance(hidden, int) and shape.get("ffn_hidden_size") is None:
        shape["ffn_hidden_size"] = 4 * hidden
    # Padding is not part of the model, and there is none in a Hugging Face folder.
    return {**shape, "make_vocab_size_divisible_by": GPTConfig.make_vocab_size_divisible_by}


def sliding_window(folder: Path, flag: str) -> int | None:
    """The tokens that attention covers in a Hugging Face folder that `read_config` takes; None if it covers all.

    Args:
        flag: the flag or argument that names the folder, for messages.
    """
    entry = read_json_object(folder / "config.json", f"{flag} {folder}: config.json")
    architecture = ARCHITECTURES[entry["model_type"]]
    values = {**architecture.defaults, **entry}
    return values.get("sliding_window") if "sliding_window" in architecture.requires else None


def choose_architecture(gpt: GPTConfig, model_type: str = "") -> Architecture:
    """The class that holds a shape: the one of `model_type`, or else the first that has the shape.

    Raises:
        ConfigError: the class, or every class, lacks the shape; names the flags of the run that make it so.
    """
    candidates = [ARCHITECTURES[model_type]] if model_type else list(ARCHITECTURES.values())
    for architecture in candidates:
        if not architecture.misfits(gpt):
            return architecture
    nearest = sorted(candidates, key=lambda each: len(each.misfits(gpt)))[:3]
    rule = "; ".join(f"{each.class_name} has only {', '.join(each.misfits(gpt))}" for each in nearest)
    remedy = "train a model with flags that a class has"
    subject = "--to hf: no class of Transformers has this shape"
    if model_type:
        subject, remedy = f"--architecture {model_type}", f"{remedy}, or give another --architecture"
    raise ConfigError(Fault(subject, ", ".join(_stated(gpt)), rule, remedy))


def _stated(gpt: GPTConfig) -> list[str]:
    names = ("position_embedding_type", "normalization", "swiglu", "openai_gelu", "qk_layernorm", "bias_linear")
    return [flag_for(name, getattr(gpt, name)) for name in names]


def config_entry(architecture: Architecture, gpt: GPTConfig, dtype: str, eod: int | None) -> dict[str, Any]:
    """The content of config.json of an exported model.

    Args:
        dtype: of the weights, such as "float32".
        eod: id of the end-of-document token, which becomes the class's eos; None if it is unknown.
    """
    entry: dict[str, Any] = {"architectures": [architecture.class_name], "model_type": architecture.model_type}
    entry |= {theirs: getattr(gpt, ours) for theirs, ours in architecture.sizes.items()}
    entry[architecture.activation] = activation_names(gpt.swiglu, gpt.openai_gelu, architecture.model_type)[0]
    entry |= dict.fromkeys(architecture.biases, gpt.bias_linear)
    entry |= {name: allowed[0] for name, allowed in architecture.requires.items()}
    if architecture.has_rope:
        # Version 5 of Transformers reads the first, earlier ones the others.
        entry["rope_parameters"] = {"rope_type": "default", "rope_theta": gpt.rotary_base, "partial_rotary_factor": 1.0}
        entry |= {"rope_theta": gpt.rotary_base, "partial_rotary_factor": 1.0}
        if architecture.model_type == "gpt_neox":
            entry |= {"rotary_emb_base": gpt.rotary_base, "rotary_pct": 1.0}
    else:
        entry |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    # The defaults of every class are ids of other tokenizers.
    entry |= {"bos_token_id": None, "eos_token_id": eod, "pad_token_id": None}
    return entry | {"torch_dtype": dtype, "use_cache": True}
