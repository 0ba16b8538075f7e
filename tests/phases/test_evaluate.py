"""Held-out loss is the same at any batch and layout and never NaN; recording it leaves a run's metrics unchanged.

Run alone: python -m pytest tests/phases/test_evaluate.py
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from cluster.test_survival import write_nan
from model.plain_gpt import token_losses
from phases.small import MODEL, evaluation_figures, full_weights, metrics, read_by, train, write_data
from ranks import run_program

from megatron_doremi.checkpoint.folder import newest_checkpoint
from megatron_doremi.checkpoint.run_config import read_run_config
from megatron_doremi.data.indexed_dataset import IndexedDataset
from megatron_doremi.mixture.statistics import DomainStats
from megatron_doremi.phases.evaluation_entries import evaluation_entries, evaluation_table, interval_entries
from megatron_doremi.phases.metrics import evaluation_summary
from megatron_doremi.student_t import student_t_quantile

TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]


def entries_of(loss, targets, text_bytes, documents, shares, names="abc", seq_length=2):
    """Entries and intervals of sums by group, each [k, g]."""
    sums = np.array([loss, targets, text_bytes, documents], dtype=float)
    stats = DomainStats(torch.zeros(len(names)), *torch.from_numpy(sums[:2].sum(axis=2)))
    shares = np.array(shares)
    entries = evaluation_entries(stats, sums, list(names), shares, seq_length)
    return entries | interval_entries(entries, sums, list(names), shares)


def test_entries_by_hand():
    """Two documents in domain a, one in b; c has no held-out text. A window has 2 targets."""
    entry = entries_of(
        loss=[[2, 4], [6, 0], [0, 0]],
        targets=[[2, 2], [2, 0], [0, 0]],
        text_bytes=[[3, 5], [8, 0], [0, 0]],
        documents=[[1, 1], [1, 0], [0, 0]],
        shares=[0.3, 0.1, 0.6],
    )
    a, b = 6 / 8 / math.log(2), 6 / 8 / math.log(2)
    # Of domain c nothing is known: a and b have 3/4 and 1/4 of the rest, with 2 and 4 bytes a token.
    token_mean = 0.75 * 1.5 + 0.25 * 3
    low, high = a - 6.483 * (a - 2 / 3 / math.log(2)), a + 6.483 * (4 / 5 / math.log(2) - a)
    worst = pytest.approx([low, high], rel=1e-4)
    assert entry == {
        "eval": {"a": 1.5, "b": 3.0},
        # A resample is one of the two documents; t over 1.96 is 6.483 for one degree of freedom.
        "eval_interval": {"a": pytest.approx([0.0, 1.5 + 6.483 * 0.5], rel=1e-4), "b": None},
        "eval_uniform_mean": 2.25,
        "eval_uniform_mean_interval": None,
        "eval_worst": 3.0,
        "eval_worst_interval": None,
        "eval_token_mean": pytest.approx(token_mean),
        "eval_token_mean_interval": None,
        "eval_bpb": pytest.approx({"a": a, "b": b}),
        "eval_bpb_interval": {"a": worst, "b": None},
        "eval_bpb_uniform_mean": pytest.approx((a + b) / 2),
        "eval_bpb_uniform_mean_interval": None,
        "eval_bpb_worst": pytest.approx(max(a, b)),
        "eval_bpb_worst_interval": worst,
        "eval_bpb_token_mean": pytest.approx(token_mean / (0.75 * 2 + 0.25 * 4) / math.log(2)),
        "eval_bpb_token_mean_interval": None,
        "eval_windows": {"a": 2, "b": 1},
        "eval_documents": {"a": 2, "b": 1},
    }


def test_equal_documents_leave_no_doubt():
    """Every resample is the same, so each interval is its figure, for means over domains too."""
    ones = np.ones((3, 4))
    entry = entries_of(ones * [[4], [6], [5]], 2 * ones, ones * [[3], [4], [8]], ones, [0.5, 0.25, 0.25])
    for key in ("eval", "eval_bpb"):
        for name, loss in entry[key].items():
            assert entry[f"{key}_interval"][name] == pytest.approx([loss, loss], rel=1e-12)
        for figure in ("uniform_mean", "worst", "token_mean"):
            loss = entry[f"{key}_{figure}"]
            assert entry[f"{key}_{figure}_interval"] == pytest.approx([loss, loss], rel=1e-12)


def test_bits_per_byte_only_where_bytes_are_known():
    """Bytes are unknown in domain b, and the documents of c are empty: means over a alone would mislead."""
    ones = np.ones((3, 4))
    entry = entries_of(5 * ones, 2 * ones, [[3.0] * 4, [math.nan] * 4, [0.0] * 4], ones, [0.5, 0.25, 0.25])
    assert entry["eval_bpb"] == {"a": pytest.approx(5 / 3 / math.log(2))}
    assert entry["eval_bpb_interval"].keys() == {"a"}
    assert not [key for key in entry if key.startswith("eval_bpb_") and key != "eval_bpb_interval"]
    assert entry["eval_uniform_mean_interval"] == [2.5, 2.5]
    none = entries_of(5 * ones, 2 * ones, math.nan * ones, ones, [0.5, 0.25, 0.25])
    assert not [key for key in none if key.startswith("eval_bpb")]
    # Text for people.
    table = [" ".join(line.split()) for line in evaluation_table(entry)]
    assert table == [
        "bits/byte 95 % interval nats/token 95 % interval documents windows",
        "a 2.4045 2.4045 to 2.4045 2.5000 2.5000 to 2.5000 4 4",
        "b n/a n/a 2.5000 2.5000 to 2.5000 4 4",
        "c n/a n/a 2.5000 2.5000 to 2.5000 4 4",
        "uniform mean n/a n/a 2.5000 2.5000 to 2.5000",
        "worst n/a n/a 2.5000 2.5000 to 2.5000",
        "token mean n/a n/a 2.5000 2.5000 to 2.5000",
    ]
    assert "bits" not in evaluation_table(none)[0]
    summary = evaluation_summary({"iteration": 1, **entry})
    assert summary.endswith(
        "held-out nats/token: uniform mean 2.500 +- 0.000, worst 2.500 +- 0.000, token mean 2.500 +- 0.000"
    )


def test_the_summary_is_in_bits_per_byte_and_fits_a_line():
    keys = [f"eval_bpb_{figure}" for figure in ("uniform_mean", "worst", "token_mean")]
    entry = {"iteration": 100_000, **dict.fromkeys(keys, 1.25), **{f"{key}_interval": [1.2, 1.27] for key in keys}}
    text = evaluation_summary(entry)
    assert "bits/byte: uniform mean 1.250 +- 0.035, worst 1.250 +- 0.035, token mean 1.250 +- 0.035" in text
    assert len(text) <= 120
    without = evaluation_summary({**entry, "eval_bpb_token_mean_interval": None})
    assert without.endswith("token mean 1.250 (one document)")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data set with 37, 37 and 5 held-out windows by domain, and a run on it."""
    data = write_data(tmp_path_factory.mktemp("data"), tokens=1500)
    manifest = json.loads(data.read_text())
    short = write_data(tmp_path_factory.mktemp("short"), tokens=1500, held_out=90)
    manifest["domains"][2]["valid"] = json.loads(short.read_text())["domains"][2]["valid"]
    manifest["domains"][2]["valid"] = str(short.parent / "domain2_valid")
    data.write_text(json.dumps(manifest))
    save = tmp_path_factory.mktemp("run")
    train(2, "main", data, save, 6, *TP2)
    return data, save


