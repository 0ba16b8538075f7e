"""tools/doremi_rounds.py: what it judges, what it writes, how it resumes, two rounds of real training, and their report
by tools/report.py.

Run alone: python -m pytest tests/rounds/test_doremi_rounds.py
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from phases.small import MODEL, metrics, training_lines, unseal, write_data
from ranks import run_program

from megatron_doremi.cluster.signals import Signals
from megatron_doremi.data.weights_file import save_weights
from megatron_doremi.errors import ConfigError
from megatron_doremi.reporting import html
from megatron_doremi.reporting.rounds import concentration_warning, read_rounds
from megatron_doremi.rounds.folder import RoundsFolder, StopRule, judge
from megatron_doremi.rounds.stages import Stage
from tools import doremi_rounds, report

NATURAL = {"A": 0.6, "B": 0.3, "C": 0.1}
# What the proxy learns from a reference: half of the way to a fixed point.
FIXED = {"A": 0.2, "B": 0.5, "C": 0.3}


def learned_from(reference, number, seed):
    mean = {name: (reference[name] + FIXED[name]) / 2 for name in reference}
    return {**mean, "A": mean["A"] + 0.002 * (-1) ** seed / number, "B": mean["B"] - 0.002 * (-1) ** seed / number}


def write_runs(folder, number, seed, reference, learned=None, provenance=None, tokenizer="0" * 64):
    """The files of a reference and a proxy that have finished."""
    path = folder.run(number, seed, "reference")
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"sampling_weights": reference}))
    path = folder.run(number, seed, "proxy")
    path.mkdir()
    learned = learned or learned_from(reference, number, seed)
    provenance = provenance or {"steps": 2, "train_iters": 2, "seed": seed}
    save_weights(path / "domain_weights.json", learned, tokenizer, provenance)
    (path / "config.json").write_text("{}")
    steps = [{**learned, "A": learned["A"] + x, "B": learned["B"] - x} for x in (0.01, -0.01)]
    rows = [{"iteration": n, "loss": 1.0, "domain_weights": each} for n, each in enumerate(steps, 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def weights_of(path):
    return json.loads(path.read_text())["weights"]


def test_a_round_is_judged_and_its_weights_are_the_next_references(tmp_path):
    folder, rule = RoundsFolder(tmp_path), StopRule(1e-3, 10, 1)
    write_runs(folder, 1, 1, NATURAL)
    first = judge(folder, rule)
    assert first.ended is None
    assert first.rounds[0].reference_weights == NATURAL
    assert (first.rounds[0].most_moved, first.rounds[0].noise) == ("A", None)
    assert first.rounds[0].change == pytest.approx(0.202)
    assert weights_of(folder.reference_weights(2)) == learned_from(NATURAL, 1, 1)
    assert json.loads(folder.reference_weights(2).read_text())["tokenizer_sha256"] == "0" * 64
    assert not folder.domain_weights.exists()
    assert folder.current_round() == 2
    second = weights_of(folder.reference_weights(2))
    write_runs(folder, 2, 1, second)
    rounds = judge(folder, rule)
    # The steps of both proxies differ from their means alike: the halves of the difference are equal.
    assert rounds.rounds[1].noise == pytest.approx(0.0, abs=1e-12)
    assert rounds.rounds[1].threshold == 1e-3
    assert read_rounds(tmp_path, "--rounds") == rounds
    before = (tmp_path / "rounds.json").read_bytes()
    assert judge(folder, rule) == rounds
    assert (tmp_path / "rounds.json").read_bytes() == before


def test_rounds_end_by_the_noise_of_the_seeds_or_by_their_number(tmp_path):
    folder = RoundsFolder(tmp_path)
    reference = NATURAL
    for number in range(1, 8):
        for seed in (1, 2):
            write_runs(folder, number, seed, reference)
        rounds = judge(folder, StopRule(1e-3, 10, 2))
        last = rounds.rounds[-1]
        # The variances of the seeds' difference, 0.004 / number, are pooled over the rounds so far.
        assert last.noise == pytest.approx(np.sqrt(np.mean([(0.004 / n) ** 2 / 2 for n in range(1, number + 1)])))
        # The seeds' offsets cancel in the mean, which moves half of the way.
        assert last.weights == pytest.approx({name: (reference[name] + FIXED[name]) / 2 for name in reference})
        assert last.change == pytest.approx(0.4 * 0.5**number)
        if rounds.ended:
            break
        reference = weights_of(folder.reference_weights(number + 1))
    # 0.4 / 2^7 = 0.0031 is above the pooled noise, 0.0013; 0.4 / 2^2 is not above 0.1.
    assert rounds.ended is None
    ended = judge(folder, StopRule(0.1, 10, 2))
    assert (ended.ended, len(ended.rounds)) == ("settled", 2)
    assert weights_of(folder.domain_weights) == ended.rounds[1].weights
    ended = judge(folder, StopRule(1e-3, 7, 2))
    assert (ended.ended, len(ended.rounds)) == ("max_rounds", 7)
    assert json.loads(folder.domain_weights.read_text())["provenance"]["settled"] is False
    with pytest.raises(ConfigError, match="--seeds: 1"):
        judge(folder, StopRule(1e-3, 7, 1))
    # Further rounds may be run after all.
    assert judge(folder, StopRule(1e-3, 8, 2)).ended is None
    assert not folder.domain_weights.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"provenance": {"steps": 1, "train_iters": 2, "seed": 1}}, "the mean of 1 of the proxy's 2 steps"),
        ({"learned": {"A": 0.5, "B": 0.3, "D": 0.2}}, "other domains"),
        ({"provenance": {"seed": 2}}, "proxies with --seed 2, 2"),
        ({"reference": {"A": 0.5, "B": 0.3, "C": 0.2}}, "other sampling weights"),
        ({"tokenizer": "1" * 64}, "another tokenizer"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(tmp_path, change, message):
    folder = RoundsFolder(tmp_path)
    write_runs(folder, 1, 1, **{"reference": NATURAL, **change})
    write_runs(folder, 1, 2, NATURAL)
    with pytest.raises(ConfigError, match=message):
        judge(folder, StopRule(1e-3, 10, 2))
    assert not folder.reference_weights(2).exists()


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (NATURAL, "the weights that round 1 has learned"),
        ({"A": 6, "B": 3, "C": 1}, "sampling_weights.A: 6"),
        ({"A": 0.398, "B": 0.402, "C": 0.1}, "sampling_weights of sum 0.9"),
    ],
)
def test_a_reference_that_did_not_sample_by_the_weights_of_the_round_before_is_refused(tmp_path, sampling, message):
    folder, rule = RoundsFolder(tmp_path), StopRule(1e-3, 10, 1)
    write_runs(folder, 1, 1, NATURAL)
    judge(folder, rule)
    write_runs(folder, 2, 1, sampling, learned=NATURAL)
    with pytest.raises(ConfigError, match=message):
        judge(folder, rule)
    assert not folder.reference_weights(3).exists()


def test_a_domain_without_weight_and_a_request_between_two_stages(tmp_path):
    data, save = write_data(tmp_path), tmp_path / "rounds"
    words = ["--domains", str(data), *MODEL, "--train-iters", "6", "--save", str(save), "--max-rounds", "1"]
    options, given = doremi_rounds.parse([*words, "--domain-weights", "domain 0=0,domain 1=1,domain 2=2"])
    with pytest.raises(ConfigError, match="'domain 0' is 0"):
        doremi_rounds.run_rounds(RoundsFolder(save), StopRule(1e-3, 1, 1), options, given, pytest.fail)
    assert not save.exists()
    signals = Signals({})
    signals.requested_by = 2
    # No rank is there to be told: the next stage must not start.
    stage = Stage(1, 1, "reference", str(save), ("--no-such-flag",))
    assert doremi_rounds.launcher({}, signals)(stage, 1) == 3


def test_rounds_that_collapse_onto_a_domain_say_so(tmp_path):
    folder, rule = RoundsFolder(tmp_path), StopRule(1e-3, 1, 1)
    write_runs(folder, 1, 1, NATURAL)
    assert concentration_warning(judge(folder, rule)) is None
    (folder.run(1, 1, "proxy") / "domain_weights.json").unlink()
    save_weights(folder.run(1, 1, "proxy") / "domain_weights.json", {"A": 0.02, "B": 0.96, "C": 0.02}, "0" * 64, {})
    # exp of -(.96 ln .96 + 2 x .02 ln .02) = 1.216, and exp of -(.6 ln .6 + .3 ln .3 + .1 ln .1) = 2.454.
    assert "1.2 effective domains, 2.5 at the start; B has 0.96" in concentration_warning(judge(folder, rule))


def test_nothing_to_judge(tmp_path):
    with pytest.raises(ConfigError, match="a folder with a finished round"):
        judge(RoundsFolder(tmp_path), StopRule(1e-3, 10, 1))


def contents(folder):
    """The files that two undisturbed rounds write, without those that hold times or paths."""
    names = ("rounds.json", "domain_weights.json", "reference_weights.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.json") if path.name in names}


def test_the_report_of_rounds(tmp_path, capsys, monkeypatch):
    folder, rule = RoundsFolder(tmp_path), StopRule(1e-3, 10, 2)
    for seed in (1, 2):
        write_runs(folder, 1, seed, NATURAL)
    judge(folder, rule)
    monkeypatch.setattr(report, "png", lambda chart: b"")
    monkeypatch.setattr(html, "svg", lambda chart, layout: chart.complete(layout)["$schema"])
    assert report.main(["--rounds", str(tmp_path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    # Weights .4, .4 and .2; the reference's effective number of domains is 2.45.
    assert "1 0.2000 A 0.0028 seeds 0.0028 0.0915 2.87" in printed
    assert (
        "round 1: the largest change of a weight is 0.2000 (A), more than the larger of --min-change 0.001" in printed
    )
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Weights over the rounds" in page
    assert "Weights over the steps (round 1 seed 2)" in page
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["rounds"][0]["change"] == pytest.approx(0.2)
    (tmp_path / "rounds.json").write_text('{"format": "megatron-doremi-rounds/1"}')
    with pytest.raises(ConfigError, match="rounds is missing"):
        report.main(["--rounds", str(tmp_path)])


def test_the_report_of_rounds_gives_the_last_rounds_weights_and_warns_of_one_domain(tmp_path, capsys, monkeypatch):
    """The mean over proxies of different rounds is what no round learned: 0.21 for noise, 0.55 for A."""
    folder, rule = RoundsFolder(tmp_path), StopRule(1e-3, 2, 1)
    write_runs(folder, 1, 1, dict.fromkeys(("A", "B", "noise"), 1 / 3), {"A": 0.2, "B": 0.4, "noise": 0.4})
    first = judge(folder, rule).rounds[0].weights
    write_runs(folder, 2, 1, first, {"A": 0.9, "B": 0.08, "noise": 0.02})
    judge(folder, rule)
    monkeypatch.setattr(report, "png", lambda chart: b"")
    monkeypatch.setattr(html, "svg", lambda chart, layout: chart.complete(layout)["$schema"])
    assert report.main(["--rounds", str(tmp_path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "noise lost weight in the mean over all steps (0.0200) and lost weight at the end (0.0200), of round 2"
        in printed
    )
    assert "2 proxies" not in printed
    # exp(entropy) of .9, .08 and .02 is 1.46, less than half of 3.
    assert "warning: the rounds concentrate the weights: 1.5 effective domains, 3.0 at the start; A has 0.90" in printed
    page = (tmp_path / "report" / "report.html").read_text()
    assert "learned: mean over all steps, of round 2" in page
    assert "lowest" not in page
    # Without --rounds the proxies are listed, and their mean says so.
    paths = [str(folder.run(number, 1, "proxy")) for number in (1, 2)]
    assert report.main([*paths, "--output-dir", str(tmp_path / "listed")]) == 0
    assert "(0.2100)" in (listed := " ".join(capsys.readouterr().out.split()))
    assert "domain mean weight of 2" in listed


@pytest.mark.slow
def test_two_rounds_of_training_stopped_before_each_run_and_resumed(tmp_path, capsys):
    data = write_data(tmp_path)
    words = ["--domains", str(data), *MODEL, "--train-iters", "6", "--domain-weights", "natural", "--log-interval", "3"]
    words += ["--save", str(tmp_path / "rounds"), "--max-rounds", "2", "--min-change", "1e-9"]
    options, given = doremi_rounds.parse(words)
    folder, rule = RoundsFolder(tmp_path / "rounds"), StopRule(1e-9, 2, 1)
    started = []

    def launch(stage, ranks):
        started.append((stage.number, stage.phase))
        # Every second start is told to stop before it begins.
        if len(started) % 2:
            return 3
        run_program(ranks, list(stage.argv))
        return 0

    codes = [doremi_rounds.run_rounds(folder, rule, options, given, launch) for _ in range(5)]
    assert codes == [3, 3, 3, 3, 0]
    assert "== round 1: proxy stopped; the same command of this tool resumes" in capsys.readouterr().out
    assert started[::2] == started[1::2] == [(1, "reference"), (1, "proxy"), (2, "reference"), (2, "proxy")]
    rounds = read_rounds(folder.path, "--rounds")
    assert rounds.ended in ("settled", "max_rounds")
    means = []
    for number in (1, 2):
        steps = [line["domain_weights"] for line in training_lines(metrics(folder.run(number, 1, "proxy")))]
        means.append(np.array([list(each.values()) for each in steps]))
        assert means[-1].shape == (6, 3)
        assert list(rounds.rounds[number - 1].weights.values()) == pytest.approx(means[-1].mean(axis=0), abs=1e-12)
    # The manifest's tokens are 1 : 2 : 3.
    assert list(rounds.rounds[0].reference_weights.values()) == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert list(rounds.rounds[1].reference_weights.values()) == pytest.approx(means[0].mean(axis=0), abs=1e-12)
    difference = means[1] - means[0]
    assert rounds.rounds[1].change == pytest.approx(np.abs(difference.mean(axis=0)).max(), abs=1e-12)
    halves = np.abs(difference[:3].mean(axis=0) - difference[3:].mean(axis=0)) / 2
    assert rounds.rounds[1].noise == pytest.approx(halves.max(), abs=1e-12)
    # Finished: the same command trains nothing and judges again.
    before = contents(folder.path)
    assert doremi_rounds.run_rounds(folder, rule, options, given, lambda stage, ranks: pytest.fail("started")) == 0
    assert contents(folder.path) == before
    # The data may move, and must not change.
    moved, other = write_data(tmp_path / "moved"), write_data(tmp_path / "other", tokens=2000)
    options, given = doremi_rounds.parse([str(moved) if word == str(data) else word for word in words])
    assert doremi_rounds.run_rounds(folder, rule, options, given, lambda stage, ranks: pytest.fail("started")) == 0
    options, given = doremi_rounds.parse([str(other) if word == str(data) else word for word in words])
    with pytest.raises(ConfigError, match="--domains: another data set"):
        doremi_rounds.run_rounds(folder, rule, options, given, launch)
    # Other settings are refused.
    options, given = doremi_rounds.parse([*words, "--lr", "1e-3"])
    with pytest.raises(ConfigError, match=r"--lr: 0\.001"):
        doremi_rounds.run_rounds(folder, rule, options, given, launch)


@pytest.mark.slow
def test_rounds_go_on_without_flags_that_nothing_reads(tmp_path):
    """An earlier version took them; reference and proxy stop half way, and their files then name other values."""
    data, model = write_data(tmp_path), [word for word in MODEL if word not in ("--min-lr", "1e-3")]
    words = ["--domains", str(data), *model, "--train-iters", "4", "--max-rounds", "1", "--lr-decay-style", "constant"]
    words += ["--position-embedding-type", "learned_absolute", "--doremi-weighting", "resample", "--log-interval", "1"]
    began_with = {"min_lr": 1e-5, "doremi_update": "simultaneous", "doremi_normalization": "batch"}
    rule, stops = StopRule(1e-3, 1, 1), []

    def whole(stage, ranks):
        run_program(ranks, list(stage.argv))
        return 0

    def launch(stage, ranks):
        stops.append(not (stops and stops[-1]))
        run_program(ranks, [*stage.argv, *(["--exit-interval", "2"] if stops[-1] else [])])
        return 3 if stops[-1] else 0

    learned = []
    for name, run in (("undisturbed", whole), ("rounds", launch)):
        folder = RoundsFolder(tmp_path / name)
        options, given = doremi_rounds.parse([*words, "--save", str(folder.path)])
        while doremi_rounds.run_rounds(folder, rule, options, given, run):
            recorded = json.loads((folder.path / "rounds.json").read_text())
            recorded["settings"] |= {**began_with, "rotary_base": 5e5}
            (folder.path / "rounds.json").write_text(json.dumps(recorded))
            for path in folder.path.rglob("iter_0000002/state.json"):
                state = json.loads(path.read_text())
                state["identity"] |= {key: value for key, value in began_with.items() if key in state["identity"]}
                state["identity"]["gpt"]["rotary_base"] = 5e5
                path.write_text(json.dumps(state))
            unseal(folder.path)
        learned.append(weights_of(folder.domain_weights))
    assert stops == [True, False, True, False]
    assert learned[0] == learned[1]
