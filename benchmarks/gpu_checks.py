"""The checks of gpu_smoke.py: those here pass or fail, those in gpu_timings.py measure.

Each check takes a place and a function that reports findings, and returns whether it passed. Only documented
interfaces of torch 2.11 and later are used.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gpu_timings
import numpy as np
import torch
from gpu_place import Place, Report, attempt, single

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 1000
FLAGS = shlex.split("--seq-length 64 --micro-batch-size 4")
TRAINING_FLAGS = shlex.split(
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128 --swiglu --disable-bias-linear "
    "--zero-stage 1 --lr 3e-3 --log-interval 1"
)
# What people turn on; each is a function of the seed and the data, on any device.
TURNED_ON = shlex.split(
    "--qk-layernorm --z-loss 1e-3 --attention-dropout 0.1 --hidden-dropout 0.1 --reset-position-ids "
    "--reset-attention-mask --optimizer muon --lr-decay-style WSD --lr-wsd-decay-iters 4 "
    "--recompute-granularity full --train-iters 8"
)


def versions(place: Place, report: Report) -> bool:
    """Installed packages and hardware, and whether a process group forms on cuda:0 with nccl."""
    import torch.distributed as dist

    packages = ("torch", "deepspeed", "numpy", "safetensors", "pydantic", "tqdm", "tensorboard", "orjson", "zstandard")
    installed = {}
    for name in packages:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "importable" if importlib.util.find_spec(name) else "missing"
    report(python=platform.python_version(), packages=installed, cuda=torch.version.cuda, threads=os.cpu_count())
    if not place.cpu:
        gpu = torch.cuda.get_device_properties(0)
        report(gpu=gpu.name, memory_gib=round(gpu.total_memory / 2**30, 1), gpus=torch.cuda.device_count())
        report(capability=f"{gpu.major}.{gpu.minor}", cudnn=torch.backends.cudnn.version())
    device = single(place).device
    value = torch.ones(3).to(device)
    dist.all_reduce(value)
    report(device=str(device), backend=dist.get_backend(), reduced=value.tolist())
    if not place.cpu:
        from megatron_doremi.phases.metrics import peak_tflops

        report(peak_tflops=peak_tflops(torch.cuda.get_device_name()))
    return True


def float32(place: Place, report: Report) -> bool:
    """Compares tiny models' losses and gradients with the CPU's, and the head's bfloat16 gradient with float64."""
    from megatron_doremi.config import GPTConfig
    from megatron_doremi.execution import Execution
    from megatron_doremi.model.unpipelined import GPTModel
    from megatron_doremi.parallel.cross_entropy import token_losses
    from megatron_doremi.parallel.groups import TensorGroup

    context = single(place)
    device = context.device
    base = GPTConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        swiglu=True,
        bias_linear=False,
        vocab_size=501,
        max_positions=128,
        init_method_std=0.1,
    )
    other = replace(
        base, num_query_groups=4, normalization="LayerNorm", swiglu=False, bias_linear=True, tied_embeddings=False
    )
    shapes = {"grouped": base, "biases": replace(other, position_embedding_type="learned_absolute")}
    ids = torch.randint(0, 501, (4, 129), generator=torch.Generator().manual_seed(5))

    def compare(gpt: GPTConfig, recompute: str) -> dict[str, float]:
        results = []
        for where in (torch.device("cpu"), device):
            model = GPTModel(gpt, context, 3, Execution(recompute, 64)).to(where)
            losses = model(ids[:, :-1].to(where), ids[:, 1:].to(where))
            losses.mean().backward()
            gradients = {name: each.grad.cpu() for name, each in model.named_parameters() if each.grad is not None}
            results.append((losses.detach().cpu(), gradients))
        (losses, gradients), (theirs, others) = results
        apart = [float((gradients[n] - others[n]).abs().max() / gradients[n].abs().max()) for n in gradients]
        result = {"loss": float((losses - theirs).abs().max()), "gradient": max(apart)}
        assert result["loss"] < 1e-4, result
        assert result["gradient"] < 1e-4, result
        return result

    def head() -> float:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, 512, 64, generator=generator).bfloat16()
        weight = (0.1 * torch.randn(128, 64, generator=generator)).bfloat16()
        targets = torch.randint(0, 100, (1, 512), generator=generator)
        gradients = []
        for dtype, where, chunk in ((torch.float64, torch.device("cpu"), 0), (torch.bfloat16, device, 16)):
            rows = weight.to(where, dtype, copy=True).requires_grad_()
            inputs = hidden.to(where, dtype), rows, targets.to(where), 100, TensorGroup(None, 1, 0)
            losses = token_losses(*inputs, Execution(loss_chunk_tokens=chunk))
            losses.sum().backward()
            assert rows.grad is not None
            gradients.append(rows.grad.double().cpu())
        error = float((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max())
        assert error < 1e-2, error
        return error

    good = [attempt(report, name, partial(compare, gpt, "none")) for name, gpt in shapes.items()]
    good.append(attempt(report, "recomputed", partial(compare, base, "full")))
    return all([*good, attempt(report, "head_gradient_bf16", head)])


def tiny_data(place: Place) -> Path:
    """A learnable data set of three domains; written once."""
    from megatron_doremi.data.indexed_dataset import IndexedDatasetWriter, dtype_for
    from megatron_doremi.data.manifest import Domain, Manifest, TokenizerInfo, save_manifest

    folder = place.work / "data"
    if (folder / "domains.json").exists():
        return folder / "domains.json"
    folder.mkdir(parents=True, exist_ok=True)
    generator, domains = np.random.default_rng(3), []
    for number in range(3):
        prefixes, cycle = {}, generator.permutation(VOCAB)[: 50 * (1 + number)]
        for split, count in (("train", 60000), ("valid", 3000)):
            ids = np.resize(cycle, count)
            prefixes[split] = folder / f"domain{number}_{split}"
            with IndexedDatasetWriter(prefixes[split], dtype_for(VOCAB)) as writer:
                writer.add_document(ids)
        domains.append(Domain(f"domain{number}", prefixes["train"], prefixes["valid"], 60000, 1, 60000))
    (folder / "tokenizer.model").write_text("none: ids were drawn")
    tokenizer = TokenizerInfo("SentencePieceTokenizer", folder / "tokenizer.model", "0" * 64, VOCAB, 0)
    save_manifest(Manifest(tuple(domains), tokenizer, folder / "domains.json"))
    return folder / "domains.json"


def run_program(
    place: Place, phase: str, save: Path, *flags: str, bf16: bool = True, on_cpu: bool = False
) -> list[dict[str, Any]]:
    """Runs pretrain_doremi.py as a user would, with ZeRO 1; returns the lines of its metrics."""
    from megatron_doremi.settings import EVALUATE, TRAINING

    argv = [
        "--phase",
        phase,
        "--domains",
        str(tiny_data(place)),
        "--save",
        str(save),
        *FLAGS,
        *["--bf16"] * bf16,
        *flags,
    ]
    argv += TRAINING_FLAGS if phase in TRAINING else []
    argv += ["--seed", "3", "--global-batch-size", "8"] if phase != EVALUATE else []
    command = [sys.executable, str(ROOT / "pretrain_doremi.py"), *argv]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if on_cpu else {}
    environment = {**os.environ, **hidden}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=80, env=environment)
    assert done.returncode == 0, f"{phase}: exit {done.returncode}: {done.stderr[-500:]}"
    path = save / ("evaluations.jsonl" if phase == "evaluate" else "metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def reference_run(place: Place) -> tuple[Path, list[dict[str, Any]]]:
    """Twelve steps of the reference; trained once."""
    save = place.work / "reference"
    if (save / "done").exists():
        return save, [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    lines = run_program(place, "reference", save, "--train-iters", "12")
    (save / "done").touch()
    return save, lines


def program(place: Place, report: Report) -> bool:
    """Runs reference, score, proxy and evaluate: exit 0, decreasing losses, weights, MFU in the metrics."""

    def train() -> dict[str, Any]:
        _, lines = reference_run(place)
        steps = [line for line in lines if "loss" in line]
        shown = ("tokens_per_second", "tflops_per_gpu", "mfu", "memory_gib")
        assert place.cpu or {"tflops_per_gpu", "memory_gib"} <= steps[-1].keys(), steps[-1].keys()
        return {"first": steps[0]["loss"], "last": steps[-1]["loss"], **{k: steps[-1].get(k) for k in shown}}

    reference, scores = place.work / "reference", place.work / "scores"
    reference_flags = ["--reference-load", str(reference)]

    def learn() -> dict[str, Any]:
        flags = ["--reference-losses", str(scores), "--train-iters", "8"]
        lines = run_program(place, "proxy", place.work / "proxy", *flags)
        weights = json.loads((place.work / "proxy" / "domain_weights.json").read_text())["weights"]
        assert abs(sum(weights.values()) - 1.0) < 1e-9
        return {"weights": weights, "loss": [line["loss"] for line in lines if "loss" in line][-1]}

    def evaluate() -> dict[str, Any]:
        line = run_program(place, "evaluate", place.work / "evaluated", "--load", str(reference))[-1]
        return {key: line[key] for key in ("iteration", "eval_uniform_mean", "eval_token_mean")}

    def score() -> str:
        run_program(place, "score", scores, *reference_flags, "--train-iters", "8")
        return "exit 0"

    parts = {"reference": train, "score": score, "proxy": learn, "evaluate": evaluate}
    good = [attempt(report, name, work) for name, work in parts.items()]
    return all(good)


def resume(place: Place, report: Report) -> bool:
    """Stops at step 6 of 12 and resumes; compares the losses with those of an uninterrupted run."""

    def compare() -> dict[str, Any]:
        save = place.work / "broken"
        flags = ["--train-iters", "12", "--load", str(save)]
        run_program(place, "reference", save, *flags, "--exit-interval", "6")
        lines = run_program(place, "reference", save, *flags)
        pairs = [
            [line["loss"] for line in run if "loss" in line and line["iteration"] > 6]
            for run in (reference_run(place)[1], lines)
        ]
        apart = max(abs(a - b) for a, b in zip(*pairs, strict=True))
        assert apart < 1e-2, apart
        return {"largest_difference": apart, "bits_match": pairs[0] == pairs[1]}

    return attempt(report, "resume", compare)


def flags(place: Place, report: Report) -> bool:
    """Trains with all that people turn on: losses in float32 as on the CPU, and in bfloat16 near them."""

    def losses(name: str, **how: bool) -> list[float]:
        lines = run_program(place, "main", place.work / name, "--domain-weights", "uniform", *TURNED_ON, **how)
        return [line["loss"] for line in lines if "loss" in line]

    expected = losses("flags on the CPU", bf16=False, on_cpu=True)

    def compare(limit: float, **how: bool) -> float:
        found = losses(f"flags {limit}", **how)
        apart = max(abs(a - b) for a, b in zip(found, expected, strict=True))
        assert len(found) == 8, found
        assert apart < limit, (found, expected)
        return apart

    good = attempt(report, "float32", partial(compare, 1e-3, bf16=False))
    return attempt(report, "bfloat16", partial(compare, 5e-2)) and good


def documents(place: Place, report: Report) -> bool:
    """Attention by a kernel that takes documents as sequences, in bfloat16, beside the mask in bfloat16 and in float32;
    and the graphs of --compile over micro-batches of several numbers of documents."""
    from torch._dynamo.utils import counters

    from megatron_doremi.config import GPTConfig
    from megatron_doremi.data.loader import document_bounds
    from megatron_doremi.execution import Execution
    from megatron_doremi.model.unpipelined import GPTModel

    context, (windows, seq) = single(place), place.pick((8, 2048), (2, 128))
    gpt = GPTConfig(
        num_layers=2,
        hidden_size=512,
        ffn_hidden_size=1024,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=64,
        swiglu=True,
        bias_linear=False,
        vocab_size=501,
        max_positions=seq,
        init_method_std=0.05,
        reset_position_ids=True,
        reset_attention_mask=True,
        eod=0,
    )

    def text(length: int) -> tuple[Any, Any, Any]:
        """Tokens, targets and bounds; documents have about `length` tokens."""
        generator = np.random.default_rng(length)
        ids = generator.integers(1, 501, (windows, seq + 1))
        ids[generator.random(ids.shape) < 1 / length] = 0
        bounds = document_bounds(ids[:, :-1], 0, np.ones(windows, dtype=bool))
        assert bounds is not None
        tokens = torch.from_numpy(ids).to(place.device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), bounds.to(place.device)

    def gradients_of(model: GPTModel, tokens: Any, targets: Any, bounds: Any) -> tuple[Any, dict[str, Any]]:
        model.zero_grad()
        losses = model(tokens, targets, None, bounds)
        losses.mean().backward()
        return losses.detach(), {n: each.grad.float() for n, each in model.named_parameters() if each.grad is not None}

    def made(compiled: bool) -> GPTModel:
        model = GPTModel(gpt, context, 3, Execution(loss_chunk_tokens=1024, compiled=compiled))
        return model.to(place.device, torch.bfloat16)

    def compare(compiled: bool, length: int) -> dict[str, Any]:
        """How far losses and gradients are from those of the mask in float32, and those of the mask in bfloat16 are."""
        model, (tokens, targets, bounds) = made(compiled), text(length)
        assert place.cpu or model.document_eod == 0, "no kernel takes documents here"
        exact = gradients_of(made(False).float(), tokens, targets, None)
        result: dict[str, Any] = {"documents": len(bounds) - 1}
        for name, each in (("mask", None), ("kernel", bounds)):
            losses, gradients = gradients_of(model, tokens, targets, each)
            result[f"{name}_loss"] = float((losses - exact[0]).abs().max())
            apart = [float((gradients[n] - g).norm() / g.norm()) for n, g in exact[1].items()]
            result[f"{name}_gradient"] = max(apart)
        for value in ("loss", "gradient"):
            assert result[f"kernel_{value}"] < 1.5 * result[f"mask_{value}"] + 1e-4, result
        return result

    def graphs() -> dict[str, Any]:
        model, seen = made(True), []
        for length in (60, 200, 600, 5000):
            gradients_of(model, *text(length))
            seen.append(counters["stats"]["unique_graphs"])
        assert seen[-1] == seen[0], seen
        return {"graphs_after_each": seen}

    good = [attempt(report, f"documents_of_{length}", partial(compare, False, length)) for length in (60, 600)]
    if not place.cpu:
        good += [attempt(report, "compiled", partial(compare, True, 600)), attempt(report, "graphs", graphs)]
    return all(good)


CHECKS: dict[str, Callable[[Place, Report], bool]] = {
    "versions": versions,
    "float32": float32,
    "program": program,
    "resume": resume,
    "flags": flags,
    "documents": documents,
    "sync": gpu_timings.sync,
    "1b": gpu_timings.one_billion,
    "1b_compiled": gpu_timings.one_billion_compiled,
    "rivals": gpu_timings.rivals,
    "1b_settings": gpu_timings.one_billion_settings,
    "kernels": gpu_timings.kernels,
    "compiled": gpu_timings.compiled,
    "proxy_280m": gpu_timings.proxy_280m,
    "checkpoint": gpu_timings.checkpoint,
}
