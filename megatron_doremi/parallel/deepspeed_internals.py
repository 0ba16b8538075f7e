"""DeepSpeed's private and undocumented names that this package depends on; only deepspeed_gradients.py uses others.

Written against DeepSpeed 0.19.8; check this file on every upgrade. tests/parallel/test_deepspeed_internals.py lists the
names and asserts that the installed DeepSpeed has them and that no other file of the package mentions them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime import utils as runtime_utils
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, PipeInstruction, PipeSchedule, ReduceGrads
from torch import Tensor, nn

from megatron_doremi.parallel.deepspeed_gradients import make_float32_optimizer
from megatron_doremi.parallel.groups import TensorGroup
from megatron_doremi.parallel.replacement import replaced
from megatron_doremi.parallel.sharded_optimizer import ShardedOptimizer


def disable_shared_memory_all_reduce() -> None:
    """Keeps DeepSpeed from compiling its shared-memory all-reduce at the first start on a machine; gloo is enough.

    `deepspeed.init_distributed` builds that op if `__compatible_ops__` marks it as compatible; no setting disables it.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def silence_memory_reports() -> None:
    """Keeps the bfloat16 optimizer from printing memory statistics while it is built; no setting disables them."""
    bf16_optimizer.see_memory_usage = lambda *_, **__: None


# Parameters under ZeRO 3.


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO 3 shards this parameter over the data-parallel group: only then it has a `ds_id`."""
    return hasattr(parameter, "ds_id")


def local_shard(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter, without communication: its shard (`ds_tensor`) under ZeRO 3, else all of it."""
    shard: Tensor = parameter.ds_tensor if is_partitioned(parameter) else parameter  # type: ignore[attr-defined]
    return shard


def local_piece(parameter: Tensor, data_rank: int) -> tuple[int, Tensor]:
    """The part of a parameter that this rank holds: (its first number in the flattened parameter, [count] its memory).

    Under ZeRO 3 the replicas hold equal parts in rank order, the last of which may be shorter, or empty.
    """
    if not is_partitioned(parameter):
        return 0, parameter.detach().view(-1)
    assert parameter.numel() == 0, "gathered"
    part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    start, total = data_rank * part.numel(), int(parameter.ds_numel)  # type: ignore[attr-defined]
    return start, part.detach().view(-1)[: max(0, min(part.numel(), total - start))]


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """Gathers parameters that ZeRO 3 shards on every rank of the data group, for reading; a collective call."""
    sharded = [parameter for parameter in parameters if is_partitioned(parameter)]
    return deepspeed.zero.GatheredParameters(sharded) if sharded else nullcontext()


# The global gradient norm.


def is_tied_copy(parameter: nn.Parameter) -> bool:
    """Whether another stage holds the first copy of this tied parameter (`ds_pipe_replicated` of PipelineModule)."""
    return bool(getattr(parameter, "ds_pipe_replicated", False))


def count_in_gradient_norm(parameter: nn.Parameter, counted: bool) -> None:
    """Tells DeepSpeed's optimizers whether this rank counts a parameter in the global gradient norm.

    They count a parameter on the first tensor rank, and on every rank if `model_parallel` is set; tied copies are
    excluded.
    """
    parameter.model_parallel = counted  # type: ignore[attr-defined]


def is_counted_in_gradient_norm(parameter: nn.Parameter) -> bool:
    """The value that `count_in_gradient_norm` set."""
    return bool(parameter.model_parallel)  # type: ignore[attr-defined]


# The optimizer's state.


