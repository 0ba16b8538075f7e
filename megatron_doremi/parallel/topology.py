"""The coordinates (pipe, data, tensor) of ranks: arithmetic only, without process groups.

Tensor is the fastest axis, then data, then pipe: ranks of a tensor group are neighbors, as in Megatron-LM.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """The layout of a run and the coordinates of one rank.

    Attributes:
        pipe_size, data_size, tensor_size: pipeline stages, model replicas, ranks over which a layer is sharded.
        rank: global rank of this process.
    """

    pipe_size: int = 1
    data_size: int = 1
    tensor_size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        assert min(self.pipe_size, self.data_size, self.tensor_size) >= 1, self
        assert 0 <= self.rank < self.world_size, self

    @property
    def world_size(self) -> int:
        return self.pipe_size * self.data_size * self.tensor_size

    @property
    def replica_size(self) -> int:
        """Ranks of a replica."""
        return self.pipe_size * self.tensor_size

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor_size

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor_size % self.data_size

    @property
    def pipe_rank(self) -> int:
        return self.rank // (self.tensor_size * self.data_size)

    @property
    def is_first_stage(self) -> bool:
        return self.pipe_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipe_rank == self.pipe_size - 1

    @property
    def reads_batches(self) -> bool:
        """Whether this rank reads windows: the first stage takes their tokens, the last stage their targets."""
        return self.is_first_stage or self.is_last_stage

    def rank_at(self, pipe: int, data: int, tensor: int) -> int:
        """The rank at these coordinates."""
        return (pipe * self.data_size + data) * self.tensor_size + tensor

    def neighbor(self, stages: int) -> int:
        """The rank `stages` stages later in the pipeline (negative: earlier), same data and tensor rank."""
        return self.rank_at(self.pipe_rank + stages, self.data_rank, self.tensor_rank)

    def loss_rank(self) -> int:
        """The rank of this replica that reports its losses: last stage, first tensor rank."""
        return self.rank_at(self.pipe_size - 1, self.data_rank, 0)


def stage_bounds(num_blocks: int, pipe_size: int, before: int, after: int) -> list[int]:
    """Splits the layers [`before` layers, blocks, `after` layers] into `pipe_size` consecutive stages.

    Blocks are spread evenly; the layers before them go to the first stage and those after them to the last,
    so the stages in the middle take the remainder.

    Returns:
        pipe_size + 1 bounds: stage s holds the layers bounds[s] to bounds[s + 1] - 1.
    """
    assert 1 <= pipe_size <= num_blocks
    share, rest = divmod(num_blocks, pipe_size)
    first_extra = (pipe_size - rest) // 2
    bounds = [0]
    for stage in range(pipe_size):
        bounds.append(bounds[-1] + share + (first_extra <= stage < first_extra + rest))
    return [0, *(before + bound for bound in bounds[1:-1]), before + num_blocks + after]
