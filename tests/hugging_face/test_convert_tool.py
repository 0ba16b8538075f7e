"""tools/convert_checkpoint.py on a trained run and its data: both ways, with the tokenizer; what it refuses.

Run alone: python -m pytest tests/hugging_face/test_convert_tool.py
"""

from __future__ import annotations

import json
import random
import shutil
import sys

import numpy as np
import pytest
from phases.small import MODEL, train
from ranks import unwrapped
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_doremi.data.indexed_dataset import IndexedDatasetWriter, dtype_for
from megatron_doremi.data.manifest import Domain, Manifest, TokenizerInfo, save_manifest
from megatron_doremi.errors import ConfigError
from megatron_doremi.tokenization.tokenizer import HUGGING_FACE, load_tokenizer
from tools import convert_checkpoint

SYLLABLES = ["ta", "ri", "mon", "el", "shu", "pra", "ke", "dor", "in", "os", "\u00fc", "42", "\n"]


def documents(seed, count):
    generator = random.Random(seed)
    words = [["".join(generator.choices(SYLLABLES, k=3)) for _ in range(40)] for _ in range(count)]
    return [" ".join(each) for each in words]


def write_text_data(folder, domains=("Books", "Code"), vocab_size=300):
    """A data set of two domains of text, with a byte-level BPE of 300 pieces; returns the manifest's path."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents(0, 50), trainer)
    file = folder / "tokenizer.json"
    tokenizer.save(str(file))
    loaded = load_tokenizer(HUGGING_FACE, file)
    entries = []
    for number, name in enumerate(domains):
        sizes = {}
        for split, count in (("train", 60), ("valid", 12)):
            texts = documents(10 * number + (split == "valid") + 1, count)
            ids = [np.append(loaded.encode(text), loaded.eod) for text in texts]
            prefix = folder / f"{name}_{split}"
            with IndexedDatasetWriter(prefix, dtype_for(loaded.vocab_size)) as writer:
                for each in ids:
                    writer.add_document(each)
            lengths = np.array([len(text.encode()) for text in texts], dtype="<u4")
            (folder / f"{name}_{split}.bytes").write_bytes(lengths.tobytes())
            sizes[split] = (prefix, sum(map(len, ids)), int(lengths.sum()))
        train_prefix, tokens, size = sizes["train"]
        entries.append(Domain(name, train_prefix, sizes["valid"][0], tokens, 60, size))
    info = TokenizerInfo(HUGGING_FACE, file, loaded.sha256, loaded.vocab_size, loaded.eod)
    save_manifest(Manifest(tuple(entries), info, folder / "domains.json"))
    return folder / "domains.json"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(manifest, a run of a few steps)"""
    folder = tmp_path_factory.mktemp("run")
    data = write_text_data(folder)
    train(1, "main", data, folder / "main", 4, "--save-interval", "2")
    return data, folder / "main"


def convert(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, words)])
    assert convert_checkpoint.main() == 0
    return unwrapped(capsys.readouterr().out)


def fault_of(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, words)])
    with pytest.raises(ConfigError) as error:
        convert_checkpoint.main()
    return str(error.value)


