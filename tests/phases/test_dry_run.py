"""--dry-run prints the resolved run (checked by hand), and plans a chain before its first stage has run.

Run alone: python -m pytest tests/phases/test_dry_run.py
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from phases.small import MODEL, read_by
from ranks import unwrapped

from megatron_doremi.arguments import parse_config
from megatron_doremi.data.reference_losses import ReferenceLossFolder
from megatron_doremi.errors import ConfigError
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.phases.inputs import open_inputs, plan_text
from megatron_doremi.phases.run_data import open_data
from megatron_doremi.phases.score import data_fingerprint
from megatron_doremi.planning.compute import checkpoint_bytes

ROOT = Path(__file__).resolve().parents[2]
SHAPE = MODEL[: MODEL.index("--seq-length")]
# Parameters of MODEL: the table (61 rows, padded to 64), 2 blocks, the last norm.
BLOCK = (4 + 2 * 2) * 8 * 32 + 32 * 32 + 3 * 32 * 64 + 2 * 32
PARAMETERS = 64 * 32 + 2 * BLOCK + 32


def dry_run(data: Path, phase: str, *flags: str, world_size: int = 1) -> tuple[dict, list[str]]:
    """The printed settings, and the lines after them."""
    steps = [] if phase == "evaluate" else ["--train-iters", "7"]
    argv = ["--phase", phase, "--domains", str(data), *steps, *read_by(phase, MODEL), *flags, "--dry-run"]
    inputs = open_inputs(parse_config(argv, world_size), Topology(data_size=world_size))
    settings, _, rest = plan_text(inputs).partition("\nlayout: ")
    return json.loads(settings), unwrapped(rest).splitlines()


def rows(lines: list[str]) -> list[list[str]]:
    """The cells of the domains' rows without the names."""
    return [line.split()[2:] for line in lines if re.match(r"  domain \d", line)]


