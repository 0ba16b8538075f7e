"""Tokenizers: from text to ids and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from megatron_doremi.data.files import sha256_of
from megatron_doremi.errors import ConfigError, Fault

SENTENCEPIECE = "SentencePieceTokenizer"


class SentencePieceTokenizer:
    """A SentencePiece model.

    Attributes:
        file: the model's file.
        sha256: of the file.
        vocab_size: ids are below this.
        eod: id that ends a document (the model's end-of-sentence piece).
    """

    type = SENTENCEPIECE

    def __init__(self, file: Path):
        """Loads a model. Raises ConfigError where the file is none, or lacks an end-of-sentence piece."""
        self.file = file
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                Fault(
                    "--tokenizer-model",
                    str(file),
                    "a SentencePiece model",
                    "make one with tools/train_tokenizer.py",
                )
            ) from error
        self.vocab_size = int(self._processor.vocab_size())
        self.eod = int(self._processor.eos_id())
        if self.eod < 0:
            raise ConfigError(
                Fault(
                    "--tokenizer-model",
                    str(file),
                    "a model with an end-of-sentence piece, which ends documents",
                    "train it with one, as tools/train_tokenizer.py does",
                )
            )
        self.sha256 = sha256_of(file)

    def encode(self, text: str) -> NDArray[np.int32]:
        """Ids of a text. Text that spells a special piece is encoded as the text it is."""
        return np.array(self._processor.encode(text), dtype=np.int32)

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """Ids of several texts."""
        return [np.array(ids, dtype=np.int32) for ids in self._processor.encode(texts, num_threads=1)]

    def decode(self, ids: NDArray | list[int]) -> str:
        """The text of ids."""
        return str(self._processor.decode([int(i) for i in ids]))


def load_tokenizer(kind: str, file: Path) -> SentencePieceTokenizer:
    """Loads a tokenizer by Megatron-LM's name of its kind. Raises ConfigError where it cannot."""
    if kind != SENTENCEPIECE:
        raise ConfigError(
            Fault(
                "--tokenizer-type",
                kind,
                f"this version reads {SENTENCEPIECE}",
                "train one with tools/train_tokenizer.py",
            )
        )
    return SentencePieceTokenizer(file)
