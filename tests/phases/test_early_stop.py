"""A proxy that --doremi-stop-drift ends: its weights and intervals, its resume, and what comes after it.

Run alone: python -m pytest tests/phases/test_early_stop.py
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import statistics

import pytest
from phases.small import MODEL, metrics, read_by, training_lines
from ranks import on_ranks, program, unwrapped

from megatron_doremi.arguments import parse_config
from megatron_doremi.mixture import early_stop
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.phases.inputs import open_inputs, plan_text

pytestmark = pytest.mark.slow
STEPS, DRIFT = 48, 0.05
# Student's t with 6 degrees of freedom, 95 % (tables).
T_6 = 2.446911851144969


def recomputed(lines, steps):
    """{domain: mean} and the half-width by the formulas of docs/early_stop.md, in plain Python, from metrics.jsonl."""
    names = list(lines[0]["domain_weights"])
    weights = {name: [line["domain_weights"][name] for line in lines] for name in names}
    length, rest = steps // 2 // 8, STEPS - steps
    window, slopes, variances = {}, {}, {}
    places = [i - 3.5 for i in range(8)]
    for name, series in weights.items():
        first = steps - 8 * length
        groups = [statistics.fmean(series[first + i * length : first + (i + 1) * length]) for i in range(8)]
        window[name] = statistics.fmean(groups)
        slopes[name] = statistics.linear_regression(places, groups).slope
        residuals = [g - window[name] - p * slopes[name] for g, p in zip(groups, places, strict=True)]
        variances[name] = sum(r * r for r in residuals) / 6
    ahead = 4 + rest / length / 2
    drift = {name: slope * ahead for name, slope in slopes.items()}
    tail = {name: min(1.0, max(0.0, window[name] + drift[name] / 2)) for name in names}
    means, errors = {}, []
    for name in names:
        noise = T_6 * math.sqrt(variances[name] * (1 / 8 + length / rest + ahead**2 / 4 / 42))
        errors.append(abs(drift[name]) / 2 + noise)
        means[name] = (math.fsum(weights[name][:steps]) + rest * tail[name] / sum(tail.values())) / STEPS
    return means, max(errors) * rest / STEPS


def printing(launch, argv):
    """The program on a rank; what it printed. Groups of single steps keep the runs short."""
    early_stop.SHORTEST_GROUP = 1
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        program(launch, argv)
    return printed.getvalue()


def run(data, save, *flags):
    """A proxy on two ranks: its metrics, and what it printed."""
    argv = ["--phase", "proxy", "--domains", str(data), "--save", str(save), "--train-iters", str(STEPS), *MODEL]
    text = on_ranks(2, printing, [*argv, *flags, "--load", str(save)])[0]
    return metrics(save), unwrapped(text)


def planned(data, save, *flags):
    """What a dry run of that proxy prints, with groups of single steps."""
    argv = ["--phase", "proxy", "--domains", str(data), "--save", str(save), "--train-iters", str(STEPS), *MODEL]
    config = parse_config([*argv, *flags, "--load", str(save), "--dry-run"], 1)
    return unwrapped(plan_text(open_inputs(config, Topology())))


def test_a_proxy_stops_resumes_and_takes_all_steps_without_the_flag(reference, data, tmp_path, monkeypatch):
    layout = [*reference, "--pipeline-model-parallel-size", "2"]
    stopping = [*layout, "--doremi-stop-drift", str(DRIFT)]
    full, _ = run(data, tmp_path / "full", *layout)
    save = tmp_path / "stopped"
    interrupted, text = run(data, save, *stopping, "--exit-interval", "20")
    assert f"after iteration 20 of {STEPS}: --exit-interval; to resume, run the same command again" in text
    lines, text = run(data, save, *stopping)

    # The first step that is checked and good enough, whether or not the run was interrupted; the steps before it are
    # those of a run without the flag.
    assert training_lines(lines)[:20] == training_lines(interrupted)
    taken_with_errors, taken = training_lines(lines), training_lines(lines)
    stop, errors = len(taken), {line["iteration"]: line.pop("final_weights_error", None) for line in taken}
    assert 20 < stop < STEPS
    assert taken == training_lines(full)[:stop]
    assert [step for step, error in errors.items() if error is not None] == [*range(16, stop + 1)]
    assert all(error > DRIFT for step, error in errors.items() if 16 <= step < stop)
    means, half = recomputed(taken, stop)
    assert errors[stop] == pytest.approx(half, rel=1e-9)
    assert errors[stop] <= DRIFT

    # It ends as a run does that took all steps, with the extrapolated weights.
    assert [line["iteration"] for line in lines if "eval" in line] == [stop]
    assert max(each.name for each in (save / "checkpoints").glob("iter_*")) == f"iter_{stop:07}"
    written = json.loads((save / "domain_weights.json").read_text())
    assert sum(written["weights"].values()) == pytest.approx(1.0, abs=1e-15)
    assert written["weights"] == pytest.approx(means, rel=1e-9)
    provenance = written["provenance"]
    assert (provenance["steps"], provenance["train_iters"], provenance["stop_drift"]) == (stop, STEPS, DRIFT)
    for name, mean in means.items():
        low, high = provenance["early_stop"]["interval"][name]
        so_far = sum(line["domain_weights"][name] for line in taken)
        assert low == pytest.approx(max(mean - half, so_far / STEPS), rel=1e-9)
        assert high == pytest.approx(min(mean + half, (so_far + STEPS - stop) / STEPS), rel=1e-9)
        assert provenance["early_stop"]["mean_so_far"][name] == pytest.approx(so_far / stop)
    assert f"stopped early after {stop} of {STEPS} steps, {STEPS - stop} saved" in text
    assert f"early stop: from step 16 on, once the mean weights of all {STEPS} steps" in text

    # The same command again takes no step and changes nothing.
    before = [(save / name).read_text() for name in ("metrics.jsonl", "domain_weights.json")]
    _, text = run(data, save, *stopping)
    assert [(save / name).read_text() for name in ("metrics.jsonl", "domain_weights.json")] == before
    assert f"done: the {stop} steps were taken before" in text
    assert f"stopped early after {stop} of {STEPS} steps" in text
    monkeypatch.setattr(early_stop, "SHORTEST_GROUP", 1)
    ended = f"finished: stopped early after {stop} of {STEPS} steps (--doremi-stop-drift {DRIFT}); the same command"
    text = planned(data, save, *reference, "--doremi-stop-drift", str(DRIFT))
    assert ended in text
    assert "resume: from" not in text
    assert f"resume: from iteration {stop} of {STEPS}" in planned(data, save, *reference)

    # Its weights are those of a finished proxy.
    main = ["--phase", "main", "--domains", str(data), "--save", "s", "--train-iters", "8", "--dry-run"]
    weights = ["--domain-weights", str(save / "domain_weights.json")]
    plan = open_inputs(parse_config([*main, *MODEL, *weights], 1), Topology()).plan
    assert plan.sampling_weights.tolist() == pytest.approx(list(written["weights"].values()))

    # Without the flag it resumes to the last step, as if it had never stopped.
    resumed, text = run(data, save, *layout)
    assert "resume: without --doremi-stop-drift the run takes all of its steps" in text
    assert training_lines(resumed) == taken_with_errors + training_lines(full)[stop:]
    finals = [json.loads((tmp_path / run / "domain_weights.json").read_text()) for run in ("full", "stopped")]
    assert finals[0]["weights"] == finals[1]["weights"]
    assert "early_stop" not in finals[1]["provenance"]


def test_a_dry_run_names_the_rule(data, tmp_path):
    flags = ["--phase", "proxy", "--domains", str(data), "--save", str(tmp_path / "run"), "--train-iters", "2400"]
    flags += [*read_by("proxy", MODEL), "--dry-run", "--reference-load", str(tmp_path / "to come")]
    text = unwrapped(plan_text(open_inputs(parse_config([*flags, "--doremi-stop-drift", "0.02"], 1), Topology())))
    rule = "early stop: from step 608 on, once the mean weights of all 2,400 steps are known to within 0.02"
    assert rule in text
    assert "early stop" not in plan_text(open_inputs(parse_config(flags, 1), Topology()))
