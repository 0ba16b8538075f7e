"""What a step's time is spent on: sums by hand, events that a device has not reached, and the parts of real steps.

Run alone: python -m pytest tests/engine/test_step_clock.py
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engines import build_engine, layout, make_config, small_gpt
from ranks import on_ranks

from megatron_doremi.engine.step_clock import DATA, FORWARD, OPTIMIZER, DeviceClock, StepClock


def test_parts_add_up_by_hand():
    """Two steps; the second between stop and enter has 100 s that belong to no part."""
    times = iter([0.0, 1.0, 3.0, 6.0, 106.0, 107.0, 109.0])
    clock = StepClock(lambda: next(times))
    for part in (DATA, FORWARD, OPTIMIZER):
        clock.enter(part)
    clock.stop()
    clock.enter(FORWARD)
    clock.enter(DATA)
    assert clock.lap() == {DATA: 1.0, FORWARD: 3.0, OPTIMIZER: 3.0}
    clock.stop()
    assert clock.lap() == {DATA: 2.0}


class Device:
    """Events of a device that has reached those recorded before `reached`; its clock shows 10 ms more at each."""

    def __init__(self):
        self.recorded, self.reached, self.made, self.waits = 0, 0, 0, 0

    def event(self):
        device = self
        device.made += 1

        class Event:
            def record(self):
                self.number = device.recorded
                device.recorded += 1

            def query(self):
                return self.number < device.reached

            def synchronize(self):
                device.waits += 1
                device.reached = device.recorded

            def elapsed_time(self, end):
                assert max(self.number, end.number) < device.reached, "an event that was not reached has no time"
                return 10.0 * (end.number - self.number)

        return Event()


def test_a_device_is_not_waited_for_before_the_lap():
    device = Device()
    clock = DeviceClock(device.event, most_pending=4)
    for step in range(10):
        for part in (DATA, FORWARD, OPTIMIZER):
            clock.enter(part)
        clock.stop()
        # The device is two events behind.
        device.reached = device.recorded - 2
        assert device.waits == 0, step
    # What it has reached was read in between, and its events were used again.
    assert device.made < 12
    assert clock.lap() == pytest.approx({DATA: 0.1, FORWARD: 0.1, OPTIMIZER: 0.1})
    assert device.waits == 1
    assert clock.lap() == {}
    clock.enter(DATA)
    clock.stop()
    assert clock.lap() == pytest.approx({DATA: 0.01})


def test_without_events_there_is_nothing_to_wait_for():
    assert DeviceClock(Device().event).lap() == {}


def parts_of_a_step(launch, phase, zero_stage, pipe, doremi):
    """The parts that a step of two micro-batches enters, without repeats."""
    from megatron_doremi.data.loader import MicroBatch

    context = layout(launch, pipe, 1)
    replicas = launch.world_size // pipe
    data = {"phase": phase, "seq_length": 32, "micro_batch_size": 2, "global_batch_size": 4 * replicas}
    config = make_config(context.topology, data, {"zero_stage": zero_stage}, doremi, clip_grad=1.0)
    engine = build_engine(config, small_gpt(tied_embeddings=False), np.full(3, 1 / 3), context)
    entered = []
    engine.clock.enter = entered.append
    ids = torch.zeros(2, 32, dtype=torch.long)
    losses = torch.zeros(2, 32) if phase == "proxy" else None
    batches = [MicroBatch(ids, ids.clone(), ids[:, 0].clone(), ids[:, 1].clone(), losses) for _ in range(2)]
    engine.train_step(
        batches,
        torch.ones(3, dtype=torch.float64),
        # The flags of a step.
        lambda norm: entered.append("flags"),
    )
    return [part for before, part in zip(["", *entered], entered, strict=False) if part != before]


F, B, R, P, S = "forward", "backward", "reduction", "pipeline", "optimizer"
END = [R, "flags", S, R, ""]
STEPS = {
    "plain": (1, "main", 0, 1, None, [[F, B, F, B, *END]]),
    "two replicas": (2, "main", 0, 1, None, [[F, B, F, B, *END]] * 2),
    "ZeRO 1": (2, "main", 1, 1, None, [[F, B, F, B, *END]] * 2),
    # It reduces the gradients of each micro-batch.
    "ZeRO 2": (2, "main", 2, 1, None, [[F, B, R, F, B, *END]] * 2),
    "pipeline, two replicas": (
        *(4, "main", 1, 2, None),
        [[F, P, F, P, B, P, B, *END]] * 2 + [[F, P, F, B, P, F, B, P, *END]] * 2,
    ),
    "proxy": (1, "proxy", 0, 1, {}, [[F, R, B, *END]]),
    "proxy, ZeRO 3 scores first": (1, "proxy", 3, 1, {}, [[F, R, F, B, R, F, B, *END]]),
    "proxy, simultaneous": (1, "proxy", 0, 1, {"doremi_update": "simultaneous"}, [[F, B, F, B, *END]]),
    "proxy, pipeline": (
        *(2, "proxy", 0, 2, {}),
        [[F, P, F, P, R, P, B, P, B, *END], [F, P, F, P, F, R, B, P, B, P, *END]],
    ),
}


@pytest.mark.parametrize("step", STEPS)
def test_the_parts_of_a_step(step):
    world, *case, expected = STEPS[step]
    assert on_ranks(world, parts_of_a_step, *case) == expected
