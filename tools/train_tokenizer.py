"""Trains a SentencePiece or byte-level BPE tokenizer on the same amount of text from each domain.

    python tools/train_tokenizer.py --input data/train.jsonl --vocab-size 32000 --output data/tokenizer.model
    python tools/train_tokenizer.py --input data/train.jsonl --vocab-size 50304 --output data/tokenizer.json

An output path that ends in .model makes a SentencePiece model. One that ends in .json makes a byte-level BPE that
splits words like GPT-2; it loads with --tokenizer-type HuggingFaceTokenizer.

Tokenization is lossless: no normalization, all spaces are kept, and bytes stand in for unknown characters. The only
exception is U+2581, which SentencePiece uses internally for a space: it decodes to a space.
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

if not __package__:
    # Run as a script: the package is beside this folder.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_doremi.console import print_stdout, warn
from megatron_doremi.errors import ConfigError, Fault, run_or_exit
from megatron_doremi.flag_parser import FlagParser
from megatron_doremi.preprocessing.documents import Document, describe
from megatron_doremi.preprocessing.domain_samples import DomainSamples
from megatron_doremi.preprocessing.encoding import NAMED_BAD_LINES, bad_lines_error, describe_bad_lines
from megatron_doremi.preprocessing.input_options import Inputs, add_input_options, read_input_options
from megatron_doremi.preprocessing.sources import read_blocks
from megatron_doremi.progress import Progress, stage
from megatron_doremi.storage.files import atomic_write_bytes, make_folder

# Documents are split into sentences of this length: SentencePiece skips training sentences that are too long.
_SENTENCE_CHARACTERS = 1000


def build_parser() -> argparse.ArgumentParser:
    """Builds the command-line parser."""
    parser = FlagParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add_input_options(parser)
    output_help = "file to write: a SentencePiece model if it ends in .model, a byte-level BPE if it ends in .json"
    add("--output", required=True, type=Path, metavar="FILE", help=output_help)
    add("--vocab-size", type=int, default=32000, metavar="N", help="number of pieces to learn (default: 32000)")
    smaller_help = "accept fewer pieces if the text is too small for --vocab-size (default: fail)"
    add("--allow-smaller", action="store_true", help=smaller_help)
    type_help = "training algorithm (default: unigram for an output .model, bpe for .json, which has no other)"
    add("--model-type", choices=("unigram", "bpe"), help=type_help)
    sample_help = "bytes of text to train on, divided equally among the domains (default: 50000000)"
    add("--sample-bytes", type=int, default=50_000_000, metavar="N", help=sample_help)
    add(
        "--seed",
        type=int,
        default=1234,
        metavar="N",
        help="seed that selects the documents to train on (default: 1234)",
    )
    add("--threads", type=int, default=2, metavar="N", help="number of training threads (default: 2)")
    return parser


def sample_documents(args: argparse.Namespace, inputs: Inputs) -> DomainSamples:
    """Reads all inputs once and keeps an equal sample of each domain. Raises ConfigError if there are bad lines."""
    samples = DomainSamples(args.sample_bytes)
    reader = inputs.reader
    size = sum(path.stat().st_size for path in inputs.paths)
    bad: dict[str, None] = {}
    bad_total = 0
    with Progress("reading", size, "byte") as progress:
        before = position = 0
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
                    remedy = "fix the input, or skip the bad lines with --on-error skip"
                    raise bad_lines_error(list(bad), bad_total, remedy)
                progress.update(before + block.position - position)
                position = before + block.position
            before += file.path.stat().st_size
    if bad_total:
        print_stdout("skipped " + describe_bad_lines(list(bad), bad_total))
    return samples


def sentences(texts: list[bytes]) -> Iterator[str]:
    """Splits the texts into sentences that SentencePiece does not skip."""
    for document in texts:
        text = document.decode("utf-8", errors="ignore")
        for start in range(0, len(text), _SENTENCE_CHARACTERS):
            yield text[start : start + _SENTENCE_CHARACTERS]


def train_sentencepiece(args: argparse.Namespace, texts: list[bytes]) -> bytes:
    """Trains a SentencePiece model and returns its file. Raises ConfigError if the text does not fit --vocab-size."""
    size = args.vocab_size
    while True:
        try:
            return sentencepiece_of(args, texts, size)
        except RuntimeError as error:
            largest = re.search(r"too high.*value <= (\d+)", str(error))
            needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
            if largest is None or int(largest[1]) >= size:
                rule = f"at least {needed[1] if needed else 260}: all bytes and the characters of the sample"
                remedy = f"give --vocab-size {needed[1]} or more" if needed else "give more text"
                reason = "" if needed or not texts else f": {error}"
                raise ConfigError(Fault("--vocab-size", f"{args.vocab_size}{reason}", rule, remedy)) from error
            size = accept_smaller(args, int(largest[1]), sum(map(len, texts)))


def accept_smaller(args: argparse.Namespace, size: int, text_bytes: int) -> int:
    """Returns the vocabulary size that the text allows, with --allow-smaller. Raises ConfigError without it."""
    if not args.allow_smaller:
        rule = f"at most {size:,} pieces, all that can be learned from {text_bytes:,} bytes of this text"
        remedy = f"give --vocab-size {size}, more text or --sample-bytes, or --allow-smaller"
        raise ConfigError(Fault("--vocab-size", str(args.vocab_size), rule, remedy))
    print(f"the text allows only {size:,} pieces instead of {args.vocab_size:,}", flush=True)
    return size


def sentencepiece_of(args: argparse.Namespace, texts: list[bytes], size: int) -> bytes:
    """Trains a SentencePiece model of `size` pieces. Raises RuntimeError if the text is too small or too varied."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # SentencePiece ends a sentence at NUL. Without it in the sample, the byte pieces encode NUL.
        sentence_iterator=(text.replace("\0", "") for text in sentences(texts)),
        model_writer=model,
        vocab_size=size,
        model_type=args.model_type or "unigram",
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
    """Trains a byte-level BPE and returns its tokenizer.json. Raises ConfigError if --vocab-size is too small, or too
    large for the text."""
    os.environ.setdefault("RAYON_NUM_THREADS", str(args.threads))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if args.vocab_size <= len(alphabet):
        rule = f"more than {len(alphabet)}: all bytes and the end-of-document token"
        raise ConfigError(Fault("--vocab-size", str(args.vocab_size), rule, "give a larger --vocab-size"))
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(texts), trainer)
    if tokenizer.get_vocab_size() < args.vocab_size:
        accept_smaller(args, tokenizer.get_vocab_size(), sum(map(len, texts)))
    return str(tokenizer.to_str()).encode("utf-8")


