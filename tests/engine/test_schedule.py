"""The alternating schedule is complete and in order, and its sends and receives pair without a deadlock.

Run alone: python -m pytest tests/engine/test_schedule.py
"""

from __future__ import annotations

import pytest
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, OptimizerStep

from megatron_doremi.engine.schedule import AlternatingSchedule, UpdateDomainWeights


def commands(micro_batches, stages, stage):
    return [c for step in AlternatingSchedule(micro_batches, stages, stage) for c in step]


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batches", [1, 2, 5])
def test_all_forwards_then_the_update_then_all_backwards(stages, micro_batches):
    for stage in range(stages):
        schedule = commands(micro_batches, stages, stage)
        update = next(i for i, c in enumerate(schedule) if isinstance(c, UpdateDomainWeights))
        forwards = [c.buffer_id for c in schedule[:update] if isinstance(c, ForwardPass)]
        backwards = [c.buffer_id for c in schedule[update:] if isinstance(c, BackwardPass)]
        assert forwards == backwards == list(range(micro_batches))
        assert not any(isinstance(c, BackwardPass) for c in schedule[:update])
        assert isinstance(schedule[-1], OptimizerStep)
        assert AlternatingSchedule(micro_batches, stages, stage).num_pipe_buffers() == micro_batches


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batches", [1, 2, 5])
def test_no_deadlock_with_blocking_sends(stages, micro_batches):
    """Simulates all stages: a send waits for its receive, the update waits for all stages."""
    queues = [[c.name for c in commands(micro_batches, stages, stage)] for stage in range(stages)]
    pairs = {"SendActivation": ("RecvActivation", 1), "SendGrad": ("RecvGrad", -1)}
    while any(queues):
        heads = [queue[0] if queue else None for queue in queues]
        moved = False
        for stage, head in enumerate(heads):
            if head in pairs:
                partner, offset = pairs[head]
                if queues[stage + offset] and queues[stage + offset][0] == partner:
                    queues[stage].pop(0)
                    queues[stage + offset].pop(0)
                    moved = True
                    break
            elif head in ("RecvActivation", "RecvGrad", None):
                continue
            elif head == "UpdateDomainWeights":
                if all(h == head for h in heads):
                    for queue in queues:
                        queue.pop(0)
                    moved = True
                    break
            else:
                queues[stage].pop(0)
                moved = True
                break
        assert moved, heads
