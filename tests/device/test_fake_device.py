"""Every tensor of a step on a device that is not the CPU: an operation that mixes devices raises, without any GPU.

Run alone: python -m pytest tests/device/test_fake_device.py
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from device.fake import fake_device
from engines import build_engine, make_config, small_gpt
from ranks import on_ranks

GPT = small_gpt(tied_embeddings=False)
SEQ, MICRO_BATCHES = 32, 3


def on_the_device(launch, work, *arguments):
    """Calls work(device, *arguments) with one rank and a process group that only pretends to talk."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    with fake_device() as device:
        import deepspeed

        from megatron_doremi.parallel.deepspeed_internals import disable_shared_memory_all_reduce

        # As in a run. DeepSpeed would compile it for a minute.
        disable_shared_memory_all_reduce()
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend="fake", dist_init_required=False)
        return work(device, *arguments)


def build(device, phase, zero_stage, bf16, chunk, doremi=None, gpt=GPT, training=None, optimizer="adam"):
    from megatron_doremi.parallel.context import make_context
    from megatron_doremi.parallel.topology import Topology

    context = make_context(Topology(1, 1, 1, 0), device)
    data = {"phase": phase, "seq_length": SEQ, "micro_batch_size": 2, "global_batch_size": 2 * MICRO_BATCHES}
    parallel = {"zero_stage": zero_stage, "loss_chunk_tokens": chunk}
    settings = {"clip_grad": 1.0, "bf16": bf16, "optimizer": optimizer}
    config = make_config(context.topology, data, parallel, doremi, training, **settings)
    return context, build_engine(config, gpt, np.full(3, 1 / 3), context)


def micro_batches():
    """As the loader makes them: on the host."""
    from megatron_doremi.data.loader import MicroBatch

    ids = torch.zeros(2, SEQ, dtype=torch.long)
    columns = [ids[:, i].clone() for i in range(3)]
    documents = torch.tensor([0, 3, SEQ, 2 * SEQ], dtype=torch.int32)
    each = MicroBatch(ids, ids.clone(), *columns[:2], keys=columns[2], documents=documents)
    return [each] * MICRO_BATCHES


def whole_step(device, phase, zero_stage, bf16, chunk, doremi, *others):
    """A step, its flags, its metrics, a comparison of ranks, the copies for a checkpoint and an evaluation's pass."""
    from megatron_doremi.checkpoint.optimizer_state import optimizer_file, owned_state, start_state
    from megatron_doremi.checkpoint.reader import load_weights
    from megatron_doremi.checkpoint.resharding import ShardingEntry, sharding_entry
    from megatron_doremi.checkpoint.weights import WeightsFolder, weights_file
    from megatron_doremi.cluster.replica_check import digest
    from megatron_doremi.cluster.step_flags import reduce_flags
    from megatron_doremi.model.forward import forward_only

    context, engine = build(device, phase, zero_stage, bf16, chunk, doremi, *others)
    topology, module, batches = context.topology, engine.module, micro_batches()
    assert {parameter.device for _, parameter in module.model_parameters()} == {device}
    losses = forward_only(module, batches, MICRO_BATCHES, (2, SEQ), context)
    assert {loss.device for loss in losses} == {device}
    seen = []
    if phase == "proxy":
        batches = [replace(batch, reference=loss) for batch, loss in zip(batches, losses, strict=True)]
    engine.train_step(
        batches,
        torch.ones(3, dtype=torch.float64).to(device),
        lambda norm: seen.append(reduce_flags(engine.objective.current.stats.stack(), norm, 0, False, False)),
    )
    assert len(seen) == 1
    engine.grad_norm()
    assert engine.objective.stats().loss.device == device
    if phase == "proxy":
        engine.objective.controller.entries(["a", "b", "c"])
    digest(module, {}, topology)
    files = [weights_file(module, topology), optimizer_file(engine, topology)]
    assert {tensor.device.type for file in files for tensor in file.tensors.values()} == {"cpu"}

    class Zeros(WeightsFolder):
        def __init__(self):
            self._sharding = {
                name: ShardingEntry(**sharding_entry(parameter, topology))
                for name, parameter in module.model_parameters()
            }

        def _read(self, name, tensor_rank, start, count):
            return torch.zeros(count)

    load_weights(engine, Zeros(), context)
    start_state(engine, 1)
    for owned in owned_state(engine, 0):
        for tensor in owned.tensors.values():
            tensor.copy_(torch.zeros(tensor.shape))
    return True


