"""Builds DeepSpeed's configuration."""

from __future__ import annotations

from typing import Any

from megatron_doremi.config import Config
from megatron_doremi.plan import RunPlan


def deepspeed_config(plan: RunPlan, parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a run.

    Args:
        parameters: number of parameters of the model on a rank, before ZeRO 3 partitions them.
    """
    config = plan.config
    result: dict[str, Any] = {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": config.data.micro_batch_size,
        "gradient_accumulation_steps": plan.micro_batches,
        # Our loop logs; DeepSpeed's report costs a synchronization with the device.
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        # It would synchronize with the device at each forward pass and step.
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": _zero(config, plan.gpt.hidden_size, parameters),
        "gradient_clipping": config.optimizer.clip_grad if config.parallel.zero_stage else 0.0,
        # Reentrant checkpointing detaches the first stage, whose inputs are integers, from the graph. "Partitioned"
        # sends assume that tensor ranks hold the same activations, which is false with sequence parallelism.
        "pipeline": {"use_reentrant": False, "pipe_partitioned": False, "grad_partitioned": False},
    }
    if config.parallel.cpu_offload:
        # DeepSpeed compiles its Adam for the CPU at the first start; torch's fused Adam needs no compiler.
        result["zero_force_ds_cpu_optimizer"] = False
    if config.optimizer.optimizer == "muon":
        # DeepSpeed's list of optimizers that ZeRO supports has no subclasses.
        result["zero_allow_untested_optimizer"] = True
    if config.optimizer.bf16:
        # Adds each gradient to its float32 sum as soon as it is computed. Otherwise DeepSpeed clears the bfloat16
        # gradients when the backward pass reaches the module's output, including the output layer's, which the loss
        # has computed before (observed with 0.19.8: the output layer was never trained).
        result["bf16"] = {"enabled": True, "immediate_grad_update": True}
        result["data_types"] = {"grad_accum_dtype": "fp32"}
        # Otherwise the float32 sums are rounded to bfloat16 when they are reduced over replicas, even with one replica.
        result["communication_data_type"] = "fp32"
    return result


def _zero(config: Config, hidden_size: int, parameters: int) -> dict[str, Any]:
    # The "memory efficient" linear layer replaces torch's in the entire process, including the reference model.
    result: dict[str, Any] = {"stage": config.parallel.zero_stage, "memory_efficient_linear": False}
    if config.parallel.zero_stage >= 2:
        # DeepSpeed's ZeRO 2 and 3 allocate the full bucket, by default 500 million elements, 2 GB, for a model of any
        # size.
        result["reduce_bucket_size"] = min(500_000_000, parameters)
    if config.parallel.zero_stage == 3:
        # Matrices are partitioned and vectors are not, for models of any size (with DeepSpeed's default, 100,000
        # elements, no parameter of a small model would be partitioned).
        result["stage3_param_persistence_threshold"] = 10 * hidden_size
    if config.parallel.cpu_offload:
        result["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return result