def is_tokenizer(path: Path) -> bool:
    """Returns whether a file is a tokenizer of the kind that its suffix indicates."""
    try:
        if path.suffix == ".json":
            Tokenizer.from_file(str(path))
        else:
            sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception:  # the library raises plain Exception
        return False
    return True


def main() -> int:
    """Samples the inputs, trains a tokenizer and writes it. Returns the exit code."""
    args = build_parser().parse_args()
    faults = []
    if args.output.suffix not in (".model", ".json"):
        faults.append(Fault("--output", str(args.output), "a path that ends in .model or .json", "rename it"))
    if args.output.exists() and not is_tokenizer(args.output):
        value, rule = f"{args.output} already exists", "a new path, or an earlier tokenizer of the same kind"
        faults.append(Fault("--output", value, rule, "give another path"))
    if args.output.suffix == ".json" and args.model_type == "unigram":
        rule = "bpe for an --output that ends in .json"
        faults.append(Fault("--model-type", "unigram", rule, "omit it, or give an --output that ends in .model"))
    for flag, number, largest in (
        ("--vocab-size", args.vocab_size, 10_000_000),
        ("--sample-bytes", args.sample_bytes, 1 << 40),
        ("--threads", args.threads, 1024),
    ):
        if not 1 <= number <= largest:
            faults.append(Fault(flag, str(number), f"from 1 to {largest:,}", "give a number in that range"))
    inputs = read_input_options(args, more=faults)
    make_folder(args.output.parent, "--output")
    if args.output.exists():
        warn(f"{args.output} already exists; this run will replace it")
    samples = sample_documents(args, inputs)
    if not samples.names:
        remedy = "give files that hold documents"
        raise ConfigError(Fault("--input", "no documents", "at least one document to train on", remedy))
    texts = list(samples.documents())
    kind = "byte-level BPE" if args.output.suffix == ".json" else f"SentencePiece {args.model_type or 'unigram'}"
    size = f"{sum(map(len, texts)) / 1e6:.1f} MB of {len(samples.names)} domains"
    print(f"training a {kind} tokenizer of {args.vocab_size:,} pieces on {size}", flush=True)
    train = train_byte_level if args.output.suffix == ".json" else train_sentencepiece
    with stage("training the tokenizer"):
        content = train(args, texts)
    atomic_write_bytes(args.output, content)
    print(f"wrote {args.output}")
    return 0


def command() -> None:
    """Runs `main` as a program."""
    run_or_exit(main)


if __name__ == "__main__":
    command()