RESETS = replace(GPT, reset_position_ids=True, reset_attention_mask=True, eod=0)
LEARNED = replace(RESETS, position_embedding_type="learned_absolute", qk_layernorm=True)
EXTRAS = {"z_loss": 0.1, "attention_dropout": 0.1, "hidden_dropout": 0.1}
# Phase, ZeRO stage, bfloat16, tokens in a chunk of logits, DoReMi's settings; shape, settings of the step, optimizer.
# Not here: ZeRO 3, whose checks compare numbers between ranks, and recomputation, which torch does not run on a device
# that was registered from Python.
STEPS = {
    "main, float32": ("main", 0, False, 8, None),
    "main, bf16, all logits at once": ("main", 1, True, 0, None),
    "main, bf16, ZeRO 2": ("main", 2, True, 8, None),
    "proxy, bf16": ("proxy", 1, True, 8, {}),
    "proxy, ZeRO 2, simultaneous, batch": (
        *("proxy", 2, False, 8),
        {"doremi_update": "simultaneous", "doremi_normalization": "batch"},
    ),
    "main, bf16, resets": ("main", 1, True, 8, None, RESETS),
    "main, resets, learned positions, normalized queries": ("main", 0, False, 0, None, LEARNED),
    "proxy, bf16, resets, z-loss, dropout": ("proxy", 1, True, 8, {}, RESETS, EXTRAS),
    "main, z-loss, dropout, Muon": ("main", 0, False, 0, None, GPT, EXTRAS, "muon"),
    "main, bf16, Muon": ("main", 1, True, 8, None, GPT, None, "muon"),
    "proxy, resample": ("proxy", 0, False, 8, {"doremi_weighting": "resample"}),
}


@pytest.mark.parametrize("step", STEPS)
def test_no_operation_mixes_devices(step):
    assert on_ranks(1, on_the_device, whole_step, *STEPS[step]) == [True]


def by_documents(device, work, *arguments):
    """work(device, *arguments) where a kernel takes documents, by a stand-in."""
    import torch.nn.functional as F

    from megatron_doremi.model import attention, pipeline

    called = []

    def kernel(q, k, v, bounds, longest):
        assert bounds.device == device
        called.append(bounds.dtype)
        document = torch.bucketize(torch.arange(len(q), device=device), bounds, right=True)
        rows = [each.transpose(0, 1) for each in (q, k, v)]
        mask = document[:, None] == document
        return F.scaled_dot_product_attention(*rows, attn_mask=mask, enable_gqa=True).transpose(0, 1)

    pipeline.takes_documents = lambda shape, device: True
    attention.document_kernel = kernel
    result = work(device, *arguments)
    assert set(called) == {torch.int32}
    return result


def test_documents_that_a_kernel_takes_are_on_the_device():
    assert on_ranks(1, on_the_device, by_documents, whole_step, *STEPS["main, bf16, resets"]) == [True]


def planted(device):
    """What these tests are for: sums that were left on the host."""
    from megatron_doremi.mixture.objective import StepRecord

    _, engine = build(device, "main", 0, False, 8)
    engine.objective.current = StepRecord(3, torch.device("cpu"))
    engine.train_step(micro_batches())


def test_a_tensor_left_on_the_host_is_found():
    with pytest.raises(AssertionError, match="FakeTensorDeviceMismatchError"):
        on_ranks(1, on_the_device, planted)
