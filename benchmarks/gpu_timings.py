"""The checks of gpu_smoke.py that measure: waits for the device, steps, kernels, compilation, copies.

Only documented interfaces of torch 2.11 and later are used.
"""

from __future__ import annotations

import itertools
import shlex
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_place import Place, Report, attempt, collect, destroy, make, single, step_of
from torch import Tensor


def sync(place: Place, report: Report) -> bool:
    """Where one proxy's step waits for the device, by file and line."""
    engine, _, batches = make(place, "70m", 50257, (4, 2, 512), "proxy")
    step = step_of(engine, batches)
    for _ in range(2):
        step()
    place.wait()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not place.cpu:
            torch.cuda.set_sync_debug_mode("warn")
        step()
        if not place.cpu:
            torch.cuda.set_sync_debug_mode("default")
    lines = Counter(
        "/".join(Path(each.filename).parts[-3:]) + f":{each.lineno}"
        for each in caught
        if "called a synchronizing" in str(each.message)
    )
    report(waits=dict(lines.most_common(25)), in_all=sum(lines.values()))
    return True


def speed(place: Place, engine: Any, gpt: Any, batches: Sequence[Any], repeat: int) -> dict[str, Any]:
    """Milliseconds, tokens and MFU of a step, and the peak of memory."""
    from megatron_doremi.phases.metrics import flops_per_token, peak_tflops

    if not place.cpu:
        torch.cuda.reset_peak_memory_stats()
    took = place.milliseconds(step_of(engine, batches), warm=2, repeat=repeat)
    count, (windows, seq) = len(batches), batches[0].tokens.shape
    tokens = count * windows * seq
    result = {"ms_a_step": took, "ms_a_micro_batch": round(took / count, 2), "tokens_per_second": tokens / took * 1e3}
    if not place.cpu:
        tflops = tokens * flops_per_token(gpt, seq) / took / 1e9
        peak = peak_tflops(torch.cuda.get_device_name())
        result |= {"tflops": round(tflops, 1), "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
        result |= {"mfu": round(tflops / peak, 4)} if peak else {}
    return result


def one_billion(place: Place, report: Report) -> bool:
    """1b, vocabulary 50,257, two micro-batches of 8 x 2048."""
    engine, gpt, batches = make(place, "1b", 50257, (2, 8, 2048))
    good = attempt(report, "step", lambda: speed(place, engine, gpt, batches, 4))

    return good & attempt(report, "top_25_ms", partial(longest_kernels, place, step_of(engine, batches)))


def longest_kernels(place: Place, step: Callable[[], None]) -> list[list[Any]]:
    """Name, milliseconds and calls of the 25 kernels that take longest in a step, and of all together."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] if place.cpu else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        step()
        place.wait()
    key = "self_cpu_time_total" if place.cpu else "self_device_time_total"
    # Beside kernels, on a GPU, there are the operations that start them.
    rows = [row for row in profiler.key_averages() if place.cpu or row.device_type == torch.autograd.DeviceType.CUDA]
    rows.sort(key=lambda row: -getattr(row, key))
    shown = [[row.key[:90], round(getattr(row, key) / 1e3, 2), row.count] for row in rows[:25]]
    return [["all", round(sum(getattr(row, key) for row in rows) / 1e3, 2), sum(row.count for row in rows)], *shown]


def one_billion_compiled(place: Place, report: Report) -> bool:
    """The same with --compile. The first step compiles."""
    engine, gpt, batches = make(place, "1b", 50257, (2, 8, 2048), compiled=True)
    began = time.perf_counter()
    step_of(engine, batches)()
    place.wait()
    report(first_step_s=round(time.perf_counter() - began, 1))
    good = attempt(report, "step", lambda: speed(place, engine, gpt, batches, 4))
    return good & attempt(report, "top_25_ms", partial(longest_kernels, place, step_of(engine, batches)))


def one_billion_settings(place: Place, report: Report) -> bool:
    """The same at 4 micro-batches a step, and what else a user may set: chunks of the losses, micro-batches of 16,
    heads of 128 channels, documents (by a kernel and by the mask); and at 16."""
    wide = {"num_attention_heads": 16, "num_query_groups": 16, "kv_channels": 128}
    documents = {"reset_position_ids": True, "reset_attention_mask": True, "eod": 0}
    settings: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
        "chunks_of_1024": ((4, 8, 2048), {"loss_chunk_tokens": 1024}),
        "chunks_of_2048": ((4, 8, 2048), {"loss_chunk_tokens": 2048}),
        "chunks_of_4096": ((4, 8, 2048), {"loss_chunk_tokens": 4096}),
        "logits_held": ((4, 8, 2048), {"loss_chunk_tokens": 0}),
        "logits_held_heads_of_128": ((4, 8, 2048), {"loss_chunk_tokens": 0, "shape": wide}),
        "documents": ((4, 8, 2048), {"shape": documents}),
        "documents_by_mask": ((4, 8, 2048), {"shape": documents}),
        "windows_16": ((4, 16, 2048), {}),
        "16_micro_batches": ((16, 8, 2048), {}),
    }
    context, good = single(place), []
    for name, (batch, more) in settings.items():

        def measure(name: str = name, batch: Any = batch, more: dict[str, Any] = more) -> dict[str, Any]:
            engine, gpt, batches = make(place, "1b", 50257, batch, compiled=True, context=context, **more)
            if name == "documents_by_mask":
                batches = [replace(each, documents=None) for each in batches]
            try:
                return speed(place, engine, gpt, batches, 3)
            finally:
                destroy(engine)

        good.append(attempt(report, name, measure))
        collect()
    return all(good)


def kernels(place: Place, report: Report) -> bool:
    """Times the norm with and without casts, the head by chunk, attention by kernel and width, and a gradient's add."""
    device, dtype = place.device, torch.bfloat16
    tokens, hidden, vocab = place.pick((16384, 2048, 50304), (128, 64, 512))

    def norm(cast: bool) -> Callable[[], float]:
        x = torch.randn(tokens, hidden, device=device, dtype=dtype, requires_grad=True)
        weight = torch.ones(hidden, device=device, dtype=dtype, requires_grad=True)

        def work() -> None:
            kind = torch.float32 if cast else dtype
            F.rms_norm(x.to(kind), (hidden,), weight.to(kind), 1e-5).to(dtype).sum().backward()

        return lambda: place.milliseconds(work)

    def loss(chunk: int) -> float:
        from megatron_doremi.execution import Execution
        from megatron_doremi.parallel.cross_entropy import token_losses
        from megatron_doremi.parallel.groups import TensorGroup

        rows = torch.randn(1, tokens, hidden, device=device, dtype=dtype, requires_grad=True)
        weight = (0.02 * torch.randn(vocab, hidden, device=device)).to(dtype).requires_grad_()
        targets = torch.randint(0, vocab - 47, (1, tokens), device=device)
        group = TensorGroup(None, 1, 0)

        def work() -> None:
            token_losses(rows, weight, targets, vocab - 47, group, Execution(loss_chunk_tokens=chunk)).mean().backward()

        return place.milliseconds(work, 1, 3)

    def attention(backend: Any, width: int, kind: torch.dtype, groups: int) -> Callable[[], float]:
        from torch.nn.attention import sdpa_kernel

        windows, seq, heads = place.pick((8, 2048, 32 * 64 // width), (1, 64, 4))

        def work() -> None:
            with sdpa_kernel([backend]):
                F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups > 1).sum().backward()

        shapes = [(windows, count, seq, width) for count in (heads, heads // groups, heads // groups)]
        q, k, v = (torch.randn(shape, device=device, dtype=kind, requires_grad=True) for shape in shapes)
        return lambda: place.milliseconds(work, 1, 3)

    def add(cast: bool) -> Callable[[], float]:
        total = torch.zeros(vocab, hidden, device=device)
        gradient = torch.ones(vocab, hidden, device=device, dtype=dtype)
        return lambda: place.milliseconds(lambda: total.add_(gradient.float() if cast else gradient))

    from torch.nn.attention import SDPBackend

    good = [attempt(report, f"norm_{'cast' if cast else 'plain'}_ms", norm(cast)) for cast in (True, False)]
    good += [attempt(report, f"loss_chunk_{chunk}_ms", partial(loss, chunk)) for chunk in (0, 1024, 4096)]
    good += [attempt(report, f"gradient_add_{'cast' if cast else 'plain'}_ms", add(cast)) for cast in (True, False)]
    backends = place.pick(("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"), ("MATH",))
    for name, width in itertools.product(backends, (64, 128)):
        # Some kernels are missing on some GPUs: an error here is a finding, not a failure.
        work = attention(getattr(SDPBackend, name), width, dtype, 1)
        try:
            report(**{f"attention_{name.lower()}_{width}_ms": work()})
        except Exception as error:
            report(**{f"attention_{name.lower()}_{width}_ms": str(error)[:200]})
    for groups, width in itertools.product((1, 4), (64, 128)):
        # The order in which the program sets them: the choice at its start, and what that takes.
        good.append(
            attempt(report, f"attention_chosen_{width}_groups_of_{groups}", partial(chosen, place, width, groups))
        )
    work = attention(SDPBackend.MATH, 64, torch.float32, 4)
    good.append(attempt(report, "attention_float32_grouped_math_ms", work))
    return all(good)


def chosen(place: Place, width: int, queries_per_group: int) -> dict[str, Any]:
    """The kernels that the program names at its start, in bfloat16, with a mask and in float32, and what torch takes
    where the program's order is set."""
    from megatron_doremi.model.attention import AttentionShape, choose_kernel, in_order, kernel_order, repeats_groups

    capability = (0, 0) if place.cpu else torch.cuda.get_device_capability()
    order = kernel_order(capability, torch.backends.cudnn.version())
    windows, seq, heads = place.pick((8, 2048, 32 * 64 // width), (1, 64, 4))
    result: dict[str, Any] = {}
    for name, dtype, masked in (
        ("bfloat16", torch.bfloat16, False),
        ("masked", torch.bfloat16, True),
        ("float32", torch.float32, False),
    ):
        shape = AttentionShape(windows, seq, heads, heads // queries_per_group, width, dtype, masked, True)
        said = choose_kernel(shape, order, place.device).name
        groups = heads if repeats_groups(dtype, masked) else shape.groups
        q, k, v = (
            torch.randn(windows, seq, each, width, device=place.device, dtype=dtype, requires_grad=True).transpose(1, 2)
            for each in (heads, groups, groups)
        )
        mask = torch.zeros(windows, 1, seq, seq, device=place.device, dtype=dtype) if masked else None

        def work(q: Tensor = q, k: Tensor = k, v: Tensor = v, mask: Tensor | None = mask) -> None:
            grouped = k.shape[1] != q.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
            out.sum().backward()

        with in_order(order):
            result[name] = {"kernel": taken_kernel(work), "ms": place.milliseconds(work, 1, 3)}
        # On a CPU, where the checks know none, the program names none.
        assert place.cpu or result[name]["kernel"] == said, (said, result)
    return result


def taken_kernel(work: Callable[[], None]) -> str:
    """The attention kernel that a call of `work` takes, by the name of torch's operation."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    names = " ".join(row.key for row in profiler.key_averages())
    parts = {"cudnn_attention": "cuDNN", "efficient_attention": "memory-efficient", "flash_attention": "flash"}
    return next((kernel for part, kernel in parts.items() if part in names), "math")


def compiled(place: Place, report: Report) -> bool:
    """Times forward and backward of a block and of the head's token losses, eager and compiled."""
    from megatron_doremi.config import ModelConfig, gpt_config
    from megatron_doremi.execution import Execution
    from megatron_doremi.model.gpt import Block
    from megatron_doremi.model.positions import Window, rotary_table
    from megatron_doremi.parallel.cross_entropy import token_losses
    from megatron_doremi.parallel.groups import TensorGroup
    from megatron_doremi.parallel.layers import TensorParallel

    backend = place.pick("inductor", "aot_eager")
    size = {"model_size": "1b"} if not place.cpu else {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 4}
    windows, seq, vocab = place.pick((8, 2048, 50257), (1, 64, 500))
    gpt = gpt_config(ModelConfig(**size, swiglu=True, disable_bias_linear=True), seq, vocab)
    device, group = place.device, TensorGroup(None, 1, 0)

    def block() -> dict[str, float]:
        layer = Block(gpt, TensorParallel())
        torch.nn.utils.vector_to_parameters(
            0.02 * torch.randn(sum(p.numel() for p in layer.parameters())), layer.parameters()
        )
        layer.to(device, torch.bfloat16)
        x = torch.randn(windows, seq, gpt.hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
        fast = torch.compile(layer, backend=backend, fullgraph=True)
        positions = torch.arange(seq, device=device)
        window = Window(positions, rotary_table(positions, gpt.kv_channels, gpt.rotary_base))

        def work(run: Callable[..., Tensor]) -> None:
            run(x, window).sum().backward()

        return {n: place.milliseconds(partial(work, each)) for n, each in (("eager", layer), ("compiled", fast))}

    def losses() -> dict[str, float]:
        rows = torch.randn(place.pick(4096, 64), gpt.hidden_size, device=device, dtype=torch.bfloat16)
        weight = torch.randn(gpt.padded_vocab_size(1), gpt.hidden_size, device=device, dtype=torch.bfloat16)
        targets = torch.randint(0, vocab, (len(rows),), device=device)
        weight = (0.02 * weight).requires_grad_()

        def work(compiled: bool) -> None:
            execution = Execution(loss_chunk_tokens=1024, compiled=compiled)
            token_losses(rows.unsqueeze(0), weight, targets.unsqueeze(0), vocab, group, execution).sum().backward()

        return {n: place.milliseconds(partial(work, each)) for n, each in (("eager", False), ("compiled", True))}

    return all([attempt(report, "block_ms", block), attempt(report, "row_losses_ms", losses)])


def proxy_280m(place: Place, report: Report) -> bool:
    """A 280m proxy, vocabulary 256,000, 8 micro-batches of 8 x 1024: as it is, with full recomputation, compiled."""
    context, good = single(place), []
    for name, recompute, compiled in (("none", "none", False), ("full", "full", False), ("compiled", "none", True)):

        def measure(recompute: str = recompute, compiled: bool = compiled) -> dict[str, Any]:
            made = make(place, "280m", 256000, (8, 8, 1024), "proxy", recompute, compiled, context=context)
            try:
                return speed(place, *made, 3)
            finally:
                destroy(made[0])

        good.append(attempt(report, name, measure))
        collect()
    return all(good)


def checkpoint(place: Place, report: Report) -> bool:
    """Times a checkpoint's copy to the host three times: the first pins memory, the others run at the bus's rate."""
    from megatron_doremi.checkpoint.optimizer_state import optimizer_file
    from megatron_doremi.checkpoint.weights import weights_file

    engine, _, batches = make(place, "280m", 50257, (1, 2, 1024))
    step_of(engine, batches)()
    topology = engine.context.topology

    def copies() -> Iterator[dict[str, float]]:
        files: list[Any] = []
        for _ in range(3):
            # As a run does when a checkpoint is written: its page-locked memory serves the next one.
            files.clear()
            place.wait()
            began = time.perf_counter()
            files += [weights_file(engine.module, topology), optimizer_file(engine, topology)]
            place.wait()
            seconds = time.perf_counter() - began
            size = sum(tensor.nbytes for file in files if file is not None for tensor in file.tensors.values())
            yield {"gib": round(size / 2**30, 2), "ms": round(1e3 * seconds, 1), "gb_a_second": size / seconds / 1e9}

    return attempt(report, "copies", lambda: list(copies()))


def rivals(place: Place, report: Report) -> bool:
    """A step of 1b beside Transformers' Llama, one variant after the other, and what a proxy's step takes over a plain
    one of 280m: the output of the benchmarks that measure them."""
    size = place.pick(
        "--model-size 1b --seq 2048 --vocab 50257 --micro-batch-size 8", "--layers 2 --hidden 64 --seq 64"
    )
    step = f"train_throughput.py --bf16 --compile {size} --micro-batches 4 --steps {place.pick(5, 1)} --only"
    proxy = place.pick("--layers 12 --hidden 768 --vocab 50257 --seq 1024 --micro-batch-size 8", "--layers 2 --seq 64")
    overhead = f"doremi_overhead.py --pipe 1 --bf16 --micro-batches 8 --steps {place.pick(10, 1)} {proxy}"
    commands = {name: [*shlex.split(step), name] for name in ("ours compiled", "transformers compiled", "transformers")}
    commands["proxy"] = shlex.split(overhead)

    def output(words: list[str]) -> list[str]:
        path = Path(__file__).with_name(words[0])
        done = subprocess.run(
            [sys.executable, path, *words[1:]], capture_output=True, text=True, timeout=110, check=False
        )
        assert done.returncode == 0, done.stderr[-500:]
        return done.stdout.splitlines()[-8:]

    good = [attempt(report, name, partial(output, words)) for name, words in commands.items()]
    return all(good)
