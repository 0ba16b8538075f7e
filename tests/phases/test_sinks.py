"""Sinks of a run's log: a new sink, a failing sink, and a run whose lock another run took over.

Run alone: python -m pytest tests/phases/test_sinks.py
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_doremi.arguments import parse_config
from megatron_doremi.errors import ConfigError
from megatron_doremi.phases.sinks import Console, JsonLines, RunLog, Sink, TensorBoard
from megatron_doremi.phases.wandb_sink import WeightsAndBiases

TRAINING = {"iteration": 1, "loss": 2.0, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 1e4}
WEIGHTED = TRAINING | {"iteration": 2, "domain_weights": {"a": 0.25, "b": 0.75}}
EVALUATION = {"iteration": 2, "eval": {"a": 1.5}, "eval_uniform_mean": 1.5, "eval_worst": 1.5, "eval_token_mean": 1.5}
EVALUATION |= {"eval_interval": {"a": [1.4, 1.6], "b": None}, "eval_worst_interval": [1.25, 1.75]}
LINES = [
    "step 2/9 | loss 2.0000 | lr 1.0e-03 | grad 0.500 | 10,000 tokens/s | LEFT left | top b 0.750",
    "step 2 | held-out nats/token: uniform mean 1.500, worst 1.500 +- 0.250, token mean 1.500 (one document)",
    "the last word",
]


class NewSink(Sink):
    """All that a new logger needs: it collects the numbers of every line."""

    subject = "a new logger"

    def __init__(self):
        self.entries = []

    def write(self, entry):
        self.entries.append(entry)


class BrokenSink(Sink):
    """A sink whose methods all fail."""

    subject = "a broken logger"

    def fail(self, *_):
        raise OSError(28, "No space left on device")

    write = step = show = say = checkpoint_state = make_durable = close = fail


def log_two_steps(log: RunLog) -> dict:
    log.step(TRAINING)
    log.step(WEIGHTED)
    log.show(WEIGHTED)
    log.evaluation(EVALUATION)
    log.make_durable()
    state = log.checkpoint_state()
    log.step(None)
    log.say(LINES[-1])
    log.close()
    return state


def outputs(folder) -> list[Sink]:
    return [JsonLines(folder / "metrics.jsonl", 0, None), TensorBoard(folder, 0), Console("main", 0, 9)]


def test_a_new_sink_gets_every_entry_and_a_broken_one_takes_nothing_from_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Console, "_time_left", lambda *_: "LEFT")
    new = NewSink()
    state = log_two_steps(RunLog([BrokenSink(), *outputs(tmp_path), BrokenSink(), new]))
    assert new.entries == [TRAINING, WEIGHTED, EVALUATION]
    path = tmp_path / "metrics.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == new.entries
    assert state == {"metrics_bytes": path.stat().st_size}
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert [event.value for event in events.Scalars("eval/loss/a")] == [1.5]
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("eval")]
    means = ["eval/uniform_mean", "eval/worst", "eval/token_mean"]
    interval = ["eval/interval/a/low", "eval/interval/a/high", "eval/worst_interval/low", "eval/worst_interval/high"]
    assert sorted(tags) == sorted(["eval/loss/a", *means, *interval])
    assert [event.value for event in events.Scalars("eval/worst_interval/high")] == [1.75]
    printed = capsys.readouterr()
    assert [line[9:] for line in printed.out.splitlines()] == LINES
    # Each of the two sinks warns once, however many lines are lost.
    assert printed.err.count("a broken logger cannot be written: [Errno 28] No space left on device") == 2
    assert "step" not in printed.err


def test_a_log_file_gets_the_first_and_the_last_line_of_a_short_run(capsys):
    log = RunLog([Console("main", 0, 2400)])
    for iteration in range(10, 2401, 10):
        entry = WEIGHTED | {"iteration": iteration, "grad_norm": 1e4, "tokens_per_second": 1e7}
        entry["domain_weights"] = {"a domain with a name that is far too long for a line": 1.0}
        log.step(entry)
        log.show(entry)
    lines = capsys.readouterr().out.splitlines()
    assert [line[9:].split(" |")[0] for line in lines] == ["step    10/2,400", "step 2,400/2,400"]
    assert max(map(len, lines)) <= 120


class FakeWandb:
    """The calls of the package wandb that the sink makes, without a server."""

    errors = SimpleNamespace(Error=type("Error", (Exception,), {}))

    def __init__(self, step=0, refuses=False):
        self.step, self.refuses, self.logged, self.settings = step, refuses, [], {}

    def Settings(self, **settings):
        return settings

    def init(self, **settings):
        if self.refuses:
            raise self.errors.Error("no API key")
        self.settings = settings
        return self

    def log(self, entry, step):
        self.logged.append((step, entry))

    def finish(self):
        self.logged.append("finished")


def weights_and_biases(save, monkeypatch, **options):
    fake = FakeWandb(**options)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    flags = f"--phase main --domains d --train-iters 9 --save {save} --num-layers 1 --hidden-size 8"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    flags += " --num-attention-heads 1 --wandb-project mixtures"
    return fake, WeightsAndBiases(parse_config(flags.split(), 1))


def test_weights_and_biases_continues_its_run_and_repeats_no_step(tmp_path, monkeypatch):
    fake, sink = weights_and_biases(tmp_path, monkeypatch)
    RunLog([sink]).step(TRAINING)
    sink.close()
    losses = {"train/loss": 2.0, "train/lr": 1e-3, "train/grad_norm": 0.5, "perf/tokens_per_second": 1e4}
    assert fake.logged == [(1, losses), "finished"]
    assert (fake.settings["project"], fake.settings["resume"]) == ("mixtures", "allow")
    again, sink = weights_and_biases(tmp_path, monkeypatch, step=2)
    log = RunLog([sink])
    log.step(TRAINING)
    log.step(WEIGHTED)
    assert [(step, entry["mixture/domain_weights/b"]) for step, entry in again.logged] == [(2, 0.75)]
    assert again.settings["id"] == fake.settings["id"]
    with pytest.raises(ConfigError, match=r"no API key\n.*\n.*WANDB_MODE=offline"):
        weights_and_biases(tmp_path, monkeypatch, refuses=True)


def test_without_the_package_weights_and_biases_is_a_fault_of_the_flags(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb, which is missing\n.*pip install wandb"):
        parse_config(["--phase", "main", "--wandb-project", "mixtures"], 1)


def test_an_error_that_no_output_has_is_a_bug_and_not_hidden():
    class Wrong(NewSink):
        def write(self, entry):
            raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        RunLog([Wrong()]).step(TRAINING)


def test_after_another_run_has_taken_the_lock_no_metrics_are_written(tmp_path, capsys):
    new = NewSink()
    log_two_steps(RunLog([*outputs(tmp_path), new], lost_to=lambda: "job 7 on node 3"))
    assert new.entries == []
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert [line[9:] for line in capsys.readouterr().out.splitlines()][1:] == LINES[1:]
