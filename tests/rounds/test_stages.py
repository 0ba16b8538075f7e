"""One command line for the runs of all rounds: which flag goes where, and what is refused.

Run alone: python -m pytest tests/rounds/test_stages.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_doremi.arguments import parse_config
from megatron_doremi.errors import ConfigError
from megatron_doremi.rounds.folder import RoundsFolder
from megatron_doremi.rounds.stages import changed_settings, fixed_settings, stages
from tools.doremi_rounds import parse

FLAGS = (
    "--save out --domains d.json --train-iters 10 --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seed 7 "
    "--domain-weights natural --doremi-step-size 0.5 --lr 1e-3 --swiglu --save-interval 5 --global-batch-size 4"
)
FOLDER = RoundsFolder(Path("out"))


def given_of(words: str):
    return parse(words.split())


def runs_of(words: str, number: int, seeds: int = 1, record_losses: bool = False):
    _, given = given_of(words)
    return list(stages(given, FOLDER, number, seeds, 7, record_losses))


def test_each_flag_goes_to_the_phases_that_read_it():
    reference, proxy = (parse_config(stage.argv, 1) for stage in runs_of(FLAGS, 1))
    assert (reference.data.phase, proxy.data.phase) == ("reference", "proxy")
    assert reference.run.save == reference.run.load == "out/round-1/seed-1/reference"
    assert (reference.data.domain_weights, proxy.data.domain_weights) == ("natural", "")
    assert (proxy.doremi.doremi_step_size, proxy.doremi.reference_load) == (0.5, reference.run.save)
    assert reference.model == proxy.model
    assert reference.model.swiglu
    assert reference.run.save_interval == proxy.run.save_interval == 5


def test_a_later_round_samples_its_references_by_the_weights_of_the_one_before():
    first, scores, proxy, second, *_ = runs_of(FLAGS, 2, seeds=2, record_losses=True)
    configs = [parse_config(stage.argv, 1) for stage in (first, scores, proxy, second)]
    assert [config.data.phase for config in configs] == ["reference", "score", "proxy", "reference"]
    assert configs[0].data.domain_weights == configs[3].data.domain_weights == "out/round-2/reference_weights.json"
    assert [config.data.seed for config in configs] == [7, 7, 7, 8]
    assert configs[1].doremi.reference_load == configs[0].run.save
    assert configs[2].doremi.reference_losses == configs[1].run.save == "out/round-2/seed-1/scores"
    assert configs[2].doremi.reference_load == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--phase main", "--phase: given"),
        ("--load x --shard 1", "--load: given"),
        ("--exit-interval 5", "--exit-duration-in-mins ends the rounds early"),
        ("--doremi-objective hardest", "otherwise every round learns the same"),
        ("--seeds 0", "from 1 to 100"),
        ("--min-change 2", "between 0 and 1"),
        ("--max-round 3", "did you mean --max-rounds?"),
        ("--trainiters 3", "did you mean --train-iters?"),
        ("--judge", "given with --judge"),
    ],
)
def test_what_is_refused(words, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        given_of(f"{FLAGS} {words}")


def test_the_folder_is_needed():
    with pytest.raises(ConfigError, match="--save: not given"):
        given_of("--judge")


def test_settings_of_earlier_rounds_do_not_change():
    reference, proxy = (parse_config(stage.argv, 1) for stage in runs_of(FLAGS, 1))
    settings = fixed_settings(reference, proxy)
    assert (settings["lr"], settings["doremi_step_size"], settings["domain_weights"]) == (1e-3, 0.5, "natural")
    changed = (parse_config(s.argv, 1) for s in runs_of(FLAGS.replace("1e-3", "2e-3") + " --micro-batch-size 4", 1))
    faults = changed_settings(settings, fixed_settings(*changed), "out/rounds.json")
    assert [(fault.subject, fault.value) for fault in faults] == [("--lr", "0.002")]


@pytest.mark.parametrize(
    ("read_with", "unread"),
    [
        ({"lr_decay_style": "constant"}, {"min_lr": 1e-5}),
        ({"position_embedding_type": "learned_absolute"}, {"rotary_base": 5e5}),
        ({"doremi_weighting": "resample"}, {"doremi_update": "simultaneous", "doremi_normalization": "batch"}),
    ],
)
def test_rounds_that_began_with_flags_that_nothing_reads_go_on_without_them(read_with, unread):
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in read_with.items())
    now = fixed_settings(*(parse_config(stage.argv, 1) for stage in runs_of(f"{FLAGS} {flags}", 1)))
    assert now.items() >= read_with.items()
    assert changed_settings({**now, **unread}, now, "out/rounds.json") == []
    # The references sample by --domain-weights whatever the proxies do.
    assert len(changed_settings({**now, "domain_weights": "uniform"}, now, "out/rounds.json")) == 1
    name = next(iter(read_with))
    faults = changed_settings({**now, **unread, name: "another"}, now, "out/rounds.json")
    assert [fault.subject for fault in faults] == [f"--{name.replace('_', '-')}"]
