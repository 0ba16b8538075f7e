"""The mean of gradients over replicas, reduced bucket by bucket beside the backward pass (Li et al. 2020).

A bucket is reduced as soon as the last micro-batch has added to all of its gradients, and those before it are under
way: in the same order on every rank. The backward pass computes gradients from the last layer to the first, and so go
the buckets. Copies of a tied parameter on other stages of a pipeline are summed before replicas are: their buckets come
last, after the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_doremi.parallel.bucket_order import BucketOrder

# 40 MiB in float32: large enough for a network's bandwidth, small enough that the last one is soon reduced.
BUCKET_ELEMENTS = 10 * 2**20


@dataclass(frozen=True)
class Bucket:
    """Parameters whose gradients are reduced together.

    Attributes:
        parameters: in any order.
        flat: their gradients, one after the other; None if each is a tensor of its own, `parameter.grad`.
    """

    parameters: tuple[nn.Parameter, ...]
    flat: Tensor | None


def loose_buckets(
    parameters: Sequence[nn.Parameter], elements: int = BUCKET_ELEMENTS, alone: Set[nn.Parameter] = frozenset()
) -> list[Bucket]:
    """Buckets of at least `elements` gradients, of parameters given from the first to the last; with fewer where they
    end, or beside one in `alone`, which has a bucket of its own."""
    return [Bucket(tuple(parameters[a:b]), None) for a, b in _runs(parameters, elements, alone)]


def flat_buckets(
    parameters: Sequence[nn.Parameter],
    flat: Tensor,
    elements: int = BUCKET_ELEMENTS,
    alone: Set[nn.Parameter] = frozenset(),
) -> list[Bucket]:
    """As `loose_buckets`, of gradients that lie in `flat`, [at least their number], in the order of `parameters`."""
    starts = [0, *accumulate(p.numel() for p in parameters)]
    return [Bucket(tuple(parameters[a:b]), flat[starts[a] : starts[b]]) for a, b in _runs(parameters, elements, alone)]


def _runs(parameters: Sequence[nn.Parameter], elements: int, alone: Set[nn.Parameter]) -> list[tuple[int, int]]:
    """Ranges of indices, from the last to the first; see `loose_buckets`."""
    runs: list[tuple[int, int]] = []
    stop = len(parameters)
    while stop:
        start = stop - 1
        total = parameters[start].numel()
        while start and total < elements and not {parameters[start], parameters[start - 1]} & alone:
            start -= 1
            total += parameters[start].numel()
        runs.append((start, stop))
        stop = start
    return runs


class GradientReduction:
    """Reduces the gradients of a step over the replicas, beside the backward pass of its last micro-batch."""

    def __init__(
        self, buckets: Sequence[Bucket], group: dist.ProcessGroup, size: int, tied: Set[nn.Parameter] = frozenset()
    ):
        """
        Args:
            buckets: in the order in which they are reduced; each parameter lies in one.
            size: ranks of the group.
            tied: parameters with a bucket of their own each, which `finish` reduces.
        """
        self._group, self._size = group, size
        self._beside = [each for each in buckets if not tied & set(each.parameters)]
        self._after = [each for each in buckets if tied & set(each.parameters)]
        self._order = BucketOrder([each.parameters for each in self._beside], lambda n: self._reduce(self._beside[n]))
        self._under_way: list[tuple[dist.Work, Tensor]] = []

    def start(self) -> None:
        """Called before the backward pass of a step's last micro-batch."""
        self._order.start()

    def _reduce(self, bucket: Bucket) -> None:
        tensor = torch.cat([grad.reshape(-1) for grad in _gradients(bucket)]) if bucket.flat is None else bucket.flat
        work = dist.all_reduce(tensor, group=self._group, async_op=True)
        assert work is not None
        self._under_way.append((work, tensor))

    @torch.no_grad()
    def finish(self) -> None:
        """Reduces tied parameters and waits; afterwards the gradients are means over the replicas."""
        self._order.finish()
        for bucket in self._after:
            self._reduce(bucket)
        for bucket, (work, tensor) in zip([*self._beside, *self._after], self._under_way, strict=True):
            work.wait()
            tensor.mul_(1.0 / self._size)
            if bucket.flat is None:
                grads = _gradients(bucket)
                for grad, mean in zip(grads, tensor.split([grad.numel() for grad in grads]), strict=True):
                    grad.copy_(mean.view_as(grad))
        self._under_way = []


def _gradients(bucket: Bucket) -> list[Tensor]:
    grads = [parameter.grad for parameter in bucket.parameters]
    return [grad for grad in grads if grad is not None]
