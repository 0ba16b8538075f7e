"""Where a run goes on: the newest complete checkpoint of --load, checked against what this run is, before any model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_doremi.config import PROXY, Config, GPTConfig, global_batch_size
from megatron_doremi.data.blend import BlendState
from megatron_doremi.doremi.domain_weights import DomainWeights
from megatron_doremi.errors import MALFORMED, ConfigError, Fault, raise_if_any
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.training.checkpoint import check_files, newest_checkpoint, read_state
from megatron_doremi.training.setup import RunData

_REMEDY = "go on with the settings and data that the run began with, or start a new folder"
_REMEDIES = {
    "global_batch_size": "give --global-batch-size; its default follows from the number of ranks",
    "sampling_weights": "give the weights that the run began with, or --change-domain-weights to go on with these",
}


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint that a run may go on from.

    Attributes:
        checkpoint: its folder.
        iteration: steps taken.
        blend: where the blend was.
        domain_weights: a proxy's.
        metrics_bytes: size of metrics.jsonl when the checkpoint was taken; None where the checkpoint does not say.
    """

    checkpoint: Path
    iteration: int
    blend: BlendState
    domain_weights: DomainWeights | None
    metrics_bytes: int | None = None


def trained_on(
    config: Config, gpt: GPTConfig, data: RunData, topology: Topology, reference: str | None
) -> dict[str, Any]:
    """What a run has to share with the checkpoint that it goes on from; every checkpoint holds it.

    Args:
        reference: tells a proxy's reference from another; None without one.
    """
    return {
        "phase": config.data.phase,
        "gpt": asdict(gpt),
        "data_fingerprint": data.manifest.fingerprint(),
        "sampling_weights": dict(zip(data.names, data.weights.tolist(), strict=True)),
        "seq_length": config.data.seq_length,
        "global_batch_size": global_batch_size(config, topology.world_size),
        "seed": config.data.seed,
        **({"reference": reference} if reference else {}),
    }


def resume_point(
    config: Config, run: Mapping[str, Any], names: tuple[str, ...], topology: Topology
) -> ResumePoint | None:
    """Where the run goes on; None where it starts. A collective call.

    Args:
        run: of `trained_on`.
        names: the domains.

    Raises:
        ConfigError: the checkpoint is of another run, with everything that differs, or is damaged.
    """
    # One rank looks, for what several see of a shared file system need not be the same.
    found: list[Any] = [None, []]
    if config.run.load and topology.rank == 0:
        found[0] = newest_checkpoint(Path(config.run.load), found[1].append)
        if found[0] is not None:
            print("".join(f"{line}\n" for line in found[1]), end="", file=sys.stderr)
    dist.broadcast_object_list(found)
    checkpoint, passed_over = found
    if checkpoint is None:
        # Starting over would throw away what the run has written.
        rule, remedy = "a complete checkpoint, or none at all", "copy it again, or delete the folder to start over"
        what = f"--load: checkpoints of {config.run.load}"
        raise_if_any([Fault(what, f"no complete one: {line}", rule, remedy) for line in passed_over])
        return None
    state = read_state(checkpoint)
    allowed = {"sampling_weights"} if config.data.change_domain_weights else set()
    raise_if_any(differences(state, checkpoint, {key: run[key] for key in run if key not in allowed}))
    check_files(checkpoint)
    try:
        blend = BlendState.from_dict(state["blend"], names)
        learned = None
        if config.data.phase == PROXY:
            learned = DomainWeights.from_dict(state["doremi"], names, "cpu")
    except MALFORMED as error:
        raise ConfigError(
            Fault(
                f"--load: {checkpoint}",
                f"state.json: {error!r}",
                "the blend's and the proxy's state of each domain",
                "delete this checkpoint to go on from an older one",
            )
        ) from error
    return ResumePoint(checkpoint, int(state["iteration"]), blend, learned, state.get("metrics_bytes"))


def differences(state: Mapping[str, Any], checkpoint: Path, run: Mapping[str, Any]) -> list[Fault]:
    """A fault for each entry of `run` that is another in the checkpoint's state."""
    return [
        Fault(
            f"--load: {checkpoint}",
            f"{key} {_short(state.get(key), value)}",
            f"this run's {key}, {_short(value, state.get(key))}",
            _REMEDIES.get(key, _REMEDY),
        )
        for key, value in run.items()
        if state.get(key) != value
    ]


def _short(value: Any, other: Any) -> Any:
    """A value for a message; of two mappings only the entries that differ."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        return {key: entry for key, entry in value.items() if other.get(key) != entry}
    return value
