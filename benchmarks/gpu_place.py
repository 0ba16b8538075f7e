"""Shared by the checks of gpu_smoke.py: device, timing, reporting, and engines of the measured sizes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Report = Callable[..., None]
# On average, where micro-batches have documents.
TOKENS_A_DOCUMENT = 600


@dataclass(frozen=True)
class Place:
    """Where the checks run.

    Attributes:
        cpu: tiny models on the CPU.
        work: a scratch folder that checks share.
    """

    cpu: bool
    work: Path

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.cpu else "cuda")

    def pick(self, on_gpu: Any, on_cpu: Any) -> Any:
        return on_cpu if self.cpu else on_gpu

    def wait(self) -> None:
        """Waits until the device has finished."""
        if not self.cpu:
            torch.cuda.synchronize()

    def milliseconds(self, work: Callable[[], Any], warm: int = 2, repeat: int = 5) -> float:
        """Median milliseconds of a call of `work`."""
        took = []
        for turn in range(warm + repeat):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            if turn >= warm:
                took.append(1e3 * (time.perf_counter() - began))
        return round(float(np.median(took)), 3)


def attempt(report: Report, name: str, work: Callable[[], Any]) -> bool:
    """Reports name=work() or its error, so that one failing finding does not stop the others."""
    try:
        report(**{name: work()})
        return True
    except Exception as error:
        report(**{name: {"error": f"{type(error).__name__}: {error}"[:600]}})
        return False


def single(place: Place) -> Any:
    """The ParallelContext of a single process, initialized as in the program."""
    from megatron_doremi.cluster.launch import Launch
    from megatron_doremi.cluster.process_group import join
    from megatron_doremi.parallel.context import make_context
    from megatron_doremi.parallel.topology import Topology

    device = join(Launch())[0]
    assert (device.type == "cpu") == place.cpu, device
    return make_context(Topology(1, 1, 1, 0), device)


def make(
    place: Place,
    size: str,
    vocab: int,
    batch: tuple[int, int, int],
    phase: str = "main",
    recompute: str = "none",
    compiled: bool = False,
    context: Any = None,
    shape: dict[str, Any] | None = None,
    **parallel: Any,
) -> tuple[Any, Any, Sequence[Any]]:
    """(engine, shape, micro-batches) in bfloat16 with ZeRO 1; `batch` is (micro-batches, windows in each, length).

    `shape` has more fields of the GPT's shape; with `eod` micro-batches have documents. `parallel` has more fields of
    ParallelConfig.
    """
    from megatron_doremi.config import (
        Config,
        DataConfig,
        DoReMiConfig,
        ModelConfig,
        OptimizerConfig,
        ParallelConfig,
        RunConfig,
        gpt_config,
    )
    from megatron_doremi.data.loader import MicroBatch, document_bounds
    from megatron_doremi.engine.build import make_engine
    from megatron_doremi.mixture.controllers import make_controller, make_objective
    from megatron_doremi.plan import make_plan

    context = context or single(place)
    if place.cpu:
        vocab, batch = 500, (batch[0], 2, 64)
        model = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, swiglu=True)
    else:
        model = ModelConfig(model_size=size, swiglu=True, disable_bias_linear=True)
    count, windows, seq = batch
    config = Config(
        DataConfig(
            phase=phase, seq_length=seq, micro_batch_size=windows, global_batch_size=windows * count, train_iters=100
        ),
        model,
        ParallelConfig(zero_stage=1, recompute_granularity=recompute, compile=compiled, **parallel),
        DoReMiConfig(),
        OptimizerConfig(bf16=True),
        RunConfig(),
    )
    gpt = replace(gpt_config(model, seq, vocab), **(shape or {}))
    names = tuple(f"domain {number}" for number in range(8))
    plan = make_plan(config, context.topology, gpt, names, (1,) * 8, np.full(8, 1 / 8))
    engine = make_engine(plan, make_objective(plan, make_controller(plan), context), context)
    generator = torch.Generator().manual_seed(1)
    batches = []
    for number in range(count):
        ids = torch.randint(1, vocab, (windows, seq + 1), generator=generator)
        documents = None
        if gpt.eod == 0:
            ids[torch.rand(ids.shape, generator=generator) < 1 / TOKENS_A_DOCUMENT] = 0
            documents = document_bounds(ids[:, :-1].numpy(), 0, np.ones(windows, dtype=bool))
        domains = (torch.arange(windows) + number) % 8
        each = MicroBatch(
            ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), domains, torch.arange(windows), documents=documents
        )
        if phase == "proxy":
            each = replace(each, reference=torch.full((windows, seq), 3.0))
        batches.append(each if place.cpu else each.pinned())
    return engine, gpt, batches


def step_of(engine: Any, batches: Sequence[Any]) -> Callable[[], None]:
    """One step, as in the training loop."""
    from megatron_doremi.cluster.step_flags import reduce_flags

    targets = torch.ones_like(engine.objective.current.stats.targets)

    def before_step(norm: Tensor | None) -> float | None:
        return reduce_flags(engine.objective.current.stats.stack(), norm, 0, False, False).norm

    return lambda: engine.train_step(batches, targets, before_step)


def destroy(engine: Any) -> None:
    """Lets go of what hooks of DeepSpeed's optimizers hold of an engine; `collect` frees it when no name is left."""
    engine.destroy()
    for parameter in engine.module.parameters():
        # Hooks hold the parameter itself: its numbers, and what DeepSpeed's optimizer has added to it.
        parameter.data = parameter.data.new_empty(0)
        parameter.__dict__.clear()


def collect() -> None:
    """Frees what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
