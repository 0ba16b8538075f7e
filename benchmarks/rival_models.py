"""Models of other libraries of the same shape as ours, and the mean loss of a micro-batch."""

from __future__ import annotations

import contextlib
import importlib.util
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_doremi.config import GPTConfig


class TransformersLoss(nn.Module):
    """Transformers' Llama and the mean loss of a micro-batch."""

    def __init__(self, gpt: GPTConfig, device: torch.device):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        with device:
            self.model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=gpt.padded_vocab_size(1),
                    hidden_size=gpt.hidden_size,
                    intermediate_size=gpt.ffn_hidden_size,
                    num_hidden_layers=gpt.num_layers,
                    num_attention_heads=gpt.num_attention_heads,
                    num_key_value_heads=gpt.num_query_groups,
                    head_dim=gpt.kv_channels,
                    rms_norm_eps=gpt.norm_epsilon,
                    max_position_embeddings=gpt.max_positions,
                    tie_word_embeddings=gpt.tied_embeddings,
                    use_cache=False,
                )
            )

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """[batch, seq] ids and targets -> the mean loss in nats."""
        logits = self.model(input_ids=tokens).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def megatron_core_installed() -> bool:
    """Whether `pip install --no-deps megatron-core` was run; nothing else of the project needs it."""
    return importlib.util.find_spec("megatron") is not None and importlib.util.find_spec("megatron.core") is not None


class MegatronCoreLoss(nn.Module):
    """Megatron Core's GPT from its layers of plain PyTorch, and the mean loss of a micro-batch; one process.

    Without Transformer Engine its attention is not fused: it computes all scores, and half of them are masked. What it
    asks of CUDA in any case, the current device and a random state for dropout, is answered on a CPU.
    """

    def __init__(self, gpt: GPTConfig, device: torch.device):
        super().__init__()
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer import TransformerConfig

        if not dist.is_initialized():
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        if device.type == "cpu":
            setattr(torch.cuda, "current_device", lambda: device)  # noqa: B010
            tensor_parallel.get_cuda_rng_tracker().fork = lambda name="": contextlib.nullcontext()
        else:
            tensor_parallel.model_parallel_cuda_manual_seed(1)
        config = TransformerConfig(
            num_layers=gpt.num_layers,
            hidden_size=gpt.hidden_size,
            num_attention_heads=gpt.num_attention_heads,
            num_query_groups=gpt.num_query_groups,
            kv_channels=gpt.kv_channels,
            ffn_hidden_size=gpt.ffn_hidden_size,
            gated_linear_unit=True,
            activation_func=F.silu,
            add_bias_linear=False,
            normalization="RMSNorm",
            layernorm_epsilon=gpt.norm_epsilon,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
            bias_activation_fusion=device.type == "cuda",
        )
        self.model = GPTModel(
            config,
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=gpt.padded_vocab_size(1),
            max_sequence_length=gpt.max_positions,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=gpt.tied_embeddings,
        )

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """[batch, seq] ids and targets -> the mean loss in nats."""
        seq = tokens.shape[1]
        positions = torch.arange(seq, device=tokens.device).expand_as(tokens)
        hidden = torch.ones(1, 1, seq, seq, dtype=torch.bool, device=tokens.device).triu(1)
        losses: Tensor = self.model(tokens, positions, hidden, labels=targets)
        return losses.float().mean()
