"""The replica check: state that must be identical on several ranks is hashed and compared every few steps.

Three kinds of state can diverge silently: the domain weights and the blend's state, which every rank computes itself;
the parameters of replicas, which diverge if a gradient was not reduced; and, within a stage, the parameters that are
not sharded over the tensor ranks. A run whose ranks differ is stopped, because its results are meaningless.
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
    """Ranks that must be identical are not: a bug of this program or an error of a machine, never of the input."""


@dataclass(frozen=True)
class ReplicaDigest:
    """Hashes of a rank's state and parameters.

    Attributes:
        rank, pipe, tensor: coordinates of the rank.
        part: its shard of parameters that ZeRO 3 shards over the data group; 0 without ZeRO 3.
        state: hash of the run's state, the same on all ranks.
        parameters: hash of its parameters, the same on all replicas.
        replicated: hash of the parameters that are not sharded, the same on all tensor ranks of a stage.
    """

    rank: int
    pipe: int
    tensor: int
    part: int
    state: str
    parameters: str
    replicated: str


def bits_hash(tensors: Iterable[Tensor]) -> str:
    """A hash of the bits of tensors. Sums are computed on the tensors' device; only two numbers per tensor leave it."""
    sums = []
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(_BYTES_TO_INTEGER[tensor.element_size()]).flatten()
        total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
        for start in range(0, len(bits), _CHUNK):
            part = bits[start : start + _CHUNK].long()
            # Weighted by position, so that exchanged values change the sum. Integer overflow wraps around, as intended.
            positions = torch.arange(start + 1, start + 1 + len(part), device=part.device)
            total += torch.stack((part.sum(), (part * positions * 0x9E3779B1).sum()))
        sums.append(total)
    numbers = torch.stack(sums).tolist() if sums else []
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()


def digest(module: GPT, state: Any, topology: Topology) -> ReplicaDigest:
    """Hashes this rank's parameters and `state`, which JSON must be able to represent."""
    local, replicated = [], []
    for _, parameter in module.model_parameters():
        part = local_shard(parameter)
        local.append(part)
        if spec_of(parameter).dim is None:
            replicated.append(part)
    partitioned = any(is_partitioned(parameter) for _, parameter in module.model_parameters())
    text = json.dumps(state, sort_keys=True)
    return ReplicaDigest(
        topology.rank,
        topology.pipe_rank,
        topology.tensor_rank,
        topology.data_rank if partitioned else 0,
        hashlib.sha256(text.encode()).hexdigest(),
        bits_hash(local),
        bits_hash(replicated),
    )


def find_mismatches(digests: Sequence[ReplicaDigest]) -> list[str]:
    """Describes each mismatch, with the ranks that differ from the majority of their group."""
    mismatches = []
    for subject, group_of, hash_of in (
        ("domain weights or blend", lambda d: (), lambda d: d.state),
        ("parameters of replicas", lambda d: (d.pipe, d.tensor, d.part), lambda d: d.parameters),
        ("parameters that tensor ranks share", lambda d: (d.pipe, d.part), lambda d: d.replicated),
    ):
        groups: dict[Any, list[ReplicaDigest]] = defaultdict(list)
        for rank_digest in digests:
            groups[group_of(rank_digest)].append(rank_digest)
        for group in groups.values():
            majority = Counter(map(hash_of, group)).most_common(1)[0][0]
            deviating = [member.rank for member in group if hash_of(member) != majority]
            if deviating:
                others = [member.rank for member in group if hash_of(member) == majority]
                mismatches.append(f"{subject}: {_ranks(deviating)} against {_ranks(others)}")
    return mismatches


def check_replicas(module: GPT, state: Any, topology: Topology, iteration: int) -> None:
    """Compares the hashes of all ranks; a collective call.

    Args:
        state: of the run, the same on all ranks; JSON must be able to represent it.
        iteration: the last completed one, for the message.

    Raises:
        ReplicaMismatch: on every rank, with the state and the ranks that differ.
    """
    local_digest = digest(module, state, topology)
    mismatches = find_mismatches([ReplicaDigest(**fields) for fields in gather_json(asdict(local_digest))])
    if mismatches:
        raise ReplicaMismatch(f"after iteration {iteration} ranks differ: " + "; ".join(mismatches))


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
