"""Hugging Face folders: Transformers computes our logits from an exported folder; round trips keep every bit.

Run alone: python -m pytest tests/hugging_face/test_conversion.py
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import replace

import pytest
from engines import small_gpt
from ranks import on_ranks

os.environ["HF_HUB_OFFLINE"] = "1"

GPT = small_gpt(kv_channels=6)
LEARNED = {"position_embedding_type": "learned_absolute", "num_query_groups": 4}
LAYER_NORM = {"normalization": "LayerNorm"}
GELU = {"swiglu": False, "bias_linear": True}
UNTIED = {"tied_embeddings": False}
# By class of Transformers, tied and untied; key-value heads are grouped where the class has them.
SHAPES = {
    "llama": replace(GPT, bias_linear=True),
    "llama untied": replace(GPT, **UNTIED, kv_channels=8, norm_epsilon=1e-6, rotary_base=5e5),
    "arcee": replace(GPT, **GELU),
    "arcee untied": replace(GPT, **UNTIED, swiglu=False, openai_gelu=True),
    "qwen3": replace(GPT, qk_layernorm=True),
    "qwen3 untied": replace(GPT, **UNTIED, qk_layernorm=True, kv_channels=8),
    "gpt2": replace(GPT, **LEARNED, **LAYER_NORM, **GELU),
    "gpt2 untied": replace(GPT, **UNTIED, **LEARNED, **LAYER_NORM, **GELU, openai_gelu=True),
    "starcoder2": replace(GPT, **LAYER_NORM, **GELU),
    "starcoder2 untied": replace(GPT, **UNTIED, **LAYER_NORM, swiglu=False, openai_gelu=True, norm_epsilon=1e-6),
    "stablelm": replace(GPT, **LAYER_NORM),
    "stablelm untied": replace(GPT, **UNTIED, **LAYER_NORM),
    "gpt_neox": replace(GPT, **LAYER_NORM, **GELU, num_query_groups=4),
    "gpt_neox untied": replace(GPT, **UNTIED, **LAYER_NORM, **GELU, num_query_groups=4),
    "mistral": GPT,
}
# Pipeline stages, tensor ranks, ZeRO stage.
LAYOUTS = {"TP2-PP2": (4, 2, 2, 0), "DP2-ZeRO3": (2, 1, 1, 3)}


def write_weights(launch, pipe, tensor, zero, folder):
    """Saves the weights of each shape as the ranks of this layout hold them; norms and biases are no constants."""
    import deepspeed
    import numpy as np
    import torch
    from engines import build_engine, layout, make_config

    from megatron_doremi.checkpoint.weights import weights_file
    from megatron_doremi.parallel.parameters import initial_values, shard, spec_of

    context = layout(launch, pipe, tensor)
    topology = context.topology
    data = {"phase": "main", "seq_length": 12, "micro_batch_size": 1, "global_batch_size": 4, "seed": 3}
    config = make_config(topology, data, {"zero_stage": zero})
    for name, gpt in SHAPES.items():
        module = build_engine(config, gpt, np.full(3, 1 / 3), context).module
        with torch.no_grad():
            for parameter_name, parameter in module.model_parameters():
                spec = spec_of(parameter)
                if spec.std == 0.0:
                    values = initial_values(replace(spec, std=0.3), parameter_name, 3) + spec.constant
                    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                        parameter.copy_(shard(values, spec, topology.tensor_size, topology.tensor_rank))
        file = weights_file(module, topology)
        (folder / name).mkdir(exist_ok=True)
        if file is not None:
            file.write(folder / name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    @functools.cache
    def of_layout(name):
        folder = tmp_path_factory.mktemp("weights")
        world, *rest = LAYOUTS[name]
        on_ranks(world, write_weights, *rest, folder)
        return folder

    return of_layout


def our_logits(weights, gpt, tokens):
    import torch

    from megatron_doremi.hugging_face.inference import load_model

    return load_model(gpt, weights, torch.device("cpu"), torch.float32).logits(tokens)


def export(folder, weights, gpt, kind, largest_file=10**9):
    from megatron_doremi.hugging_face.config_file import choose_architecture, config_entry
    from megatron_doremi.hugging_face.conversion import write_hugging_face

    architecture = choose_architecture(gpt, kind if kind in ("gpt_neox", "mistral") else "")
    assert architecture.model_type == kind
    folder.mkdir()
    write_hugging_face(folder, weights, gpt, architecture, None, lambda: None, largest_file)
    (folder / "config.json").write_text(json.dumps(config_entry(architecture, gpt, "float32", 5)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.slow
def test_transformers_computes_our_logits(saved, tmp_path, layout, shape):
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_doremi.checkpoint.weights import WeightsFolder
    from megatron_doremi.hugging_face.conversion import write_native
    from megatron_doremi.hugging_face.model_folder import open_model

    gpt, weights = SHAPES[shape], WeightsFolder(saved(layout) / shape)
    export(tmp_path / "hf", weights, gpt, shape.split()[0], largest_file=5000 if shape == "llama" else 10**9)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.randint(0, gpt.vocab_size, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs, ours = model(tokens).logits, our_logits(weights, gpt, tokens)
    assert theirs.shape == ours.shape == (3, 20, 53)
    assert ours.abs().max() > 1
    assert (theirs - ours).abs().max() < 1e-5
    assert model.generate(tokens[:1, :4], min_new_tokens=3, max_new_tokens=3).shape == (1, 7)
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 2) == (shape == "llama")
    # Back: every bit, and the shape but for padding.
    opened = open_model(tmp_path / "hf", "--load")
    assert replace(opened.gpt, make_vocab_size_divisible_by=8) == gpt
    assert opened.eod == 5
    (tmp_path / "native").mkdir()
    write_native(tmp_path / "native", opened.weights, opened.gpt, None, lambda: None)
    back = WeightsFolder(tmp_path / "native")
    assert back.names() == weights.names()
    assert all(torch.equal(back.full(name), weights.full(name)) for name in weights.names())
    # And Transformers' own way of writing the folder.
    model.save_pretrained(tmp_path / "again")
    again = open_model(tmp_path / "again", "--load")
    assert again.gpt == opened.gpt
    assert all(torch.equal(again.weights.full(name), weights.full(name)) for name in weights.names())


@pytest.mark.slow
def test_folders_of_other_versions(saved, tmp_path):
    """GPT-2 without the prefix of its class and with its masks stored; Llama with its rotary frequencies stored and the
    base of version 4; GPT-NeoX with version 5's name of the output layer."""
    import torch
    from safetensors.torch import load_file, save_file

    from megatron_doremi.checkpoint.weights import WeightsFolder
    from megatron_doremi.hugging_face.model_folder import open_model

    for shape in ("gpt2", "llama untied", "gpt_neox untied"):
        folder, gpt = tmp_path / shape, SHAPES[shape]
        weights = WeightsFolder(saved("TP2-PP2") / shape)
        export(folder, weights, gpt, shape.split()[0])
        tensors = load_file(folder / "model.safetensors")
        entry = json.loads((folder / "config.json").read_text())
        if shape == "gpt2":
            tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
            tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
        elif shape == "llama untied":
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
            del entry["rope_parameters"]
        else:
            tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
            del entry["rope_parameters"], entry["partial_rotary_factor"], entry["rope_theta"]
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(entry))
        opened = open_model(folder, "--load")
        assert replace(opened.gpt, make_vocab_size_divisible_by=8) == gpt
        assert all(torch.equal(opened.weights.full(name), weights.full(name)) for name in weights.names())
