"""Waiting for ranks whose work takes long, where a collective would time out: by keys of the store at which all met.

Who waits does not mark the watchdog. It sees the progress of those who work, so that a run whose last worker hangs
still ends.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from megatron_doremi.errors import ConfigError, Fault, RunError

_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 1.0


def from_rank_0(store: dist.Store, name: str, rank: int, work: Callable[[], Any]) -> Any:
    """What rank 0 computes, on every rank, however long it takes.

    Args:
        name: of the key; used once in a run.
        work: called on rank 0 only; gives anything that JSON takes.

    Raises:
        ConfigError, RunError: of `work`, on every rank.
    """
    if rank == 0:
        try:
            value = work()
        except (ConfigError, RunError) as error:
            store.set(name, error_text(error))
            raise
        store.set(name, json.dumps({"value": value}))
        return value
    _wait(store, [name], lambda: None)
    entry = json.loads(store.get(name))
    if "value" not in entry:
        raise error_of(entry)
    return entry["value"]


def wait_for_all(
    store: dist.Store, name: str, rank: int, world_size: int, meanwhile: Callable[[], None] = lambda: None
) -> None:
    """Waits until every rank has called this.

    Args:
        name: of the keys; used once in a run.
        meanwhile: called now and then; may raise.
    """
    store.set(f"{name}/{rank}", "here")
    _wait(store, [f"{name}/{other}" for other in range(world_size)], meanwhile)


def _wait(store: dist.Store, keys: list[str], meanwhile: Callable[[], None]) -> None:
    # By turns: a store that waits for a key answers nobody else on this connection.
    pause = _FIRST_PAUSE
    while not store.check(keys):
        meanwhile()
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def error_text(error: ConfigError | RunError) -> str:
    """An error as JSON, for other ranks."""
    if isinstance(error, ConfigError):
        return json.dumps({"faults": [asdict(fault) for fault in error.faults]})
    return json.dumps({"error": str(error)})


def error_of(entry: dict[str, Any]) -> ConfigError | RunError:
    """The error that another rank wrote by `error_text`."""
    if "faults" in entry:
        return ConfigError([Fault(**fault) for fault in entry["faults"]])
    return RunError(entry["error"])
