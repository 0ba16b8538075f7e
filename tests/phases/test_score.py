"""Recorded reference losses equal online ones; scoring is sparse, resumable and split over tasks.

Run alone: python -m pytest tests/phases/test_score.py
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from phases.small import MODEL, full_weights, read_by, train, training_lines, unseal, write_data
from ranks import on_ranks, program, run_program
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_doremi.arguments import parse_config
from megatron_doremi.data.reference_loss_file import LossFile, chunk_path
from megatron_doremi.errors import ConfigError, RunError
from megatron_doremi.parallel.context import ParallelContext
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.phases.inputs import plan_run
from megatron_doremi.phases.run_data import open_data
from megatron_doremi.phases.score import check_reference_losses, open_reference_losses, windows_needed

pytestmark = pytest.mark.slow
STEPS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set and a reference trained at TP 2."""
    folder = tmp_path_factory.mktemp("score")
    data = write_data(folder, tokens=2000)
    train(2, "reference", data, folder / "reference", 15, "--tensor-model-parallel-size", "2")
    return folder


def score_flags(data, reference, out, flags="", model=MODEL):
    argv = ["--phase", "score", "--domains", str(data), "--reference-load", str(reference), "--save", str(out)]
    return [*argv, *read_by("score", model), *shlex.split(flags)]


def score(folder, out, world=1, flags=""):
    run_program(world, score_flags(folder / "domains.json", folder / "reference", out, flags))


def files(out):
    paths = [path for path in sorted(out.rglob("*")) if path.is_file() and path.parent.name != ".lock"]
    return {path.relative_to(out): path.read_bytes() for path in paths}


def proxy(folder, out, *flags, world=1):
    return training_lines(train(world, "proxy", folder / "domains.json", out, STEPS, *flags))


class Quiet:
    """A watchdog that does not watch."""

    def mark(self, doing):
        pass


def check(plan, data):
    """Checks recorded losses as a proxy does before it builds its model."""
    import torch.distributed as dist

    reference_losses = open_reference_losses(plan.config, data)
    check_reference_losses(reference_losses, plan, dist.HashStore(), Quiet())
    return reference_losses


def read_chunk(folder, domain, chunk):
    """Windows of a chunk and their losses."""
    with LossFile.open(folder, domain, chunk, 16) as file:
        windows = file.windows()
        return windows, np.stack([file.losses(int(window)) for window in windows])


def opened(folder, *flags):
    base = ["--phase", "proxy", "--domains", str(folder / "domains.json"), "--save", "unused"]
    config = parse_config([*base, "--train-iters", str(STEPS), *MODEL, *flags], 1)
    data, weights = open_data(config, training=True)
    return plan_run(config, Topology(), data, weights), data


def test_a_proxy_on_recorded_losses(folder, tmp_path):
    """Compared with the online reference: nearly equal domain weights give nearly equal training losses."""
    score(folder, tmp_path / "scores", world=2, flags="--pipeline-model-parallel-size 2")
    online = proxy(folder, tmp_path / "online", "--reference-load", str(folder / "reference"))
    recorded_flags = ["--reference-losses", str(tmp_path / "scores")]
    for world, name, flags in (
        (1, "single", []),
        (2, "PP2", ["--pipeline-model-parallel-size", "2"]),
        (2, "TP2", ["--tensor-model-parallel-size", "2"]),
        (2, "DP2", ["--zero-stage", "1"]),
    ):
        lines = proxy(folder, tmp_path / name, *recorded_flags, *flags, world=world)
        for ours, theirs in zip(lines, online, strict=True):
            # The grid rounds a loss by at most .00024 up or down; lambda is a mean of about 100 losses.
            assert ours["domain_excess"] == pytest.approx(theirs["domain_excess"], abs=1e-4)
            assert ours["domain_weights"] == pytest.approx(theirs["domain_weights"], abs=2e-4)
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
    provenance = json.loads((tmp_path / "single" / "domain_weights.json").read_text())["provenance"]
    assert provenance["reference"] == str(tmp_path / "scores")


