"""Tokenizers: from text to ids and back. Text that spells a special token is encoded as the text it is."""

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

from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.preprocessing.byte_level import as_bytes, encode, gpt2_definition, same_encoding, tiktoken_core
from megatron_doremi.preprocessing.lost_characters import CharacterCheck, uncovered_characters
from megatron_doremi.preprocessing.special_tokens import ENDS, sentencepiece_model, unknown_token, without_special_text

SENTENCEPIECE = "SentencePieceTokenizer"
HUGGING_FACE = "HuggingFaceTokenizer"
GPT2 = "GPT2BPETokenizer"
KINDS = (SENTENCEPIECE, HUGGING_FACE, GPT2)


class SentencePieceTokenizer:
    """A SentencePiece model.

    Attributes:
        data: the model's file.
        sha256: of the file, in hex.
        vocab_size: ids are below this.
        eod: id that ends a document (the model's end-of-sentence piece).
        encoder: what does the work.
        lossless: whether no character of any text can be lost.
    """

    type = SENTENCEPIECE
    suffix = ".model"
    encoder = "sentencepiece"

    def __init__(self, file: Path, allow_special: bool = False):
        """Loads a model.

        Args:
            file: the model.
            allow_special: text that spells a control piece becomes that piece.

        Raises:
            ConfigError: the file is none, or lacks an end-of-sentence piece.
        """
        try:
            self.data = file.read_bytes()
            self._decoder = sentencepiece.SentencePieceProcessor(model_proto=self.data)
            text_alone, self.lossless = sentencepiece_model(self.data, allow_special=False)
            encoder = sentencepiece_model(self.data, allow_special=True)[0] if allow_special else text_alone
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=encoder)
        except (OSError, RuntimeError, DecodeError) as error:
            raise _fault(file, "a SentencePiece model", "make one with tools/train_tokenizer.py") from error
        self.vocab_size = int(self._processor.vocab_size())
        self.eod = int(sentencepiece.SentencePieceProcessor(model_proto=text_alone).eos_id())
        if self.eod < 0:
            rule = "a model with an end-of-sentence piece, which ends documents"
            raise _fault(file, rule, "train it with one, as tools/train_tokenizer.py does")
        self.sha256 = hashlib.sha256(self.data).hexdigest()
        self._check: CharacterCheck | None = None

    def choose_encoder(self, texts: list[str]) -> None:
        """Nothing to choose: there is one encoder."""

    def encode(self, text: str) -> NDArray[np.int32]:
        """Ids of a text."""
        return np.array(self._processor.encode(text), dtype=np.int32)

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """Ids of several texts, on one thread."""
        # Arrays at once: lists of Python's integers cost a fifth of the time that the encoder itself takes.
        ids: list[NDArray[np.int32]] = self._processor.encode(texts, return_type="numpy", num_threads=1)
        return ids

    def decode(self, ids: NDArray | Sequence[int]) -> str:
        """The text of ids."""
        return str(self._decoder.decode([int(i) for i in ids]))

    def lost_characters(self, texts: list[str]) -> Counter[str]:
        """How often texts hold each character that is dropped or unknown."""
        if self.lossless:
            return Counter()
        self._check = self._check or CharacterCheck(self._processor.encode, self.decode, self._processor.unk_id())
        return self._check.lost_in(texts)


