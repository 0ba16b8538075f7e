"""Trains a tokenizer, SentencePiece or byte-level BPE, on the same amount of text from each domain.

    python tools/train_tokenizer.py --input data/train.jsonl --vocab-size 32000 --output data/tokenizer.model
    python tools/train_tokenizer.py --input data/train.jsonl --vocab-size 50304 --output data/tokenizer.json

A path that ends in .model makes a SentencePiece model, one that ends in .json a byte-level BPE with GPT-2's words,
which tools/preprocess_data.py encodes faster.

Nothing of a text is lost: no normalization, spaces kept, bytes for what the vocabulary lacks, so that decoding gives
back what was encoded. One character is the exception: U+2581, by which SentencePiece stores a space, comes back as one.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from megatron_doremi.errors import ConfigError, Fault, run_or_exit
from megatron_doremi.preprocessing.documents import Document, describe
from megatron_doremi.preprocessing.domain_samples import DomainSamples
from megatron_doremi.preprocessing.encoding import NAMED_BAD_LINES, bad_lines_error
from megatron_doremi.preprocessing.input_options import Inputs, add_input_options, read_input_options
from megatron_doremi.preprocessing.sources import read_blocks
from megatron_doremi.storage.files import atomic_write_bytes, make_folder

# SentencePiece leaves out longer training sentences; documents are cut into pieces of this length.
_SENTENCE_CHARACTERS = 1000


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add_input_options(parser)
    add("--output", required=True, type=Path, metavar="FILE", help="*.model: SentencePiece; *.json: byte-level BPE")
    add("--vocab-size", type=int, default=32000, help="pieces (default: 32000)")
    add("--allow-smaller", action="store_true", help="take fewer pieces where the text is not enough for --vocab-size")
    add("--model-type", choices=("unigram", "bpe"), default="unigram", help="of SentencePiece (default: unigram)")
    add("--sample-bytes", type=int, default=50_000_000, help="text to train on (default: 50000000)")
    add("--seed", type=int, default=1234, help="chooses the sample (default: 1234)")
    add("--threads", type=int, default=2, help="of the training (default: 2)")
    return parser


def sample_documents(args: argparse.Namespace, inputs: Inputs) -> DomainSamples:
    """Reads all inputs once and keeps an equal sample of each domain. Raises ConfigError where lines are bad."""
    samples = DomainSamples(args.sample_bytes)
    reader = inputs.reader
    size = sum(path.stat().st_size for path in inputs.paths)
    bad: dict[str, None] = {}
    bad_total = 0
    with tqdm(total=size, unit="B", unit_scale=True, desc="reading", mininterval=0.5) as bar:
        done = 0
        for file in inputs.files:
            for block in read_blocks(file, reader.columns, reader.needed_of):
                for number, document in reader.documents(block):
                    if not isinstance(document, Document):
                        bad_total += 1
                        if len(bad) < NAMED_BAD_LINES:
                            bad[describe(block, number, document)] = None
                        continue
                    digest = hashlib.sha256(f"{args.seed}/{document.text}".encode()).digest()
                    order = int.from_bytes(digest[:8], "big")
                    samples.offer(document.domain, order, document.text.encode("utf-8"))
                if bad and args.on_error == "fail":
                    remedy = "mend the input, or give --on-error skip to leave them out"
                    raise bad_lines_error(list(bad), bad_total, remedy)
                bar.update(done + block.position - bar.n)
            done += file.path.stat().st_size
    if bad_total:
        print(f"left out {bad_total:,} bad lines, among them: " + "; ".join(bad))
    return samples


def sentences(texts: list[bytes]) -> Iterator[str]:
    """The texts in pieces that SentencePiece takes whole."""
    for document in texts:
        text = document.decode("utf-8", errors="ignore")
        for start in range(0, len(text), _SENTENCE_CHARACTERS):
            yield text[start : start + _SENTENCE_CHARACTERS]


def train_sentencepiece(args: argparse.Namespace, texts: list[bytes]) -> bytes:
    """Trains a SentencePiece model and returns its file. Raises ConfigError where the text does not fill it."""
    size = args.vocab_size
    while True:
        try:
            return sentencepiece_of(args, texts, size)
        except RuntimeError as error:
            reached = re.search(r"too high.*value <= (\d+)", str(error))
            needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
            if reached is None or int(reached[1]) >= size:
                rule = f"at least {needed[1] if needed else 260}: single bytes and the characters of the sample"
                remedy = f"give --vocab-size {needed[1]} or more" if needed else "give more text"
                said = "" if needed or not texts else f": {error}"
                raise ConfigError(Fault("--vocab-size", f"{args.vocab_size}{said}", rule, remedy)) from error
            size = smaller(args, int(reached[1]))


def smaller(args: argparse.Namespace, reached: int) -> int:
    """The size that the text reaches, where --allow-smaller takes it. Raises ConfigError otherwise."""
    if not args.allow_smaller:
        rule = f"at most {reached:,}, all that can be learned from {args.sample_bytes:,} bytes of this text"
        remedy = f"give --vocab-size {reached}, more text or --sample-bytes, or --allow-smaller"
        raise ConfigError(Fault("--vocab-size", str(args.vocab_size), rule, remedy))
    print(f"the text is enough for {reached:,} pieces, not for {args.vocab_size:,}", flush=True)
    return reached


def sentencepiece_of(args: argparse.Namespace, texts: list[bytes], size: int) -> bytes:
    """A SentencePiece model of `size` pieces. Raises RuntimeError where the text does not fill it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # NUL would end the sentence for SentencePiece; it falls to the byte pieces.
        sentence_iterator=(text.replace("\0", "") for text in sentences(texts)),
        model_writer=model,
        vocab_size=size,
        model_type=args.model_type,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=["\n"],
        max_sentence_length=4 * _SENTENCE_CHARACTERS,
        bos_id=-1,
        pad_id=-1,
        unk_id=0,
        eos_id=1,
        num_threads=args.threads,
        minloglevel=2,
    )
    return model.getvalue()


