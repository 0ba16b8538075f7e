"""Recorded reference losses: equal to those computed online, sparse, resumable, shared out, and never the wrong ones.

Run alone: python -m pytest tests/training/test_score.py
"""

from __future__ import annotations

import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from ranks import run_program
from training.small import MODEL, train, training_lines, write_data

from megatron_doremi.arguments import parse_config
from megatron_doremi.data import scores
from megatron_doremi.data.scores import RecordedLosses, add_to_chunk, missing_windows, read_chunk
from megatron_doremi.errors import ConfigError
from megatron_doremi.training.score import check_recorded, windows_read
from megatron_doremi.training.setup import open_data

pytestmark = pytest.mark.slow
STEPS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set and a reference that was trained as TP 2."""
    folder = tmp_path_factory.mktemp("score")
    data = write_data(folder, tokens=2000)
    train(2, "reference", data, folder / "reference", 15, "--tensor-model-parallel-size", "2")
    return folder


def score(folder, out, world=1, flags=""):
    argv = ["--phase", "score", "--domains", str(folder / "domains.json"), "--save", str(out)]
    run_program(world, [*argv, "--reference-load", str(folder / "reference"), *MODEL, *shlex.split(flags)])


def files(out):
    return {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def proxy(folder, out, *flags, world=1):
    return training_lines(train(world, "proxy", folder / "domains.json", out, STEPS, *flags))


def opened(folder, *flags):
    base = ["--phase", "proxy", "--domains", str(folder / "domains.json"), "--save", "unused"]
    config = parse_config([*base, "--train-iters", str(STEPS), *MODEL, *flags], 1)
    return config, open_data(config, training=True)


def test_a_proxy_on_recorded_losses(folder, tmp_path):
    """Against the online reference: the training losses are those of one gradient under nearly the same weights."""
    score(folder, tmp_path / "scores", world=2, flags="--pipeline-model-parallel-size 2")
    online = proxy(folder, tmp_path / "online", "--reference-load", str(folder / "reference"))
    recorded = ["--reference-losses", str(tmp_path / "scores")]
    for world, name, flags in (
        (1, "single", []),
        (2, "PP2", ["--pipeline-model-parallel-size", "2"]),
        (2, "TP2", ["--tensor-model-parallel-size", "2"]),
        (2, "DP2", ["--zero-stage", "1"]),
    ):
        lines = proxy(folder, tmp_path / name, *recorded, *flags, world=world)
        for ours, theirs in zip(lines, online, strict=True):
            # float16 rounds a loss of 4 nats by .001 at most, to either side; lambda is a mean of 100 or so.
            assert ours["domain_excess"] == pytest.approx(theirs["domain_excess"], abs=1e-3)
            assert ours["domain_weights"] == pytest.approx(theirs["domain_weights"], abs=2e-3)
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    provenance = json.loads((tmp_path / "single" / "domain_weights.json").read_text())["provenance"]
    assert provenance["reference"] == str(tmp_path / "scores")


def test_losses_are_the_references_own(folder, tmp_path):
    """Every recorded number against a plain model on the reference's weights."""
    from model.plain_gpt import token_losses

    from megatron_doremi.config import GPTConfig
    from megatron_doremi.model.weights import WeightsFolder
    from megatron_doremi.training.checkpoint import newest_checkpoint

    score(folder, tmp_path)
    checkpoint = newest_checkpoint(folder / "reference")
    weights = WeightsFolder(checkpoint / "weights")
    whole = {name: weights.whole(name).double() for name in weights.names()}
    gpt = GPTConfig(**json.loads((folder / "reference" / "config.json").read_text())["gpt"])
    _, data = opened(folder, "--reference-load", "r")
    for domain, dataset in enumerate(data.train):
        windows, losses = read_chunk(tmp_path, domain, 0)
        assert windows.tolist() == list(range((dataset.num_tokens - 1) // 16))
        for row in (0, 7, len(windows) - 1):
            ids = torch.from_numpy(dataset.tokens(int(windows[row]) * 16, 17))
            expected = token_losses(whole, gpt, ids[None, :-1], ids[None, 1:])[0]
            assert losses[row] == pytest.approx(expected.numpy(), rel=1e-3, abs=1e-3)


def test_tasks_share_the_work_and_a_killed_run_goes_on(folder, tmp_path):
    score(folder, tmp_path / "whole")
    for shard in (1, 0):
        score(folder, tmp_path / "parts", flags=f"--shard {shard} --num-shards 2")
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    # What is missing is scored again, what is there stays as it is.
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    lost = tmp_path / "killed" / "losses" / "0001" / "000000.safetensors"
    lost.unlink()
    kept = tmp_path / "killed" / "losses" / "0002" / "000000.safetensors"
    before = kept.stat().st_mtime_ns
    score(folder, tmp_path / "killed", world=2, flags="--micro-batch-size 2")
    assert kept.stat().st_mtime_ns == before
    # Another batch shape rounds differently in the last bit of float32, seldom of float16.
    again, first = (read_chunk(tmp_path / name, 1, 0) for name in ("killed", "whole"))
    assert again[0].tolist() == first[0].tolist()
    assert np.abs(again[1].astype(float) - first[1].astype(float)).max() < 5e-3


def test_only_what_a_proxy_reads(folder, tmp_path):
    """With --train-iters fewer windows are scored, and they suffice; for a longer run they do not."""
    score(folder, tmp_path / "few", flags=f"--train-iters {STEPS}")
    config, data = opened(folder, "--reference-losses", str(tmp_path / "few"))
    needed = windows_read(config, data, 1)
    # 20 batches of 8 over 3 domains: 53.3 windows of each and one to spare.
    assert [len(windows) for windows in needed] == [55, 55, 55]
    check_recorded(config, data, 1)
    proxy(folder, tmp_path / "proxy", "--reference-losses", str(tmp_path / "few"))
    config, data = opened(folder, "--reference-losses", str(tmp_path / "few"), "--train-iters", "40")
    with pytest.raises(
        ConfigError, match=r"windows of domain 'domain 0' are missing, the first is window \d+"
    ) as caught:
        check_recorded(config, data, 1)
    assert len(caught.value.faults) == 3
    # Scoring for the longer run adds to what is there.
    score(folder, tmp_path / "few", flags="--train-iters 40")
    check_recorded(config, data, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seq_length": 32}, "seq_length 32"),
        ({"tokenizer_sha256": "f" * 64}, "tokenizer_sha256 ffff"),
        ({"data_fingerprint": "0"}, "data_fingerprint 0"),
        ({"format": "other"}, "format other"),
    ],
)
def test_scores_of_something_else_are_refused(change, words, folder, tmp_path):
    score(folder, tmp_path / "scores", flags="--train-iters 2")
    path = tmp_path / "scores" / "scores.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    config, data = opened(folder, "--reference-losses", str(tmp_path / "scores"))
    with pytest.raises(ConfigError) as caught:
        check_recorded(config, data, 1)
    assert words in str(caught.value)


def test_another_references_scores_are_not_mixed_in(folder, tmp_path):
    score(folder, tmp_path / "scores", flags="--train-iters 2")
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            shutil.copy(path, other)
    train(1, "reference", other / "domains.json", other / "reference", 2)
    with pytest.raises(AssertionError, match="score this data with this reference into a folder of its own"):
        score(other, tmp_path / "scores", flags="--train-iters 2")


def test_chunks(tmp_path):
    """Adding keeps windows in order; a window that is missing and a damaged file are named."""
    one = np.full((2, 3), 1.0, np.float16)
    add_to_chunk(tmp_path, 0, 0, np.array([5, 9]), one)
    add_to_chunk(tmp_path, 0, 0, np.array([2, 7]), 2 * one)
    windows, losses = read_chunk(tmp_path, 0, 0)
    assert windows.tolist() == [2, 5, 7, 9]
    assert losses[:, 0].tolist() == [2, 1, 2, 1]
    assert missing_windows(tmp_path, 0, np.array([2, 3, 9, 5000])).tolist() == [3, 5000]
    recorded = RecordedLosses(tmp_path, ["code"])
    assert recorded.losses(np.array([0, 0]), np.array([9, 2]))[:, 0].tolist() == [1, 2]
    with pytest.raises(ConfigError, match="domain 'code' are missing, the first is window 3"):
        recorded.losses(np.array([0]), np.array([3]))
    path = scores.chunk_path(tmp_path, 0, 0)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ConfigError, match="a file of token losses"):
        read_chunk(tmp_path, 0, 0)
