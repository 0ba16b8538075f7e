"""Where documents end, for a model whose positions or attention reset there."""

from __future__ import annotations

from dataclasses import replace

from megatron_doremi.config import Config
from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.phases.run_data import RunData
from megatron_doremi.settings import flag_of
from megatron_doremi.shapes import RESETS, GPTConfig


def with_documents(gpt: GPTConfig, config: Config, data: RunData) -> GPTConfig:
    """The shape of a model to train, with the resets that the command line asks for beside those that it has.

    Raises:
        ConfigError: the data name no tokenizer that would say which token ends a document.
    """
    asked = [name for name in RESETS if getattr(config.training, name)]
    if not asked:
        return gpt
    tokenizer = data.manifest.tokenizer
    if tokenizer is None:
        rule = f"the id of the end-of-document token, which {config.data.source} does not name"
        remedy = "give the domains.json that tools/preprocess_data.py writes"
        raise ConfigError([Fault(flag_of(name), "given", rule, remedy) for name in asked])
    return replace(
        gpt,
        eod=tokenizer.eod,
        reset_position_ids=gpt.reset_position_ids or config.training.reset_position_ids,
        reset_attention_mask=gpt.reset_attention_mask or config.training.reset_attention_mask,
    )


def document_warnings(gpt: GPTConfig, data: RunData) -> list[str]:
    """A warning that names the domains whose first document does not end with the token that ends documents."""
    if not gpt.reads_documents:
        return []
    without = []
    for name, stream in zip(data.names, data.train, strict=True):
        spans = stream.documents_at(0, 1)
        end = int(spans.starts[0] + spans.lengths[0])
        if not 0 < end <= stream.num_tokens or int(stream.tokens(end - 1, 1)[0]) != gpt.eod:
            without.append(name)
    if not without:
        return []
    named = ", ".join(map(repr, without[:3])) + (f" and {len(without) - 3} more" if len(without) > 3 else "")
    return [
        f"the first document of {named} does not end with the end-of-document token {gpt.eod}: positions and attention "
        "reset at that token only; run tools/preprocess_data.py with --append-eod"
    ]
