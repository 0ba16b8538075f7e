"""tools/inspect_step.py shows exactly the windows that the loader read, whatever the run changed on its way.

Run alone: python -m pytest tests/phases/test_inspect_step.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from phases.small import MODEL
from ranks import on_ranks, program

from megatron_doremi.data.indexed_dataset import IndexedDataset
from megatron_doremi.errors import ConfigError
from tools import inspect_step

pytestmark = pytest.mark.slow


def recorded(launch, argv, path):
    """Runs the program on a rank, and writes what its loader reads: a line a step."""
    from megatron_doremi.data import loader

    read = loader.StepReader.read

    def recording(self, state, weights):
        step = read(self, state, weights)
        rows = [
            row
            for batch in step.micro_batches
            for row in zip(batch.domains.tolist(), batch.windows.tolist(), batch.tokens.tolist(), strict=True)
        ]
        with open(path, "a") as file:
            file.write(json.dumps([state.step + 1, rows]) + "\n")
        return step

    loader.StepReader.read = recording
    return program(launch, argv)


def run(data, save, *extra, phase="main", iters=12):
    argv = ["--phase", phase, "--domains", str(data), "--save", str(save), "--load", str(save)]
    on_ranks(1, recorded, [*argv, "--train-iters", str(iters), *MODEL, *extra], str(save) + ".windows")


def windows_read(save):
    """{step: [(domain, window, tokens)]} in the order of the batch; a resumed run reads again what was read ahead."""
    lines = Path(str(save) + ".windows").read_text().splitlines()
    return dict(map(json.loads, lines))


def shown(save, step, capsys, *flags):
    assert inspect_step.main(["--run", str(save), "--step", str(step), "--ids", "--json", *flags]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def check(data, save, step, capsys):
    """The tool's windows of a step are the loader's: domain, window and every token."""
    names, entries = [f"domain {i}" for i in range(3)], shown(save, step, capsys)
    loaded = windows_read(save)[step]
    assert [(e["domain"], e["window"]) for e in entries] == [(names[d], w) for d, w, _ in loaded]
    assert [e["row"] for e in entries] == [*range(len(loaded))]
    for entry, (domain, window, tokens) in zip(entries, loaded, strict=True):
        ids = [token for part in entry["documents"] for token in part["ids"]]
        assert ids[:-1] == tokens
        dataset = IndexedDataset(data.parent / f"domain{domain}_train")
        assert ids == dataset.tokens(window * 16, 17).tolist()
        for part in entry["documents"]:
            document = dataset.document(part["document"])
            assert part["tokens"] == len(document)
            assert part["ids"] == document[part["first"] : part["last"] + 1].tolist()
    return entries


def test_a_static_mixture_with_and_without_checkpoints_between(data, tmp_path, capsys):
    save = tmp_path / "run"
    run(data, save, "--domain-weights", "domain 0=7,domain 1=2,domain 2=1", "--log-interval", "5", iters=30)
    entries = {step: check(data, save, step, capsys) for step in (1, 5, 29, 30)}
    # 93 windows of the first domain, 5.6 of them a step: the second epoch begins at step 17.
    assert {e["epoch"] for e in entries[1]} == {1}
    assert {e["epoch"] for e in entries[29] if e["domain"] == "domain 0"} == {2}
    inspect_step.main(["--run", str(save), "--step", "5", "--ids", "--limit", "2", "--domain", "domain 0"])
    text = capsys.readouterr().out
    assert "replayed from iteration 0; metrics.jsonl has the same windows by domain" in text
    assert "more windows: --limit 0 shows all" in text
    assert text.count("== row") == 2
    assert "domain 1, window" not in text
    assert "may not have taken this step" not in text
    (save / "checkpoints").rename(save / "away")
    lines = (save / "metrics.jsonl").read_text().splitlines()
    (save / "metrics.jsonl").write_text("\n".join(lines[:2]))
    assert inspect_step.main(["--run", str(save), "--step", "11", "--ids", "--limit", "1"]) == 0
    assert "may not have taken this step yet: the last that is recorded is 10;" in capsys.readouterr().out
    (save / "metrics.jsonl").write_text("\n".join(lines))
    # A line that a person or another program has edited.
    lines = (save / "metrics.jsonl").read_text().splitlines()
    edited = {**json.loads(lines[0]), "loss": None, "grad_norm": None}
    edited["domain_loss"]["domain 2"] = None
    (save / "metrics.jsonl").write_text("\n".join([json.dumps(edited), *lines[1:]]))
    assert inspect_step.main(["--run", str(save), "--step", "5", "--ids"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "loss nan, gradient norm nan replayed" in text
    assert "loss by domain: domain 2 nan, " in text
    (save / "metrics.jsonl").write_text(json.dumps({**edited, "domain_tokens": 7}))
    with pytest.raises(ConfigError, match="no line of step 5 with its domain_tokens"):
        inspect_step.main(["--run", str(save), "--step", "5", "--ids"])


def test_a_run_that_changed_its_weights_and_batch_size(data, tmp_path, capsys):
    save = tmp_path / "run"
    run(data, save, "--exit-interval", "4")
    changed = ["--domain-weights", "uniform", "--change-domain-weights"]
    run(data, save, *changed, "--exit-interval", "8")
    run(data, save, *changed, "--global-batch-size", "12", "--override-resume", "global-batch-size")
    for kept in (True, False):
        for step in (3, 4, 5, 8, 9, 12):
            check(data, save, step, capsys)
        if kept:
            # Without checkpoints the replay starts at the first step, through both changes.
            (save / "checkpoints").rename(save / "away")


def test_a_learned_mixture_by_its_metrics(data, reference, tmp_path, capsys):
    save = tmp_path / "run"
    flags = [*reference, "--doremi-weighting", "resample", "--doremi-step-size", "4", "--save-interval", "5"]
    run(data, save, *flags, phase="proxy")
    steps = windows_read(save)
    assert len({tuple(np.bincount([row[0] for row in steps[step]], minlength=3)) for step in steps}) > 2
    for step in (1, 5, 6, 12):
        check(data, save, step, capsys)
    lines = (save / "metrics.jsonl").read_text().splitlines(keepends=True)
    (save / "metrics.jsonl").write_text("".join(line for line in lines if '"iteration": 7,' not in line))
    check(data, save, 6, capsys)
    with pytest.raises(ConfigError, match="no line of step 7"):
        shown(save, 9, capsys)


def test_what_cannot_be_shown_is_refused(data, tmp_path, capsys, monkeypatch):
    save = tmp_path / "run"
    run(data, save, iters=2)
    for flags, words in (
        (["--step", "3"], "which has 2"),
        (["--step", "0"], "at least 1"),
        (["--step", "1", "--domain", "domain1"], "did you mean 'domain 1'"),
        (["--step", "1", "--domains", "nowhere"], "manifest nowhere"),
    ):
        with pytest.raises(ConfigError, match=words):
            inspect_step.main(["--run", str(save), "--ids", *flags])
    with pytest.raises(ConfigError, match=r"config\.json"):
        inspect_step.main(["--run", str(tmp_path), "--step", "1"])

    class Letters:
        def decode(self, ids):
            return "".join(chr(ord("A") + i) for i in ids)

    monkeypatch.setattr(inspect_step, "dataset_tokenizer", lambda manifest: Letters())
    assert inspect_step.main(["--run", str(save), "--step", "2", "--json"]) == 0
    (loaded, *_) = windows_read(save)[2]
    documents = json.loads(capsys.readouterr().out.splitlines()[0])["documents"]
    assert "".join(part["text"] for part in documents)[:-1] == Letters().decode(loaded[2])

    part = {"document": 0, "first": 0, "last": 1, "tokens": 2, "text": "a\x1b[2J\nb"}
    window = {"row": 0, "domain": "x", "window": 0, "windows": 1, "epoch": 0, "file": "f", "documents": [part]}
    assert inspect_step.entry_lines(window)[-2:] == ["a\\x1b[2J", "b"]

    path = data.parent / "domain1_train.bin"
    original = path.read_bytes()
    path.write_bytes(bytes([original[0] ^ 1]) + original[1:])
    try:
        with pytest.raises(ConfigError, match="other tokens"):
            inspect_step.main(["--run", str(save), "--ids", "--step", "1"])
    finally:
        path.write_bytes(original)
