"""Trains a SentencePiece tokenizer on JSON lines, on the same amount of text from each domain.

    python tools/train_tokenizer.py --input data/train.jsonl --vocab-size 32000 --output data/tokenizer.model

Nothing of a text is lost: no normalisation, spaces kept, bytes for what the vocabulary lacks, so that decoding
gives back what was encoded. One character is the exception: U+2581, by which SentencePiece stores a space, comes
back as one.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import io
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sentencepiece
from tqdm import tqdm

from megatron_doremi.data.files import atomic_write_bytes, make_folder
from megatron_doremi.data.jsonl import BadLine, check_inputs, parse_document, read_lines
from megatron_doremi.errors import ConfigError, Fault, raise_if_any, run_or_exit

# SentencePiece leaves out longer training sentences; documents are cut into pieces of this length.
_SENTENCE_CHARACTERS = 1000


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--input", nargs="+", required=True, type=Path, metavar="FILE", help=".jsonl, .zst or .gz")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the model, *.model")
    parser.add_argument("--vocab-size", type=int, default=32000, help="pieces (default: 32000)")
    parser.add_argument("--model-type", choices=("unigram", "bpe"), default="unigram", help="(default: unigram)")
    parser.add_argument("--sample-bytes", type=int, default=50_000_000, help="text to train on (default: 50000000)")
    parser.add_argument("--text-key", default="text", help="(default: text)")
    parser.add_argument("--domain-key", default="meta.pile_set_name", help="(default: meta.pile_set_name)")
    parser.add_argument("--seed", type=int, default=1234, help="chooses the sample (default: 1234)")
    parser.add_argument("--threads", type=int, default=2, help="of the training (default: 2)")
    return parser


class Sample:
    """A sample of one domain's documents, uniform by a hash of their text, up to a number of bytes."""

    def __init__(self, most_bytes: int):
        self.most_bytes, self.size = most_bytes, 0
        self._heap: list[tuple[int, bytes]] = []

    def offer(self, order: int, text: bytes) -> None:
        """Takes a document while there is room; later ones of a lower order push out those of the highest."""
        heapq.heappush(self._heap, (-order, text))
        self.size += len(text)
        while self.size - len(self._heap[0][1]) >= self.most_bytes:
            self.size -= len(heapq.heappop(self._heap)[1])

    def documents(self) -> list[bytes]:
        """The sample in the order of its hashes, the last document cut at the limit."""
        ordered = [text for _, text in sorted(self._heap, reverse=True)]
        left, result = self.most_bytes, []
        for text in ordered:
            result.append(text[:left])
            left -= len(result[-1])
        return result


def sample_documents(args: argparse.Namespace) -> dict[str, Sample]:
    """Reads all inputs once and keeps an equal sample of each domain."""
    samples: dict[str, Sample] = {}
    size = sum(path.stat().st_size for path in args.input)
    with tqdm(total=size, unit="B", unit_scale=True, desc="reading", mininterval=0.5) as bar:
        done = 0
        for path in args.input:
            for line in read_lines(path):
                bar.update(done + line.position - bar.n)
                try:
                    text, domain = parse_document(line.data or b"", args.text_key, args.domain_key)
                except BadLine as error:
                    what = f"{line.file}, line {line.number}: {error}"
                    raise ConfigError(Fault("--input", what, "lines that each hold a document", "mend it")) from error
                data = text.encode("utf-8")
                digest = hashlib.sha256(f"{args.seed}/{text}".encode()).digest()
                # How many domains there are is known at the end; each sample is cut down then.
                samples.setdefault(domain, Sample(args.sample_bytes)).offer(int.from_bytes(digest[:8], "big"), data)
            done += path.stat().st_size
    share = args.sample_bytes // max(1, len(samples))
    for sample in samples.values():
        sample.most_bytes = share
    return samples


def sentences(samples: dict[str, Sample]) -> Iterator[str]:
    """The samples' documents in pieces that SentencePiece takes whole."""
    for name in sorted(samples):
        for document in samples[name].documents():
            text = document.decode("utf-8", errors="ignore")
            for start in range(0, len(text), _SENTENCE_CHARACTERS):
                yield text[start : start + _SENTENCE_CHARACTERS]


def train(args: argparse.Namespace, samples: dict[str, Sample]) -> bytes:
    """Trains the model and returns its file. Raises ConfigError where the text does not fill the vocabulary."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # NUL would end the sentence for SentencePiece; it falls to the byte pieces.
            sentence_iterator=(text.replace("\0", "") for text in sentences(samples)),
            model_writer=model,
            vocab_size=args.vocab_size,
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
    except RuntimeError as error:
        raise ConfigError(
            Fault(
                "--vocab-size",
                f"{args.vocab_size}: {error}",
                "a vocabulary that the sample fills (at least 260)",
                "give another --vocab-size or more text",
            )
        ) from error
    return model.getvalue()


def main() -> int:
    """Samples, trains, writes."""
    args = build_parser().parse_args()
    faults = check_inputs(args.input)
    if args.output.suffix != ".model":
        faults.append(Fault("--output", str(args.output), "a path that ends in .model", "name it so"))
    for flag, number in (("--sample-bytes", args.sample_bytes), ("--threads", args.threads)):
        if number < 1:
            faults.append(Fault(flag, str(number), "at least 1", "give a positive number"))
    raise_if_any(faults)
    make_folder(args.output.parent, "--output")
    samples = sample_documents(args)
    if not samples:
        raise ConfigError(Fault("--input", "no documents", "text to train on", "give files that hold documents"))
    print(
        f"training a {args.model_type} tokenizer of {args.vocab_size:,} pieces on "
        f"{sum(min(s.size, s.most_bytes) for s in samples.values()) / 1e6:.1f} MB of {len(samples)} domains"
    )
    atomic_write_bytes(args.output, train(args, samples))
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    run_or_exit(main)
