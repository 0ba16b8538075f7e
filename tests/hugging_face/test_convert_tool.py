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
