"""Groups of seeds: figures by hand, what a pair shares, whose weights a main model samples by, and the verdict.

Run alone: python -m pytest tests/reporting/test_report_groups.py
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_doremi.errors import ConfigError
from megatron_doremi.reporting.comparison import TOKEN_MEAN, UNIFORM_MEAN, WORST, compare, list_runs, with_controls
from megatron_doremi.reporting.console import console_text
from megatron_doremi.reporting.evaluations import Unit
from megatron_doremi.reporting.groups import Group, check_learned_weights
from megatron_doremi.reporting.mixture import epochs
from megatron_doremi.reporting.runs import read_run
from megatron_doremi.reporting.study_tables import held_out_table, weights_table
from megatron_doremi.reporting.verdict import findings, verdict

NAMES = ("code", "web")
GPT = {"num_layers": 2, "hidden_size": 64, "vocab_size": 1000}


@pytest.fixture
def group(write_run, rows):
    """Returns a function that writes a group of runs: {seed: (loss of code, loss of web, token mean)}."""

    def make(name, figures, bits=False, windows=None, weights=None, phase="main", **changes):
        runs = []
        for seed, (*losses, token_mean) in figures.items():
            config = {
                "phase": phase,
                "gpt": GPT,
                "held_out_content": "h",
                "settings": {"data": {"seed": seed, "seq_length": 64, "train_iters": 9}},
                "identity": {"data_content": "d"},
                **changes,
            }
            if weights is not None:
                config["sampling_weights"] = dict(zip(NAMES, weights, strict=True))
            line = rows[1](9, dict(zip(NAMES, losses, strict=True)), token_mean)
            if bits:
                line["eval_bpb"] = {n: loss / 2 for n, loss in line["eval"].items()}
                line |= {"eval_bpb_token_mean": token_mean / 2, "eval_bpb_interval": {"code": [0.5, 0.75], "web": None}}
            if windows is not None:
                line["eval_windows"] = dict.fromkeys(NAMES, windows)
            lines = [{"iteration": 5, "loss": 2.0, "consumed_tokens": 1000, "elapsed_ms": 20.0}, line]
            runs.append(read_run(write_run(f"{name}-{seed}", lines, config=config)))
        return Group(name, tuple(runs))

    return make


@pytest.fixture
def proxies(write_run, rows):
    """Two proxies, of seeds 1 and 2, that learned (.75, .25) and (.25, .75)."""
    runs = []
    for seed, code in ((1, 0.75), (2, 0.25)):
        weights = {"code": code, "web": 1 - code}
        config = {"phase": "proxy", "settings": {"data": {"seed": seed}, "doremi": {"doremi_smoothing": 0.01}}}
        lines = [rows[0](1, weights), rows[0](2, weights)]
        runs.append(read_run(write_run(f"proxy-{seed}", lines, weights=weights, config=config)))
    return Group("proxy", tuple(runs))


MAIN = {1: (1.0, 2.0, 1.2), 2: (1.25, 2.0, 1.2), 3: (1.5, 2.0, 1.2)}
NATURAL = {1: (1.5, 3.0, 1.0), 2: (1.5, 3.5, 1.2), 3: (1.5, 4.0, 1.4)}


def test_control_domains_are_left_out_of_worst_domain_and_mean(group):
    """web, the worst domain of every run, is a control: both figures are those of code, -.5, -.25, 0."""
    groups = with_controls([group("main", MAIN), group("natural", NATURAL)], ["web"])
    study = compare(groups)
    summary = study.comparisons[0].summary
    assert summary[WORST].differences == summary[UNIFORM_MEAN].differences == (-0.5, -0.25, 0.0)
    assert summary[TOKEN_MEAN].differences == pytest.approx((0.2, 0.0, -0.2))
    assert study.comparisons[0].domains.keys() == {"code", "web"}
    assert "web is a control: left out of worst domain and uniform mean, not of the token mean." in findings(study)
    for names, wrong in ((["noise"], "noise"), (["code", "web"], "code, web")):
        with pytest.raises(ConfigError) as error:
            with_controls(groups, names)
        assert error.value.faults[0].value == wrong


def test_figures_by_hand(group):
    """Differences of the worst domain -1, -1.5, -2; of the mean -.75, -.875, -1; of the token mean +.2, 0, -.2."""
    study = compare([group("main", MAIN), group("natural", NATURAL)])
    summary = study.comparisons[0].summary
    assert summary[WORST].differences == (-1.0, -1.5, -2.0)
    assert summary[UNIFORM_MEAN].differences == (-0.75, -0.875, -1.0)
    assert summary[WORST].paired.standard_deviation == 0.5
    assert study.comparisons[0].visible == {"web": -1}
    assert verdict(study) == (
        "Over 3 paired seeds, main is better than natural in the worst domain (web: -1.500 [-2.742, -0.258]) and in "
        "the mean (-0.875 [-1.186, -0.564]) (nats per token)."
    )
    assert summary[TOKEN_MEAN].paired.sign == 0
    sentences = findings(study)
    assert sentences[0].startswith(
        "Of 2 domains, main against natural is better on 1 (web -1.500) and worse on 0 beyond"
    )
    shared = "The 3 pairs of main and natural share seed, initial weights, training windows, steps and held-out text."
    assert shared in sentences


def test_no_difference_and_one_seed_are_said(group):
    main, natural = group("main", MAIN), group("natural", {**NATURAL, 3: (1.5, 1.0, 1.4)})
    text = verdict(compare([main, natural]))
    assert text.startswith("Over 3 paired seeds, no difference between main and natural can be seen in the worst")
    single = compare([group("m", {1: MAIN[1]}), group("n", {1: NATURAL[1]})])
    assert verdict(single) == (
        "One run of each cannot tell: m against n is -1.000 in the worst domain (web) and -0.750 in the mean "
        "(nats per token)."
    )
    assert verdict(compare([main])).startswith("Nothing is compared with main")


def test_seeds_in_one_group_only_are_left_out_and_named(group):
    study = compare([group("main", MAIN), group("natural", {**NATURAL, 4: (0.0, 0.0, 0.0)})])
    assert study.comparisons[0].pairing.seeds == (1, 2, 3)
    assert "Left out, because only one of main and natural has the seed: 4." in study.notes
    assert held_out_table(study).rows[0][:3] == ("web", 2.0, 3.5)
    with pytest.raises(ConfigError, match="need a seed in common"):
        compare([group("a", {1: MAIN[1], 2: MAIN[2]}), group("b", {8: MAIN[1], 9: MAIN[2]})])


def test_what_a_pair_does_not_share_is_named(group):
    other = group("natural", NATURAL, gpt={**GPT, "hidden_size": 96}, held_out_content="other")
    study = compare([group("main", MAIN), other])
    assert verdict(study) == "main and natural cannot be compared, since they differ in held-out text."
    assert "The runs differ in hidden_size: main 64, natural 96." in study.notes
    assert "The 3 pairs of main and natural share seed, training windows and steps." in study.notes
    branched = [{"iteration": 5, "name": "branch", "before": "runs/a", "now": "runs/" + name} for name in "bc"]
    pair = [group(name, {1: MAIN[1]}, overrides=[branched[place]]) for place, name in enumerate(("b", "c"))]
    assert compare(pair).comparisons[0].pairing.differing == ()
    other_parent = group("d", {1: MAIN[1]}, overrides=[{**branched[0], "before": "runs/e"}])
    named = [each.name for each in compare([pair[0], other_parent]).comparisons[0].pairing.differing]
    assert named == ["settings changed on resuming"]
    old = Group("old", (replace(other.runs[0], config={"settings": {"data": {"seed": 1}}}),))
    notes = compare([Group("new", (replace(old.runs[0], path=old.runs[0].path / "new"),)), old]).notes
    assert any(note.startswith("Not recorded by new and old, and so not checked: hidden_size, train") for note in notes)


def test_bits_per_byte_are_preferred_and_never_mixed_with_nats(group):
    bits, nats = group("main", MAIN, bits=True), group("natural", NATURAL)
    study = compare([bits, group("uniform", NATURAL, bits=True)])
    assert study.unit is Unit.BITS
    assert study.comparisons[0].summary[WORST].differences == (-0.5, -0.75, -1.0)
    assert "bits per byte" in verdict(study)
    mixed = compare([bits, nats])
    assert mixed.unit is Unit.NATS
    assert any("not every run knows the bytes" in note for note in mixed.notes)
    # A domain of 0 bytes has no finite bits per byte.
    evaluation = bits.runs[0].evaluations[0]
    unknown = replace(evaluation, bits=replace(evaluation.bits, losses={"code": float("nan"), "web": 1.0}))
    assert list_runs([Group("x", (replace(bits.runs[0], evaluations=(unknown,)),))]).unit is Unit.NATS
    single = list_runs([Group("x", bits.runs[:1])])
    assert held_out_table(single).rows == (("code", 0.5, "[0.500, 0.750]"), ("web", 1.0, ""))


def test_different_tokenizers_are_compared_in_bits_per_byte_on_the_same_text(group):
    """A window of 64 tokens at 2 nats a bit of loss a byte is 184.7 bytes; 5 of them leave 77 of 1,000 bytes unread."""
    text = {name: {"documents": 7, "bytes": 1000, "sizes_sha256": "a" * 64} for name in NAMES}
    ours = {"tokenizer_sha256": "1" * 64, "held_out_content": "ids", "data_fingerprint": "f", "held_out_text": text}
    theirs = {**ours, "tokenizer_sha256": "2" * 64, "held_out_content": "others", "data_fingerprint": "g"}

    def study(number=0, bits=True, windows=5, **changes):
        main = group(f"main{number}", MAIN, bits=bits, windows=5, **ours)
        natural = group(f"natural{number}", NATURAL, bits=bits, windows=windows, **{**theirs, **changes})
        return compare([replace(main, name="main"), replace(natural, name="natural")])

    same = study()
    assert "main is better than natural in the worst domain" in verdict(same)
    assert "(they also differ in tokenizer, data fingerprint) (bits per byte)" in verdict(same)
    notes = " ".join(same.notes)
    assert "share seed, initial weights, training windows, steps and held-out text." in notes
    assert "The held-out text is the same (14 documents, 2,000 bytes, alike in each domain)" in notes
    assert "in bytes of text: main 185, natural 185;" in notes
    assert "cannot be compared" not in notes
    # Another text, a part of it, unknown text, or no bits per byte.
    other = {**text, "web": {**text["web"], "bytes": 999}}
    cases = (
        ({"held_out_text": other}, "such as the documents of web: main 7 of 1000 bytes, natural 7 of 999 bytes."),
        ({"windows": 3}, "Only a part was read for natural: evaluate without --eval-iters."),
        ({"held_out_text": None}, "Not recorded for natural: whether the text is the same."),
        ({"bits": False}, "main 111111111111..., natural 222222222222.... Their held-out losses cannot be compared."),
    )
    for number, (changes, sentence) in enumerate(cases, 1):
        refused = study(number, **changes)
        assert "main and natural cannot be compared, since they differ in held-out text" in verdict(refused), changes
        assert sentence in " ".join(refused.notes)


def test_token_means_of_two_definitions_are_not_compared(write_run, rows):
    line = rows[1](2, {"code": 1.0, "web": 2.0}, 1.5)
    runs = {"old": line, "new": {**line, "eval_token_mean_interval": [1.4, 1.6]}}
    groups = [Group(name, (read_run(write_run(name, [each])),)) for name, each in runs.items()]
    study = compare(groups)
    assert list(study.comparisons[0].summary) == [WORST, UNIFORM_MEAN]
    assert any(note.startswith("old and new have no token mean in common") for note in study.notes)


def test_a_main_models_weights_are_checked_against_the_proxys(group, proxies):
    def check(*weights):
        names = [f"main{weights}{seed}" for seed in (1, 2)]
        mixtures = zip(names, (1, 2), weights, strict=True)
        runs = [group(name, {seed: MAIN[seed]}, weights=(w, 1 - w)).runs[0] for name, seed, w in mixtures]
        return check_learned_weights(Group("main", tuple(runs)), proxies)

    right, sentences = check(0.75, 0.25)
    assert (right, sentences) == (
        True,
        ["Every run of main samples by the weights that the proxy with its seed learned (compared by content)."],
    )
    assert check(0.25, 0.25)[1][1] == "main seed 1 samples by the weights of proxy seed 2."
    assert check(0.5, 0.5)[1][0] == "main seed 1 samples by the weights of the mean over the proxies."
    right, sentences = check(0.6, 0.25)
    assert not right
    assert "main seed 1 does not sample by the weights that a given proxy learned." in sentences
    study = compare([group("main", {1: MAIN[1]}, weights=(0.6, 0.4)), proxies])
    assert not study.weights_match


def test_weights_and_epochs_by_hand(group, proxies):
    """1,000 tokens by (.75, .25), the natural weights, of domains of 300 and 100 tokens."""
    study = compare([group("main", {1: MAIN[1]}, weights=(0.75, 0.25)), proxies], {"code": 300, "web": 100})
    table = weights_table(study)
    assert [column.name for column in table.columns][1:] == [
        *("training tokens", "natural", "learned", "lowest", "highest", "at the end", "main epochs")
    ]
    assert table.rows[0] == ("code", 300.0, 0.75, 0.5, 0.25, 0.75, 0.5, 2.5)


def test_epochs_of_a_branch_count_both_mixtures(group):
    """5 steps of 200 tokens: 4 by (.25, .75), the last by (.75, .25), of 100 tokens each."""
    change = {"iteration": 4, "name": "sampling_weights", "before": {"code": 0.25, "web": 0.75}}
    branch = group("main", {1: MAIN[1]}, weights=(0.75, 0.25), overrides=[{"name": "branch", "iteration": 4}, change])
    assert epochs(branch.runs[0], {"code": 100, "web": 100}) == pytest.approx({"code": 3.5, "web": 6.5})


def test_a_run_that_was_killed_is_named_in_the_verdict(group):
    main, natural = group("main", MAIN), group("natural", NATURAL)
    killed = replace(natural.runs[1], evaluations=(replace(natural.runs[1].evaluations[0], iteration=4),))
    study = compare([main, replace(natural, runs=(natural.runs[0], killed, natural.runs[2]))])
    assert verdict(study).endswith("[-1.186, -0.564]) (they also differ in evaluated step) (nats per token).")
    assert "The 3 pairs of main and natural share seed, initial weights, training windows and held-out text." in (
        study.notes
    )
    assert "The runs differ in evaluated step: main 9, natural 4." in study.notes
    assert "The runs of natural differ in evaluated step: seed 1 9, seed 2 4, seed 3 9." in study.notes


def test_runs_of_a_group_that_are_not_of_one_configuration_are_named(group):
    mixed = Group("main", (*group("a", {1: MAIN[1]}).runs, *group("b", {2: MAIN[2]}, lr=0.5).runs))
    slow = replace(mixed, runs=(replace(mixed.runs[0], config={**mixed.runs[0].config, "lr": 0.1}), mixed.runs[1]))
    assert "The runs of main differ in lr: seed 1 0.1, seed 2 0.5." in compare([slow]).notes


def test_a_run_in_two_groups_is_refused(group):
    natural = group("natural", NATURAL)
    with pytest.raises(ConfigError, match="its difference to itself is 0"):
        compare([Group("main", (natural.runs[0], *group("main", MAIN).runs[1:])), natural])


def test_faults_of_groups_are_reported_at_once(group, write_run, rows):
    twice = Group("twice", group("a", {1: MAIN[1]}).runs * 2)
    empty = Group("empty", (read_run(write_run("e", [{"iteration": 1, "loss": 2.0}])),))
    nan = float("nan")
    diverged = Group("diverged", (read_run(write_run("d", [rows[1](2, {"code": nan, "web": 1.0}, 1.0)])),))
    with pytest.raises(ConfigError) as caught:
        compare([twice, empty, diverged], {"code": 1})
    message = str(caught.value)
    for part in ("these have seed 1", "at least one evaluation line", "diverged", "not in the manifest: web"):
        assert part in message


def test_the_console_fits_a_terminal_with_hundreds_of_domains(write_run, rows):
    names = [f"a domain with a long name, number {n}" for n in range(300)]
    groups = []
    for name, shift in (("main", 0.0), ("natural", 0.1), ("uniform", 0.2), ("unimax", 0.3)):
        runs = []
        for seed in (1, 2, 3):
            losses = {each: 1 + shift * (n % 7 - 3) + 0.01 * seed * shift for n, each in enumerate(names)}
            path = write_run(f"{name}{seed}", [rows[1](2, losses, 1.0)], config={"phase": "main", "seed": seed})
            runs.append(read_run(path))
        groups.append(Group(name, tuple(runs)))
    study = compare(groups)
    lines = console_text(study).split("\n")
    assert len(lines) <= 37
    assert max(map(len, lines)) <= 120
    assert any(line.startswith("... 291 more") for line in lines)
    assert any(line.startswith("Over 3 paired seeds, ") for line in lines)
    assert json.dumps(verdict(study)).count("the worst domain") == 3
