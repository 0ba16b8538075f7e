"""Metrics lines against values computed by hand.

Run alone: python -m pytest tests/phases/test_metrics.py
"""

from __future__ import annotations

import pytest
import torch
from phases.small import MODEL, train
from ranks import on_ranks, program

from megatron_doremi.config import GPTConfig
from megatron_doremi.mixture.statistics import DomainStats
from megatron_doremi.phases.metrics import Meters, StepTimer, domain_entries, flops_per_token, peak_tflops, step_summary

STATS = DomainStats(*torch.tensor([[1.0, 0.0, 0.0], [6.0, 3.0, 0.0], [4.0, 1.0, 0.0]]))


def test_domain_entries_by_hand():
    entry = domain_entries(STATS, ["a", "b", "c"])
    assert entry["loss"] == pytest.approx(9.0 / 5.0)
    assert entry["domain_loss"] == {"a": 1.5, "b": 3.0}
    assert entry["domain_tokens"] == {"a": 4, "b": 1, "c": 0}


def test_peaks_are_found_by_the_longest_name():
    """H100 PCIe differs from H100 SXM, and GH200 from H200; an unlisted GPU, or a part of one, has no MFU."""
    names = {
        "NVIDIA H100 80GB HBM3": 989.0,
        "NVIDIA H100 PCIe": 756.0,
        "NVIDIA H100 NVL": 835.0,
        "NVIDIA H200": 989.0,
        "NVIDIA GH200 480GB": 989.0,
        "NVIDIA A100-SXM4-80GB": 312.0,
        "NVIDIA B200": 2250.0,
        "NVIDIA GeForce RTX 4090": None,
        "NVIDIA RTX A1000": None,
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
    }
    assert {name: peak_tflops(name) for name in names} == names


def test_flops_of_a_token_by_hand():
    """One layer of width 4, 2 heads of 2, GELU of 8, vocabulary 10, windows of 6."""
    gpt = GPTConfig(
        num_layers=1,
        hidden_size=4,
        ffn_hidden_size=8,
        num_attention_heads=2,
        num_query_groups=2,
        kv_channels=2,
        bias_linear=False,
        vocab_size=10,
        make_vocab_size_divisible_by=1,
        max_positions=6,
    )
    # qkv 4 x 12, projection 4 x 4, feed-forward 2 x 4 x 8, output 4 x 10; scores and mixing 2 x 4 x 6 / 2.
    assert flops_per_token(gpt, 6) == 6 * (48 + 16 + 64 + 40 + 24)


def test_meters_by_hand():
    """2e15 operations in half a second on four ranks are 1,000 TFLOP/s each."""
    meters = Meters(tokens=1000, flops=2e15, world_size=4, gpu="NVIDIA B200")
    entries = meters.entries(0.5, {"data": 0.0012345, "forward": 0.4}, 3 << 30)
    assert entries == {
        "elapsed_ms": 500.0,
        "tokens_per_second": 2000.0,
        "time_ms": {"data": 1.234, "forward": 400.0},
        "tflops_per_gpu": 1000.0,
        "memory_gib": 3.0,
        "mfu": pytest.approx(1000 / 2250),
    }
    unknown = Meters(1000, 2e15, 4, "NVIDIA GeForce RTX 4090").entries(0.5, {}, 3 << 30)
    assert entries.keys() - unknown.keys() == {"mfu"}
    assert Meters(1000, 2e15, 4, None).entries(0.5, {}, 0).keys() == {"elapsed_ms", "tokens_per_second", "time_ms"}


def test_the_console_shows_mfu_where_it_is_known():
    entry = {"iteration": 5, "loss": 2.0, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 12345.0}
    assert "tokens/s | 1 h left" in step_summary(entry, 10, "1 h")
    entry["mfu"] = 0.4567
    assert "tokens/s | MFU 45.7% | 1 h left" in step_summary(entry, 10, "1 h")
    # Where the line stays readable.
    for left in ("1 h", "23 h 59 min"):
        assert 100 < len(f"HH:MM:SS {step_summary(entry, 1_000_000, left)}") <= 120


def test_laps_count_steps():
    timer = StepTimer(3)
    steps, seconds = timer.lap(7)
    assert steps == 4
    assert 0 < seconds < 60
    assert timer.lap(8)[0] == 1


def flops_of_steps(launch, argv):
    """The operations of a step that each run counts."""
    counted = []
    entries = Meters.entries

    def counting(self, *arguments):
        counted.append(self.flops)
        return entries(self, *arguments)

    Meters.entries = counting
    try:
        program(launch, argv)
    finally:
        Meters.entries = entries
    return counted


def test_a_step_counts_the_forward_pass_of_an_online_reference(data, reference, tmp_path):
    """2 of 6 operations a parameter more; losses that were recorded cost none."""
    scores = ["--phase", "score", "--domains", str(data), *reference, "--save", str(tmp_path / "scores")]
    on_ranks(1, program, [*scores, "--micro-batch-size", "2", "--seq-length", "16"])
    kinds = {"online": ("proxy", reference), "main": ("main", [])}
    kinds["recorded"] = ("proxy", ["--reference-losses", str(tmp_path / "scores")])
    counted = {}
    for name, (phase, flags) in kinds.items():
        argv = ["--phase", phase, "--domains", str(data), "--save", str(tmp_path / name), "--train-iters", "1"]
        (counted[name],) = on_ranks(1, flops_of_steps, [*argv, *MODEL, *flags])[0]
    assert counted["online"] == pytest.approx(counted["main"] * 4 / 3)
    assert counted["recorded"] == counted["main"]


@pytest.mark.parametrize("flags", [[], ["--pipeline-model-parallel-size", "2"]], ids=["replicas", "stages"])
def test_a_line_has_the_parts_of_a_step(flags, data, reference, tmp_path):
    for line in train(2, "proxy", data, tmp_path / "run", 3, *reference, *flags):
        if "loss" not in line:
            continue
        expected = {"data", "reference", "forward", "backward", "reduction", "optimizer"}
        assert line["time_ms"].keys() == expected | ({"pipeline"} if flags else set())
        # Writing lines, for example, belongs to no part.
        assert 0.0 < sum(line["time_ms"].values()) <= line["elapsed_ms"]
