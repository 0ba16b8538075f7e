"""The Hugging Face classes that hold a GPT of this program: their names of parameters and the values of their config.

Checked against Transformers by tests/hugging_face/: equal logits from the exported folder, for each class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_doremi.hugging_face.stored import Stored, gate_and_up, separate_heads, stacked_heads, transposed
from megatron_doremi.shapes import GPTConfig

# Names of activations in Transformers; the two approximations by tanh are one function.
_GELU, _GELU_TANH, _SILU = ("gelu", "gelu_python"), ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), ("silu", "swish")


@dataclass(frozen=True)
class Architecture:
    """A class of Transformers.

    Attributes:
        model_type, class_name: its names in config.json.
        modules: our module -> its module there, with {i} for the number of a block. attention.qkv and, with SwiGLU,
            mlp.fc1 have several separated by spaces; `fused` names the layout of a fused attention.qkv.
        sizes: entry of config.json -> our field of the same value.
        needs: our field -> the only value that the class has.
        defaults: values of entries that config.json may omit.
        requires: entry of config.json -> the values with which the class computes what our model computes.
        activation: entry that names the activation.
        biases: entries that say whether linear layers have biases; empty if they follow from `needs`.
        own_width: whether a head's width may differ from hidden size / heads.
        groups: whether there are fewer key-value heads than heads.
        rope_names: top-level entries of the rotary base and of the share of a head's channels that rotate.
        rope_share: that share where no entry states it.
        aliases: other names of entries in `sizes` that the class reads too.
        fused: "": queries, keys and values are separate; "group": fused as ours; "stacked": GPT-2's Conv1D.
    """

    model_type: str
    class_name: str
    modules: Mapping[str, str]
    sizes: Mapping[str, str]
    needs: Mapping[str, Any]
    defaults: Mapping[str, Any]
    requires: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    activation: str = "hidden_act"
    biases: tuple[str, ...] = ()
    own_width: bool = False
    groups: bool = True
    rope_names: tuple[str, str] = ("rope_theta", "partial_rotary_factor")
    rope_share: float = 1.0
    aliases: Mapping[str, str] = field(default_factory=dict)
    fused: str = ""

    @property
    def prefix(self) -> str:
        """Of the names of all parameters but the output layer's."""
        return self.modules["embedding"].split(".")[0] + "."

    @property
    def has_rope(self) -> bool:
        return self.needs["position_embedding_type"] == "rope"

    def misfits(self, gpt: GPTConfig) -> list[str]:
        """The flags that make a shape one that this class lacks; empty if it has it."""
        flags = [flag_for(name, value) for name, value in self.needs.items() if getattr(gpt, name) != value]
        if not self.groups and gpt.num_query_groups != gpt.num_attention_heads:
            flags.append("no --num-query-groups")
        if not self.own_width and gpt.kv_channels * gpt.num_attention_heads != gpt.hidden_size:
            flags.append(f"--kv-channels {gpt.hidden_size // gpt.num_attention_heads}")
        return flags

    def stored(self, name: str, gpt: GPTConfig) -> Stored:
        """How the class stores our parameter `name`."""
        module, kind = name.rsplit(".", 1)
        layer = ""
        if module.startswith("layers."):
            _, number, rest = module.split(".", 2)
            layer, module = number, rest
        theirs = [f"{each}.{kind}" for each in self.modules[module].format(i=layer).split()]
        if module == "attention.qkv":
            if self.fused == "stacked":
                return stacked_heads(theirs[0], gpt, kind == "weight")
            return separate_heads(theirs, gpt) if not self.fused else Stored(tuple(theirs))
        if module == "mlp.fc1" and gpt.swiglu:
            return gate_and_up(*theirs)
        is_matrix = kind == "weight" and module in ("attention.proj", "mlp.fc1", "mlp.fc2")
        return transposed(theirs[0]) if self.fused == "stacked" and is_matrix else Stored(tuple(theirs))