def test_losses_are_the_references_own(folder, tmp_path):
    """Compares every recorded loss with a plain model on the reference's weights."""
    from model.plain_gpt import token_losses

    from megatron_doremi.checkpoint.folder import newest_checkpoint
    from megatron_doremi.config import GPTConfig

    score(folder, tmp_path)
    checkpoint = newest_checkpoint(folder / "reference")
    weights = {name: tensor.double() for name, tensor in full_weights(checkpoint).items()}
    gpt = GPTConfig(**json.loads((folder / "reference" / "config.json").read_text())["gpt"])
    _, data = opened(folder, "--reference-load", "r")
    for domain, dataset in enumerate(data.train):
        windows, losses = read_chunk(tmp_path, domain, 0)
        assert windows.tolist() == list(range((dataset.num_tokens - 1) // 16))
        for row in (0, 7, len(windows) - 1):
            ids = torch.from_numpy(dataset.tokens(int(windows[row]) * 16, 17))
            expected = token_losses(weights, gpt, ids[None, :-1], ids[None, 1:])[0]
            assert losses[row] == pytest.approx(expected.numpy(), abs=2**-12 + 1e-5)


def test_tasks_share_the_work_and_a_killed_run_resumes(folder, tmp_path):
    score(folder, tmp_path / "undisturbed")
    for shard in (1, 0):
        score(folder, tmp_path / "parts", flags=f"--shard {shard} --num-shards 2")
    assert files(tmp_path / "parts") == files(tmp_path / "undisturbed")
    # Missing windows are scored again, existing files stay unchanged.
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "killed")
    lost = tmp_path / "killed" / "losses" / "0001" / "000000.safetensors"
    lost.unlink()
    kept = tmp_path / "killed" / "losses" / "0002" / "000000.safetensors"
    before = kept.stat().st_mtime_ns
    score(folder, tmp_path / "killed", world=2, flags="--micro-batch-size 2")
    assert kept.stat().st_mtime_ns == before
    # Another batch shape differs in the last bit of float32, seldom by a step of the grid.
    again, first = (read_chunk(tmp_path / name, 1, 0) for name in ("killed", "undisturbed"))
    assert again[0].tolist() == first[0].tolist()
    assert np.abs(again[1].astype(float) - first[1].astype(float)).max() <= 2**-11


def test_only_what_a_proxy_reads(folder, tmp_path):
    """With --train-iters fewer windows are scored: enough for that run, too few for a longer one."""
    score(folder, tmp_path / "few", flags=f"--train-iters {STEPS}")
    plan, data = opened(folder, "--reference-losses", str(tmp_path / "few"))
    needed = [sum(bits.bit_count() for _, bits in chunks) for chunks in windows_needed(plan)]
    # 20 batches of 8 over 3 domains: 53.3 windows of each, plus a margin of one.
    assert needed == [55, 55, 55]
    check(plan, data)
    proxy(folder, tmp_path / "proxy", "--reference-losses", str(tmp_path / "few"))
    plan, data = opened(folder, "--reference-losses", str(tmp_path / "few"), "--train-iters", "40")
    with pytest.raises(
        ConfigError, match=r"windows of domain 'domain 0' are missing, the first is window \d+"
    ) as caught:
        check(plan, data)
    assert len(caught.value.faults) == 3
    # Scoring for the longer run adds the missing windows.
    score(folder, tmp_path / "few", flags="--train-iters 40")
    check(plan, data)


def test_another_references_scores_are_not_mixed_in(folder, tmp_path):
    score(folder, tmp_path / "scores", flags="--train-iters 2")
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            shutil.copy(path, other)
    train(1, "reference", other / "domains.json", other / "reference", 2)
    with pytest.raises(AssertionError, match="score this data with this reference into a separate folder"):
        score(other, tmp_path / "scores", flags="--train-iters 2")


def test_losses_in_float16_of_version_0_1(tmp_path):
    """A proxy on a folder that version 0.1 wrote logs the same lines as version 0.1."""
    kept = Path(__file__).parent / "version_0_1"
    data = write_data(tmp_path, tokens=600)
    flags = ["--reference-losses", str(kept / "scores")]
    lines = training_lines(
        train(2, "proxy", data, tmp_path / "proxy", 6, *flags, "--pipeline-model-parallel-size", "2")
    )
    expected = json.loads((kept / "proxy.json").read_text())
    assert len(lines) == len(expected) == 6
    for ours, theirs in zip(lines, expected, strict=True):
        for key in ("domain_excess", "domain_weights", "loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-7), key
    # Scoring does not add windows to such a folder.
    copy = tmp_path / "scores"
    shutil.copytree(kept / "scores", copy)
    train(1, "reference", data, tmp_path / "reference", 1)
    with pytest.raises(AssertionError, match=r"format megatron-doremi-scores/1, which is read only"):
        score(tmp_path, copy)


def test_resampling_on_recorded_losses(folder, tmp_path):
    """The mixture changes every step, so losses are read once their windows are known."""
    score(folder, tmp_path / "scores")
    both = ["--doremi-weighting", "resample", "--doremi-step-size", "0.1"]
    with_online = proxy(folder, tmp_path / "online", *both, "--reference-load", str(folder / "reference"))
    layout = ["--pipeline-model-parallel-size", "2", "--micro-batch-size", "4"]
    with_recorded = proxy(
        folder, tmp_path / "r", *both, *layout, "--reference-losses", str(tmp_path / "scores"), world=2
    )
    for ours, theirs in zip(with_recorded, with_online, strict=True):
        assert ours["domain_tokens"] == theirs["domain_tokens"]
        assert ours["domain_excess"] == pytest.approx(theirs["domain_excess"], abs=1e-4)
    assert with_online[0]["domain_tokens"] != with_online[-1]["domain_tokens"]


def test_losses_of_another_precision_are_refused(folder, tmp_path):
    score(folder, tmp_path / "scores", flags="--train-iters 2")
    scores_json = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert scores_json["precision"] == "float32"
    plan, data = opened(folder, "--reference-losses", str(tmp_path / "scores"), "--bf16", "--zero-stage", "1")
    with pytest.raises(ConfigError, match=r"precision float32\n.*precision bfloat16"):
        open_reference_losses(plan.config, data)


def change_weights(run, name, change):
    """Changes parameters of a run's checkpoint in place; file sizes stay the same."""
    unseal(run)
    for path in run.rglob("weights/*.safetensors"):
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in list(file.keys())}
        for key in tensors:
            if name in key:
                change(tensors[key])
        save_file(tensors, path, metadata)


def scored(launch, argv):
    """Scores on this rank; returns its output and its error's text."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            program(launch, argv)
        except (ConfigError, RunError) as error:
            return printed.getvalue() + str(error)
    return printed.getvalue()


def test_a_request_to_stop_hides_no_error():
    """One of two ranks fails while the other is asked to stop."""
    import torch.distributed as dist

    from megatron_doremi.cluster.preemption import SIGNAL
    from megatron_doremi.phases.score import _Replica

    context = ParallelContext(Topology(), None, None, None)
    replica = _Replica(None, None, None, context, Quiet(), dist.HashStore(), None)

    def fails():
        raise OSError(28, "No space left on device", "losses")

    class Asked:
        def reason(self):
            # Between the check of the store and the stop request to the others.
            replica._report_failure(fails)
            return SIGNAL

    replica.poll(Asked())
    with pytest.raises(RunError, match="losses: No space left on device"):
        replica.poll(Asked())


def test_a_reference_that_gives_no_losses_on_a_domain(tmp_path):
    """Every replica reports domain and window, and no loss of the chunk is recorded (version 0.1: NaN and exit 0)."""
    data = write_data(tmp_path, tokens=300, apart=True)
    model = [*MODEL, "--untie-embeddings-and-output-weights"]
    train(1, "reference", data, tmp_path / "reference", 1, model=model)
    # Domain 2 uses the ids from 40.
    change_weights(tmp_path / "reference", "embedding", lambda rows: rows[40:].fill_(float("nan")))
    argv = score_flags(data, tmp_path / "reference", tmp_path / "scores", model=model)
    for words in on_ranks(2, scored, argv):
        assert re.search(r"the reference's loss is nan in window 0 of domain 'domain 2'", words)
    recorded_domains = sorted(path.parent.name for path in (tmp_path / "scores").rglob("*.safetensors"))
    assert recorded_domains == ["0000", "0001"]


def test_a_disk_that_fills_up_while_scoring(folder, tmp_path):
    """One message; the test puts a file in place of a folder of losses."""
    (tmp_path / "losses").mkdir()
    (tmp_path / "losses" / "0001").write_text("")
    with pytest.raises(AssertionError, match="losses/0001"):
        score(folder, tmp_path)


def test_clipped_losses_are_reported(folder, tmp_path):
    """A reference so confident that its largest losses exceed the grid's maximum."""
    shutil.copytree(folder / "reference", tmp_path / "reference")
    change_weights(tmp_path / "reference", "embedding", lambda rows: rows.mul_(60))
    argv = score_flags(folder / "domains.json", tmp_path / "reference", tmp_path / "scores", "--train-iters 2")
    printed = on_ranks(2, scored, argv)
    message = re.search(r"score: ([\d,]+) of 336 token losses were above 31.9995 nats", printed[0])
    assert not printed[1]
    counts = []
    for domain in range(3):
        with LossFile.open(tmp_path / "scores", domain, 0, 16) as file:
            counts.append(file.clipped)
            largest = max(file.losses(int(window)).max() for window in file.windows())
            assert (largest == np.float32(65535 / 2048)) == (file.clipped > 0)
    assert sum(counts) > 0
    assert int(message[1].replace(",", "")) == sum(counts)


def test_a_damaged_file_is_reported_by_every_rank(folder, tmp_path):
    """Only one rank of a replica reads the file; the other one holds the first pipeline stage."""
    score(folder, tmp_path, flags="--train-iters 2")
    path = chunk_path(tmp_path, 1, 0)
    path.write_bytes(path.read_bytes()[:-1])
    flags = "--pipeline-model-parallel-size 2"
    for words in on_ranks(2, scored, score_flags(folder / "domains.json", folder / "reference", tmp_path, flags)):
        assert str(path) in words
        assert "delete it and run --phase score again" in words
