"""The replica check: what must be identical on several ranks is hashed and compared every few steps.

Three things can drift apart silently: the domain weights and the blend's state, which every rank computes
for itself; the parameters of replicas, which differ only if a gradient was not reduced; and, within a stage, the
parameters that are not sharded over tensor ranks. A run whose ranks differ is stopped: its numbers mean nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_doremi.errors import RunError
from megatron_doremi.model.unpipelined import GPT
from megatron_doremi.parallel.deepspeed_internals import is_partitioned, local_shard
from megatron_doremi.parallel.exchange import gather_json
from megatron_doremi.parallel.parameters import spec_of
from megatron_doremi.parallel.topology import Topology

_CHUNK = 1 << 22
_BYTES_TO_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaMismatch(RunError):
    """Ranks that must be identical are not: a fault of ours or of a machine, never of the input."""


@dataclass(frozen=True)
class ReplicaDigest:
    """Hashes of what a rank holds.

    Attributes:
        rank, pipe, tensor: its place.
        part: which shard it holds of parameters that ZeRO 3 shards over the data group; 0 if it holds them in full.
        state: of the run's own state, the same on all ranks.
        parameters: of its parameters, the same on all replicas.
        replicated: of the parameters that are not sharded, the same on all tensor ranks of a stage.
    """

    rank: int
    pipe: int
    tensor: int
    part: int
    state: str
    parameters: str
    replicated: str


def bits_hash(tensors: Iterable[Tensor]) -> str:
    """A hash of the bits of tensors that is computed where they lie: a number a tensor travels, not the tensor."""
    sums = []
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(_BYTES_TO_INTEGER[tensor.element_size()]).flatten()
        total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
        for start in range(0, len(bits), _CHUNK):
            part = bits[start : start + _CHUNK].long()
            # Places count: two values that changed sides must not cancel. Products wrap around, as they should.
            places = torch.arange(start + 1, start + 1 + len(part), device=part.device)
            total += torch.stack((part.sum(), (part * places * 0x9E3779B1).sum()))
        sums.append(total)
    numbers = torch.stack(sums).tolist() if sums else []
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()


def digest(module: GPT, state: Any, topology: Topology) -> ReplicaDigest:
    """Hashes what this rank holds; `state` is anything that JSON takes."""
    held, whole = [], []
    for _, parameter in module.model_parameters():
        part = local_shard(parameter)
        held.append(part)
        if spec_of(parameter).dim is None:
            whole.append(part)
    partitioned = any(is_partitioned(parameter) for _, parameter in module.model_parameters())
    text = json.dumps(state, sort_keys=True)
    return ReplicaDigest(
        topology.rank,
        topology.pipe_rank,
        topology.tensor_rank,
        topology.data_rank if partitioned else 0,
        hashlib.sha256(text.encode()).hexdigest(),
        bits_hash(held),
        bits_hash(whole),
    )


def find_mismatches(digests: Sequence[ReplicaDigest]) -> list[str]:
    """What does not agree, each with the ranks that differ from most of their group."""
    found = []
    for what, key, value in (
        ("domain weights or blend", lambda d: (), lambda d: d.state),
        ("parameters of replicas", lambda d: (d.pipe, d.tensor, d.part), lambda d: d.parameters),
        ("parameters that tensor ranks share", lambda d: (d.pipe, d.part), lambda d: d.replicated),
    ):
        groups: dict[Any, list[ReplicaDigest]] = defaultdict(list)
        for entry in digests:
            groups[key(entry)].append(entry)
        for group in groups.values():
            most = Counter(value(entry) for entry in group).most_common(1)[0][0]
            odd = [entry.rank for entry in group if value(entry) != most]
            if odd:
                others = [entry.rank for entry in group if value(entry) == most]
                found.append(f"{what}: {_ranks(odd)} against {_ranks(others)}")
    return found


def check_replicas(module: GPT, state: Any, topology: Topology, iteration: int) -> None:
    """Compares all ranks; a collective call.

    Raises:
        ReplicaMismatch: on every rank, naming what differs and where.
    """
    own = digest(module, state, topology)
    found = find_mismatches([ReplicaDigest(**entry) for entry in gather_json(asdict(own))])
    if found:
        raise ReplicaMismatch(f"after iteration {iteration} ranks disagree: " + "; ".join(found))


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
