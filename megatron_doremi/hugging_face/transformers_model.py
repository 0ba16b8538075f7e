"""A model that Transformers runs, because ours cannot express it: token losses of a causal language model's class.

Transformers is imported here alone, and only if a run needs it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.hugging_face.faults import own_class
from megatron_doremi.hugging_face.transformers_config import (
    cannot_import,
    check_transformers,
    installed_version,
    unknown_class,
)
from megatron_doremi.hugging_face.weights import BUFFERS, StoredTensor, stored_tensors
from megatron_doremi.shapes import TransformersShape
from megatron_doremi.storage.files import read_json_object
from megatron_doremi.storage.tensor_file import DTYPES

_SHOWN_NAMES, _SHOWN_CHARACTERS = 5, 300
_PROBE_TOKENS = 8
_TYPES = (*DTYPES, "F64")


def read_transformers_shape(folder: Path, flag: str, reason: str) -> TransformersShape:
    """What a run has to know of a Hugging Face folder that Transformers runs; no weights are read.

    Args:
        flag: the flag or argument that names the folder, for messages.
        reason: what our model cannot express, see `why_not_ours`.

    Raises:
        ConfigError: Transformers is missing or cannot run it, or a file is missing or damaged.
    """
    check_transformers(folder, flag, reason)
    tensors = stored_tensors(folder, flag)
    raise_if_any(_type_faults(tensors, f"{flag} {folder}"))
    subject = f"{flag} {folder}: config.json"
    try:
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError as error:
        # Such as a version of another package that Transformers does not support.
        raise cannot_import(folder, flag, reason, error) from error
    entry = read_json_object(folder / "config.json", subject)
    model_type = entry.get("model_type")
    class_name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(model_type))
    if class_name is None or own_class(entry, class_name):
        raise unknown_class(folder, flag, model_type)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()
        vocab_size = int(config.vocab_size)
    except MemoryError:
        raise
    except Exception as error:
        # Whatever a value in the folder makes Transformers raise, among it errors of its own kinds.
        raise _refused(subject, error) from error
    positions = getattr(config, "max_position_embeddings", None)
    return TransformersShape(
        class_name=class_name,
        reason=reason,
        version=installed_version(),
        vocab_size=vocab_size,
        max_positions=positions if isinstance(positions, int) and positions > 0 else None,
        parameters=sum(math.prod(each.shape) for each in tensors.values()),
    )


def _type_faults(tensors: Mapping[str, StoredTensor], subject: str) -> list[Fault]:
    """Faults of tensors in another type than those of parameters: Transformers would take quantized numbers without
    their scales as the parameters themselves."""
    others = [(n, each) for n, each in sorted(tensors.items()) if each.dtype not in _TYPES and not n.endswith(BUFFERS)]
    if not others:
        return []
    more = f" and {len(others) - 1:,} more" if len(others) > 1 else ""
    rule, remedy = f"parameters in one of {', '.join(_TYPES)}", "give the model that was not quantized"
    return [Fault(subject, f"{others[0][0]}: {others[0][1].dtype}{more}", rule, remedy)]


def _refused(subject: str, error: Exception) -> ConfigError:
    """The error of a folder that Transformers cannot load, with the start of its message."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    rule, remedy = "a folder that Transformers can load", "save it again with Transformers' save_pretrained"
    return ConfigError(Fault(subject, text[:_SHOWN_CHARACTERS], rule, remedy))


