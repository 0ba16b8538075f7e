"""A model in one process, without process groups: for logits and for generating text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megatron_doremi.checkpoint.reader import copy_weights
from megatron_doremi.checkpoint.source import Weights
from megatron_doremi.config import GPTConfig
from megatron_doremi.errors import RunError
from megatron_doremi.model.unpipelined import GPTModel
from megatron_doremi.parallel.context import unsharded


@torch.no_grad()
def load_model(gpt: GPTConfig, weights: Weights, device: torch.device, dtype: torch.dtype) -> GPTModel:
    """A model with its weights, for forward passes only."""
    context = unsharded(device)
    module = GPTModel(gpt, context, seed=None, dtype=dtype)
    copy_weights(module, weights, context)
    return module.requires_grad_(False).eval()


def probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The distribution that the next token is drawn from.

    Args:
        logits: [vocab].
        temperature: divides the logits; 0 puts all probability on the most likely token.
        top_k: only this many most likely tokens remain; 0: all.
        top_p: of those, only the most likely ones whose probabilities first sum to this remain (Holtzman et al. 2020);
            1: all.

    Returns:
        [vocab], float32, sum 1.
    """
    values = logits.float()
    if temperature == 0.0:
        return torch.nn.functional.one_hot(values.argmax(), len(values)).float()
    # Relative to the largest, in float64: a tiny temperature makes the others -Inf, and none of them NaN.
    values = ((values - values.max()).double() / temperature).float()
    order = values.argsort(descending=True, stable=True)
    ranked = values[order].softmax(-1)
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if top_k:
        keep[top_k:] = False
    # A token remains if those before it have not reached the sum yet; the first always does.
    share = ranked * keep / (ranked * keep).sum()
    keep &= share.cumsum(-1) - share < top_p
    keep[0] = True
    result = torch.zeros_like(values)
    result[order] = ranked * keep / (ranked * keep).sum()
    return result


@torch.no_grad()
def generate(
    model: Callable[[Tensor], Tensor],
    max_positions: int | None,
    device: torch.device,
    prompt: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator,
) -> Iterator[int]:
    """Yields one token id after the other.

    Every token is one forward pass over the text so far: there is no cache of keys and values.

    Args:
        model: [1, seq] ids -> [1, seq, vocab] logits.
        max_positions: the model sees the last so many tokens of prompt and text; None: all.
        prompt: ids; not empty.
        max_new_tokens: number of tokens to yield.
        temperature, top_k, top_p: see `probabilities`.

    Raises:
        RunError: a logit is NaN or Inf.
    """
    ids = list(prompt)
    for _ in range(max_new_tokens):
        tokens = torch.tensor([ids[-(max_positions or len(ids)) :]], device=device)
        logits = model(tokens)[0, -1]
        if not bool(logits.isfinite().all()):
            raise RunError(f"the model's logits after {len(ids):,} tokens are NaN or Inf: are its weights damaged?")
        chosen = probabilities(logits, temperature, top_k, top_p).cpu()
        ids.append(int(torch.multinomial(chosen, 1, generator=generator)))
        yield ids[-1]