@dataclass(frozen=True)
class OwnedPiece:
    """The piece of a parameter's optimizer state that a rank owns.

    Attributes:
        start: its first element within this rank's tensor-parallel shard of the parameter, flattened.
        count: its number of elements, at least 1.
        flat: the tensor that the optimizer updates and that holds the piece's weights; see `flat_partitions`.
        offset: first element of the piece within `flat`, flattened.
        is_master: whether `flat` is a float32 copy of the weights, not the parameter itself.
    """

    start: int
    count: int
    flat: Tensor
    offset: int
    is_master: bool

    def of(self, tensor: Tensor) -> Tensor:
        """[count], the piece of a tensor shaped like `flat`; it shares the tensor's memory."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.count)


def wraps_optimizer(engine: DeepSpeedEngine) -> bool:
    """Whether DeepSpeed's optimizer (ZeRO or mixed precision) wraps the torch optimizer, `basic_optimizer`."""
    return engine.optimizer is not engine.basic_optimizer


def flat_partitions(engine: DeepSpeedEngine) -> list[Tensor]:
    """The tensors that the torch optimizer updates: flat float32 partitions under ZeRO, else the parameters.

    ZeRO 3, offloaded ZeRO 2, and the bfloat16 optimizer, which is also that of ZeRO 1 in float32, use different names
    for the partitions of their parameter groups.
    """
    if isinstance(engine.optimizer, ShardedOptimizer):
        return engine.optimizer.masters()
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(engine.optimizer, attribute):
            return list(getattr(engine.optimizer, attribute))
    return [parameter for group in engine.basic_optimizer.param_groups for parameter in group["params"]]


def torch_state(engine: DeepSpeedEngine, flat: Tensor) -> dict[str, Any]:
    """The torch optimizer's state of one of `flat_partitions`, by key; empty before the first step."""
    state: dict[str, Any] = engine.basic_optimizer.state[flat]
    return state


def owned_piece(
    engine: DeepSpeedEngine, parameter: nn.Parameter, data_rank: int, flats: list[Tensor]
) -> OwnedPiece | None:
    """Locates the piece of a parameter's state that this rank owns; None if it owns none.

    ZeRO 3 splits every parameter into equal pieces, in rank order, and records the position of each in its group's
    partition (`grad_position`). Offloaded ZeRO 2 and the bfloat16 optimizer partition the concatenated parameters of a
    group, and `_hp_mapping` records the part of a parameter that lies in this rank's partition.

    Args:
        flats: the engine's `flat_partitions`.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, ShardedOptimizer):
        mine = optimizer.piece_of(parameter)
        return None if mine is None else OwnedPiece(mine.start, mine.count, flats[mine.bucket], mine.offset, True)
    if is_partitioned(parameter):
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = data_rank * size
        count = min(size, parameter.ds_numel - start)  # type: ignore[attr-defined]
        # The last pieces may consist of padding only.
        return OwnedPiece(start, count, flats[group], offset, is_master=True) if count > 0 else None
    if not wraps_optimizer(engine):
        return OwnedPiece(0, parameter.numel(), parameter, 0, is_master=False)
    piece = parameter._hp_mapping  # type: ignore[attr-defined]
    if piece is None or piece.hp_fragment_address.numel <= 0:
        return None
    address = piece.hp_fragment_address
    flat = flats[piece.param_group_index]
    return OwnedPiece(piece.lp_fragment_address.start, address.numel, flat, address.start, is_master=True)


# Process groups.


def new_groups_replaced(new_group: Callable[[Iterable[int]], Any]) -> AbstractContextManager[None]:
    """Within it DeepSpeed gets its process groups from `new_group`. Its grid would make all groups of all ranks, on
    every rank, also those of single ranks."""
    return replaced(deepspeed.comm, "new_group", new_group)


def pipeline_mpu(module: PipelineModule, data_group: Any) -> Any:
    """The `mpu` of a pipeline, its grid, with a data group also where that has one rank."""
    grid = module.mpu()
    grid.dp_proc_group = data_group
    return grid


# The pipeline module.


class PipelineModuleHooks(PipelineModule):
    """DeepSpeed's pipeline module with public names for its hooks and layers."""

    @abstractmethod
    def layer_bounds(self, num_stages: int) -> list[int]:
        """The first layer of every stage, then the number of layers; called while the module is built."""

    def _partition_layers(self, method: str = "uniform") -> None:
        """Assigns layers to this stage. Overridden because DeepSpeed accepts only its own partition methods."""
        self.parts = self.layer_bounds(self.num_stages)
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        """Broadcasts tied weights; without no_grad, autograd would record the broadcast."""
        super()._synchronize_tied_weights()

    def stage_layers(self) -> range:
        """Indices, among all layers, of the layers of this stage."""
        return range(self._local_start, self._local_stop)

    def untied_layer(self, index: int) -> nn.Module:
        """An untied layer of this stage by its index among all layers, under which DeepSpeed registers it."""
        layer: nn.Module = getattr(self, str(index))
        return layer

    def has_tied_layer(self, key: str) -> bool:
        """Whether this stage holds a copy of the tied layer `key` (of its TiedLayerSpec)."""
        return key in self.tied_modules

    def tied_layer(self, key: str) -> nn.Module:
        """This stage's copy of the tied layer `key`."""
        layer: nn.Module = self.tied_modules[key]
        return layer

    def tied_weights(self) -> list[nn.Parameter]:
        """The parameters of this stage of which another stage has a copy."""
        return [each[0] for each in self.get_tied_weights_and_groups()]

    def layer_functions(self) -> list[Callable[..., Tensor]]:
        """The functions that this stage calls in order: layers, and forward functions bound to tied layers."""
        functions: list[Callable[..., Tensor]] = self.forward_funcs
        return functions


