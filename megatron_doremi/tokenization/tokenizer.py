"""Tokenizers: encode text to ids and decode ids to text. Text that spells a special token is encoded as plain text."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tiktoken
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from tokenizers import Tokenizer as Tokenizers

from megatron_doremi.data.manifest import Manifest
from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.tokenization.byte_level import as_bytes, encode, gpt2_definition, same_encoding, tiktoken_core
from megatron_doremi.tokenization.lost_characters import CharacterCheck, uncovered_characters
from megatron_doremi.tokenization.special_tokens import (
    EOD_TOKENS,
    sentencepiece_model,
    unknown_token,
    without_special_text,
)

SENTENCEPIECE = "SentencePieceTokenizer"
HUGGING_FACE = "HuggingFaceTokenizer"
GPT2 = "GPT2BPETokenizer"
KINDS = (SENTENCEPIECE, HUGGING_FACE, GPT2)


class SentencePieceTokenizer:
    """A SentencePiece model.

    Attributes:
        data: content of the model file.
        sha256: SHA-256 of the file, in hex.
        vocab_size: number of ids.
        eod: end-of-document id: the model's end-of-sentence piece.
        encoder: name of the library that encodes.
        lossless: whether every text keeps all of its characters.
    """

    type = SENTENCEPIECE
    suffix = ".model"
    encoder = "sentencepiece"

    def __init__(self, file: Path, allow_special: bool = False):
        """Loads a model.

        Args:
            file: the model file.
            allow_special: encode text that spells a control piece as that piece.

        Raises:
            ConfigError: the file is not a SentencePiece model, or its end-of-sentence piece is missing.
        """
        try:
            self.data = file.read_bytes()
            self._decoder = sentencepiece.SentencePieceProcessor(model_proto=self.data)
            text_alone, self.lossless = sentencepiece_model(self.data, allow_special=False)
            encoder = sentencepiece_model(self.data, allow_special=True)[0] if allow_special else text_alone
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=encoder)
        except (OSError, RuntimeError, DecodeError) as error:
            remedy = "make one with tools/train_tokenizer.py"
            if file.suffix == ".json":
                remedy = f"give --tokenizer-type {HUGGING_FACE}, or {GPT2} for a vocab.json"
            raise _fault(file, "a SentencePiece model", remedy) from error
        self.vocab_size = int(self._processor.vocab_size())
        self.eod = int(sentencepiece.SentencePieceProcessor(model_proto=text_alone).eos_id())
        if self.eod < 0:
            rule = "a model with an end-of-sentence piece, which serves as the end of documents"
            raise _fault(file, rule, "train a model that has one, for example with tools/train_tokenizer.py")
        self.sha256 = hashlib.sha256(self.data).hexdigest()
        self._check: CharacterCheck | None = None

    def choose_encoder(self, texts: list[str]) -> None:
        """Does nothing: there is only one encoder."""

    def encode(self, text: str) -> NDArray[np.int32]:
        """Returns the ids of a text."""
        return np.array(self._processor.encode(text), dtype=np.int32)

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """Returns the ids of each text, using one thread."""
        # NumPy output: lists of Python integers would add a fifth to the time of encoding.
        ids: list[NDArray[np.int32]] = self._processor.encode(texts, return_type="numpy", num_threads=1)
        return ids

    def decode(self, ids: NDArray | Sequence[int]) -> str:
        """Returns the text of ids."""
        return str(self._decoder.decode([int(i) for i in ids]))

    def pieces(self) -> dict[int, str]:
        """The piece of each id."""
        return {number: str(self._decoder.id_to_piece(number)) for number in range(self.vocab_size)}

    def lost_characters(self, texts: list[str]) -> Counter[str]:
        """Counts the occurrences of each character that is dropped or unknown."""
        if self.lossless:
            return Counter()
        self._check = self._check or CharacterCheck(self._processor.encode, self.decode, self._processor.unk_id())
        return self._check.lost_in(texts)


class HuggingFaceTokenizer:
    """A tokenizer.json of Hugging Face's tokenizers library. tiktoken's core, which is several times as fast, encodes a
    byte-level BPE if it is known to give the same ids (byte_level.py).

    Attributes:
        type: HuggingFaceTokenizer, or GPT2BPETokenizer for one made from GPT-2's two files.
        data: content of the tokenizer.json.
        sha256: SHA-256 of `data`, in hex.
        vocab_size: the largest id + 1.
        eod: end-of-document id.
        fast: tiktoken's core, or None if the tokenizers library encodes.
    """

    suffix = ".json"

    def __init__(
        self,
        data: bytes,
        file: Path,
        kind: str = HUGGING_FACE,
        eod: str | int | None = None,
        fast: bool = True,
        allow_special: bool = False,
    ):
        """Loads a tokenizer.json.

        Args:
            data: its content.
            file: the file it came from, for messages.
            eod: the end-of-document token or its id; None takes the first of `EOD_TOKENS` in the vocabulary.
            fast: use tiktoken's core if possible.
            allow_special: encode text that spells a special token as that token.

        Raises:
            ConfigError: `data` is not a tokenizer.json, the end-of-document token is missing, or text encodes to it.
        """
        self.type, self.data = kind, data
        try:
            definition = json.loads(data)
            self._decoder = Tokenizers.from_str(data.decode("utf-8"))
            vocab = self._decoder.get_vocab(with_added_tokens=True)
            self.vocab_size = max(vocab.values(), default=-1) + 1
            self.eod = self._eod_id(vocab, eod, file)
            end = next((token for token, token_id in vocab.items() if token_id == self.eod), None)
            text_only = definition if allow_special else without_special_text(definition, end)
            same = text_only is definition
            self._slow = Tokenizers.from_str(data.decode("utf-8") if same else json.dumps(text_only))
        except ConfigError:
            raise
        except Exception as error:  # the library raises plain Exception
            rule = "a tokenizer.json of Hugging Face's tokenizers library"
            raise _fault(file, rule, "give such a file, or another --tokenizer-type") from error
        # Fine-tuning may leave padding and truncation in the file, which would change documents.
        self._slow.no_padding()
        self._slow.no_truncation()
        self._slow.encode_special_tokens = not allow_special
        self.sha256 = hashlib.sha256(data).hexdigest()
        use_fast = fast and not allow_special
        self.fast: tiktoken.Encoding | None = tiktoken_core(self._slow, text_only) if use_fast else None
        self._model = definition["model"]
        self._unknown = vocab.get(unknown_token(self._model) or "", -1)
        self._check: CharacterCheck | None = None
        if not allow_special and not isinstance(eod, int) and end is not None and self.eod in self.encode(end):
            rule = "a token that no text encodes to, so that only --append-eod ends a document"
            raise ConfigError(Fault("--eod-token", repr(end), rule, "give a special token of the tokenizer"))

    @staticmethod
    def _eod_id(vocab: dict[str, int], eod: str | int | None, file: Path) -> int:
        if isinstance(eod, int):
            return eod
        for token in EOD_TOKENS if eod is None else (eod,):
            if token in vocab:
                return vocab[token]
        rule = f"a vocabulary with the end-of-document token {' or '.join(EOD_TOKENS) if eod is None else repr(eod)}"
        raise _fault(file, rule, "name the tokenizer's end-of-document token with --eod-token")

    @property
    def encoder(self) -> str:
        """Name of the library that encodes."""
        return "tiktoken" if self.fast else "tokenizers"

    @property
    def lossless(self) -> bool:
        """Whether every text is known to keep all of its characters: tiktoken's core has all bytes and does not
        normalize."""
        return self.fast is not None

    def choose_encoder(self, texts: list[str]) -> None:
        """Falls back to the tokenizers library if tiktoken gives other ids for `texts` or its regex engine differs."""
        if self.fast and not same_encoding(self.fast, self._slow, texts):
            self.fast = None

    def encode(self, text: str) -> NDArray[np.int32]:
        """Returns the ids of a text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """Returns the ids of each text."""
        if self.fast is None:
            encodings = self._slow.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        return [self._encode_fast(self.fast, text) for text in texts]

    def _encode_fast(self, core: tiktoken.Encoding, text: str) -> NDArray[np.int32]:
        try:
            return encode(core, text)
        except ValueError:
            # A run of a million spaces overflows the stack of tiktoken's regex engine.
            return np.array(self._slow.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: NDArray | Sequence[int]) -> str:
        """Returns the text of ids, including special tokens."""
        return str(self._decoder.decode([int(i) for i in ids], skip_special_tokens=False))

    def pieces(self) -> dict[int, str]:
        """The piece of each id."""
        return {number: piece for piece, number in self._decoder.get_vocab(with_added_tokens=True).items()}

    def lost_characters(self, texts: list[str]) -> Counter[str]:
        """Counts the occurrences of each character that is dropped or unknown."""
        if self.lossless:
            return Counter()
        model = self._model
        affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        if model["type"] in ("BPE", "Unigram") and not affixes:
            if self._check is None:
                self._check = CharacterCheck(lambda text: self.encode(text).tolist(), self.decode, self._unknown)
            return self._check.lost_in(texts)
        lost: Counter[str] = Counter()
        for text, encoding in zip(texts, self._slow.encode_batch(texts, add_special_tokens=False), strict=True):
            tokens = list(zip(encoding.ids, encoding.offsets, strict=True))
            lost += uncovered_characters(text, tokens, self._unknown)
        return lost


