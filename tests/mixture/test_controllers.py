"""A new controller is one file: the training loop runs one that is defined here and resumes it bit-exactly.

Run alone: python -m pytest tests/mixture/test_controllers.py
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from phases.small import MODEL, metrics, training_lines, write_data
from ranks import on_ranks, program

from megatron_doremi.mixture import controllers
from megatron_doremi.mixture.controller import ControllerState, MixtureController

pytestmark = pytest.mark.slow


class CurvesState(ControllerState):
    weights: dict[str, float]
    history: dict[str, list[float]]
    held_out: dict[str, float]


class Curves(MixtureController):
    """Samples more of a domain the worse its held-out loss is and the faster its training loss falls."""

    method, learns, samples_ahead, state_name, state_schema = "curves", True, False, "curves", CurvesState
    needs_held_out = True

    def __init__(self, weights):
        self.weights, self.steps, self.history = weights, 0, [[] for _ in weights]
        self.held_out = np.zeros(len(weights))

    def observe(self, stats):
        self.steps += 1
        for losses, loss in zip(self.history, (stats.loss / stats.targets.clamp(min=1)).tolist(), strict=True):
            losses.append(loss)

    def evaluates_at(self, step):
        return step % 3 == 0

    def observe_evaluation(self, losses):
        falls = [each[0] - each[-1] if each else 0.0 for each in self.history]
        raised = self.weights * np.exp(losses - losses.max() + np.array(falls))
        self.weights, self.held_out = raised / raised.sum(), losses

    def sampling_weights(self, step):
        return self.weights

    def result(self):
        return self.weights

    def entries(self, names):
        return {"domain_weights": dict(zip(names, self.weights.tolist(), strict=True))}

    def state_dict(self, names):
        vectors = (self.weights.tolist(), self.history, self.held_out.tolist())
        keys = ("weights", "history", "held_out")
        return {"steps": self.steps} | {k: dict(zip(names, v, strict=True)) for k, v in zip(keys, vectors, strict=True)}

    def load_state_dict(self, entry, names):
        self.steps = entry["steps"]
        self.weights, self.held_out = (np.array([entry[k][n] for n in names]) for k in ("weights", "held_out"))
        self.history = [list(entry["history"][n]) for n in names]


def under_curves(launch, argv):
    """Runs the program on a rank where `main` learns its mixture with `Curves`."""
    controllers.METHODS["static"] = lambda config, weights: Curves(weights)
    return program(launch, argv)


def argv(data, save, *flags):
    run = ["--phase", "main", "--domains", str(data), "--save", str(save), "--load", str(save), "--train-iters", "8"]
    return [*run, *MODEL, "--eval-iters", "1", "--log-interval", "100", *flags]


def test_a_controller_of_held_out_losses_and_a_history_resumes_to_the_last_bit(tmp_path):
    data, layout = write_data(tmp_path, tokens=1500), ["--pipeline-model-parallel-size", "2"]
    on_ranks(2, under_curves, argv(data, tmp_path / "whole", *layout))
    stopped = argv(data, tmp_path / "broken", *layout, "--exit-interval", "5")
    on_ranks(2, under_curves, stopped)
    assert (tmp_path / "broken" / "checkpoints" / "iter_0000005").is_dir()
    on_ranks(2, under_curves, stopped)
    uninterrupted, resumed = metrics(tmp_path / "whole"), metrics(tmp_path / "broken")
    lines = training_lines(uninterrupted)
    # A learned mixture logs every step; the evaluations are those that the controller requests, and the last one.
    assert [line["iteration"] for line in lines] == [*range(1, 9)]
    evaluations = [line for line in uninterrupted if "eval" in line]
    assert [line["iteration"] for line in evaluations] == [0, 3, 6, 8]
    assert training_lines(resumed) == lines
    assert [line for line in resumed if "eval" in line] == evaluations
    written = [json.loads((tmp_path / run / "domain_weights.json").read_text()) for run in ("whole", "broken")]
    assert written[0]["weights"] == written[1]["weights"] == lines[-1]["domain_weights"]
    assert written[0]["provenance"]["method"] == "curves"

    # By hand: weights and quotas follow the held-out losses, and the training losses between them.
    names = list(lines[0]["domain_weights"])
    weights = np.array([1500, 3000, 4500]) / 9000
    for before, after in ((0, 1), (3, 4), (6, 7)):
        losses = next(line["eval"] for line in evaluations if line["iteration"] == before)
        falls = [lines[0]["domain_loss"][n] - lines[before - 1]["domain_loss"][n] if before else 0.0 for n in names]
        raised = [w * math.exp(losses[n] + fall) for n, w, fall in zip(names, weights, falls, strict=True)]
        weights = np.array(raised) / sum(raised)
        line = lines[after - 1]
        assert [line["domain_weights"][n] for n in names] == pytest.approx(weights.tolist(), rel=1e-12)
        for name, weight in zip(names, weights, strict=True):
            assert abs(line["domain_tokens"][name] / 16 - 8 * weight) < 1.0
    assert len({json.dumps(line["domain_tokens"]) for line in lines}) > 2


def test_what_a_method_cannot_resume_from_or_misses_is_refused(tmp_path):
    """A checkpoint without the controller's state, and data without held-out text."""
    data, save = write_data(tmp_path, tokens=1500), tmp_path / "run"
    flags = ["--exit-interval", "1"]
    on_ranks(1, program, argv(data, save, *flags))
    with pytest.raises(AssertionError, match="curves is missing"):
        on_ranks(1, under_curves, argv(data, save, *flags))
    write_data(tmp_path, tokens=1500, held_out=1)
    with pytest.raises(AssertionError, match="curves follows their losses"):
        on_ranks(1, under_curves, argv(data, tmp_path / "new", *flags))