class TransformersModel(nn.Module):
    """A causal language model of Transformers, unsharded on each rank; a `Stage` of forward passes."""

    every_stage_reads = False
    document_eod: int | None = None

    def __init__(self, model: Any, loss_chunk_tokens: int):
        """Args:
        model: an instance of the class.
        loss_chunk_tokens: hold the logits of about this many tokens at a time; 0: of all tokens.
        """
        super().__init__()
        self.model, self.loss_chunk_tokens = model, loss_chunk_tokens

    def run(
        self, x: Tensor, targets: Tensor | None, tokens: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """[batch, seq] ids and targets -> [batch, seq] losses in nats, float32."""
        assert targets is not None
        losses, start = [], 0
        for logits in self.logits(x, self.loss_chunk_tokens):
            stop = start + logits.shape[1]
            flat = F.cross_entropy(logits.flatten(0, 1).float(), targets[:, start:stop].flatten(), reduction="none")
            losses.append(flat.view(-1, stop - start))
            start = stop
        return torch.cat(losses, dim=1)

    def logits(self, tokens: Tensor, chunk_tokens: int = 0) -> Iterator[Tensor]:
        """Yields the logits, [batch, n, vocab], of consecutive positions of [batch, seq] ids.

        The layers run once. Their output is kept, and for each part of the positions the class computes its logits from
        it, so that whatever it does to its logits (a bound, a scale) is done.

        Args:
            chunk_tokens: tokens of a part, at least one position of each window; 0: all at once.
        """
        batch, length = tokens.shape
        size = max(1, chunk_tokens // batch)
        if not chunk_tokens or size >= length:
            yield self.model(input_ids=tokens, use_cache=False).logits
            return
        first, *rest = torch.arange(length, device=tokens.device).split(size)
        layers, outputs = self.model.get_decoder(), list[Any]()
        hook = layers.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        try:
            logits = self.model(input_ids=tokens, use_cache=False, logits_to_keep=first).logits
        finally:
            hook.remove()
        yield logits
        for part in rest:
            # The instance's attribute hides the method of the class.
            layers.forward = lambda *args, **kwargs: outputs[0]
            try:
                logits = self.model(input_ids=tokens, use_cache=False, logits_to_keep=part).logits
            finally:
                del layers.forward
            yield logits

    def activation_shape(self, micro_batch_size: int, seq_length: int) -> tuple[int, int, int]:
        """A single stage receives and sends nothing."""
        raise AssertionError("a model that Transformers runs has one stage")


@torch.no_grad()
def load_by_transformers(
    folder: Path, dtype: torch.dtype, device: torch.device, loss_chunk_tokens: int
) -> TransformersModel:
    """Loads a folder's model, for forward passes only.

    Raises:
        ConfigError: Transformers cannot load it, its files are not those of its class, or its class is not causal.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        model, report = loaded
        # Transformers draws a missing tensor at random and ignores one that its class lacks.
        raise_if_any(_tensor_faults(folder, type(model).__name__, report))
        module = TransformersModel(model.to(device), loss_chunk_tokens).requires_grad_(False).eval()
        _check(module, folder, device)
    except (ConfigError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _refused(str(folder), error) from error
    return module


def _tensor_faults(folder: Path, class_name: str, report: dict[str, Any]) -> list[Fault]:
    """Faults of tensors that are missing, have another shape, or do not belong to the class."""
    rule, remedy = f"the tensors of {class_name} with this config.json", "give a complete folder of this class"
    faults = []
    kinds = {"missing_keys": "missing", "mismatched_keys": "another shape", "unexpected_keys": "not of this class"}
    for key, word in kinds.items():
        names = sorted(name if isinstance(name, str) else str(name[0]) for name in report.get(key) or ())
        if names:
            more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
            faults.append(Fault(str(folder), f"{word}: {', '.join(names[:_SHOWN_NAMES])}{more}", rule, remedy))
    return faults


def _check(module: TransformersModel, folder: Path, device: torch.device) -> None:
    """Tries a few tokens: logits must be numbers, and depend neither on later tokens nor on the parts in which they
    are computed.

    Raises:
        ConfigError: they do. A bidirectional class would see each target, and its losses would mean nothing.
    """
    vocab_size = module.model.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(2 * _PROBE_TOKENS, device=device).view(2, _PROBE_TOKENS) % vocab_size
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + vocab_size // 2) % vocab_size
    (logits,), (others,) = module.logits(tokens), module.logits(changed)
    parts = torch.cat(list(module.logits(tokens, _PROBE_TOKENS)), dim=1)
    # Experts may round differently with other tokens beside theirs.
    allowed = math.sqrt(torch.finfo(logits.dtype).eps) * float(logits.float().std())
    class_name, remedy = type(module.model).__name__, "give a causal language model"
    if bool(logits.isnan().any()):
        value, damaged = f"the logits of {class_name} are NaN", "download the folder again, or correct its config.json"
        raise ConfigError(Fault(str(folder), value, "logits that are numbers", damaged))
    if (logits[:, :-1] - others[:, :-1]).abs().max() > allowed:
        rule = "logits that do not depend on later tokens"
        raise ConfigError(Fault(str(folder), f"{class_name} is not causal", rule, remedy))
    if (logits - parts).abs().max() > allowed:
        rule = "logits at a position follow from the layers' output there"
        raise ConfigError(Fault(str(folder), class_name, rule, remedy))