class HuggingFaceTokenizer:
    """A tokenizer.json of Hugging Face's library; its byte-level BPEs are encoded by tiktoken's core where it is known
    to give the same ids (byte_level.py), at several times the speed.

    Attributes:
        type: HuggingFaceTokenizer, or GPT2BPETokenizer for one that was made of GPT-2's two files.
        data: the tokenizer.json.
        sha256: of it, in hex.
        vocab_size: ids are below this.
        eod: id that ends a document.
        fast: tiktoken's core, where it is used.
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
        """Reads a tokenizer.json.

        Args:
            data: its content.
            file: where it came from, for messages.
            eod: the token that ends a document, or its id; None: the first of the usual names that is there.
            fast: try tiktoken's core.
            allow_special: text that spells a special token becomes that token.

        Raises:
            ConfigError: the file is none, has no such token, or text itself becomes that token.
        """
        self.type, self.data = kind, data
        try:
            definition = json.loads(data)
            self._decoder = Tokenizers.from_str(data.decode("utf-8"))
            vocab = self._decoder.get_vocab(with_added_tokens=True)
            self.vocab_size = max(vocab.values(), default=-1) + 1
            self.eod = self._end(vocab, eod, file)
            end = next((token for token, number in vocab.items() if number == self.eod), None)
            text_alone = definition if allow_special else without_special_text(definition, end)
            same = text_alone is definition
            self._slow = Tokenizers.from_str(data.decode("utf-8") if same else json.dumps(text_alone))
        except ConfigError:
            raise
        except Exception as error:  # the library raises Exception itself
            raise _fault(file, "a tokenizer.json of Hugging Face's tokenizers", "give such a file") from error
        # The padding and cutting that a fine-tuning left in the file would change documents.
        self._slow.no_padding()
        self._slow.no_truncation()
        self._slow.encode_special_tokens = not allow_special
        self.sha256 = hashlib.sha256(data).hexdigest()
        use_fast = fast and not allow_special
        self.fast: tiktoken.Encoding | None = tiktoken_core(self._slow, text_alone) if use_fast else None
        self._model = definition["model"]
        self._unknown = vocab.get(unknown_token(self._model) or "", -1)
        self._check: CharacterCheck | None = None
        if not allow_special and not isinstance(eod, int) and end is not None and self.eod in self.encode(end):
            rule = "a token that no text becomes, so that only --append-eod ends a document"
            raise ConfigError(Fault("--eod-token", repr(end), rule, "give a special token of the tokenizer"))

    @staticmethod
    def _end(vocab: dict[str, int], eod: str | int | None, file: Path) -> int:
        if isinstance(eod, int):
            return eod
        for name in ENDS if eod is None else (eod,):
            if name in vocab:
                return vocab[name]
        rule = f"a token that ends documents: {' or '.join(ENDS) if eod is None else repr(eod)}"
        raise _fault(file, rule, "give --eod-token the token that does")

    @property
    def encoder(self) -> str:
        """What does the work."""
        return "tiktoken" if self.fast else "tokenizers"

    @property
    def lossless(self) -> bool:
        """Whether no character of any text can be lost: tiktoken's core knows all bytes and changes nothing."""
        return self.fast is not None

    def choose_encoder(self, texts: list[str]) -> None:
        """Gives tiktoken up where it encodes one of `texts`, or knows other classes of characters."""
        if self.fast and not same_encoding(self.fast, self._slow, texts):
            self.fast = None

    def encode(self, text: str) -> NDArray[np.int32]:
        """Ids of a text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """Ids of several texts."""
        if self.fast is None:
            encoded = self._slow.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(each.ids, dtype=np.int32) for each in encoded]
        return [self._encode_fast(self.fast, text) for text in texts]

    def _encode_fast(self, core: tiktoken.Encoding, text: str) -> NDArray[np.int32]:
        try:
            return encode(core, text)
        except ValueError:
            # A million spaces in a row are more than its regex engine holds.
            return np.array(self._slow.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: NDArray | Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return str(self._decoder.decode([int(i) for i in ids], skip_special_tokens=False))

    def lost_characters(self, texts: list[str]) -> Counter[str]:
        """How often texts hold each character that is dropped or unknown."""
        if self.lossless:
            return Counter()
        model = self._model
        affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        if model["type"] in ("BPE", "Unigram") and not affixes:
            if self._check is None:
                self._check = CharacterCheck(lambda text: self.encode(text).tolist(), self.decode, self._unknown)
            return self._check.lost_in(texts)
        lost: Counter[str] = Counter()
        for text, each in zip(texts, self._slow.encode_batch(texts, add_special_tokens=False), strict=True):
            lost += uncovered_characters(text, list(zip(each.ids, each.offsets, strict=True)), self._unknown)
        return lost


Tokenizer = SentencePieceTokenizer | HuggingFaceTokenizer


def load_tokenizer(
    kind: str,
    file: Path,
    merges: Path | None = None,
    eod: str | int | None = None,
    fast: bool = True,
    allow_special: bool = False,
) -> Tokenizer:
    """Loads a tokenizer by Megatron-LM's name of its kind.

    Args:
        file: a SentencePiece model, a tokenizer.json, or GPT-2's vocab.json.
        merges: GPT-2's merges.txt; None: the one beside its vocab.json.
        eod: the token that ends documents, or its id; None: the tokenizer's own.
        fast: let tiktoken's core encode what it can.
        allow_special: text that spells a special token becomes that token.

    Raises:
        ConfigError: it cannot be read.
    """
    if kind == SENTENCEPIECE:
        return SentencePieceTokenizer(file, allow_special)
    if kind not in KINDS:
        raise ConfigError(Fault("--tokenizer-type", kind, "one of " + ", ".join(KINDS), "give one of these"))
    try:
        data = file.read_bytes()
        entry = json.loads(data) if kind == GPT2 else None
    except (OSError, ValueError) as error:
        raise _fault(file, "a JSON file that can be read", "give tokenizer.json or vocab.json") from error
    if isinstance(entry, dict) and "model" not in entry:
        data = as_bytes(gpt2_definition(_vocab(entry, file), _merges(merges or file.with_name("merges.txt"))))
    return HuggingFaceTokenizer(data, file, kind, eod, fast, allow_special)


def _vocab(entry: dict[str, Any], file: Path) -> dict[str, int]:
    if not entry or not all(type(number) is int and number >= 0 for number in entry.values()):
        raise _fault(file, "GPT-2's vocabulary: an object {piece: id}", "give its vocab.json")
    return entry


def _merges(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        rule = "GPT-2's merges.txt, beside vocab.json or given"
        raise ConfigError(Fault("--merge-file", str(error), rule, "give its path")) from error
    merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    if any(len(line.split(" ")) != 2 for line in merges):
        raise ConfigError(Fault("--merge-file", str(file), "lines 'left right'", "give GPT-2's merges.txt"))
    return merges


def _fault(file: Path, rule: str, remedy: str) -> ConfigError:
    return ConfigError(Fault("--tokenizer-model", str(file), rule, remedy))
