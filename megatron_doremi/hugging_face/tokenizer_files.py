"""The tokenizer of a Hugging Face folder: writing one, loading one, and comparing one with another by what it does."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from megatron_doremi.checkpoint.run_config import RunConfigFile
from megatron_doremi.data.manifest import Manifest, load_manifest
from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.hugging_face.unigram_ties import equally_likely
from megatron_doremi.storage.files import atomic_write_bytes, atomic_write_text
from megatron_doremi.tokenization.sentencepiece_definition import sentencepiece_definition
from megatron_doremi.tokenization.tokenizer import (
    GPT2,
    HUGGING_FACE,
    SENTENCEPIECE,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    dataset_tokenizer,
    load_tokenizer,
)

# Steps after encoding that add tokens which our data do not hold, such as a begin-of-sentence token.
_TEMPLATES = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")
# Text with which every tokenizer is tried: spaces, lines, digits, other scripts, bytes of no character in a vocabulary.
SAMPLE = (
    "  Two  spaces, a\ttab, and lines.\n\n    def f(x):\n        return x ** 2  # 1234567890\n",
    "na\u00efve caf\u00e9 \u2014 \u201cquotes\u201d \ufb01 \u4e2d\u6587 \u0440\u0443\u0441 \U0001f600",
    " leading, trailing ",
    "don't I'll we've THEY'RE https://example.org/a_b?c=d&e=f",
)
_SAMPLE_DOMAINS, _SAMPLE_TOKENS = 32, 1000


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int, texts: Iterable[str]) -> bool:
    """Writes the files that Transformers' `AutoTokenizer` reads.

    Args:
        max_length: tokens of the longest window.
        texts: further samples on which the written tokenizer must give the same ids, or an equally likely split.

    Returns:
        whether it gave the same ids.

    Raises:
        ConfigError: it does not.
    """
    definition = _definition(tokenizer)
    data = json.dumps(definition, ensure_ascii=False, indent=1).encode("utf-8")
    written = HuggingFaceTokenizer(data, folder / "tokenizer.json", eod=tokenizer.eod, fast=False)
    samples = (*SAMPLE, *texts)
    difference = encoding_difference(tokenizer, written, samples)
    if difference:
        raise _not_expressed(difference)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": written.pieces().get(tokenizer.eod),
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    atomic_write_bytes(folder / "tokenizer.json", data)
    atomic_write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    if isinstance(tokenizer, SentencePieceTokenizer):
        atomic_write_bytes(folder / "tokenizer.model", tokenizer.data)
    return all(tokenizer.encode(text).tolist() == written.encode(text).tolist() for text in samples)


def _definition(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer.json that adds no token to the text."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        try:
            return sentencepiece_definition(tokenizer.data)
        except (DecodeError, ValueError) as error:
            raise _not_expressed(str(error)) from error
    definition: dict[str, Any] = json.loads(tokenizer.data)
    processor = definition.get("post_processor") or {}
    steps = processor.get("processors", [processor])
    if any(step.get("type") in _TEMPLATES for step in steps):
        definition["post_processor"] = None
    return {**definition, "truncation": None, "padding": None}


def _not_expressed(reason: str) -> ConfigError:
    rule = "a tokenizer that Hugging Face's tokenizers library can express"
    remedy = "give --without-tokenizer to write the model alone"
    return ConfigError(Fault("tokenizer of the model", reason, rule, remedy))


def sample_texts(manifest: Manifest, tokenizer: Tokenizer) -> list[str]:
    """The start of each domain's training text, of the first domains if there are many."""
    texts = []
    for domain in manifest.domains[:_SAMPLE_DOMAINS]:
        count = min(domain.tokens, _SAMPLE_TOKENS)
        ids = manifest.open_train(domain, tokenizer.vocab_size).tokens(0, count)
        texts.append(tokenizer.decode(ids[ids != tokenizer.eod]))
    return texts


def run_tokenizer(run: RunConfigFile, domains: Path | None, remedy: str) -> tuple[Tokenizer, Manifest]:
    """The tokenizer of a run, and the manifest that names it.

    Args:
        domains: the manifest, if it was moved; None: the run's.
        remedy: what the user can do without it, for messages.

    Raises:
        ConfigError: the manifest is missing, or names another tokenizer.
    """
    path = domains or Path(str(run.settings.get("data", {}).get("domains", "")))
    subject = "tokenizer of the model"
    if not path.is_file():
        raise ConfigError(
            Fault(subject, f"no manifest {path}", "the run's manifest, which names its tokenizer", remedy)
        )
    manifest = load_manifest(path)
    tokenizer = dataset_tokenizer(manifest)
    if tokenizer is None or tokenizer.sha256 != run.tokenizer_sha256:
        found = tokenizer.sha256[:12] if tokenizer else "none"
        rule = f"the run's tokenizer, {str(run.tokenizer_sha256)[:12]}"
        raise ConfigError(Fault(subject, f"{found} in {path}", rule, remedy))
    return tokenizer, manifest


def load_folder_tokenizer(folder: Path, flag: str, eod: int) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, which encodes text as text, without special tokens.

    Args:
        flag: the flag that names the folder, for messages.
        eod: id of the end-of-document token of the data that it is compared with.

    Raises:
        ConfigError: the folder has none that this program reads.
    """
    for name, kind in (("tokenizer.json", HUGGING_FACE), ("tokenizer.model", SENTENCEPIECE), ("vocab.json", GPT2)):
        if (folder / name).is_file():
            return load_tokenizer(kind, folder / name, eod=eod)
    rule = "a folder with its tokenizer: tokenizer.json, tokenizer.model, or vocab.json and merges.txt"
    raise ConfigError(Fault(f"{flag} {folder}", "no tokenizer", rule, "download it with its tokenizer"))


def encoding_difference(one: Tokenizer, other: Tokenizer, texts: Iterable[str]) -> str:
    """Where two tokenizers with the same vocabulary encode text differently; "" if they do not, or, of unigram models,
    choose between equally likely splits."""
    for text in texts:
        ids, others = one.encode(text).tolist(), other.encode(text).tolist()
        if ids != others and not (_is_unigram(one) and equally_likely(ids, others, one.pieces())):
            pairs = enumerate(zip(ids, others, strict=False))
            first = next((i for i, (a, b) in pairs if a != b), min(len(ids), len(others)))
            rest, other_rest = ids[first : first + 4], others[first : first + 4]
            return f"{text[:40]!r} gives {rest} and {other_rest} from token {first}"
    return ""


def _is_unigram(tokenizer: Tokenizer) -> bool:
    try:
        return bool(_definition(tokenizer)["model"]["type"] == "Unigram")
    except (ConfigError, LookupError):
        return False


def vocabulary_difference(ours: Tokenizer, theirs: Tokenizer) -> str:
    """Where `theirs` lacks a piece of `ours` or has another under its id; "" if it has them all."""
    pieces = theirs.pieces()
    for number, piece in sorted(ours.pieces().items()):
        if pieces.get(number) != piece:
            found = repr(pieces[number]) if number in pieces else "missing"
            return f"id {number:,} is {found} in place of {piece!r}"
    return ""


def tokenizer_difference(ours: Tokenizer, theirs: Tokenizer, texts: Iterable[str]) -> str:
    """How `theirs` acts differently on ids or text of `ours`; "" if it does not, whatever files they are from.

    Args:
        texts: samples of the data, beside `SAMPLE`.
    """
    if ours.sha256 == theirs.sha256:
        return ""
    return vocabulary_difference(ours, theirs) or encoding_difference(ours, theirs, (*SAMPLE, *texts))
