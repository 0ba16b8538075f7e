"""Which bucket of gradients is reduced next, beside a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn


class BucketOrder:
    """Calls for each bucket once a backward pass has computed all of its gradients and the buckets before it were
    called for: in the same order on every rank."""

    def __init__(self, buckets: Sequence[Sequence[nn.Parameter]], reduce: Callable[[int], None]):
        """Registers hooks on the parameters, after those that move their gradients.

        Args:
            buckets: in the order in which they are called for; each parameter lies in one.
            reduce: called with the number of a bucket.
        """
        self._sizes, self._reduce = [len(bucket) for bucket in buckets], reduce
        self._bucket_of = {parameter: number for number, bucket in enumerate(buckets) for parameter in bucket}
        self._missing: list[int] = []
        self._called = 0
        for parameter in self._bucket_of:
            parameter.register_post_accumulate_grad_hook(self._accumulated)

    def start(self) -> None:
        """Called before a backward pass; of others than those between `start` and `finish` nothing is called for."""
        self._missing, self._called = list(self._sizes), 0

    def _accumulated(self, parameter: nn.Parameter) -> None:
        if not self._missing:
            return
        self._missing[self._bucket_of[parameter]] -= 1
        while self._called < len(self._sizes) and not self._missing[self._called]:
            self._reduce(self._called)
            self._called += 1

    def finish(self) -> None:
        """Called after the backward pass, which has computed all gradients."""
        assert self._called == len(self._sizes), "a parameter got no gradient"
        self._missing = []
