"""A run's identity is compared between ranks and with the checkpoint; changes are refused or recorded.

Run alone: python -m pytest tests/phases/test_identity.py
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil

import pytest
from phases.small import MODEL, metrics, train, training_lines, unseal, write_data
from ranks import on_ranks, program

from megatron_doremi.config import OptimizerConfig
from megatron_doremi.engine.optimizer import make_learning_rate
from megatron_doremi.phases.identity import differences, for_message, identity_hash, override_faults

pytestmark = pytest.mark.slow


def started_differently(launch, odd, argv, extra):
    """Runs the program on one rank, with extra arguments on the ranks in `odd`; returns its error's text."""
    from megatron_doremi.errors import ConfigError

    try:
        program(launch, argv + (extra if launch.rank in odd else []))
    except ConfigError as error:
        return str(error)
    return "trained"


def with_messages(launch, argv):
    """Runs the program on one rank; returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        program(launch, argv)
    return printed.getvalue()


def resume(data, save, iters, *extra):
    """Resumes a main run; returns its metrics and what it printed."""
    argv = ["--phase", "main", "--domains", str(data), "--save", str(save), "--load", str(save), "--train-iters"]
    (printed,) = on_ranks(1, with_messages, [*argv, str(iters), *MODEL, "--log-interval", "1", *extra])
    return training_lines(metrics(save)), printed


@pytest.fixture(scope="module")
def copy_of_the_data(data, tmp_path_factory):
    """The same data set except for one token in the middle of a domain, like a stale file on one node."""
    folder = tmp_path_factory.mktemp("stale") / "data"
    shutil.copytree(data.parent, folder)
    path = folder / "domain1_train.bin"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(bytes(content))
    return folder / "domains.json"


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        (["--seed", "12"], "--seed 12"),
        (["--lr", "4e-3"], "--lr 0.004"),
        (["--clip-grad", "2"], "--clip-grad 2.0"),
        (["--domain-weights", "uniform"], "--domain-weights uniform"),
        (["--log-interval", "7"], "--log-interval 7"),
    ],
)
def test_ranks_that_start_differently_are_named(extra, name, data, tmp_path):
    argv = ["--phase", "main", "--domains", str(data), "--save", str(tmp_path / "run"), "--train-iters", "2", *MODEL]
    messages = on_ranks(4, started_differently, [2], [*argv, "--micro-batch-size", "1"], extra)
    assert all(f"rank 2: {name}" in text and "ranks 0, 1, 3" in text for text in messages), messages
    assert not (tmp_path / "run").exists()


def test_ranks_that_see_other_data_are_named(data, copy_of_the_data, tmp_path):
    argv = ["--phase", "main", "--domains", str(data), "--save", str(tmp_path / "run"), "--train-iters", "2", *MODEL]
    messages = on_ranks(2, started_differently, [1], argv, ["--domains", str(copy_of_the_data)])
    assert all("rank 1: data_content" in text for text in messages), messages


def test_an_override_is_reported_and_recorded(data, copy_of_the_data, tmp_path):
    """A resume overrides the learning rate and the data; the next resume without flags keeps both changes."""
    save = tmp_path / "run"
    resume(data, save, 9, "--exit-interval", "3")
    override = ["--lr", "4e-3", "--override-resume", "lr,data-content"]
    _, printed = resume(copy_of_the_data, save, 9, *override, "--exit-interval", "6")
    assert "resume: lr changed from 0.005 to 0.004" in printed
    assert "resume: data_content changed from" in printed
    lines, printed = resume(copy_of_the_data, save, 9, "--lr", "4e-3")
    assert "resume: from iteration 6 of 9" in printed
    assert "changed from" not in printed
    rates = [
        make_learning_rate(OptimizerConfig(lr=5e-3 if step < 4 else 4e-3, min_lr=1e-3), 9).at(step)
        for step in range(1, 10)
    ]
    assert [line["lr"] for line in lines] == rates
    for entry in (
        json.loads((save / "checkpoints" / "iter_0000009" / "state.json").read_text()),
        json.loads((save / "config.json").read_text()),
    ):
        changes = {change["name"]: change for change in entry["overrides"]}
        assert changes.keys() == {"lr", "data_content"}
        assert changes["lr"] == {"iteration": 3, "name": "lr", "before": 0.005, "now": 0.004}
        assert entry["identity"]["lr"] == 0.004


def test_a_longer_run_reports_its_learning_rate(data, tmp_path):
    resume(data, tmp_path / "run", 4)
    lines, printed = resume(data, tmp_path / "run", 8)
    rate = make_learning_rate(OptimizerConfig(lr=5e-3, min_lr=1e-3), 8).at(5)
    assert lines[4]["lr"] == rate
    assert f"--train-iters 4 -> 8: the learning rate of iteration 5 is {rate:.3e}" in printed


def test_a_batch_size_that_is_overridden_counts_windows_right(data, tmp_path):
    resume(data, tmp_path / "run", 4, "--exit-interval", "2")
    override = ["--global-batch-size", "12", "--override-resume", "global-batch-size"]
    lines, _ = resume(data, tmp_path / "run", 4, *override)
    assert [line["consumed_samples"] for line in lines] == [8, 16, 28, 40]


def test_a_checkpoint_of_version_0_1_resumes(data, tmp_path):
    """Its state.json has fewer fields: those present are compared, and the message names the missing ones."""
    undisturbed, _ = resume(data, tmp_path / "undisturbed", 8)
    save = tmp_path / "run"
    resume(data, save, 8, "--exit-interval", "4")
    path = save / "checkpoints" / "iter_0000004" / "state.json"
    state = json.loads(path.read_text())
    identity = state.pop("identity")
    del state["overrides"], state["checksums"], state["sha256"]
    early = ("phase", "gpt", "data_fingerprint", "sampling_weights", "seq_length", "global_batch_size", "seed")
    path.write_text(json.dumps({**state, **{key: identity[key] for key in early}}))
    with pytest.raises(AssertionError, match="seed was 11"):
        resume(data, save, 8, "--seed", "12")
    lines, printed = resume(data, save, 8)
    assert lines == undisturbed
    assert "does not record precision, " in printed


def test_differences_and_overrides():
    before = {"phase": "main", "lr": 1.0, "gpt": {"a": 1, "b": 2}, "train_iters": 5}
    now = {"phase": "proxy", "lr": 2.0, "gpt": {"a": 1, "b": 3}, "seed": 1, "train_iters": 6}
    faults, overridden = differences(before, now, "c", ["lr", "phase"])
    assert overridden == ["lr"]
    assert [fault.value for fault in faults] == [
        "phase was main, and is proxy in this start",
        "gpt was {'b': 2}, and is {'b': 3} in this start",
    ]
    assert [fault.value for fault in override_faults(["lr", "phase", "nonsense"], now)] == ["phase", "nonsense"]
    assert identity_hash(before) == identity_hash(dict(reversed(before.items()))) != identity_hash(now)


def test_what_no_step_reads_may_differ():
    def rate(style, end):
        return {"lr_decay_style": style, "min_lr": end}

    def positions(kind, base):
        return {"gpt": {"position_embedding_type": kind, "rotary_base": base}}

    assert differences(rate("constant", 0.1), rate("constant", 0.2), "run", ()) == ([], [])
    assert differences(positions("learned_absolute", 1.0), positions("learned_absolute", 2.0), "run", ()) == ([], [])
    loss = {"doremi_update": "alternating", "doremi_normalization": "domain", "sampling_weights": {"A": 1.0}}
    other = {"doremi_update": "simultaneous", "doremi_normalization": "batch", "sampling_weights": {"A": 0.5}}
    resample, reweight = {"doremi_weighting": "resample"}, {"doremi_weighting": "reweight"}
    assert differences(resample | loss, resample | other, "run", ()) == ([], [])
    assert len(differences(reweight | loss, reweight | other, "run", ())[0]) == 3
    for before, now in ((rate("linear", 0.1), rate("linear", 0.2)), (positions("rope", 1.0), positions("rope", 2.0))):
        assert len(differences(before, now, "run", ())[0]) == 1


MODEL_WITHOUT_END = [word for word in MODEL if word not in ("--min-lr", "1e-3")]
NATURAL = {"domain 0": 1 / 6, "domain 1": 1 / 3, "domain 2": 1 / 2}


@pytest.mark.parametrize(
    ("phase", "flags", "began_with"),
    [
        ("main", ["--lr-decay-style", "constant"], {"min_lr": 1e-5}),
        ("main", ["--position-embedding-type", "learned_absolute"], {"gpt": {"rotary_base": 5e5}}),
        (
            "proxy",
            ["--doremi-weighting", "resample"],
            {"doremi_update": "simultaneous", "doremi_normalization": "batch", "sampling_weights": NATURAL},
        ),
    ],
    ids=["min_lr", "rotary_base", "resample"],
)
def test_a_run_resumes_without_flags_that_nothing_reads(phase, flags, began_with, data, reference, tmp_path):
    """An earlier version took them; no change is recorded, and the model that the run trained can be used."""
    flags = [*flags, *(reference if phase == "proxy" else []), "--log-interval", "1"]
    undisturbed = train(1, phase, data, tmp_path / "undisturbed", 6, *flags, model=MODEL_WITHOUT_END)
    save = tmp_path / "run"
    train(1, phase, data, save, 6, *flags, "--exit-interval", "3", model=MODEL_WITHOUT_END)
    path = save / "checkpoints" / "iter_0000003" / "state.json"
    state = json.loads(path.read_text())
    for name, value in began_with.items():
        before = state["identity"][name]
        assert before != value
        state["identity"][name] = {**before, **value} if name == "gpt" else value
    path.write_text(json.dumps(state))
    unseal(save)
    lines = train(1, phase, data, save, 6, *flags, "--load", str(save), model=MODEL_WITHOUT_END)
    assert training_lines(lines) == training_lines(undisturbed)
    assert json.loads((save / "config.json").read_text())["overrides"] == []
    # config.json holds what this start was given, the checkpoint what the run began with.
    argv = ["--phase", "evaluate", "--domains", str(data), "--load", f"{save}@3", "--save", str(tmp_path / "evaluated")]
    on_ranks(1, with_messages, [*argv, "--seq-length", "16"])


def test_weights_are_shown_with_as_many_digits_as_tell_them_apart():
    before, now = {"A": 0.3333333, "B": 0.6666667, "C": 0.0}, {"A": 1 / 3, "B": 0.5, "C": 0.0}
    assert for_message(before, now) == {"A": 0.3333333, "B": 0.666667}
    assert for_message(now, before) == {"A": 1 / 3, "B": 0.5}


def test_metrics_of_a_refused_resume_stay(data, tmp_path):
    """A refused checkpoint leaves the run's metrics unchanged (iteration -3 used to empty metrics.jsonl)."""
    save = tmp_path / "run"
    train(1, "main", data, save, 2, "--log-interval", "1")
    before = metrics(save)
    path = save / "checkpoints" / "iter_0000002" / "state.json"
    path.write_text(path.read_text().replace('"iteration": 2', '"iteration": -3'))
    with pytest.raises(AssertionError, match="iteration: -3"):
        train(1, "main", data, save, 2, "--log-interval", "1", "--load", str(save))
    assert metrics(save) == before


def test_data_that_differ_have_other_identities(tmp_path):
    from megatron_doremi.data.content_hash import content_hash
    from megatron_doremi.data.indexed_dataset import IndexedDataset

    hashes = set()
    for name, tokens in (("a", 300), ("b", 301), ("a2", 300)):
        (tmp_path / name).mkdir()
        write_data(tmp_path / name, 1, tokens)
        hashes.add(content_hash(["domain 0"], [IndexedDataset(tmp_path / name / "domain0_train")]))
    assert len(hashes) == 2