def test_a_run_opens_in_transformers_and_comes_back(run, tmp_path, monkeypatch, capsys):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_doremi.hugging_face.model_folder import open_model

    data, folder = run
    output = convert(monkeypatch, capsys, "--to", "hf", folder, tmp_path / "hf")
    assert "LlamaForCausalLM" in output
    assert "at step 4" in output
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = load_tokenizer(HUGGING_FACE, data.with_name("tokenizer.json"))
    text = "  shumon \u00fc 42\n\n\u4e2d " + documents(9, 1)[0]
    assert tokenizer(text).input_ids == ours.encode(text).tolist()
    assert tokenizer.decode(ours.encode(text)) == text
    assert (tokenizer.eos_token_id, tokenizer.bos_token) == (ours.eod, None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert (model.config.eos_token_id, model.config.bos_token_id, model.config.vocab_size) == (ours.eod, None, 300)
    assert model.dtype == torch.float32
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    # To a native model and back: every file of the model, byte for byte.
    convert(monkeypatch, capsys, "--to", "native", tmp_path / "hf", tmp_path / "native")
    trained, native = open_model(folder, "--load"), open_model(tmp_path / "native", "--load")
    assert all(torch.equal(trained.weights.full(name), native.weights.full(name)) for name in trained.weights.names())
    convert(monkeypatch, capsys, "--to", "hf", tmp_path / "native", tmp_path / "again")
    names = sorted(path.name for path in (tmp_path / "hf").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_an_earlier_step_in_another_type(run, tmp_path, monkeypatch, capsys):
    import torch

    from megatron_doremi.hugging_face.model_folder import open_model

    output = convert(monkeypatch, capsys, "--to", "hf", f"{run[1]}@2", tmp_path / "hf", "--dtype", "bfloat16")
    assert "bfloat16" in output
    assert "at step 2" in output
    earlier, exported = open_model(run[1], "--load", 2), open_model(tmp_path / "hf", "--load")
    for name in earlier.weights.names():
        assert torch.equal(earlier.weights.full(name).bfloat16(), exported.weights.full(name))


def test_each_parameter_keeps_its_type(run, tmp_path, monkeypatch, capsys):
    import torch
    from safetensors.torch import load_file, save_file

    from megatron_doremi.hugging_face.model_folder import open_model

    convert(monkeypatch, capsys, "--to", "hf", run[1], tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()
    save_file(tensors, file)
    convert(monkeypatch, capsys, "--to", "native", tmp_path / "hf", tmp_path / "native")
    weights = open_model(tmp_path / "native", "--load").weights
    assert weights.dtype("embedding.weight") == torch.bfloat16
    assert weights.dtype("final_norm.weight") == torch.float32
    assert torch.equal(weights.full("final_norm.weight"), tensors["model.norm.weight"])


def test_a_shape_without_a_class_is_refused_with_its_flags(run, tmp_path, monkeypatch):
    flags = [*MODEL, "--position-embedding-type", "learned_absolute"]
    train(1, "main", run[0], tmp_path / "learned", 1, model=flags)
    message = fault_of(monkeypatch, "--to", "hf", tmp_path / "learned", tmp_path / "hf")
    assert "--position-embedding-type learned_absolute" in message
    assert "LlamaForCausalLM has only --position-embedding-type rope" in message
    assert not (tmp_path / "hf").exists()


def edit(folder, **changes):
    path = folder / "config.json"
    entry = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in entry.items() if value is not ...}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "olmo2"}, "it normalizes the outputs of attention"),
        ({"model_type": "mamba"}, "one of llama, arcee"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_type 'default'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type 'default'"),
        ({"hidden_act": "relu"}, "hidden_act: 'relu'"),
        ({"mlp_bias": True}, "biases in all linear layers or in none"),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple"),
        ({"hidden_size": "32"}, "hidden_size: '32'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"intermediate_size": 48}, "[64, 32]"),
        ({"num_hidden_layers": 1}, "model.layers.1"),
        ({"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight: missing"),
        ({"tie_word_embeddings": False}, "lm_head.weight: missing"),
        ({"rope_parameters": {"rope_theta": 10**400}, "rope_theta": 10**400}, "rotary_base: a huge integer"),
    ],
)
def test_what_the_model_cannot_express_is_refused(run, tmp_path, monkeypatch, capsys, changes, words):
    convert(monkeypatch, capsys, "--to", "hf", run[1], tmp_path / "hf")
    edit(tmp_path / "hf", **changes)
    assert words in fault_of(monkeypatch, "--to", "native", tmp_path / "hf", tmp_path / "native")


def test_folders_that_hold_no_model(run, tmp_path, monkeypatch, capsys):
    convert(monkeypatch, capsys, "--to", "hf", run[1], tmp_path / "hf")
    shutil.copytree(tmp_path / "hf", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    message = fault_of(monkeypatch, "--to", "native", tmp_path / "pickled", tmp_path / "out")
    assert "pickled weights" in message
    shutil.copytree(tmp_path / "hf", tmp_path / "truncated")
    with (tmp_path / "truncated" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert "model.safetensors" in fault_of(monkeypatch, "--to", "native", tmp_path / "truncated", tmp_path / "out")
    index = {"metadata": {}, "weight_map": {"a": "../hf/model.safetensors"}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "not a path" in fault_of(monkeypatch, "--to", "native", tmp_path / "hf", tmp_path / "out")
    assert "no such folder" in fault_of(monkeypatch, "--to", "native", tmp_path / "none", tmp_path / "out")
    assert "already exists" in fault_of(monkeypatch, "--to", "hf", run[1], tmp_path / "hf")
    assert not (tmp_path / "out").exists()


def test_a_moved_manifest_is_named(run, tmp_path, monkeypatch, capsys):
    data, folder = run
    copied = tmp_path / "main"
    shutil.copytree(folder, copied)
    settings = json.loads((copied / "config.json").read_text())
    settings["settings"]["data"]["domains"] = str(tmp_path / "moved.json")
    (copied / "config.json").write_text(json.dumps(settings))
    assert "--without-tokenizer" in fault_of(monkeypatch, "--to", "hf", copied, tmp_path / "hf")
    convert(monkeypatch, capsys, "--to", "hf", copied, tmp_path / "hf", "--domains", data)
    output = convert(monkeypatch, capsys, "--to", "hf", copied, tmp_path / "bare", "--without-tokenizer")
    assert "it has no tokenizer" in output
    names = {path.name for path in (tmp_path / "bare").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}


def test_weights_that_are_not_what_their_folder_says(run, tmp_path, monkeypatch, capsys):
    import torch
    from safetensors.torch import load_file, save_file

    def refused(name, words, *flags, to="native"):
        assert words in fault_of(monkeypatch, "--to", to, tmp_path / name, tmp_path / "out", *flags)
        # Nothing is left, not even under a hidden name.
        assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]

    def saved(name, tensors, file="model.safetensors", **changes):
        shutil.copytree(tmp_path / "hf", tmp_path / name, dirs_exist_ok=True)
        save_file(tensors, tmp_path / name / file)
        edit(tmp_path / name, **changes)

    convert(monkeypatch, capsys, "--to", "hf", run[1], tmp_path / "hf")
    convert(monkeypatch, capsys, "--to", "native", tmp_path / "hf", tmp_path / "native")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    # Version 5 of Transformers does not tie an output layer that has values of its own.
    saved("untied", {**tensors, "lm_head.weight": embedding + 1})
    refused("untied", "lm_head.weight has values of its own")
    saved("copied", {**tensors, "lm_head.weight": embedding.clone()})
    convert(monkeypatch, capsys, "--to", "native", tmp_path / "copied", tmp_path / "copied_native")
    # Shards with one tensor twice, and shards beside a single file, which Transformers reads alone.
    saved("shards", tensors, "a.safetensors")
    saved("shards", {"model.norm.weight": tensors["model.norm.weight"] + 1}, "b.safetensors")
    places = dict.fromkeys(tensors, "a.safetensors") | {"model.norm.weight": "b.safetensors"}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    refused("shards", "model.safetensors and model.safetensors.index.json for other files")
    (tmp_path / "shards" / "model.safetensors").unlink()
    refused("shards", "model.norm.weight is in a.safetensors and in b.safetensors")
    # A type that lacks a value's size, or that not all parts of a parameter have.
    saved("large", {**tensors, "model.norm.weight": torch.full((32,), 1e6)})
    refused("large", "final_norm.weight holds 1e+06", "--dtype", "float16", to="hf")
    query = "model.layers.0.self_attn.q_proj.weight"
    saved("mixed", {**tensors, query: tensors[query].bfloat16()})
    convert(monkeypatch, capsys, "--to", "native", tmp_path / "mixed", tmp_path / "mixed_native")
    convert(monkeypatch, capsys, "--to", "hf", tmp_path / "mixed_native", tmp_path / "mixed_again")
    key = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(load_file(tmp_path / "mixed_again" / "model.safetensors")[key], tensors[key])
    # A config.json that was edited: a layer fewer, another value that leaves the shapes as they are.
    entry = json.loads((tmp_path / "native" / "config.json").read_text())
    edit(tmp_path / "native", gpt=entry["gpt"] | {"num_layers": 1})
    refused("native", "layers.1.attention.proj.weight: missing", to="hf")
    shutil.copytree(run[1], tmp_path / "run")
    gpt = json.loads((tmp_path / "run" / "config.json").read_text())["gpt"]
    edit(tmp_path / "run", gpt=gpt | {"rotary_base": 5e5})
    refused("run", "rotary_base: 500000.0", to="hf")
    # A byte that changed on the disk.
    edit(tmp_path / "run", gpt=gpt)
    file = next((tmp_path / "run" / "checkpoints" / "iter_0000004" / "weights").iterdir())
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused("run", "changed after it was written", to="hf")


def test_out_is_a_link_or_holds_what_a_killed_conversion_left(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    left = tmp_path / ".real.partial"
    (left / "weights").mkdir(parents=True)
    (left / "old").symlink_to(run[1])
    convert(monkeypatch, capsys, "--to", "hf", run[1], tmp_path / "link")
    assert "model.safetensors" in [path.name for path in (tmp_path / "real").iterdir()]
    assert not left.exists()
    assert (run[1] / "config.json").exists()
    monkeypatch.chdir(tmp_path)
    assert "the current one" in fault_of(monkeypatch, "--to", "hf", run[1], ".")


def test_an_export_says_that_transformers_attends_across_documents(run, tmp_path):
    from argparse import Namespace
    from dataclasses import replace

    from megatron_doremi.hugging_face.architectures import ARCHITECTURES
    from megatron_doremi.hugging_face.model_folder import open_model

    opened, args = open_model(run[1], "SOURCE"), Namespace(out=tmp_path, dtype=None)
    resets = replace(opened, gpt=replace(opened.gpt, reset_attention_mask=True, eod=0))
    architecture = ARCHITECTURES["llama"]
    lines = [" ".join(convert_checkpoint._summary(args, each, architecture)) for each in (opened, resets)]
    assert "one document at a time" not in lines[0]
    assert "trained with --reset-attention-mask, which Transformers does not know: give it one document" in lines[1]
