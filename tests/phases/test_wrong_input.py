"""Wrong files and mismatches: exit code 2, one message, no traceback, nothing written.

Run alone: python -m pytest tests/phases/test_wrong_input.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from phases.small import MODEL, read_by, train, unseal, write_data
from ranks import unwrapped

from megatron_doremi.arguments import parse_config
from megatron_doremi.errors import ConfigError
from megatron_doremi.phases.run_data import open_data
from megatron_doremi.phases.trained_run import read_reference

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return write_data(folder, tokens=300)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A reference run and its training data."""
    folder = tmp_path_factory.mktemp("reference")
    data = write_data(folder, tokens=300)
    train(1, "reference", data, folder / "run", 2)
    return folder


def open_with(data: Path, *extra: str, phase: str = "main", world_size: int = 1):
    base = ["--phase", phase, "--domains", str(data), "--save", "unused", "--train-iters", "5"]
    config = parse_config([*read_by(phase, [*base, *MODEL]), *extra], world_size)
    return (config, *open_data(config, training=phase != "evaluate"))


def edit(path: Path, change) -> None:
    entry = json.loads(path.read_text())
    change(entry)
    path.write_text(json.dumps(entry))


def truncate(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def weights_file(data: Path, weights: dict, **entries) -> list[str]:
    path = data.parent / "weights.json"
    path.write_text(json.dumps({"weights": weights, **entries} if entries else weights))
    return ["--domain-weights", str(path)]


THIRD = {"domain 0": 0.2, "domain 1": 0.3, "domain 2": 0.5}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: truncate(d.parent / "domain1_train.bin", 4), "domain1_train.bin"),
        (lambda d: truncate(d.parent / "domain1_train.idx", 4), "domain1_train.idx"),
        (lambda d: (d.parent / "domain1_train.idx").write_bytes(b"no index at all"), "starts with MMIDIDX"),
        (lambda d: (d.parent / "domain2_valid.bin").unlink(), "no such file"),
        (lambda d: d.unlink(), "no such file"),
        (lambda d: d.write_text("{"), "one JSON object"),
        (lambda d: edit(d, lambda e: e.update(format="other/1")), "megatron-doremi-domains/1"),
        (lambda d: edit(d, lambda e: e["domains"][1].update(name="domain 0")), "unique names"),
        (lambda d: edit(d, lambda e: e.update(domains=[])), "at least 1 item"),
        (lambda d: edit(d, lambda e: e.update(tokenizer=None)), "names no tokenizer"),
        (lambda d: edit(d, lambda e: e["tokenizer"].update(eod=99)), "below vocab_size"),
    ],
)
def test_damaged_data(damage, words, data):
    damage(data)
    with pytest.raises(ConfigError) as caught:
        open_with(data)
    assert words in str(caught.value)


def test_short_and_empty_domains_are_named_together(data):
    from megatron_doremi.data.indexed_dataset import IndexedDatasetWriter, dtype_for

    for name, tokens in (("domain0_train", [1] * 16), ("domain2_train", [])):
        with IndexedDatasetWriter(data.parent / name, dtype_for(61)) as writer:
            writer.add_document(tokens)
    with pytest.raises(ConfigError) as caught:
        open_with(data)
    text = str(caught.value)
    assert "domain 'domain 0'" in text
    assert "has 16 tokens" in text
    assert "domain 'domain 2'" in text
    assert "is empty" in text
    assert "--seq-length + 1 = 17 tokens" in text