def train_byte_level(args: argparse.Namespace, texts: list[bytes]) -> bytes:
    """Trains a byte-level BPE and returns its tokenizer.json. Raises ConfigError where the vocabulary is too small, or
    there are no more pairs of pieces to merge before it is full."""
    os.environ.setdefault("RAYON_NUM_THREADS", str(args.threads))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if args.vocab_size <= len(alphabet):
        rule = f"more than the {len(alphabet)} bytes and the end of documents"
        raise ConfigError(Fault("--vocab-size", str(args.vocab_size), rule, "give another --vocab-size"))
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(texts), trainer)
    if tokenizer.get_vocab_size() < args.vocab_size:
        smaller(args, tokenizer.get_vocab_size())
    return str(tokenizer.to_str()).encode("utf-8")


def is_tokenizer(path: Path) -> bool:
    """Whether a file is what this program writes under such a name."""
    try:
        if path.suffix == ".json":
            Tokenizer.from_file(str(path))
        else:
            sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception:  # the library raises Exception itself
        return False
    return True


def main() -> int:
    """Samples, trains, writes."""
    args = build_parser().parse_args()
    faults = []
    if args.output.suffix not in (".model", ".json"):
        faults.append(Fault("--output", str(args.output), "a path that ends in .model or .json", "name it so"))
    if args.output.exists() and not is_tokenizer(args.output):
        value, rule = f"{args.output} is there already", "a new path, or an earlier tokenizer of that kind"
        faults.append(Fault("--output", value, rule, "give another path"))
    for flag, number, least, most in (
        ("--vocab-size", args.vocab_size, 1, 10_000_000),
        ("--sample-bytes", args.sample_bytes, 1, 1 << 40),
        ("--threads", args.threads, 1, 1024),
    ):
        if not least <= number <= most:
            faults.append(Fault(flag, str(number), f"from {least} to {most:,}", "give a number in that range"))
    inputs = read_input_options(args, more=faults)
    make_folder(args.output.parent, "--output")
    samples = sample_documents(args, inputs)
    if not samples.names:
        raise ConfigError(Fault("--input", "no documents", "text to train on", "give files that hold documents"))
    texts = list(samples.documents())
    kind = "byte-level BPE" if args.output.suffix == ".json" else args.model_type
    print(
        f"training a {kind} tokenizer of {args.vocab_size:,} pieces on "
        f"{sum(map(len, texts)) / 1e6:.1f} MB of {len(samples.names)} domains",
        flush=True,
    )
    train = train_byte_level if args.output.suffix == ".json" else train_sentencepiece
    atomic_write_bytes(args.output, train(args, texts))
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    run_or_exit(main)
