"""Exchange of small values between ranks, as JSON: nothing from a peer is unpickled."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_doremi.errors import ConfigError, RunError, error_from_json, error_to_json


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The values of all ranks of a group, in rank order; a collective call.

    Args:
        value: anything that JSON can represent; returned as JSON decodes it (tuples as lists).
        group: None: all ranks.
    """
    encoded = _encode(value)
    size = dist.get_world_size(group)
    if size == 1:
        return [_decode(encoded)]
    length = torch.tensor([len(encoded)], device=encoded.device)
    lengths = [torch.empty_like(length) for _ in range(size)]
    dist.all_gather(lengths, length, group=group)
    longest = int(torch.stack(lengths).max())
    padded = torch.zeros(longest, dtype=torch.uint8, device=encoded.device)
    padded[: len(encoded)] = encoded
    gathered = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(gathered, padded, group=group)
    return [_decode(part[: int(count)]) for part, count in zip(gathered, lengths, strict=True)]


def broadcast_json(value: Any, source: int = 0, group: dist.ProcessGroup | None = None) -> Any:
    """The value of one rank on every rank; a collective call.

    Args:
        value: read on rank `source` only.
        source: global rank.
        group: None: all ranks.
    """
    encoded = _encode(value if dist.get_rank() == source else None)
    if dist.get_world_size(group) == 1:
        return _decode(encoded)
    length = torch.tensor([len(encoded)], device=encoded.device)
    dist.broadcast(length, source, group=group)
    buffer = (
        encoded if dist.get_rank() == source else torch.empty(int(length), dtype=torch.uint8, device=encoded.device)
    )
    dist.broadcast(buffer, source, group=group)
    return _decode(buffer)


def from_rank_0(work: Callable[[], Any]) -> Any:
    """Calls `work` on rank 0 and returns its result on every rank; a collective call.

    For work that may take longer than the timeout of a collective, see `run_on_rank_0_via_store` in
    cluster/store_collectives.py.

    Args:
        work: returns anything that JSON can represent.

    Raises:
        ConfigError: on every rank, if `work` raises one.
        RunError: on every rank, if `work` raises one, or an OSError.
    """
    result, failure = None, None
    if dist.get_rank() == 0:
        try:
            result = work()
        except (ConfigError, RunError, OSError) as error:
            failure = error_to_json(error)
    result, failure = broadcast_json((result, failure))
    if failure is not None:
        raise error_from_json(failure)
    return result


def on_all_ranks(work: Callable[[], None]) -> None:
    """Calls `work` on every rank; a collective call.

    Raises:
        ConfigError: on every rank, that of the first rank whose `work` raises one.
    """
    failure = None
    try:
        work()
    except ConfigError as error:
        failure = error_to_json(error)
    failures = [each for each in gather_json(failure) if each is not None]
    if failures:
        raise error_from_json(failures[0])


def _encode(value: Any) -> Tensor:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)


def _decode(data: Tensor) -> Any:
    return json.loads(data.cpu().numpy().tobytes())
