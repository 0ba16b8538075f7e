"""What the server of `ranks.py` has ready for every rank that it forks.

The optimizer, ZeRO and the profiler import modules when they are first used, DeepSpeed looks for a compiler's headers
and, with bfloat16, collects garbage among all that was imported; together that takes each rank seconds.
"""

import gc
import importlib

for name in (
    "deepspeed.module_inject",
    "deepspeed.moe.layer",
    "deepspeed.ops",
    "deepspeed.runtime.zero.stage3",
    "megatron_doremi.engine.build",
    "megatron_doremi.cluster.process_group",
    "megatron_doremi.phases.train",
    "megatron_doremi.phases.score",
    "megatron_doremi.phases.evaluate",
    "pretrain_doremi",
    "setuptools",
    "tools.inspect_data",
    "tools.merge_datasets",
    "tools.preprocess_data",
    "tools.train_tokenizer",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.fsdp",
    "torch.profiler",
    "torch.utils.tensorboard",
):
    importlib.import_module(name)

# Found out at the first access.
importlib.import_module("deepspeed.ops").__compatible_ops__  # noqa: B018
# What is here stays: no rank has to look through it.
gc.collect()
gc.freeze()
