"""Connections to the key-value store of a run, which rank 0 or torchrun hosts over TCP.

It listens on all interfaces without authentication; it holds JSON only, and nothing in it is executed.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar
from urllib.parse import urlsplit

import torch.distributed as dist

from megatron_doremi.cluster.heartbeat import Heartbeat
from megatron_doremi.cluster.launch import Launch
from megatron_doremi.errors import ConfigError, Fault, RunError

_SECONDS_TO_RESOLVE = 45.0
# For a store that torchrun hosts, which is up before the workers start, and for a reply once something listens.
_SECONDS_TO_ANSWER = 30.0
T = TypeVar("T")


def open_store(launch: Launch, timeout: float) -> dist.Store:
    """Connects to the store of the run; rank 0 hosts it, unless the launcher does.

    Args:
        timeout: seconds to wait for the host of the store.

    Raises:
        ConfigError: the host name does not resolve.
        RunError: nothing listens there in time, or another program listens there.
    """
    if not launch.rendezvous:
        return dist.HashStore()
    place = urlsplit(launch.rendezvous)
    if place.scheme == "file":
        return dist.FileStore(place.path, launch.world_size)
    host, port = str(place.hostname), int(place.port or 0)
    _resolve(host, port, launch)
    hosts = launch.rank == 0 and not launch.hosted
    if not hosts:
        limit = min(timeout, _SECONDS_TO_ANSWER) if launch.hosted else timeout
        _wait_for_listener(host, port, launch, limit)

    def connect() -> dist.Store:
        limit = timedelta(seconds=_SECONDS_TO_ANSWER)
        if launch.listener >= 0:
            listener = launch.listener
            return dist.TCPStore(host, port, None, True, limit, wait_for_workers=False, master_listen_fd=listener)
        return dist.TCPStore(host, port, None, hosts, limit, wait_for_workers=False, multi_tenant=True)

    try:
        store = call_with_timeout(connect, _SECONDS_TO_ANSWER)
    except TimeoutError as error:
        raise RunError(
            f"rank {launch.rank}: the process at {launch.rendezvous} does not answer as the rendezvous of a run: "
            "another program uses this port, or MASTER_ADDR is not the host of rank 0; export another MASTER_PORT"
        ) from error
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        if hosts and "EADDRINUSE" in reason:
            reason = f"port {port} of {socket.gethostname()} is in use: export another MASTER_PORT"
        raise RunError(f"rank {launch.rank}: no rendezvous at {launch.rendezvous}: {reason}") from error
    store.set_timeout(timedelta(seconds=timeout))
    return store


def call_with_timeout(function: Callable[[], T], seconds: float) -> T:
    """Calls a function that may never return, in a thread that is abandoned after `seconds`.

    Raises:
        TimeoutError: the function has not returned in time.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]


def _resolve(host: str, port: int, launch: Launch) -> None:
    end = time.monotonic() + _SECONDS_TO_RESOLVE
    reason = "no answer from the resolver"
    while (left := end - time.monotonic()) > 0:
        try:
            call_with_timeout(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), left)
            return
        except OSError as error:
            reason = str(error)
            # The name of a node that has just started may not be known yet.
            time.sleep(min(3.0, max(0.0, end - time.monotonic())))
    remedy = "export MASTER_ADDR with the host of rank 0 as this network knows it"
    rule = f"a host that resolves on {socket.gethostname()} (rank {launch.rank}): {reason}"
    raise ConfigError(Fault("MASTER_ADDR", host, rule, remedy))


def _wait_for_listener(host: str, port: int, launch: Launch, seconds: float) -> None:
    """Waits until a process listens there; PyTorch's own client would log a stack trace for each attempt."""
    end = time.monotonic() + seconds
    reason = ""
    while time.monotonic() < end:
        try:
            socket.create_connection((host, port), timeout=min(10.0, max(1.0, end - time.monotonic()))).close()
            return
        except OSError as error:
            reason = str(error)
            time.sleep(0.3)
    hint = "torchrun, which hosts the rendezvous, is gone" if launch.hosted else "is rank 0 on that host?"
    raise RunError(
        f"rank {launch.rank}: nothing listens at {launch.rendezvous} after {seconds:g} s "
        f"(--distributed-timeout-minutes): {reason}; {hint}"
    )


def second_connection(store: dist.Store) -> dist.Store:
    """Another connection to a store: a wait on one does not block the other."""
    if hasattr(store, "clone"):
        return store.clone()
    # torch 2.11 has no `clone`. Stores in a file or in memory have no connection.
    if isinstance(store, dist.TCPStore):
        return dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)
    return store


def get_keys(store: dist.Store, keys: Sequence[str]) -> list[bytes]:
    """The values of keys that are set, in one request if the store supports it."""
    if not keys:
        return []
    return store.multi_get(list(keys)) if has_extended_api(store) else [store.get(key) for key in keys]


def has_extended_api(store: dist.Store) -> bool:
    """Whether a store supports multi_get and append."""
    return bool(store.has_extended_api())  # type: ignore[attr-defined]


def read_heartbeats(store: dist.Store, ranks: Sequence[int]) -> dict[int, Heartbeat]:
    """The last heartbeats of ranks, each of which has sent one."""
    texts = get_keys(store, [f"heartbeat/{rank}" for rank in ranks])
    return {rank: Heartbeat.from_json(text) for rank, text in zip(ranks, texts, strict=True)}
