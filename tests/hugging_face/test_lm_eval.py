"""examples/lm_eval.sh and tools/eval_task.py: the harness's log-likelihoods and bits per byte are our model's.

Run alone: python -m pytest tests/hugging_face/test_lm_eval.py
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hugging_face.test_convert_tool import write_text_data
from phases.small import train

from megatron_doremi.data.indexed_dataset import IndexedDatasetWriter
from megatron_doremi.errors import ConfigError
from megatron_doremi.hugging_face.inference import load_model
from megatron_doremi.hugging_face.model_folder import open_model
from megatron_doremi.tokenization.tokenizer import HUGGING_FACE, load_tokenizer
from tools import eval_task

ROOT = Path(__file__).resolve().parents[2]


def log_likelihood(module, ids, eod, length):
    """Sum of log-probabilities of a document after an end-of-document token, in windows of `length` tokens: each is
    as full as the document allows, and every token is predicted once."""
    total, done, tokens = 0.0, 0, [eod, *ids]
    while done < len(ids):
        end = min(done + length, len(ids))
        start = max(0, end - length)
        window = torch.tensor([tokens[start : end + 1]])
        losses = module(window[:, :-1], window[:, 1:])[0]
        total -= float(losses[done - start :].double().sum())
        done = end
    return total


@pytest.mark.slow
def test_the_harness_sees_our_model(tmp_path):
    data = write_text_data(tmp_path, ("Books & Co", "C++"))
    # A folder of another run, which the brackets of OUT would match as a pattern.
    (tmp_path / "out 1, 2" / "task").mkdir(parents=True)
    (tmp_path / "out 1, 2" / "task" / "heldout_c.jsonl").write_text('{"text": "another"}\n')
    flags = ["--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--seq-length", "64"]
    train(1, "main", data, tmp_path / "run", 8, model=[*flags, "--lr", "5e-3", "--global-batch-size", "8"])
    environment = {
        **os.environ,
        "TASKS": "heldout",
        "DOMAINS": str(data),
        "DOCUMENTS": "4",
        "OUT": str(out := tmp_path / "out [1], 2"),
    }
    environment |= {
        "DEVICE": "cpu",
        "HF_HOME": str(tmp_path / "home"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    script = ["bash", str(ROOT / "examples" / "lm_eval.sh"), str(tmp_path / "run")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    opened = open_model(tmp_path / "run", "--load")
    module = load_model(opened.gpt, opened.weights, torch.device("cpu"), torch.float32)
    tokenizer = load_tokenizer(HUGGING_FACE, data.with_name("tokenizer.json"))
    results = json.loads(next((out / "results").rglob("results_*.json")).read_text())["results"]
    for task in ("heldout_books_co", "heldout_c"):
        samples = next((out / "results").rglob(f"samples_{task}_*.jsonl")).read_text().splitlines()
        assert len(samples) == 4
        total = size = 0
        for sample in map(json.loads, samples):
            text = sample["doc"]["text"]
            ours = log_likelihood(module, tokenizer.encode(text).tolist(), tokenizer.eod, 64)
            theirs = float(sample["filtered_resps"][0])
            assert len(tokenizer.encode(text)) > 64
            assert theirs == pytest.approx(ours, rel=1e-6, abs=1e-4)
            total, size = total + ours, size + len(text.encode())
        assert results[task]["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-6)
    # The documents are those of the held-out split, in its order.
    lines = (out / "task" / "heldout_c.jsonl").read_text().splitlines()
    first = tokenizer.encode(json.loads(lines[0])["text"])
    from megatron_doremi.data.manifest import load_manifest

    manifest = load_manifest(data)
    assert manifest.open_held_out(manifest.domains[1]).tokens(0, len(first)).tolist() == first.tolist()


def test_names_of_tasks_differ():
    taken: list[str] = []
    for name in ("C", "c++", "\u4e2d", "(en)", "C#"):
        taken.append(f"heldout_{eval_task.slug(name, taken)}")
    assert taken == ["heldout_c", "heldout_c_2", "heldout_domain", "heldout_en", "heldout_c_3"]


def test_a_mistake_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval_task.py", "--domains", "none.json", "--output-dir", str(tmp_path / "o")])
    with pytest.raises(ConfigError, match=r"none\.json"):
        eval_task.main()
    assert not (tmp_path / "o").exists()


def test_domains_without_text_are_left_out(tmp_path, monkeypatch, capsys):
    """The harness cannot read a task without documents; and a folder whose name its data sets would split."""
    data = write_text_data(tmp_path, ("Books", "C++"))
    eod = load_tokenizer(HUGGING_FACE, data.with_name("tokenizer.json")).eod

    def empty(name):
        with IndexedDatasetWriter(tmp_path / f"{name}_valid", np.dtype(np.uint16)) as writer:
            writer.add_document(np.array([eod]))
            writer.add_document(np.array([eod]))

    def run(out):
        monkeypatch.setattr(sys, "argv", ["eval_task.py", "--domains", str(data), "--output-dir", str(out)])
        return eval_task.main()

    empty("Books")
    assert run(tmp_path / "task") == 0
    assert "left out, since its held-out documents are empty: 'Books'" in capsys.readouterr().out
    assert json.loads((tmp_path / "task" / "heldout.yaml").read_text())["task"] == ["heldout_c"]
    assert not (tmp_path / "task" / "heldout_books.jsonl").exists()
    empty("C++")
    with pytest.raises(ConfigError, match="every held-out document is empty"):
        run(tmp_path / "none")
    with pytest.raises(ConfigError, match="--output-dir"):
        run(tmp_path / "a::b")