def test_it_prints_and_writes_nothing(data, tmp_path):
    flags = ["--phase", "main", "--domains", str(data), "--train-iters", "7", *MODEL, "--dry-run"]
    command = [sys.executable, str(ROOT / "pretrain_doremi.py"), *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{\n")
    vocabulary = "vocabulary 61 tokens, padded to 64"
    assert f"parameters: {PARAMETERS:,} ({vocabulary}), at most {PARAMETERS:,} per rank" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_main_run(data):
    """7 steps of 8 windows on streams of 93, 187 and 281 windows."""
    settings, lines = dry_run(data, "main", "--domain-weights", "uniform", "--bf16", "--zero-stage", "1", world_size=2)
    assert settings["model"]["ffn_hidden_size"] == 64
    assert settings["model"]["kv_channels"] == 8
    assert settings["data"]["global_batch_size"] == 8
    # 0.06 of 7 steps, rounded.
    assert settings["optimizer"]["lr_warmup_iters"] == 0
    assert "doremi" not in settings
    assert lines[0] == "tensor 1 x pipeline 1 x data 2 = 2 ranks, ZeRO 1"
    assert "precision: bfloat16 weights and activations, float32 gradients and master weights" in lines
    step = "a step: 8 windows = 128 tokens in 2 micro-batches per rank, each [2, 16]"
    assert f"{step}; the run: 7 steps = 896 tokens" in lines
    assert "mixture: static; sampling weights: uniform" in lines
    epochs = [f"{56 / 3 / windows:.2f}" for windows in (93, 187, 281)]
    assert rows(lines) == [[str(n), "0.3333", e, "12"] for n, e in zip((93, 187, 281), epochs, strict=True)]


def test_the_held_out_windows_are_those_that_an_evaluation_reads(data, reference):
    """--eval-iters counts batches of 8 windows, in an evaluation those of the run that it loads."""
    limit = ["--eval-iters", "1"]
    assert [row[-1] for row in rows(dry_run(data, "main", *limit)[1])] == ["8"] * 3
    assert [row[-1] for row in rows(dry_run(data, "evaluate", "--load", reference[1], *limit)[1])] == ["8"] * 3
    assert [row[-1] for row in rows(dry_run(data, "evaluate", "--load", reference[1])[1])] == ["12"] * 3


def test_a_task_of_an_array_shows_its_share(data, reference):
    """A proxy's 56 windows need at most 20 of each of three domains."""
    _, lines = dry_run(data, "score", *reference, "--domain-weights", "uniform", "--shard", "1", "--num-shards", "4")
    assert "at most 60; task 1 of 4: about 15 of them" in " ".join(" ".join(lines).split())


def test_the_reference_counts(data):
    """A proxy holds an online reference's weights in addition to its state, here at 4 bytes per parameter."""
    flags = ["--reference-load", "to-come", "--model-size", "8b", "--seq-length", "16"]
    argv = ["--phase", "proxy", "--domains", str(data), "--train-iters", "7", *flags, "--dry-run"]
    text = plan_text(open_inputs(parse_config(argv, 1), Topology()))
    count = int(text.partition("parameters: ")[2].split()[0].replace(",", ""))
    assert f", {4 * count / 2**30:.2f} GiB of the reference's weights" in " ".join(text.split())


def test_a_checkpoint_has_the_planned_size(data, reference):
    """Weights and two moments in float32, beside headers of some kilobytes."""
    folder = max((Path(reference[1]) / "checkpoints").glob("iter_*"))
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    argv = ["--phase", "main", "--domains", str(data), "--train-iters", "7", *MODEL, "--dry-run"]
    plan = open_inputs(parse_config(argv, 1), Topology()).plan
    assert 12 * PARAMETERS == checkpoint_bytes(plan, PARAMETERS) < size < 1.1 * checkpoint_bytes(plan, PARAMETERS)


def test_a_shard_of_zero_3(data):
    """Matrices are divided, the norms' vectors are not."""
    _, lines = dry_run(data, "main", "--zero-stage", "3", world_size=4)
    vectors = 5 * 32
    shard = (PARAMETERS - vectors) // 4 + vectors
    assert any(line.endswith(f"at most {shard:,} per rank, sharded by ZeRO 3") for line in lines)


def test_only_a_file_of_weights_can_be_to_come(data, tmp_path):
    """A path that is misspelled is named; text that is no path is a fault."""
    (tmp_path / "proxy").mkdir()
    (tmp_path / "proxy" / "domain_weights.json").write_text("{}")
    argv = ["--phase", "main", "--domains", str(data), "--train-iters", "7", *SHAPE, "--seq-length", "16", "--dry-run"]

    def opened(weights):
        return open_inputs(parse_config([*argv, "--domain-weights", weights], 1), Topology())

    to_come = opened(f"{tmp_path}/prxy/domain_weights.json").to_come
    assert f"(did you mean {tmp_path}/proxy/domain_weights.json?)" in to_come["--domain-weights"]
    for weights in ("web 0.5, code 0.5", f"{tmp_path}/prxy/domain_weights"):
        with pytest.raises(ConfigError, match=r"weights as in A=0\.5,B=0\.5"):
            opened(weights)


def test_a_chain_is_planned_as_it_will_run(data, reference, tmp_path):
    """The stand-in for an input gives the same plan as the input does once it exists."""
    run, weights, trained = tmp_path / "run", tmp_path / "weights.json", Path(reference[1])
    load = ["--reference-load", str(run)]
    stages = [
        ("score", [*load, *SHAPE]),
        ("proxy", load),
        ("main", ["--domain-weights", str(weights)]),
        ("evaluate", ["--load", str(run), *SHAPE]),
    ]
    before = [dry_run(data, phase, *flags) for phase, flags in stages]
    shutil.copytree(trained, run)
    weights.write_text(json.dumps(dict.fromkeys(("domain 0", "domain 1", "domain 2"), 1.0)))
    after = [dry_run(data, phase, *flags) for phase, flags in stages]
    for (settings, lines), now in zip(before, after, strict=True):
        assert "does not exist yet: " in lines[-1]
        assert (settings, lines[:-1]) == now
    # Each domain supplies 18.7 of 56 windows, plus a margin of one.
    assert [row[-1] for row in rows(after[0][1])] == ["20", "20", "20"]


def test_what_exists_is_checked(data, reference, tmp_path):
    with pytest.raises(ConfigError, match=r"model flags: num_layers 3\n.*num_layers 2"):
        dry_run(data, "score", *reference, *SHAPE, "--num-layers", "3")
    with pytest.raises(ConfigError, match="train it first, or give its model flags"):
        dry_run(data, "score", "--reference-load", str(tmp_path / "none"))
    flags = ["--reference-load", str(tmp_path / "none"), *SHAPE, "--tensor-model-parallel-size", "3"]
    with pytest.raises(ConfigError, match="multiple of --tensor-model-parallel-size 3"):
        dry_run(data, "score", *flags, world_size=3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json"):
        dry_run(data, "proxy", "--reference-load", str(tmp_path / "empty"))
    cap = ["--max-epochs-per-domain", "0.1", "--domain-weights", str(tmp_path / "weights.json")]
    assert "no cap on epochs is checked" in dry_run(data, "main", *cap)[1][-1]
    (tmp_path / "weights.json").write_text(json.dumps(dict.fromkeys(("domain 0", "domain 1", "domain 2"), 1.0)))
    with pytest.raises(ConfigError, match=r"0\.20 epochs: 19 of 93 windows"):
        dry_run(data, "main", *cap)


@pytest.mark.parametrize(
    ("phase", "flags", "rule"),
    [
        ("main", "--domain-weights unifrom", "did you mean uniform?"),
        ("main", "--domain-weights temperatur:2", "did you mean temperature:T, for example temperature:3?"),
        ("proxy", "--reference-losses onlin", "scores.json"),
        ("proxy", "--reference-losses", "--reference-losses: empty"),
        ("proxy", "--doremi-objective hardest --reference-losses losses", "hardest reads no reference"),
        ("score", "--reference-load r --global-batch-size 0", "--global-batch-size: not given"),
    ],
)
def test_a_mistake_is_no_file_to_come(phase, flags, rule, data):
    words = flags.split()
    with pytest.raises(ConfigError) as caught:
        dry_run(data, phase, *words, *([""] if len(words) % 2 else []))
    assert rule in str(caught.value)


def test_recorded_losses_are_checked(data, tmp_path):
    """What a proxy finds after joining, its dry run finds too: here no window is recorded."""
    argv = ["--phase", "proxy", "--domains", str(data), "--train-iters", "7", *MODEL, "--save", "s"]
    config = parse_config([*argv, "--reference-losses", str(tmp_path / "losses")], 1)
    fingerprint = data_fingerprint(config, open_data(config, training=True)[0])
    ReferenceLossFolder(tmp_path / "losses", {**fingerprint, "reference": "0" * 64, "reference_iteration": 2})
    with pytest.raises(ConfigError, match="20 windows"):
        dry_run(data, "proxy", "--reference-losses", str(tmp_path / "losses"))


def test_a_run_has_no_stand_ins(data, tmp_path):
    argv = ["--phase", "main", "--domains", str(data), "--train-iters", "7", *MODEL, "--save", str(tmp_path / "s")]
    with pytest.raises(ConfigError, match=r"weights\.json"):
        open_inputs(parse_config([*argv, "--domain-weights", str(tmp_path / "weights.json")], 1), Topology())
