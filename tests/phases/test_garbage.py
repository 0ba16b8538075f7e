"""Python's garbage collection during a run: at the same steps on every rank, and never before a tensor is freed.

Run alone: python -m pytest tests/phases/test_garbage.py
"""

from __future__ import annotations

import gc

import pytest
from phases.small import MODEL
from ranks import on_ranks, program

from megatron_doremi.phases.garbage import GarbageCollection


class Cycle:
    """Garbage that only a collection finds; reports when it is freed."""

    def __init__(self, freed: list[int], number: int):
        self.itself, self.freed, self.number = self, freed, number

    def __del__(self):
        self.freed.append(self.number)


def test_collects_at_multiples_and_restores():
    freed: list[int] = []
    assert gc.isenabled()
    before = Cycle(freed, 0)
    with GarbageCollection(3) as garbage:
        assert not gc.isenabled()
        # What existed before is not looked at.
        del before
        for iteration in range(1, 8):
            Cycle(freed, iteration)
            garbage.collect_at(iteration)
            assert freed == list(range(1, iteration // 3 * 3 + 1))
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert sorted(freed) == list(range(8))


def garbage_of_a_run(launch, argv):
    """By iteration: how many objects were garbage after the step, and the types of tensors among them."""
    import torch

    found = []

    def look(self, iteration):
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        tensors = [type(each).__name__ for each in gc.garbage if isinstance(each, torch.Tensor)]
        found.append((iteration, len(gc.garbage), tensors))
        gc.set_debug(0)
        gc.garbage.clear()
        gc.collect()

    collect_at, GarbageCollection.collect_at = GarbageCollection.collect_at, look
    try:
        program(launch, argv)
    finally:
        GarbageCollection.collect_at = collect_at
    return found


STEPS = {
    "main": (1, "main", []),
    "proxy": (1, "proxy", []),
    "stages": (2, "proxy", ["--pipeline-model-parallel-size", "2"]),
    "bf16, ZeRO 1": (2, "proxy", ["--bf16", "--zero-stage", "1"]),
    "ZeRO 2": (2, "main", ["--zero-stage", "2"]),
    "ZeRO 3": (2, "proxy", ["--zero-stage", "3"]),
    "recomputation": (1, "main", ["--recompute-granularity", "full"]),
}


@pytest.mark.parametrize("step", STEPS)
def test_no_tensor_waits_for_a_collection(step, data, reference, tmp_path):
    world, phase, flags = STEPS[step]
    argv = ["--phase", phase, "--domains", str(data), "--save", str(tmp_path / "run"), "--train-iters", "5"]
    extra = reference if phase == "proxy" else []
    for found in on_ranks(world, garbage_of_a_run, [*argv, *MODEL, *flags, *extra]):
        print(found)
        assert [iteration for iteration, _, _ in found] == [1, 2, 3, 4, 5]
        for iteration, objects, tensors in found[1:]:
            assert not tensors, iteration
            # Seen were none, and 56 where blocks are computed again: a hundred steps' garbage is little.
            assert objects < 200, iteration