# The engines.


def left_as_it_is(norm: Tensor, device: Any = None, val: float = -1.0) -> None:
    """In place of DeepSpeed's change of a norm that is NaN or Inf to -1."""


class EngineHooks(DeepSpeedEngine):
    """Any of DeepSpeed's engines with public names for the hooks of its step."""

    def _configure_zero_optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
        stage, group = self.zero_optimization_stage(), self.seq_data_parallel_group
        if stage == 1:
            return make_float32_optimizer(self, optimizer)
        if stage == 2 and not self.zero_cpu_offload():
            return ShardedOptimizer(optimizer, TensorGroup(group, dist.get_world_size(group), dist.get_rank(group)))
        return super()._configure_zero_optimizer(optimizer)

    def before_model_step(self) -> float | None:
        """Called once per step, after the last backward pass and before any parameter is updated.

        Returns:
            the value of `optimizer_norm`, if it is finite on every rank; None: the optimizer computes and checks it.
        """
        return None

    def _take_model_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer's step, on the last micro-batch of a step."""
        norm = self.before_model_step()
        with nullcontext() if norm is None else self.known_norm(norm):
            super()._take_model_step(*args, **kwargs)

    def optimizer_norm(self) -> Tensor | None:
        """The gradient norm that the optimizer computes within its step, before it, and NaN or Inf where it is not
        finite; a collective call.

        It does not wait for the device. None where that is not possible (ZeRO 3, and an optimizer on the host).
        """
        optimizer, norm = self.optimizer, None
        if isinstance(optimizer, bf16_optimizer.BF16_Optimizer):
            with replaced(runtime_utils, "mask_nan_or_inf_with_val_inplace", left_as_it_is):
                gradients = optimizer.get_grads_for_norm()[0]
                norm = bf16_optimizer.get_global_norm_of_tensors(gradients, optimizer.norm_type, optimizer.mpu)
        return norm

    @contextmanager
    def known_norm(self, norm: float) -> Iterator[None]:
        """Gives the optimizer a finite `norm` on the host: its checks and its clipping then wait for no device."""
        optimizer, known = self.optimizer, torch.tensor(norm, dtype=torch.float32)
        if isinstance(optimizer, bf16_optimizer.BF16_Optimizer):
            with replaced(bf16_optimizer, "get_global_norm_of_tensors", lambda *args, **kwargs: known):
                yield
        else:
            yield

    def allreduce_gradients(self, *args: Any, **kwargs: Any) -> None:
        """The reduction over replicas after a backward pass; DeepSpeed's pipeline engine does not call it."""
        if self.reduces_gradients():
            self.before_reduction()
            super().allreduce_gradients(*args, **kwargs)

    def before_reduction(self) -> None:
        """Called before gradients are reduced after a backward pass; not by the pipeline engine."""

    def reduces_gradients(self) -> bool:
        """Whether the gradients of the replicas are reduced after the last backward pass."""
        return True

    def collects_reduced_gradients(self) -> bool:
        """Whether the optimizer collects its gradients in DeepSpeed's reduction after a backward pass."""
        collect_earlier = (bf16_optimizer.BF16_Optimizer, ShardedOptimizer)
        return wraps_optimizer(self) and not isinstance(self.optimizer, collect_earlier)

    def last_grad_norm(self) -> Tensor | float:
        """The gradient norm of the last step, as computed by the optimizer or given to `set_grad_norm`."""
        norm: Tensor | float = self._global_grad_norm
        return norm

    def set_grad_norm(self, norm: Tensor) -> None:
        """Records the gradient norm of the last step, for an optimizer that computes none."""
        self._global_grad_norm = norm