def evaluate(world, data, load, save, *flags):
    argv = ["--phase", "evaluate", "--domains", str(data), "--load", str(load), "--save", str(save)]
    run_program(world, [*argv, *read_by("evaluate", MODEL), *flags])
    return [json.loads(line) for line in (save / "evaluations.jsonl").read_text().splitlines()]


def by_document(data, save, lines):
    """Sums of losses, targets and bytes of each document, [k, 7] each, by the plain model and a walk over the tokens.

    Args:
        lines: maximum number of windows of each domain, spread evenly; None: all.
    """
    manifest = json.loads(data.read_text())
    weights = {name: tensor.double() for name, tensor in full_weights(newest_checkpoint(save)).items()}
    gpt = read_run_config(save, "--load").gpt
    sums = np.zeros((3, len(manifest["domains"]), 7))
    for number, domain in enumerate(manifest["domains"]):
        dataset = IndexedDataset(data.parent / domain["valid"])
        ids = torch.from_numpy(dataset.tokens(0, dataset.num_tokens))
        sizes = np.fromfile(f"{dataset.prefix}.bytes", "<u4")
        owner = [n for n in range(7) for _ in range(len(dataset.document(n)))]
        count = (len(ids) - 1) // 16
        taken = min(lines or count, count)
        for window in [n * count // taken for n in range(taken)]:
            first = 16 * window
            losses = token_losses(weights, gpt, ids[None, first : first + 16], ids[None, first + 1 : first + 17])[0]
            for place, loss in enumerate(losses.tolist()):
                document = owner[first + 1 + place]
                sums[:, number, document] += loss, 1, sizes[document] / len(dataset.document(document))
    return sums


@pytest.mark.slow
@pytest.mark.parametrize("limit", [[], ["--eval-iters", "2"]], ids=["all windows", "16 of each domain"])
def test_against_the_plain_model_by_document(trained, tmp_path, limit):
    """Losses, bits per byte and means; intervals against the analytic standard errors of seven documents."""
    data, save = trained
    line = evaluate(1, data, save, tmp_path, *limit)[-1]
    loss, targets, text_bytes = by_document(data, save, 16 if limit else None)
    names, shares = list(line["eval"]), np.array([1 / 6, 2 / 6, 3 / 6])
    assert list(line["eval_documents"].values()) == (targets > 0).sum(axis=1).tolist()
    assert list(line["eval_windows"].values()) == (targets.sum(axis=1) / 16).tolist()
    nats = loss.sum(axis=1) / targets.sum(axis=1)
    bytes_a_token = text_bytes.sum(axis=1) / targets.sum(axis=1)
    bits = nats / bytes_a_token / math.log(2)
    token_means = {"eval": shares @ nats, "eval_bpb": shares @ nats / (shares @ bytes_a_token) / math.log(2)}
    for key, losses, units in (("eval", nats, targets), ("eval_bpb", bits, text_bytes * math.log(2))):
        assert line[key] == pytest.approx(dict(zip(names, losses, strict=True)), rel=2e-6)
        assert line[f"{key}_uniform_mean"] == pytest.approx(losses.mean(), rel=2e-6)
        assert line[f"{key}_worst"] == pytest.approx(losses.max(), rel=2e-6)
        assert line[f"{key}_token_mean"] == pytest.approx(token_means[key], rel=2e-6)
        residuals = loss - losses[:, None] * units
        n = (targets > 0).sum(axis=1)
        errors = np.sqrt(n / (n - 1) * (residuals**2).sum(axis=1)) / units.sum(axis=1)
        intervals = np.array(list(line[f"{key}_interval"].values()))
        t = [student_t_quantile(each) for each in (n - 1).tolist()]
        assert (intervals[:, 1] - intervals[:, 0]) / (2 * np.array(t) * errors) == pytest.approx(1, abs=0.25)
        assert line[f"{key}_worst_interval"] == intervals[losses.argmax()].tolist()
        low, high = line[f"{key}_uniform_mean_interval"]
        degrees = int((errors**2).sum() ** 2 / (errors**4 / (n - 1)).sum())
        error = np.sqrt((errors**2).sum()) / 3
        assert (high - low) / (2 * student_t_quantile(degrees) * error) == pytest.approx(1, abs=0.25)
        low, high = line[f"{key}_token_mean_interval"]
        assert low < line[f"{key}_token_mean"] < high


@pytest.mark.slow
def test_the_same_at_any_batch_and_layout(trained, tmp_path):
    """At the defaults, with weights of another layout; the results differ only by rounding."""
    data, save = trained
    in_training = metrics(save)[-1]
    assert in_training["eval_windows"] == {"domain 0": 37, "domain 1": 37, "domain 2": 5}
    assert len(evaluation_figures(in_training)) == 2 * (3 + 6 + 3 * 3) + 6
    for world, flags in (
        (1, ["--micro-batch-size", "1"]),
        (2, [*PP2, "--micro-batch-size", "3"]),
        (2, ["--micro-batch-size", "1"]),
        (4, [*TP2, *PP2, "--micro-batch-size", "4"]),
    ):
        line = evaluate(world, data, save, tmp_path, *flags)[-1]
        assert line["iteration"] == 6
        assert evaluation_figures(line) == pytest.approx(evaluation_figures(in_training), rel=1e-6)
        assert line["eval_worst"] == max(line["eval"].values())
        assert line["eval_uniform_mean"] == pytest.approx(np.mean(list(line["eval"].values())), rel=1e-12)


@pytest.mark.slow
def test_fewer_windows_are_the_same_at_any_batch_and_layout_too(trained, tmp_path):
    """--eval-iters counts batches of the evaluated run (8 windows), not of the evaluation's layout."""
    data, save = trained
    lines = []
    for world, size in ((1, "1"), (1, "2"), (2, "4")):
        flags = ["--eval-iters", "2", "--micro-batch-size", size]
        lines.append(evaluate(world, data, save, tmp_path / size, *flags)[-1])
    for line in lines:
        assert line["eval_windows"] == {"domain 0": 16, "domain 1": 16, "domain 2": 5}
        assert evaluation_figures(line) == pytest.approx(evaluation_figures(lines[0]), rel=1e-6)


@pytest.mark.slow
def test_a_pair_without_bytes_has_nats_only(trained, tmp_path):
    """As version 0.1 and Megatron-LM write them; one line says it."""
    data, save = trained
    manifest = json.loads(data.read_text())
    for domain in manifest["domains"]:
        for split in ("train", "valid"):
            domain[split] = str(data.parent / domain[split])
    prefix = manifest["domains"][1]["valid"]
    for suffix in (".bin", ".idx"):
        (tmp_path / f"bare{suffix}").symlink_to(prefix + suffix)
    manifest["domains"][1]["valid"] = manifest["domains"][1]["train"] = str(tmp_path / "bare")
    other = tmp_path / "domains.json"
    other.write_text(json.dumps({**manifest, "tokenizer": {**manifest["tokenizer"], "file": "tokenizer.model"}}))
    (tmp_path / "tokenizer.model").write_text("")
    line = evaluate(1, other, save, tmp_path)[-1]
    assert line["eval"].keys() == {"domain 0", "domain 1", "domain 2"}
    assert line["eval_bpb"].keys() == line["eval_bpb_interval"].keys() == {"domain 0", "domain 2"}
    assert "eval_bpb_uniform_mean" not in line
    before = metrics(save)[-1]
    assert line["eval_interval"] == {name: pytest.approx(ends) for name, ends in before["eval_interval"].items()}


@pytest.mark.slow
def test_evaluations_of_several_runs_stand_side_by_side(trained, tmp_path):
    """Evaluates into the folder of a run that may still train, and two runs into one folder."""
    data, save = trained
    before = {path: path.read_bytes() for path in save.rglob("*") if path.is_file()}
    other = tmp_path / "other"
    train(1, "main", data, other, 2)
    (save / "evaluations.jsonl").write_bytes(b'{"torn": ')
    evaluate_lines = ["run", "of_this_folder", "checkpoint", "iteration"]
    for load in (save, other):
        argv = ["--phase", "evaluate", "--domains", str(data), "--load", str(load), "--save", str(save)]
        run_program(1, [*argv, *read_by("evaluate", MODEL)])
    torn, *lines = (save / "evaluations.jsonl").read_text().splitlines()
    assert torn == '{"torn": '
    assert [[json.loads(line)[key] for key in evaluate_lines] for line in lines] == [
        [str(save), True, "iter_0000006", 6],
        [str(other), False, "iter_0000002", 2],
    ]
    (save / "evaluations.jsonl").unlink()
    assert before == {path: path.read_bytes() for path in save.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_model_with_nan_is_not_recorded(tmp_path):
    data = write_data(tmp_path, tokens=1500, apart=True)
    save, out = tmp_path / "run", tmp_path / "out"
    train(1, "main", data, save, 2, "--untie-embeddings-and-output-weights")
    write_nan(save, row=25)
    with pytest.raises(
        AssertionError,
        match=r"NonFinite: the held-out loss of \S+iter_0000002 is NaN or Inf in "
        r"'domain 1' \(windows \d+(, \d+)*(, \.\.\.)?\)\n",
    ):
        evaluate(2, data, save, out)
    assert (out / "evaluations.jsonl").read_bytes() == b""
