"""Metrics lines against values computed by hand.

Run alone: python -m pytest tests/phases/test_metrics.py
"""

from __future__ import annotations

import pytest
import torch

from megatron_doremi.config import GPTConfig
from megatron_doremi.mixture.statistics import DomainStats
from megatron_doremi.phases.metrics import domain_entries, flops_per_token, peak_tflops

STATS = DomainStats(*torch.tensor([[1.0, 0.0, 0.0], [6.0, 3.0, 0.0], [4.0, 1.0, 0.0]]))


def test_domain_entries_by_hand():
    entry = domain_entries(STATS, ["a", "b", "c"])
    assert entry["loss"] == pytest.approx(9.0 / 5.0)
    assert entry["domain_loss"] == {"a": 1.5, "b": 3.0}
    assert entry["domain_tokens"] == {"a": 4, "b": 1, "c": 0}


def test_peaks_are_found_by_the_longest_name():
    """H100 PCIe differs from H100 SXM, and GH200 from H200; an unlisted GPU has no MFU."""
    names = {
        "NVIDIA H100 80GB HBM3": 989.0,
        "NVIDIA H100 PCIe": 756.0,
        "NVIDIA H100 NVL": 835.0,
        "NVIDIA H200": 989.0,
        "NVIDIA GH200 480GB": 989.0,
        "NVIDIA A100-SXM4-80GB": 312.0,
        "NVIDIA B200": 2250.0,
        "NVIDIA GeForce RTX 4090": None,
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
