"""What a compiled block holds for its backward pass: what autograd saved, against the formula.

Run alone: python -m pytest tests/planning/test_block_memory.py -s
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engines import small_gpt

from megatron_doremi.config import ParallelConfig, TrainingConfig
from megatron_doremi.model.dropout import Dropout
from megatron_doremi.model.gpt import Block
from megatron_doremi.model.positions import Window, rotary_table
from megatron_doremi.parallel.layers import TensorParallel
from megatron_doremi.planning.block_memory import block_bytes_per_token

SHAPE = {"num_layers": 1, "hidden_size": 256, "num_attention_heads": 8, "kv_channels": 32, "ffn_hidden_size": 512}
WINDOWS, SEQ = 2, 64
CASES = {
    "rotated": ({}, "none"),
    "groups": ({"num_query_groups": 2}, "none"),
    "normalized": ({"qk_layernorm": True}, "none"),
    "learned": ({"position_embedding_type": "learned_absolute"}, "none"),
    "learned, groups": ({"position_embedding_type": "learned_absolute", "num_query_groups": 2}, "none"),
    "LayerNorm, biases": ({"normalization": "LayerNorm", "bias_linear": True, "swiglu": False}, "none"),
    "selective": ({}, "selective"),
    "full": ({}, "full"),
    "attention dropout": ({}, "none"),
    "both dropouts": ({}, "none"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_what_a_compiled_block_holds(case, dtype):
    changes, recompute = CASES[case]
    gpt = small_gpt(**{**SHAPE, "num_query_groups": 8, "swiglu": True, "bias_linear": False, **changes})
    rates = {name: 0.1 for name in ("attention", "hidden") if f"{name} dropout" in case or case == "both dropouts"}
    block = Block(gpt, TensorParallel(), recompute, Dropout(**rates)).to(dtype)
    torch.manual_seed(1)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.02)
    positions = torch.arange(SEQ)
    rotary = rotary_table(positions, 32, 10000.0) if gpt.position_embedding_type == "rope" else None
    x = torch.randn(WINDOWS, SEQ, 256, dtype=dtype, requires_grad=True)
    torch._dynamo.reset()
    # The division of a graph into forward and backward pass is Inductor's; its kernels would take minutes.
    run = torch.compile(block, fullgraph=True, backend="aot_eager_decomp_partition")
    held: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = run(x, Window(positions, rotary, keys=torch.arange(WINDOWS) if rates else None))
    for parameter in block.parameters():
        held.pop(parameter.untyped_storage().data_ptr(), None)
    found = sum(held.values()) / (WINDOWS * SEQ)
    training = TrainingConfig(**{f"{name}_dropout": rate for name, rate in rates.items()})
    parallel = ParallelConfig(recompute_granularity=recompute, compile=True)
    expected = block_bytes_per_token(replace(gpt, max_positions=SEQ), parallel, dtype.itemsize, training)
    print(f"{case}, {dtype}: {found:.0f} bytes a token, formula {expected:.0f}")
    # Statistics of norms and softmax, and rotary angles, come on top. Of probabilities torch chooses what to keep.
    least = 0.5 * expected if rates.get("attention") else expected
    assert least <= found < expected + 4 * 256
    out.sum().backward()