def flag_for(name: str, value: Any) -> str:
    """The flag that gives a field of `GPTConfig` a value."""
    switches = {
        "swiglu": ("--swiglu", True),
        "openai_gelu": ("--openai-gelu", True),
        "qk_layernorm": ("--qk-layernorm", True),
        "bias_linear": ("--disable-bias-linear", False),
    }
    if name in switches:
        flag, on = switches[name]
        return flag if value == on else f"no {flag}"
    return f"--{name.replace('_', '-')} {value}"


_LLAMA_MODULES = {
    "embedding": "model.embed_tokens",
    "attention_norm": "model.layers.{i}.input_layernorm",
    "attention.qkv": "model.layers.{i}.self_attn.q_proj model.layers.{i}.self_attn.k_proj "
    "model.layers.{i}.self_attn.v_proj",
    "attention.proj": "model.layers.{i}.self_attn.o_proj",
    "mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "mlp.fc1": "model.layers.{i}.mlp.gate_proj model.layers.{i}.mlp.up_proj",
    "mlp.fc2": "model.layers.{i}.mlp.down_proj",
    "final_norm": "model.norm",
    "output": "lm_head",
}
_LLAMA_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "max_position_embeddings": "max_positions",
    "initializer_range": "init_method_std",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tied_embeddings",
}
_WITHOUT_WIDTH = {name: ours for name, ours in _LLAMA_SIZES.items() if name not in ("head_dim", "rms_norm_eps")}
_ROPE_RMS = {"position_embedding_type": "rope", "normalization": "RMSNorm"}
_ROPE_LAYER_NORM = {"position_embedding_type": "rope", "normalization": "LayerNorm"}
_GATED = {"swiglu": True, "openai_gelu": False}

