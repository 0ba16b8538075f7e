"""A step between two lines of metrics waits for the device once, where the ranks agree that it is finite.

Run alone: python -m pytest tests/device/test_host_waits.py
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from device.host_waits import host_waits
from device.test_fake_device import SEQ, STEPS, build, by_documents, micro_batches, on_the_device
from ranks import on_ranks


def waits_of_a_step(device, phase, *settings, copied=False):
    """Where the second step of a run waits, from its batch on the host, or `copied` to the device, to its flags."""
    import torch

    from megatron_doremi.data.blend import BlendState
    from megatron_doremi.data.loader import Step
    from megatron_doremi.phases import train

    _, engine = build(device, phase, *settings)
    batches = micro_batches()
    if phase == "proxy":
        batches = [replace(batch, reference=torch.zeros(2, SEQ)) for batch in batches]
    if copied:
        batches = [batch.to(device) for batch in batches]
    trainer = SimpleNamespace(
        engine=engine,
        reference=None,
        config=SimpleNamespace(data=SimpleNamespace(phase=phase)),
        plan=SimpleNamespace(names=("a", "b", "c")),
        stop=SimpleNamespace(reason=lambda: 0),
        checkpoints=SimpleNamespace(progress=lambda: (False, False)),
        save_timer=SimpleNamespace(due=lambda: False),
        iteration=0,
    )

    def finite(*arguments):
        """The flags of a step whose numbers are fake."""
        return replace(reduce_flags(*arguments), loss_non_finite=False, gradient_non_finite=False)

    reduce_flags, train.reduce_flags = train.reduce_flags, finite
    step = Step(tuple(batches), np.full(3, 2 * SEQ), BlendState.start(3))
    train.Trainer._take_step(trainer, step, 1e-3)
    with host_waits() as places:
        train.Trainer._take_step(trainer, step, 1e-3)
    return places


@pytest.mark.parametrize("step", STEPS)
def test_one_wait_a_step(step):
    (places,) = on_ranks(1, on_the_device, waits_of_a_step, *STEPS[step])
    assert [place.partition(":")[0] for place in places] == ["cluster/step_flags.py"], places


def waits_of_a_copied_step(device, *arguments):
    return waits_of_a_step(device, *arguments, copied=True)


@pytest.mark.parametrize("step", ["main, bf16, resets", "proxy, bf16"])
def test_a_step_whose_batch_was_copied_ahead_waits_no_more(step):
    (places,) = on_ranks(1, on_the_device, waits_of_a_copied_step, *STEPS[step])
    assert [place.partition(":")[0] for place in places] == ["cluster/step_flags.py"], places


def test_documents_that_a_kernel_takes_cost_no_wait():
    step = STEPS["main, bf16, resets"]
    (places,) = on_ranks(1, on_the_device, by_documents, waits_of_a_step, *step)
    assert [place.partition(":")[0] for place in places] == ["cluster/step_flags.py"], places


def planted_waits(device):
    import torch
    from deepspeed.accelerator import get_accelerator

    with host_waits() as places:
        numbers = torch.ones(3, device=device)
        counts = []

        def waits_for(work):
            before = len(places)
            work()
            counts.append(len(places) - before)

        waits_for(lambda: numbers.sum().item())
        waits_for(lambda: float(numbers[0]))
        waits_for(lambda: bool((numbers > 0).all()))
        waits_for(lambda: numbers.tolist())
        waits_for(lambda: numbers.cpu())
        waits_for(lambda: torch.zeros(3).copy_(numbers))
        waits_for(lambda: numbers.copy_(torch.zeros(3)))
        waits_for(lambda: torch.tensor(1.0, device=device))
        waits_for(lambda: get_accelerator().synchronize())
        # These do not wait.
        waits_for(lambda: numbers.mul_(2.0).add_(1.0).sum().sqrt())
        waits_for(lambda: torch.zeros(3).to(device, non_blocking=True))
    return counts


def test_waits_are_counted():
    assert on_ranks(1, on_the_device, planted_waits) == [[1] * 9 + [0, 0]]
