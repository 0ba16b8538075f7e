"""A barrier and a broadcast through the run's store, for work that may take longer than the timeout of a collective.

Waiting ranks report no progress to the watchdog, only working ranks do: if all working ranks hang, the run still ends.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_doremi.errors import ConfigError, RunError, error_from_json, error_to_json

_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 1.0


def run_on_rank_0_via_store(store: dist.Store, name: str, rank: int, work: Callable[[], Any]) -> Any:
    """Calls `work` on rank 0 and returns its result on every rank, however long it takes.

    For short work, `from_rank_0` (parallel/exchange.py) does the same by a collective.

    Args:
        name: of the key; used once in a run.
        work: returns anything that JSON can represent.

    Raises:
        ConfigError: on every rank, if `work` raises one.
        RunError: on every rank, if `work` raises one, or an OSError.
    """
    if rank == 0:
        try:
            value = work()
        except (ConfigError, RunError, OSError) as error:
            failure = error_to_json(error)
            store.set(name, json.dumps((None, failure)))
            raise error_from_json(failure) from error
        store.set(name, json.dumps((value, None)))
        return value
    _wait(store, [name], lambda: None)
    value, failure = json.loads(store.get(name))
    if failure is not None:
        raise error_from_json(failure)
    return value


def barrier_via_store(
    store: dist.Store, name: str, rank: int, world_size: int, meanwhile: Callable[[], None] = lambda: None
) -> None:
    """Waits until every rank has called this.

    Args:
        name: of the keys; used once in a run.
        meanwhile: called at least every second while this rank waits; may raise.
    """
    store.set(f"{name}/{rank}", "arrived")
    _wait(store, [f"{name}/{other}" for other in range(world_size)], meanwhile)


def _wait(store: dist.Store, keys: list[str], meanwhile: Callable[[], None]) -> None:
    # Polls: while a store waits for a key, it answers nothing else on this connection.
    pause = _FIRST_PAUSE
    while not store.check(keys):
        meanwhile()
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
