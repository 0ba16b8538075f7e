"""tools/generate.py: the tokens that Transformers generates from the exported folder; the distribution by hand.

Run alone: python -m pytest tests/hugging_face/test_generate.py
"""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest
import torch
from hugging_face.test_convert_tool import write_text_data
from phases.small import train

from megatron_doremi.errors import ConfigError, RunError
from megatron_doremi.hugging_face.inference import probabilities
from tools import convert_checkpoint, generate


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((1.0, 0, 1.0), [0.1, 0.4, 0.2, 0.3]),
        ((0.0, 0, 1.0), [0.0, 1.0, 0.0, 0.0]),
        ((1e-300, 0, 1.0), [0.0, 1.0, 0.0, 0.0]),
        ((0.5, 0, 1.0), [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        ((1.0, 2, 1.0), [0.0, 4 / 7, 0.0, 3 / 7]),
        ((1.0, 0, 0.7), [0.0, 4 / 7, 0.0, 3 / 7]),
        ((1.0, 0, 0.71), [0.0, 4 / 9, 2 / 9, 3 / 9]),
        # Of the two that remain, the first has 4/7 of the probability.
        ((1.0, 2, 0.57), [0.0, 1.0, 0.0, 0.0]),
        ((1.0, 0, 1e-6), [0.0, 1.0, 0.0, 0.0]),
        ((1.0, 9, 1.0), [0.1, 0.4, 0.2, 0.3]),
    ],
)
def test_the_distribution_of_the_next_token(settings, expected):
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64).log() + 3.0
    assert probabilities(logits, *settings).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    data = write_text_data(folder)
    train(1, "main", data, folder / "run", 20)
    argv, sys.argv = sys.argv, ["convert_checkpoint.py", "--to", "hf", str(folder / "run"), str(folder / "hf")]
    assert convert_checkpoint.main() == 0
    sys.argv = argv
    return folder / "run", folder / "hf"


def text_of(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, words)])
    assert generate.main() == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_the_text_is_transformers(models, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, folder = models
    words = ["--prompt", "shumon tari", "--temperature", "0", "--max-new-tokens", "10"]
    ours = text_of(monkeypatch, capsys, "--load", run, *words)
    assert ours == text_of(monkeypatch, capsys, "--load", folder, *words)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("shumon tari", return_tensors="pt").input_ids
    theirs = model.generate(prompt, max_new_tokens=10, do_sample=False)
    assert ours == tokenizer.decode(theirs[0], skip_special_tokens=True) + "\n"
    assert len(ours) > len("shumon tari\n")


def test_texts_follow_from_the_seed(models, monkeypatch, capsys):
    words = ["--load", f"{models[0]}@20", "--samples", "2", "--max-new-tokens", "30"]
    texts = [text_of(monkeypatch, capsys, *words, "--seed", seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("--- 1 of 2\n")
    assert "\n--- 2 of 2\n" in texts[0]
    with pytest.raises(ConfigError, match=r"--top-p: 0\.0\n"):
        text_of(monkeypatch, capsys, "--load", models[0], "--top-p", "0")


def test_control_characters_do_nothing_to_a_terminal():
    assert generate.shown_lines("a\tb\nc\x1b[2J\x07") == "a\tb\nc\\x1b[2J\\x07"


def test_prompts_and_models_that_are_damaged(models, tmp_path, monkeypatch, capsys):
    words = ["--load", models[0], "--max-new-tokens", "3", "--temperature", "0", "--prompt"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"shumon\xff\n")))
    assert text_of(monkeypatch, capsys, *words, "-").startswith("shumon\ufffd")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ConfigError, match="without a standard input"):
        text_of(monkeypatch, capsys, *words, "-")
    # A tokenizer with a piece more than the model's 300.
    folder = tmp_path / "hf"
    shutil.copytree(models[1], folder)
    definition = json.loads((folder / "tokenizer.json").read_text())
    words[1] = folder
    definition["model"] = {"type": "WordLevel", "vocab": {"<|endoftext|>": 0, "ta": 300}, "unk_token": "<|endoftext|>"}
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(ConfigError, match="id 300 of the prompt"):
        text_of(monkeypatch, capsys, *words, "ta")
    monkeypatch.setattr(generate, "load_model", lambda *_: NanModel())
    with pytest.raises(RunError, match="logits after 1 tokens are NaN"):
        text_of(monkeypatch, capsys, "--load", models[0], "--prompt", "")


class NanModel(torch.nn.Linear):
    """A model whose weights are damaged."""

    def __init__(self):
        super().__init__(1, 1)
        self.gpt = type("Shape", (), {"max_positions": 4})

    def logits(self, tokens):
        return torch.full((*tokens.shape, 300), torch.nan)
