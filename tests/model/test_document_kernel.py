"""Attention by a kernel that takes each document as a sequence, against the mask; the kernel is stood in for.

Run alone: python -m pytest tests/model/test_document_kernel.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engines import small_gpt
from phases.small import MODEL, metrics, train, training_lines
from ranks import on_ranks, program

from megatron_doremi.data.loader import document_bounds
from megatron_doremi.execution import Execution
from megatron_doremi.model import attention, pipeline
from megatron_doremi.model.unpipelined import GPTModel
from megatron_doremi.parallel.context import unsharded

EOD, SEQ = 7, 12
GPT = small_gpt(max_positions=SEQ, eod=EOD, reset_attention_mask=True)
# Places of ends in each of two windows of a micro-batch.
LAYOUTS = {
    "no end": ([], []),
    "inside": ([4], [2, 9]),
    "the last token": ([11], [3]),
    "the first token": ([0], [0, 11]),
    "of a single token": ([3, 4, 5], [0, 1, 2]),
    "everywhere": (list(range(12)), list(range(12))),
    "in the first window only": ([5], []),
}


def by_document(q, k, v, starts, starts_k, longest, longest_k, grouped):
    """Causal attention of each document by itself: the stand-in for the kernel."""
    assert starts is starts_k
    assert (longest, longest_k) == (SEQ, SEQ)
    assert starts.dtype == torch.int32
    parts = []
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        rows = [each[start:stop].transpose(0, 1) for each in (q, k, v)]
        parts.append(F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=grouped).transpose(0, 1))
    return torch.cat(parts)


def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal
    assert query.shape == key.shape
    return by_document(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, False)


def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    assert window_size == (-1, 0)
    assert query.shape == key.shape
    return by_document(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, False)


def of_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    assert window_size == (-1, 0)
    assert enable_gqa == (query.shape != key.shape)
    return by_document(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, enable_gqa)


def micro_batch(layout):
    ids = torch.randint(8, GPT.vocab_size, (2, SEQ + 1), generator=torch.Generator().manual_seed(1))
    for window, places in zip(ids, layout, strict=True):
        window[places] = EOD
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def bounds_of(tokens):
    bounds = document_bounds(tokens.numpy(), EOD, np.ones(len(tokens), dtype=bool))
    assert bounds is not None
    return bounds


def losses_and_gradients(gpt, layout, execution, by_kernel):
    model = GPTModel(gpt, unsharded(torch.device("cpu")), 3, execution)
    tokens, targets = micro_batch(layout)
    losses = model(tokens, targets, None, bounds_of(tokens) if by_kernel else None)
    (losses * torch.linspace(0.5, 1.5, SEQ)).sum().backward()
    return losses.detach(), {name: each.grad for name, each in model.model_parameters()}


@pytest.fixture(params=[of_2_10, of_2_11, of_2_13], ids=lambda function: function.__name__)
def kernel(request, monkeypatch):
    """Of each signature that torch has had. Small micro-batches may have many documents."""
    monkeypatch.setattr(attention, "document_kernel", attention.adapted(request.param))
    monkeypatch.setattr(pipeline, "takes_documents", lambda shape, device: True)
    monkeypatch.setattr("megatron_doremi.data.loader.TOKENS_A_DOCUMENT", 1)


SHAPES = {
    "rope": GPT,
    "positions reset": replace(GPT, reset_position_ids=True, qk_layernorm=True),
    "learned": replace(GPT, position_embedding_type="learned_absolute", reset_position_ids=True, num_query_groups=4),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_are_those_under_the_mask(layout, shape, kernel):
    runs = [losses_and_gradients(SHAPES[shape], LAYOUTS[layout], Execution(), each) for each in (False, True)]
    (losses, gradients), (found, others) = runs
    assert torch.allclose(found, losses, rtol=0, atol=2e-6)
    # Where each document is one token, gradients of queries and keys are 0, and rounding under the mask.
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert torch.allclose(others[name], gradient, rtol=1e-5, atol=1e-6 * largest), name


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_sees_the_same_documents(recompute, kernel):
    runs = [losses_and_gradients(GPT, LAYOUTS["inside"], Execution(each), True) for each in ("none", recompute)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(gradient, runs[1][1][name]) for name, gradient in runs[0][1].items())


def test_bounds_by_hand():
    tokens = np.full((3, 64), 1)
    tokens[0, 1], tokens[1, 63], tokens[2, :] = 7, 7, 7
    # An end in a window's last place starts nothing, and the third window is padding.
    bounds = document_bounds(tokens, 7, np.array([True, True, False]))
    assert bounds.tolist() == [0, 2, 64, 128, 192]
    assert bounds.dtype == torch.int32


def test_too_many_documents_are_left_to_the_mask():
    """More than one in 32 tokens; a window is a document however short it is."""
    tokens = np.full((1, 128), 1)
    tokens[0, [10, 20, 30]] = 7
    assert document_bounds(tokens, 7, np.ones(1, bool)).tolist() == [0, 11, 21, 31, 128]
    tokens[0, 40] = 7
    assert document_bounds(tokens, 7, np.ones(1, bool)) is None
    assert document_bounds(np.full((3, 4), 1), 7, np.ones(3, bool)).tolist() == [0, 4, 8, 12]


def test_the_kernel_of_this_torch_is_adapted_and_waits_for_a_gpu():
    """A dry run imports what knows it, and not the compiler, which it would bring along."""
    attend = attention._torchs_kernel()
    # On a CPU it refuses the tensors, not the arguments' names.
    rows = torch.zeros(SEQ, 2, 8, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="CPU"):
        attend(rows, rows, rows, torch.tensor([0, SEQ], dtype=torch.int32), SEQ)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="needs a GPU"):
            attention.attend_documents(rows[None], rows[None], rows[None], torch.tensor([0, SEQ], dtype=torch.int32))
    code = "import sys, megatron_doremi.phases.inputs; sys.exit('torch._dynamo' in sys.modules)"
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", code], env=environ, check=True, capture_output=True)


def test_a_model_that_takes_no_documents_ignores_them(monkeypatch):
    """They were read for another model; with attention dropout, too, a mask is made."""
    monkeypatch.setattr(attention, "document_kernel", None)
    monkeypatch.setattr("megatron_doremi.data.loader.TOKENS_A_DOCUMENT", 1)
    for gpt, execution in ((GPT, Execution()), (GPT, Execution(attention_dropout=0.1))):
        found, _ = losses_and_gradients(gpt, ([4], [2]), execution, False)
        with_bounds, _ = losses_and_gradients(gpt, ([4], [2]), execution, True)
        assert torch.equal(found, with_bounds)
        model = GPTModel(gpt, unsharded(torch.device("cpu")), 3, execution)
        assert model.document_eod is None
    monkeypatch.setattr(pipeline, "takes_documents", lambda shape, device: True)
    assert GPTModel(GPT, unsharded(torch.device("cpu")), 3).document_eod == EOD
    assert GPTModel(GPT, unsharded(torch.device("cpu")), 3, Execution(attention_dropout=0.1)).document_eod is None
    assert GPTModel(replace(GPT, reset_attention_mask=False), unsharded(torch.device("cpu")), 3).document_eod is None


def masked(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
    """The stand-in in operations whose shapes do not depend on numbers: for the compiler."""
    places = torch.arange(len(query))
    document = torch.searchsorted(cu_seq_q, places, right=True)
    visible = (document[:, None] == document) & (places[:, None] >= places)
    rows = [each.transpose(0, 1) for each in (query, key, value)]
    return F.scaled_dot_product_attention(*rows, attn_mask=visible, enable_gqa=enable_gqa).transpose(0, 1)


def test_one_graph_for_any_number_of_documents(monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend

    monkeypatch.setattr(attention, "document_kernel", attention.adapted(masked))
    monkeypatch.setattr(pipeline, "takes_documents", lambda shape, device: True)
    monkeypatch.setattr("megatron_doremi.data.loader.TOKENS_A_DOCUMENT", 1)
    gpt = replace(GPT, num_layers=1)
    model = GPTModel(gpt, unsharded(torch.device("cpu")), 3)
    counter = CompileCounterWithBackend("aot_eager")
    model.layers[1].compile(backend=counter, fullgraph=True, dynamic=False)
    model.execution = Execution(compiled=True)
    for layout in LAYOUTS.values():
        tokens, targets = micro_batch(layout)
        found = model(tokens, targets, None, bounds_of(tokens))
        found.sum().backward()
        plain, _ = losses_and_gradients(gpt, layout, Execution(), True)
        assert torch.allclose(found, plain, rtol=0, atol=2e-6)
    assert counter.frame_count == 1


RUNS = [
    (1, []),
    (2, ["--pipeline-model-parallel-size", "2"]),
    (2, ["--zero-stage", "3"]),
    (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
]


def with_kernel(launch, argv):
    """The program, with the stand-in, and how often it was called."""
    from megatron_doremi.data import loader

    calls = []

    def kernel(q, k, v, bounds, longest):
        calls.append(len(bounds))
        return masked(q, k, v, bounds, bounds, longest, longest, enable_gqa=True)

    loader.TOKENS_A_DOCUMENT = 4
    attention.document_kernel = kernel
    pipeline.takes_documents = lambda shape, device: True
    program(launch, argv)
    return len(calls)


@pytest.mark.slow
@pytest.mark.parametrize("layout", RUNS)
def test_whole_runs_are_those_under_the_mask(data, tmp_path, layout):
    """A proxy with an online reference, evaluated; some micro-batches have too many documents and keep the mask."""
    world, flags = layout
    flags = [*MODEL, "--reset-attention-mask", "--adam-eps", "1e-3", "--log-interval", "1", *flags]
    train(1, "reference", data, tmp_path / "reference", 3, "--reset-attention-mask")
    loads = ["--reference-load", str(tmp_path / "reference")]
    expected = train(world, "proxy", data, tmp_path / "mask", 3, *loads, model=flags)
    argv = ["--phase", "proxy", "--domains", str(data), "--save", str(tmp_path / "kernel"), "--train-iters", "3"]
    calls = on_ranks(world, with_kernel, [*argv, *flags, *loads])
    assert min(calls) > 0
    found = metrics(tmp_path / "kernel")
    for line, other in zip(training_lines(found), training_lines(expected), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert line["domain_weights"] == pytest.approx(other["domain_weights"], abs=1e-6)
    evaluated = [[line for line in lines if "eval" in line][-1]["eval"] for lines in (found, expected)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)