Tokenizer = SentencePieceTokenizer | HuggingFaceTokenizer


def kind_of_tokenizer(file: Path) -> str:
    """The type of a tokenizer that the name of its file indicates: one of `KINDS`."""
    if file.suffix != ".json":
        return SENTENCEPIECE
    return GPT2 if file.name == "vocab.json" and file.with_name("merges.txt").exists() else HUGGING_FACE


def load_tokenizer(
    kind: str,
    file: Path,
    merges: Path | None = None,
    eod: str | int | None = None,
    fast: bool = True,
    allow_special: bool = False,
) -> Tokenizer:
    """Loads a tokenizer.

    Args:
        kind: one of `KINDS`, Megatron-LM's names.
        file: a SentencePiece model, a tokenizer.json, or GPT-2's vocab.json.
        merges: GPT-2's merges.txt; None takes the one beside vocab.json.
        eod: the end-of-document token or its id; None takes the tokenizer's usual one.
        fast: use tiktoken's core if possible.
        allow_special: encode text that spells a special token as that token.

    Raises:
        ConfigError: the kind is unknown, or the tokenizer cannot be loaded.
    """
    if kind == SENTENCEPIECE:
        return SentencePieceTokenizer(file, allow_special)
    if kind not in KINDS:
        raise ConfigError(Fault("--tokenizer-type", kind, "one of " + ", ".join(KINDS), "give one of these"))
    try:
        data = file.read_bytes()
        content = json.loads(data) if kind == GPT2 else None
    except (OSError, ValueError) as error:
        raise _fault(file, "a readable JSON file", "give tokenizer.json or vocab.json") from error
    if isinstance(content, dict) and "model" not in content:
        data = as_bytes(gpt2_definition(_vocab(content, file), _merges(merges or file.with_name("merges.txt"))))
    return HuggingFaceTokenizer(data, file, kind, eod, fast, allow_special)