class PipelineEngineHooks(EngineHooks, PipelineEngine):
    """DeepSpeed's pipeline engine with public names for the hooks of its schedule."""

    def run_schedule(self, micro_batches: Iterator[Any]) -> None:
        """Does what `train_batch` does, without its timers and its reduction of a loss that is never read."""
        self.set_dataiterator(micro_batches)
        self.total_loss = None
        self._compute_loss = True
        self._exec_schedule(self._train_schedule())

    def schedule(self) -> PipeSchedule | None:
        """The schedule of a step; None for DeepSpeed's 1F1B."""
        return None

    def instructions(self) -> Mapping[type[PipeInstruction], Callable[..., None]]:
        """{instruction: function of the engine that executes it}, for instructions that DeepSpeed does not know."""
        return {}

    def before_instruction(self, kind: type[PipeInstruction]) -> None:
        """Called before each instruction of the schedule."""

    def after_forward(self, buffer_id: int, labels: tuple[Tensor, ...]) -> None:
        """Called on the last stage after a forward pass; `loss` holds the result of the module's loss function."""

    def before_backward(self, buffer_id: int) -> None:
        """Called on every stage before a backward pass, which starts from `loss` on the last stage."""

    def _train_schedule(self) -> PipeSchedule:
        schedule = self.schedule()
        return super()._train_schedule() if schedule is None else schedule

    def _exec_forward_pass(self, buffer_id: int) -> None:
        super()._exec_forward_pass(buffer_id)
        if self.is_last_stage():
            self.after_forward(buffer_id, self.pipe_buffers["labels"][buffer_id])

    def _exec_backward_pass(self, buffer_id: int) -> None:
        self.before_backward(buffer_id)
        super()._exec_backward_pass(buffer_id)
        # DeepSpeed would keep the last stage's hidden states until the buffer's next forward pass.
        self.pipe_buffers["outputs"][buffer_id] = None

    def _exec_reduce_grads(self) -> None:
        if self.reduces_gradients():
            super()._exec_reduce_grads()

    @cached_property
    def _INSTRUCTION_MAP(self) -> dict[type[PipeInstruction], Callable[..., None]]:
        """Overridden because DeepSpeed looks up instructions here, not among the methods of the subclass."""
        functions = {
            **PipelineEngine._INSTRUCTION_MAP,
            ForwardPass: PipelineEngineHooks._exec_forward_pass,
            BackwardPass: PipelineEngineHooks._exec_backward_pass,
            ReduceGrads: PipelineEngineHooks._exec_reduce_grads,
            **self.instructions(),
        }
        return {kind: announced(kind, function) for kind, function in functions.items()}


def announced(kind: type[PipeInstruction], function: Callable[..., None]) -> Callable[..., None]:
    def execute(engine: PipelineEngineHooks, **arguments: Any) -> None:
        engine.before_instruction(kind)
        function(engine, **arguments)

    return execute
