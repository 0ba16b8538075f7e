"""Fused operations against the formulas that they fuse, forward and backward.

Run alone: python -m pytest tests/model/test_fused.py
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from megatron_doremi.model.fused import rotate, split_heads, swiglu
from megatron_doremi.model.positions import RotaryTable, rotary_table

GROUPS, QUERIES, WIDTH = 2, 3, 4
TABLES = {
    "none": None,
    "one for all windows": rotary_table(torch.arange(5), WIDTH, 100.0),
    "one a window": rotary_table(torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]]), WIDTH, 100.0),
}


def projection(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """[2, 5, groups (queries + 2) width]"""
    return torch.randn(2, 5, GROUPS * (QUERIES + 2) * WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def by_complex_numbers(x: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Channel i is the real part and channel i + width / 2 the imaginary part of a number that is turned."""
    real, imaginary = x.double().chunk(2, dim=-1)
    turned = torch.complex(real, imaginary) * torch.complex(table.cos.double(), table.sin.double())
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_heads_are_split_and_rotated(name, dtype, bound):
    qkv, table = projection(dtype), TABLES[name]
    q, k, v = split_heads(qkv, GROUPS, WIDTH, table)
    parts = qkv.view(2, 5, GROUPS, QUERIES + 2, WIDTH)
    expected = parts[:, :, :, :QUERIES], parts[:, :, :, QUERIES : QUERIES + 1]
    if table is not None:
        expected = tuple(by_complex_numbers(part, table) for part in expected)
        assert torch.equal(rotate(parts[:, :, :, :QUERIES], table), q)
    for found, wanted in zip((q, k), expected, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted.double(), rtol=bound, atol=bound)
    assert torch.equal(v, parts[:, :, :, QUERIES + 1 :])


@pytest.mark.parametrize("name", TABLES)
def test_gradients_of_heads(name):
    table = TABLES[name]
    if table is not None:
        table = RotaryTable(*(part.double() for part in table))
        heads = torch.randn(2, 5, 2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda x: rotate(x, table), (heads,))
    assert gradcheck(lambda x: split_heads(x, GROUPS, WIDTH, table), (projection().requires_grad_(),))


def test_swiglu():
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    gate, up = x.chunk(2, dim=-1)
    assert torch.equal(swiglu(x), F.silu(gate) * up)
    assert gradcheck(swiglu, (x,))