def dataset_tokenizer(manifest: Manifest) -> Tokenizer | None:
    """The tokenizer of a data set, if its manifest names one. Raises ConfigError if its file has changed."""
    info = manifest.tokenizer
    if info is None:
        return None
    tokenizer = load_tokenizer(info.type, info.file, eod=info.eod)
    if tokenizer.sha256 == info.sha256 and (tokenizer.vocab_size, tokenizer.eod) != (info.vocab_size, info.eod):
        value = f"vocab_size {info.vocab_size}, eod {info.eod}"
        rule = f"those of {info.file.name}: vocab_size {tokenizer.vocab_size}, eod {tokenizer.eod}"
        raise ConfigError(Fault(f"tokenizer of {manifest.path}", value, rule, "make the manifest again"))
    if tokenizer.sha256 != info.sha256:
        raise ConfigError(
            Fault(
                f"tokenizer {info.file}",
                f"SHA-256 {tokenizer.sha256[:12]}",
                f"{info.sha256[:12]}, the tokenizer that encoded the data",
                "restore that file, or make the data set again",
            )
        )
    return tokenizer


def _vocab(content: dict[str, Any], file: Path) -> dict[str, int]:
    if not content or not all(type(token_id) is int and token_id >= 0 for token_id in content.values()):
        raise _fault(file, "GPT-2's vocabulary: an object {piece: id}", "give its vocab.json")
    return content


def _merges(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        rule = "a readable merges.txt of GPT-2 (default: the one beside vocab.json)"
        raise ConfigError(Fault("--merge-file", str(error), rule, "give its path")) from error
    merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    if any(len(line.split(" ")) != 2 for line in merges):
        raise ConfigError(Fault("--merge-file", str(file), "lines 'left right'", "give GPT-2's merges.txt"))
    return merges


def _fault(file: Path, rule: str, remedy: str) -> ConfigError:
    return ConfigError(Fault("--tokenizer-model", str(file), rule, remedy))
