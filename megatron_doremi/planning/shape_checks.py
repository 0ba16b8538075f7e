"""What a model's flags make of its size, known before the run starts."""

from __future__ import annotations

from dataclasses import replace

from megatron_doremi.config import ModelConfig
from megatron_doremi.planning.memory import parameter_counts
from megatron_doremi.shapes import GPTConfig


def shape_warnings(model: ModelConfig, gpt: GPTConfig) -> list[str]:
    """A warning if a model is larger than the name of its size says."""
    if not model.model_size or not gpt.swiglu:
        return []
    counts = [parameter_counts(each, 1, 1)[0] for each in (gpt, replace(gpt, swiglu=False))]
    with_gate, without = (f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:,.0f}M" for count in counts)
    # Two thirds of the width have as many, rounded up to what tensor parallel sizes divide.
    width = -(-gpt.ffn_hidden_size * 2 // 3 // 64) * 64
    name = f"--model-size {model.model_size}"
    return [
        f"{name} with --swiglu has {with_gate} parameters, without it {without}: it adds a third matrix to each "
        f"feed-forward layer; sizes in place of {name}, with --ffn-hidden-size {width}, give about as many as without"
    ]
