"""Which kernel computes attention on a GPU, by fakes of torch's checks that follow its documented rules.

Run alone: python -m pytest tests/model/test_attention_kernels.py
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from engines import make_config, small_gpt
from torch.nn.attention import SDPBackend

from megatron_doremi.model import gpt as gpt_module
from megatron_doremi.model.attention import (
    CUDNN,
    EFFICIENT,
    FLASH,
    MATH,
    AttentionShape,
    choose_kernel,
    in_order,
    kernel_order,
)
from megatron_doremi.model.gpt import Attention
from megatron_doremi.model.positions import Positions, document_mask
from megatron_doremi.parallel.layers import TensorParallel
from megatron_doremi.parallel.topology import Topology
from megatron_doremi.phases.kernels import kernel_report
from megatron_doremi.plan import make_plan

HALF, FULL, CPU = torch.bfloat16, torch.float32, torch.device("cpu")
SHAPE = AttentionShape(batch=2, seq=16, heads=8, groups=8, width=64, dtype=HALF, masked=False, trains=True)
HOPPER, AMPERE = kernel_order((9, 0), 91900), kernel_order((8, 0), 91900)


def flash(params):
    half = params.query.dtype in (torch.float16, HALF)
    return half and params.attn_mask is None and params.query.shape[-1] <= 256 and params.query.shape[-1] % 8 == 0


def cudnn(params):
    return params.query.dtype in (torch.float16, HALF) and params.query.shape[-1] <= 128


def efficient(params):
    alike = params.query.shape[1] == params.key.shape[1]
    return alike and not params.enable_gqa and params.query.shape[-1] % 8 == 0 and params.query.shape[-1] <= 512


FAKES = {CUDNN: cudnn, FLASH: flash, EFFICIENT: efficient}


@pytest.mark.parametrize(
    ("capability", "version", "order"),
    [
        ((9, 0), 91501, (CUDNN, FLASH, EFFICIENT, MATH)),
        ((10, 0), 92000, (CUDNN, FLASH, EFFICIENT, MATH)),
        ((9, 0), 91500, (FLASH, EFFICIENT, MATH)),
        ((9, 0), None, (FLASH, EFFICIENT, MATH)),
        ((8, 0), 91900, (FLASH, EFFICIENT, MATH)),
        ((12, 0), 91900, (FLASH, EFFICIENT, MATH)),
    ],
)
def test_the_order_follows_the_gpu(capability, version, order):
    assert kernel_order(capability, version) == order


@pytest.mark.parametrize(
    ("changes", "on_hopper", "on_ampere"),
    [
        ({}, CUDNN, FLASH),
        ({"groups": 2}, CUDNN, FLASH),
        ({"width": 256}, FLASH, FLASH),
        ({"masked": True}, CUDNN, EFFICIENT),
        ({"masked": True, "groups": 2, "width": 256}, EFFICIENT, EFFICIENT),
        ({"dtype": FULL}, EFFICIENT, EFFICIENT),
        # Repeated for this kernel.
        ({"dtype": FULL, "groups": 2}, EFFICIENT, EFFICIENT),
        ({"width": 260}, MATH, MATH),
        ({"width": 20, "dtype": FULL}, MATH, MATH),
    ],
)
def test_each_shape_has_its_kernel(changes, on_hopper, on_ampere):
    shape = replace(SHAPE, **changes)
    for order, expected in ((HOPPER, on_hopper), (AMPERE, on_ampere)):
        choice = choose_kernel(shape, order, CPU, FAKES)
        assert choice.name == expected
        assert bool(choice.warning) == (expected == MATH)


def test_the_checks_see_the_models_layout():
    """The strides of [batch, seq, heads, width], gradients, groups and the mask."""
    seen = []
    for shape in (replace(SHAPE, groups=2), replace(SHAPE, groups=2, masked=True, trains=False)):
        choose_kernel(shape, (FLASH, MATH), CPU, {FLASH: lambda params: seen.append(params) or True})
    plain, masked = seen
    assert (plain.query.shape, plain.key.shape) == ((2, 8, 16, 64), (2, 2, 16, 64))
    assert plain.query.stride() == (16 * 8 * 64, 64, 8 * 64, 1)
    assert plain.query.requires_grad
    assert (plain.is_causal, plain.enable_gqa, plain.attn_mask, plain.dropout) == (True, True, None, 0.0)
    assert masked.key.shape == (2, 8, 16, 64)
    assert not masked.query.requires_grad
    assert (masked.is_causal, masked.enable_gqa, masked.attn_mask.shape) == (False, False, (2, 1, 16, 16))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 320}, ["heads have 320 channels", "256 at most", "--kv-channels"]),
        ({"width": 20}, ["heads have 20 channels", "multiples of 8", "--num-attention-heads"]),
        ({}, ["refuse its other kernels on this GPU for bfloat16", "32 heads of 64 channels"]),
    ],
)
def test_the_fall_back_says_why_and_what_it_costs(changes, words):
    """2 windows with 32 heads of 1024 x 1024 scores of 4 bytes are 256 MiB."""
    shape = replace(SHAPE, seq=1024, heads=32, groups=32, **changes)
    refusing = dict.fromkeys(FAKES, lambda params: False)
    warning = choose_kernel(shape, HOPPER, CPU, refusing).warning
    assert warning.startswith(
        "attention falls back to torch's math kernel, which holds 256 MiB of scores in each layer"
    )
    assert all(word in warning for word in words)


def test_torch_keeps_the_order_while_it_is_set():
    order = torch._C._get_sdp_priority_order
    before = order()
    with in_order(HOPPER):
        names = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
        assert order()[:3] == [int(each.value) for each in names]
        assert torch.backends.cuda.math_sdp_enabled()
    with in_order(AMPERE):
        assert order()[0] == int(SDPBackend.FLASH_ATTENTION.value)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert order() == before


def report(reference=None, tensor=1, training=None, phase="main", seq=32, **changes):
    data = {"phase": phase, "seq_length": seq, "micro_batch_size": 2, "train_iters": 1, "global_batch_size": 2}
    topology = Topology(1, 1, tensor, 0)
    config = make_config(topology, data, training=training, bf16=True)
    plan = make_plan(config, topology, small_gpt(**changes), ("a",), (10,), np.ones(1))
    return kernel_report(plan, reference, HOPPER, CPU, FAKES)


def test_a_run_names_its_kernels():
    assert report() == ("attention kernel: cuDNN", ())
    assert report(kv_channels=136).line == "attention kernel: flash"
    line, warnings = report(small_gpt(kv_channels=260), phase="proxy")
    assert line == "attention kernel: cuDNN, the reference's math"
    assert len(warnings) == 1
    assert warnings[0].startswith("the reference's attention falls back to torch's math kernel")
    # torch's check of flash decides whether a kernel takes documents.
    masked = {"reset_attention_mask": True, "eod": 0}
    assert report(**masked).line == "attention kernel: flash, document by document"
    assert report(kv_channels=264, **masked).line == "attention kernel: memory-efficient"
    assert report(training={"attention_dropout": 0.1}, **masked).line.startswith("attention kernel: cuDNN; plain")
    # A reference drops nothing, whatever the proxy does.
    both = report(small_gpt(**masked), training={"attention_dropout": 0.1}, phase="proxy", **masked).line
    assert both.startswith("attention kernel: cuDNN, the reference's flash, document by document; plain operations in")
    dropped = report(training={"attention_dropout": 0.1}).line
    assert dropped == "attention kernel: cuDNN; plain operations in training, for --attention-dropout"
    # 2 windows, 4 heads on 2 ranks, 1024 x 1024 scores of 4 bytes.
    assert "holds 16 MiB of scores" in report(tensor=2, seq=1024, kv_channels=264).warnings[0]


@pytest.mark.parametrize(("dtype", "masked"), [(FULL, False), (FULL, True), (HALF, False), (HALF, True)])
def test_the_block_repeats_groups_where_the_choice_counts_on_it(dtype, masked, monkeypatch):
    """The model's call of torch has the shapes that `choose_kernel` checked. CUDA is faked by its name alone."""
    calls = []

    def attend(q, k, v, attn_mask, is_causal, enable_gqa):
        calls.append((k.shape[1], attn_mask is not None, is_causal, enable_gqa))
        return q

    class OnCuda(torch.Tensor):
        is_cuda = property(lambda self: True)

    attention = Attention(small_gpt(), TensorParallel(), recompute=False)
    qkv = torch.zeros(1, 8, (4 + 2 * 2) * 8, dtype=dtype)
    window = Positions(small_gpt()).of_window(8, CPU)
    if masked:
        window = window._replace(mask=document_mask(torch.zeros(1, 8, dtype=torch.int64), dtype))
    split = gpt_module.split_heads
    monkeypatch.setattr(gpt_module, "split_heads", lambda *a: tuple(x.as_subclass(OnCuda) for x in split(*a)))
    monkeypatch.setattr(gpt_module.F, "scaled_dot_product_attention", attend)
    attention._mix(qkv, window)
    seen = []
    shape = AttentionShape(1, 8, 4, 2, 8, dtype, masked, False)
    choose_kernel(shape, (FLASH, MATH), CPU, {FLASH: lambda params: seen.append(params) or True})
    (params,) = seen
    assert calls == [(params.key.shape[1], params.attn_mask is not None, params.is_causal, params.enable_gqa)]
