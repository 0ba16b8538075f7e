"""Forward passes without gradients through a pipeline: what a stage holds of what it sends.

Run alone: python -m pytest tests/model/test_forward.py
"""

from __future__ import annotations

from engines import layout, small_gpt
from planning.measured import micro_batches
from ranks import on_ranks

COUNT, WINDOWS, SEQ = 6, 2, 8


def most_sent(launch):
    """The largest number of sent activations that this rank held at a time, and the number of losses."""
    from megatron_doremi.execution import Execution
    from megatron_doremi.model import forward
    from megatron_doremi.model.unpipelined import make_gpt

    context = layout(launch, 2, 1, False)
    held, most = 0, 0

    class Sent:
        def __init__(self, work):
            nonlocal held, most
            self.work, held = work, held + 1
            most = max(most, held)

        def wait(self):
            nonlocal held
            self.work.wait()
            held -= 1

    send = forward.dist.isend
    forward.dist.isend = lambda *arguments: Sent(send(*arguments))
    module = make_gpt(small_gpt(), context, 0, Execution())
    losses = forward.forward_only(module, micro_batches(WINDOWS, SEQ, COUNT), COUNT, (WINDOWS, SEQ), context)
    return most, held, len(losses)


def test_a_stage_holds_two_micro_batches_that_it_sends():
    assert on_ranks(2, most_sent) == [(2, 0, 0), (0, 0, COUNT)]