def test_short_held_out_text_is_left_out_of_evaluation_and_never_blocks_training(data, capsys):
    from megatron_doremi.data.indexed_dataset import IndexedDatasetWriter, dtype_for
    from megatron_doremi.data.manifest import print_warnings

    for name, tokens in (("domain0_valid", [1] * 16), ("domain2_valid", [])):
        with IndexedDatasetWriter(data.parent / name, dtype_for(61)) as writer:
            writer.add_document(tokens)
    for phase, flags in (("main", []), ("evaluate", ["--load", "r"])):
        _, opened, _ = open_with(data, *flags, phase=phase)
        assert [dataset is None for dataset in opened.valid] == [True, False, True]
    print_warnings(opened.manifest)
    stderr = unwrapped(capsys.readouterr().err)
    assert stderr.count("warning: ") == 2
    assert "domain 'domain 0'" in stderr
    assert "has 16 tokens" in stderr
    with IndexedDatasetWriter(data.parent / "domain1_valid", dtype_for(61)) as writer:
        writer.add_document([1])
    open_with(data)
    with pytest.raises(ConfigError, match="no held-out text that fills a window"):
        open_with(data, "--load", "r", phase="evaluate")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (lambda d: ["--domain-weights", "nowhere.json"], "no such file"),
        (lambda d: weights_file(d, {"domain 0": 1.0}), "missing: 'domain 1', 'domain 2'"),
        (lambda d: weights_file(d, {**THIRD, "Books": 1.0}), "unknown: 'Books'"),
        (lambda d: weights_file(d, {**THIRD, "domain 0": -0.1}), "greater than or equal to 0"),
        (lambda d: weights_file(d, {**THIRD, "domain 0": "much"}), "a valid number"),
        (
            lambda d: weights_file(d, THIRD, format="megatron-doremi-weights/1", tokenizer_sha256="f" * 64),
            "learned with tokenizer ffffffffffff",
        ),
        (lambda d: weights_file(d, THIRD, format="other", tokenizer_sha256="0" * 64), "megatron-doremi-weights/1"),
    ],
)
def test_wrong_weights(flags, words, data):
    with pytest.raises(ConfigError) as caught:
        open_with(data, *flags(data))
    assert words in str(caught.value)


def test_a_megatron_list(data):
    """Weights and prefixes in one text in Megatron-LM's format; a flag gives the vocabulary's size."""
    listed = data.parent / "blend.txt"
    listed.write_text("3 domain0_train 1 domain2_train")
    with pytest.raises(ConfigError, match="--vocab-size"):
        open_with(listed)
    _, opened, weights = open_with(listed, "--vocab-size", "61")
    assert opened.names == ("domain0_train", "domain2_train")
    assert weights.tolist() == [0.75, 0.25]
    assert opened.manifest.natural_weights().tolist() == pytest.approx([300 / 1200, 900 / 1200])
    _, _, weights = open_with(listed, "--vocab-size", "61", "--reference-load", "r", phase="proxy")
    assert weights.tolist() == [0.5, 0.5]
    with pytest.raises(ConfigError, match="weight prefix"):
        open_with(data, "--domain-weights", "given")


def test_a_folder_that_holds_a_run_is_not_overwritten(reference):
    with pytest.raises(ConfigError, match="to resume it"):
        open_with(reference / "domains.json", "--save", str(reference / "run"))


def test_another_tokenizers_weights_are_accepted_by_flag(data):
    flags = weights_file(data, THIRD, format="megatron-doremi-weights/1", tokenizer_sha256="f" * 64)
    _, _, weights = open_with(data, *flags, "--allow-tokenizer-mismatch")
    assert weights.tolist() == pytest.approx([0.2, 0.3, 0.5])


def reference_faults(folder: Path, data: Path, *extra: str, world_size: int = 1) -> str:
    flags = ["--reference-load", str(folder / "run"), *extra]
    config, opened, _ = open_with(data, *flags, phase="proxy", world_size=world_size)
    with pytest.raises(ConfigError) as caught:
        read_reference(config, opened)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e.update(tokenizer_sha256="1" * 64), "losses of other tokens cannot be compared"),
        (lambda e: e.update(domains=["domain 1", "domain 0", "domain 2"]), "in its order"),
        (lambda e: e.pop("gpt"), "gpt is missing"),
        (lambda e: e["gpt"].pop("hidden_size"), "gpt.hidden_size is missing"),
        (lambda e: e["gpt"].pop("swiglu"), "as in its checkpoint: swiglu True"),
        (
            lambda e: e["gpt"].update(position_embedding_type="learned_absolute", max_positions=8),
            "learned positions up to 8",
        ),
    ],
)
def test_a_reference_that_does_not_fit(change, words, reference, tmp_path):
    shutil.copytree(reference, tmp_path / "copy")
    edit(tmp_path / "copy" / "run" / "config.json", change)
    assert words in reference_faults(tmp_path / "copy", reference / "domains.json")


