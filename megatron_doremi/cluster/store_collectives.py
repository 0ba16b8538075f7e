"""Waiting for ranks whose work takes long, where a collective would time out: by keys of the store at which all met.

Who waits does not mark the watchdog. It sees the progress of those who work, so that a run whose last worker hangs
still ends.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_doremi.errors import ConfigError, RunError, error_of, error_text

_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 1.0


def run_on_rank_0_via_store(store: dist.Store, name: str, rank: int, work: Callable[[], Any]) -> Any:
    """What rank 0 computes, on every rank, however long it takes.

    Args:
        name: of the key; used once in a run.
        work: called on rank 0 only; gives anything that JSON takes.

    Raises:
        ConfigError: on every rank, where `work` raises one.
        RunError: on every rank, where `work` raises one, or an OSError.
    """
    if rank == 0:
        try:
            value = work()
        except (ConfigError, RunError, OSError) as error:
            failure = error_text(error)
            store.set(name, json.dumps((None, failure)))
            raise error_of(failure) from error
        store.set(name, json.dumps((value, None)))
        return value
    _wait(store, [name], lambda: None)
    value, failure = json.loads(store.get(name))
    if failure is not None:
        raise error_of(failure)
    return value


def barrier_via_store(
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
