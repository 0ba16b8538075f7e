"""The runs of a round and their flags, from one command line: each flag goes to the phases that read it. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_doremi.config import SECTIONS, Config
from megatron_doremi.errors import Fault
from megatron_doremi.planning_settings import PlanningConfig
from megatron_doremi.rounds.folder import RoundsFolder
from megatron_doremi.settings import PROXY, REFERENCE, SCORE, flag_of, phases_of, without_unread

SCORES = "scores"
# What the rounds set themselves, and flags that would end a run early or mix the logs of all runs.
_TAKEN = {
    "phase": "the rounds have a reference and a proxy each",
    "load": "the same command resumes",
    "reference_load": "the reference of a round is the one that it trains",
    "reference_losses": "--record-losses records the reference's losses and gives them to the proxy",
    "shard": "a round is scored at once",
    "num_shards": "a round is scored at once",
    "exit_interval": "every run trains to its end; --exit-duration-in-mins ends the rounds early",
    "tensorboard_dir": "each run has a folder of its own",
    "dry_run_world_size": "a dry run plans for --nproc-per-node ranks",
    "suggest_layout": "pretrain_doremi.py --dry-run --suggest-layout plans one phase",
    "device_memory_gib": "only for the plan of one phase",
    **dict.fromkeys((field.name for field in dataclasses.fields(PlanningConfig)), "only for the plan of one phase"),
}
# Settings that may change from one start to the next.
_CHANGEABLE = (
    "phase",
    # The data may move; what they are is recorded beside these settings.
    "domains",
    "micro_batch_size",
    "eval_iters",
    "eval_interval",
    "allow_tokenizer_mismatch",
    "reference_load",
)


@dataclass(frozen=True)
class Stage:
    """A run of a round.

    Attributes:
        number: of the round, from 1.
        seed: from 1.
        phase: reference, score or proxy.
        folder: its --save folder.
        argv: flags of pretrain_doremi.py.
    """

    number: int
    seed: int
    phase: str
    folder: str
    argv: tuple[str, ...]


def taken_faults(given: Mapping[str, Any]) -> list[Fault]:
    """Faults of flags that rounds do not take, or that have no effect in them."""
    faults = [
        Fault(flag_of(name), "given", f"not a flag of rounds: {why}", "leave it out")
        for name, why in _TAKEN.items()
        if name in given
    ]
    if given.get("doremi_objective") == "hardest":
        rule = "an objective that reads the reference: otherwise every round learns the same"
        faults.append(Fault("--doremi-objective", "hardest", rule, "give excess or easiest"))
    return faults


def stages(
    given: Mapping[str, Any], folder: RoundsFolder, number: int, seeds: int, first_seed: int, record_losses: bool
) -> Iterator[Stage]:
    """The runs of a round, in their order.

    Args:
        given: the flags of the command line by name: text, a list of words, or True.
        number: of the round, from 1.
        first_seed: --seed of the first seed; the others follow.
        record_losses: record the reference's losses before the proxy trains, which otherwise runs it on each batch.
    """
    for seed in range(1, seeds + 1):
        reference, scores, proxy = (str(folder.run(number, seed, name)) for name in (REFERENCE, SCORES, PROXY))
        of_seed = {**given, "seed": str(first_seed + seed - 1)}
        weights = {"domain_weights": str(folder.reference_weights(number))} if number > 1 else {}
        yield Stage(number, seed, REFERENCE, reference, _argv(REFERENCE, {**of_seed, **weights}, reference))
        # The reference's mixture is not the proxy's, which samples all domains alike.
        of_seed.pop("domain_weights", None)
        of_seed.pop("domain_names", None)
        losses = {"reference_load": reference}
        if record_losses:
            yield Stage(number, seed, SCORE, scores, _argv(SCORE, {**of_seed, **losses}, scores))
            losses = {"reference_losses": scores}
        yield Stage(number, seed, PROXY, proxy, _argv(PROXY, {**of_seed, **losses}, proxy))


def _argv(phase: str, given: Mapping[str, Any], save: str) -> tuple[str, ...]:
    """The flags that a phase reads."""
    words = ["--phase", phase, "--save", save, *([] if phase == SCORE else ["--load", save])]
    for cls in SECTIONS.values():
        for field in dataclasses.fields(cls):
            if field.name in given and phase in phases_of(cls, field):
                words += _words(field.name, given[field.name])
    return tuple(words)


def _words(name: str, value: Any) -> Sequence[str]:
    if value is True:
        return [flag_of(name)]
    return [flag_of(name), *([value] if isinstance(value, str) else value)]


def fixed_settings(reference: Config, proxy: Config) -> dict[str, Any]:
    """The settings that the runs of all rounds share, and that must not change between two starts of the rounds.

    Args:
        reference, proxy: settings of the first round's runs.
    """
    settings: dict[str, Any] = {}
    for section, config in (("data", reference), ("model", reference), ("optimizer", reference), ("doremi", proxy)):
        for name, value in dataclasses.asdict(getattr(config, section)).items():
            if name not in _CHANGEABLE and name not in _TAKEN:
                settings[name] = list(value) if isinstance(value, tuple) else value
    return settings


def changed_settings(recorded: Mapping[str, Any], now: Mapping[str, Any], path: str) -> list[Fault]:
    """Faults of settings that differ from those of the rounds in a folder, where runs read them."""
    recorded, now = without_unread(recorded), without_unread(now)
    return [
        Fault(
            flag_of(name),
            str(value),
            f"{recorded[name]} as in {path}, in every round",
            "give that value, or another --save for new rounds",
        )
        for name, value in now.items()
        if name in recorded and recorded[name] != value
    ]