_LLAMA = Architecture(
    model_type="llama",
    class_name="LlamaForCausalLM",
    modules=_LLAMA_MODULES,
    sizes=_LLAMA_SIZES,
    needs={**_ROPE_RMS, **_GATED, "qk_layernorm": False},
    defaults={"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False},
    biases=("attention_bias", "mlp_bias"),
    own_width=True,
)
_MISTRAL = Architecture(
    model_type="mistral",
    class_name="MistralForCausalLM",
    modules=_LLAMA_MODULES,
    sizes=_LLAMA_SIZES,
    needs={**_ROPE_RMS, **_GATED, "qk_layernorm": False, "bias_linear": False},
    defaults={"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "num_key_value_heads": 8, "sliding_window": 4096},
    requires={"sliding_window": (None,)},
    own_width=True,
)
_QWEN3 = Architecture(
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    modules={
        **_LLAMA_MODULES,
        "attention.q_norm": "model.layers.{i}.self_attn.q_norm",
        "attention.k_norm": "model.layers.{i}.self_attn.k_norm",
    },
    sizes=_LLAMA_SIZES,
    needs={**_ROPE_RMS, **_GATED, "qk_layernorm": True, "bias_linear": False},
    defaults={
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "head_dim": 128,
        "num_key_value_heads": 32,
        "use_sliding_window": False,
        "attention_bias": False,
    },
    requires={"use_sliding_window": (False,), "attention_bias": (False,)},
    own_width=True,
)
_ARCEE = Architecture(
    model_type="arcee",
    class_name="ArceeForCausalLM",
    modules={**_LLAMA_MODULES, "mlp.fc1": "model.layers.{i}.mlp.up_proj"},
    sizes=_LLAMA_SIZES,
    needs={**_ROPE_RMS, "swiglu": False, "qk_layernorm": False},
    defaults={
        "hidden_act": "relu2",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    },
    biases=("attention_bias", "mlp_bias"),
    own_width=True,
)
_STARCODER2 = Architecture(
    model_type="starcoder2",
    class_name="Starcoder2ForCausalLM",
    modules={
        **_LLAMA_MODULES,
        "mlp.fc1": "model.layers.{i}.mlp.c_fc",
        "mlp.fc2": "model.layers.{i}.mlp.c_proj",
    },
    sizes={**_WITHOUT_WIDTH, "norm_epsilon": "norm_epsilon"},
    needs={**_ROPE_LAYER_NORM, "swiglu": False, "qk_layernorm": False},
    defaults={
        "hidden_act": "gelu_pytorch_tanh",
        "norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "num_key_value_heads": 2,
        "initializer_range": 0.018042,
        "use_bias": True,
        "sliding_window": None,
    },
    requires={"sliding_window": (None,)},
    biases=("use_bias",),
)
_GPT_NEOX = Architecture(
    model_type="gpt_neox",
    class_name="GPTNeoXForCausalLM",
    modules={
        "embedding": "gpt_neox.embed_in",
        "attention_norm": "gpt_neox.layers.{i}.input_layernorm",
        "attention.qkv": "gpt_neox.layers.{i}.attention.query_key_value",
        "attention.proj": "gpt_neox.layers.{i}.attention.dense",
        "mlp_norm": "gpt_neox.layers.{i}.post_attention_layernorm",
        "mlp.fc1": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
        "mlp.fc2": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
        "final_norm": "gpt_neox.final_layer_norm",
        # The name on disk; version 5 of Transformers calls the module lm_head.
        "output": "embed_out",
    },
    sizes={
        **{name: ours for name, ours in _WITHOUT_WIDTH.items() if name != "num_key_value_heads"},
        "layer_norm_eps": "norm_epsilon",
    },
    needs={**_ROPE_LAYER_NORM, "swiglu": False, "qk_layernorm": False, "bias_linear": True},
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "attention_bias": True,
    },
    requires={"use_parallel_residual": (False,), "attention_bias": (True,)},
    groups=False,
    rope_names=("rotary_emb_base", "rotary_pct"),
    rope_share=0.25,
    fused="group",
)
_STABLELM = Architecture(
    model_type="stablelm",
    class_name="StableLmForCausalLM",
    modules=_LLAMA_MODULES,
    sizes={**_WITHOUT_WIDTH, "layer_norm_eps": "norm_epsilon"},
    needs={**_ROPE_LAYER_NORM, **_GATED, "qk_layernorm": False, "bias_linear": False},
    defaults={
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
    },
    requires={"use_qkv_bias": (False,), "qk_layernorm": (False,), "use_parallel_residual": (False,)},
    rope_share=0.25,
)
_GPT2 = Architecture(
    model_type="gpt2",
    class_name="GPT2LMHeadModel",
    modules={
        "embedding": "transformer.wte",
        "positions": "transformer.wpe",
        "attention_norm": "transformer.h.{i}.ln_1",
        "attention.qkv": "transformer.h.{i}.attn.c_attn",
        "attention.proj": "transformer.h.{i}.attn.c_proj",
        "mlp_norm": "transformer.h.{i}.ln_2",
        "mlp.fc1": "transformer.h.{i}.mlp.c_fc",
        "mlp.fc2": "transformer.h.{i}.mlp.c_proj",
        "final_norm": "transformer.ln_f",
        "output": "lm_head",
    },
    sizes={
        "vocab_size": "vocab_size",
        "n_embd": "hidden_size",
        "n_inner": "ffn_hidden_size",
        "n_layer": "num_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_positions",
        "initializer_range": "init_method_std",
        "layer_norm_epsilon": "norm_epsilon",
        "tie_word_embeddings": "tied_embeddings",
    },
    needs={
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "swiglu": False,
        "qk_layernorm": False,
        "bias_linear": True,
    },
    defaults={
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    requires={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    activation="activation_function",
    groups=False,
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    fused="stacked",
)

# In the order in which an export looks for a class that has the shape.
ARCHITECTURES: dict[str, Architecture] = {
    each.model_type: each for each in (_LLAMA, _ARCEE, _QWEN3, _GPT2, _STARCODER2, _STABLELM, _GPT_NEOX, _MISTRAL)
}


def activation_names(swiglu: bool, openai_gelu: bool, model_type: str = "") -> tuple[str, ...]:
    """Transformers' names of the activation of a shape; the first is the one to write for a class."""
    if swiglu:
        return _SILU
    if not openai_gelu:
        return _GELU
    return tuple(sorted(_GELU_TANH, key=lambda name: (name == "gelu_new") != (model_type == "gpt2")))
