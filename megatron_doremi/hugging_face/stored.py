"""How a parameter of this program is stored in a Hugging Face class: under one name or several, and in which layout.

Linear weights are [out, in] in both; GPT-2's four `Conv1D` matrices are [in, out]. Rope pairs the same channels in both
(i with i + width / 2), so nothing is permuted.

torch is imported where tensors are joined: the config.json of a folder is checked before a program imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_doremi.config import GPTConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """The tensors that hold one parameter of this program, at its full shape.

    Attributes:
        names: of the tensors there.
        split: the parameter -> those tensors, in the order of `names`.
        join: those tensors -> the parameter. The inverse of `split`, bit for bit.
        by_rows: the same share of each tensor's rows, joined, is a tensor parallel rank's shard of the parameter.
        is_plain: the tensor is the parameter.
    """

    names: tuple[str, ...]
    split: Callable[[Tensor], list[Tensor]] = lambda full: [full]
    join: Callable[[Sequence[Tensor]], Tensor] = lambda parts: parts[0]
    by_rows: bool = False

    @property
    def is_plain(self) -> bool:
        return self.join is Stored.join

    def shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Shapes of those tensors for a parameter of this shape; nothing is allocated."""
        import torch

        with torch.device("meta"):
            return [tuple(part.shape) for part in self.split(torch.empty(shape))]


def transposed(name: str) -> Stored:
    """A matrix of a `Conv1D` layer."""
    return Stored((name,), lambda full: [full.T], lambda parts: parts[0].T)


def gate_and_up(gate: str, up: str) -> Stored:
    """The fused projection of SwiGLU, whose first half of rows is the gate."""
    return Stored((gate, up), lambda full: list(full.chunk(2)), _joined, by_rows=True)


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    import torch

    return torch.cat(list(parts), dim)


def separate_heads(names: Sequence[str], gpt: GPTConfig) -> Stored:
    """The fused projection, [heads + 2 groups, width, ...] by key-value group, as one matrix (or bias) each for
    queries, keys and values.
    """
    groups, width = gpt.num_query_groups, gpt.kv_channels
    queries = gpt.num_attention_heads // groups

    def split(full: Tensor) -> list[Tensor]:
        by_group = full.view(groups, queries + 2, width, *full.shape[1:])
        parts = by_group.split([queries, 1, 1], dim=1)
        return [part.reshape(-1, *full.shape[1:]) for part in parts]

    def join(parts: Sequence[Tensor]) -> Tensor:
        rest = parts[0].shape[1:]
        # Of a rank's share of the rows, its share of the groups.
        by_group = [part.view(len(parts[1]) // width, -1, width, *rest) for part in parts]
        return _joined(by_group, dim=1).view(-1, *rest)

    return Stored(tuple(names), split, join, by_rows=True)


def stacked_heads(name: str, gpt: GPTConfig, is_weight: bool) -> Stored:
    """GPT-2's fused projection: all queries, then all keys, then all values, as a `Conv1D`."""
    separate = separate_heads(("q", "k", "v"), gpt)

    def split(full: Tensor) -> list[Tensor]:
        stacked = _joined(separate.split(full))
        return [stacked.T if is_weight else stacked]

    def join(parts: Sequence[Tensor]) -> Tensor:
        return separate.join((parts[0].T if is_weight else parts[0]).contiguous().chunk(3))

    return Stored((name,), split, join)
