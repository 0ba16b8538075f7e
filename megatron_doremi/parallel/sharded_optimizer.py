"""ZeRO 2 (Rajbhandari et al. 2020): each replica owns a range of the optimizer's state and of the gradients' sums.

Parameters lie in buckets, one for each group of the torch optimizer, and each replica owns an equal range of every
bucket. As soon as a backward pass has computed all gradients of a bucket, they are reduce-scattered in float32: every
replica receives its range of the mean, and adds it to its sum over micro-batches. DeepSpeed's own ZeRO 2 all-reduces
the gradients, which is twice the traffic, after the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from megatron_doremi.parallel.bucket_order import BucketOrder
from megatron_doremi.parallel.collectives import Started, all_gather_into, finished, start_scatter_sum
from megatron_doremi.parallel.groups import TensorGroup

# Buckets whose reduction may be under way while another one is filled.
_MAX_UNDER_WAY = 1


@dataclass(frozen=True)
class Piece:
    """The part of a parameter that a replica owns.

    Attributes:
        parameter: this rank's shard of the model's.
        start: the first element of the part within it, flattened.
        count: elements, at least 1.
        bucket: its number.
        offset: of the first element within this replica's range of the bucket.
    """

    parameter: nn.Parameter
    start: int
    count: int
    bucket: int
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """[count], the part of a tensor shaped like the replica's range of the bucket."""
        return tensor.narrow(0, self.offset, self.count)


class _Bucket:
    """Parameters that are views of one tensor.

    Attributes:
        weights: [replicas x length], the parameters in their order, then padding.
        own: [length], this replica's range of it.
        master: [length] float32 weights of that range.
        total: [length] float32 sum of its gradients; None before the first micro-batch.
    """

    total: Tensor | None = None

    def __init__(self, parameters: list[nn.Parameter], replicas: TensorGroup):
        self.parameters = parameters
        self.starts = [0, *accumulate(p.numel() for p in parameters)]
        # Ranges of an even length: NCCL wants addresses that are multiples of 4 bytes.
        length = -(-self.starts[-1] // (2 * replicas.size)) * 2
        self.weights = parameters[0].new_zeros(replicas.size * length)
        for parameter, view in zip(parameters, self.views(self.weights), strict=True):
            view.copy_(parameter.detach().reshape(-1))
            parameter.data = view.view_as(parameter)
        self.first = replicas.rank * length
        self.own = self.weights.narrow(0, self.first, length)
        self.master = self.own.float().clone()

    def views(self, flat: Tensor) -> list[Tensor]:
        """The vectors of a tensor shaped like `weights` that belong to the parameters."""
        return [flat[start:stop] for start, stop in pairwise(self.starts)]

    def pieces(self, number: int) -> Iterator[Piece]:
        """What the replica owns of the parameters; `number` is the bucket's."""
        stop_of_own = self.first + len(self.own)
        for parameter, (start, stop) in zip(self.parameters, pairwise(self.starts), strict=True):
            left, right = max(start, self.first), min(stop, stop_of_own)
            if left < right:
                yield Piece(parameter, left - start, right - left, number, left - self.first)


class ShardedOptimizer:
    """A torch optimizer of float32 master weights, each replica's range of them, and the sharded gradients.

    It takes the place of DeepSpeed's; the engine calls `step`, `zero_grad` and `set_gradient_accumulation_boundary`.
    """

    @torch.no_grad()
    def __init__(self, optimizer: torch.optim.Optimizer, replicas: TensorGroup):
        """Moves the parameters into buckets, and registers hooks on them.

        Args:
            optimizer: without state; its groups are the buckets, in the order in which backward passes fill them.
        """
        self.optimizer, self._replicas = optimizer, replicas
        self._buckets: list[_Bucket] = []
        for group in optimizer.param_groups:
            self._buckets.append(_Bucket(group["params"], replicas))
            group["params"] = [self._buckets[-1].master]
        self._pieces = [piece for number, each in enumerate(self._buckets) for piece in each.pieces(number)]
        self._order = BucketOrder([each.parameters for each in self._buckets], lambda n: self._reduce(self._buckets[n]))
        self._under_way: list[tuple[_Bucket, Started]] = []

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The torch optimizer's groups."""
        return self.optimizer.param_groups

    def masters(self) -> list[Tensor]:
        """[length] float32 weights of this replica's range of each bucket."""
        return [bucket.master for bucket in self._buckets]

    def piece_of(self, parameter: nn.Parameter) -> Piece | None:
        """What this replica owns of a parameter; None: nothing."""
        return next((piece for piece in self._pieces if piece.parameter is parameter), None)

    def start(self) -> None:
        """Called before each backward pass."""
        assert not self._under_way
        self._order.start()

    @torch.no_grad()
    def _reduce(self, bucket: _Bucket) -> None:
        while len(self._under_way) > _MAX_UNDER_WAY:
            self._add_oldest()
        flat = torch.empty_like(bucket.weights, dtype=torch.float32)
        gradients = [parameter.grad.reshape(-1) for parameter in bucket.parameters if parameter.grad is not None]
        torch._foreach_copy_(bucket.views(flat), gradients)
        del gradients
        flat[bucket.starts[-1] :] = 0.0
        for parameter in bucket.parameters:
            parameter.grad = None
        if self._replicas.size == 1:
            self._add(bucket, flat)
            return
        started = start_scatter_sum(flat.view(self._replicas.size, -1), self._replicas)
        self._under_way.append((bucket, started))

    def _add_oldest(self) -> None:
        bucket, started = self._under_way.pop(0)
        self._add(bucket, finished(started).view(-1).mul_(1.0 / self._replicas.size))

    def _add(self, bucket: _Bucket, gradients: Tensor) -> None:
        bucket.total = gradients if bucket.total is None else bucket.total.add_(gradients)

    @torch.no_grad()
    def finish(self) -> None:
        """Called after each backward pass: waits for its reductions."""
        self._order.finish()
        while self._under_way:
            self._add_oldest()

    def gradients(self) -> list[Tensor]:
        """[length] float32 sums over the micro-batches of this replica's range of each bucket."""
        totals = [bucket.total for bucket in self._buckets if bucket.total is not None]
        assert len(totals) == len(self._buckets), "a parameter got no gradient"
        return totals

    def gradient_pieces(self, counted: Callable[[nn.Parameter], bool]) -> list[Tensor]:
        """This replica's pieces of the gradients of parameters that are `counted`, flat."""
        totals = self.gradients()
        return [piece.of(totals[piece.bucket]) for piece in self._pieces if counted(piece.parameter)]

    @torch.no_grad()
    def step(self) -> None:
        """Updates this replica's range of the weights and gathers the others'; a collective call."""
        for bucket, total in zip(self._buckets, self.gradients(), strict=True):
            bucket.master.grad = total
        self.optimizer.step()
        self.zero_grad()
        for bucket in self._buckets:
            bucket.own.copy_(bucket.master)
            if self._replicas.size > 1:
                all_gather_into(bucket.weights, bucket.own, group=self._replicas.group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the sums."""
        for bucket in self._buckets:
            bucket.total = bucket.master.grad = None

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """The engine says whether a micro-batch is a step's last; all are treated alike."""
