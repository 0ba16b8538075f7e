"""The only place that builds DeepSpeed's configuration."""

from __future__ import annotations

from typing import Any

from megatron_doremi.config import Config
from megatron_doremi.plan import RunPlan


def deepspeed_config(plan: RunPlan, parameters: int) -> dict[str, Any]:
    """DeepSpeed's dictionary for a run.

    Args:
        parameters: of the model on a rank, before ZeRO 3 cuts them.
    """
    config = plan.config
    result: dict[str, Any] = {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": config.data.micro_batch_size,
        "gradient_accumulation_steps": plan.micro_batches,
        # Our loop logs; DeepSpeed's own report would cost a synchronization.
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        # It would wait for the device at each forward pass and step.
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": _zero(config, plan.gpt.hidden_size, parameters),
        "gradient_clipping": config.optimizer.clip_grad if config.parallel.zero_stage else 0.0,
        # Reentrant checkpointing cuts a first stage, whose inputs are integers, off the graph. "Partitioned"
        # sends assume that tensor ranks hold the same activations, which with sequence parallel they do not.
        "pipeline": {"use_reentrant": False, "pipe_partitioned": False, "grad_partitioned": False},
    }
    if config.parallel.cpu_offload:
        # DeepSpeed's own Adam for the CPU is compiled at the first start; torch's fused one needs no compiler.
        result["zero_force_ds_cpu_optimizer"] = False
    if config.optimizer.bf16:
        # Each gradient goes to its float32 sum as soon as it is there. Otherwise DeepSpeed clears bfloat16 gradients
        # when the backward pass reaches the module's output, and with them the output layer's, which come from the
        # loss, before the module (seen on 0.19.8: the output layer never learned).
        result["bf16"] = {"enabled": True, "immediate_grad_update": True}
        result["data_types"] = {"grad_accum_dtype": "fp32"}
        # Otherwise the float32 sums are rounded to bfloat16 on their way between replicas, at one replica too.
        result["communication_data_type"] = "fp32"
    return result


def _zero(config: Config, hidden_size: int, parameters: int) -> dict[str, Any]:
    # The "memory efficient" linear layer replaces torch's for the whole process, the reference's too.
    result: dict[str, Any] = {"stage": config.parallel.zero_stage, "memory_efficient_linear": False}
    if config.parallel.zero_stage >= 1:
        # ZeRO allocates a whole bucket; DeepSpeed's default is 500 million numbers, 2 GB, for a model of any size.
        result["reduce_bucket_size"] = min(500_000_000, parameters)
    if config.parallel.zero_stage == 3:
        # Vectors stay whole, matrices are cut, whatever the size of the model (DeepSpeed's default, 100,000 numbers,
        # would leave a small one whole).
        result["stage3_param_persistence_threshold"] = 10 * hidden_size
    if config.parallel.cpu_offload:
        result["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    return result