def test_a_reference_of_before_a_field_existed(reference, tmp_path):
    """config.json and state.json have no field `normalization`; its default is what was trained."""
    shutil.copytree(reference, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    edit(run / "config.json", lambda e: e["gpt"].pop("normalization"))
    (state,) = run.rglob("state.json")
    edit(state, lambda e: e["identity"]["gpt"].pop("normalization"))
    unseal(run)
    config, opened, _ = open_with(reference / "domains.json", "--reference-load", str(run), phase="proxy")
    assert read_reference(config, opened).gpt.normalization == "RMSNorm"


def test_a_reference_that_is_none(reference, tmp_path):
    data = reference / "domains.json"
    assert "no such folder" in reference_faults(tmp_path, data)
    shutil.copytree(reference, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "run" / "checkpoints")
    assert "no complete checkpoint" in reference_faults(tmp_path / "copy", data)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (["--pipeline-model-parallel-size", "4"], ["num_layers 2", "at least --pipeline-model-parallel-size 4"]),
        (["--tensor-model-parallel-size", "4"], ["num_query_groups 2", "multiple of --tensor-model-parallel-size 4"]),
    ],
)
def test_a_reference_that_the_layout_cannot_shard(layout, words, reference):
    larger = ["--num-layers", "4", "--num-query-groups", "4"]
    faults = reference_faults(reference, reference / "domains.json", *larger, *layout, world_size=4)
    assert all(word in faults for word in words)


def run(*argv: str, launcher: list[str] | None = None) -> subprocess.CompletedProcess:
    command = [*(launcher or [sys.executable]), "pretrain_doremi.py", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_program_reports_faults_once_and_exits_with_2(data, tmp_path):
    truncate(data.parent / "domain0_train.bin", 2)
    (data.parent / "domain1_train.idx").write_bytes(b"?")
    save = tmp_path / "save"
    done = run("--phase", "main", "--domains", str(data), "--save", str(save), "--train-iters", "5", *MODEL)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: 2 faults in the input:")
    assert not save.exists()


def test_a_wrong_flag_is_reported_without_importing_torch(data):
    done = run("--phase", "main", "--lr", "quick")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "--lr: quick" in done.stderr
    modules = "import sys, pretrain_doremi; print('torch' in sys.modules)"
    imported = subprocess.run([sys.executable, "-c", modules], cwd=ROOT, capture_output=True, text=True, check=True)
    assert imported.stdout.strip() == "False"


def test_with_processes_of_its_own_the_program_reports_faults_once_and_exits_with_2(data, tmp_path):
    """A fault of the flags before any process starts, one of a file by rank 0 for both."""
    flags = ["--phase", "main", "--domains", str(data), "--save", str(tmp_path / "s"), "--train-iters", "5", *MODEL]
    done = run(*flags, "--nproc-per-node", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: 1 fault in the input:\n  [1] --global-batch-size: 8" in done.stderr
    truncate(data.parent / "domain0_train.bin", 2)
    done = run(*flags, "--nproc-per-node", "2")
    assert done.returncode == 2
    assert done.stderr.startswith("error: 1 fault in the input:")
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "s").exists()


def test_faults_of_the_launch_and_of_the_flags_are_one_message(data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    done = run("--phase", "main", "--lr", "quick")
    assert done.returncode == 2
    assert "[1] WORLD_SIZE: 4 without RANK" in done.stderr
    assert "[2] --lr: quick" in done.stderr
    monkeypatch.setenv("RANK", "0")
    assert "[1] MASTER_ADDR: not set" in run("--phase", "main", "--lr", "quick").stderr
    flags = ["--phase", "main", "--domains", str(data), "--train-iters", "5", *MODEL]
    assert "= 4 ranks" in run(*flags, "--dry-run").stdout
    assert "= 2 ranks" in run(*flags, "--dry-run", "--dry-run-world-size", "2").stdout
    assert "--dry-run-world-size: has no effect" in run(*flags, "--dry-run-world-size", "2").stderr


def test_under_a_launcher_one_rank_reports(data, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = ["--phase", "main", "--domains", str(data), "--save", str(tmp_path / "s"), "--train-iters", "5", *MODEL]
    done = run(*flags, "--tensor-model-parallel-size", "3", launcher=torchrun)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "s").exists()
