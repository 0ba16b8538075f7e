"""Writes held-out documents as a task of EleutherAI's lm-evaluation-harness, which then needs no network.

    python tools/eval_task.py --domains data/domains.json --output-dir held-out-task
    lm_eval run --model hf --model_args pretrained=main-hf --tasks heldout --include_path held-out-task

One task a domain (`heldout_NAME`, group `heldout`) gives the bits per byte of whole documents, each after an
end-of-document token. `--phase evaluate` reads windows of consecutive text instead, in which a document may follow
another, so that its figures are a little lower.
"""

from __future__ import annotations

import argparse
import glob
import json
import re
import sys
from pathlib import Path

if not __package__:
    # Run as a script: the package is beside this folder.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from megatron_doremi.console import print_stdout
from megatron_doremi.data.manifest import load_manifest
from megatron_doremi.data.token_stream import TokenStream
from megatron_doremi.errors import ConfigError, Fault, raise_if_any, run_or_exit
from megatron_doremi.flag_parser import FlagParser
from megatron_doremi.progress import Progress
from megatron_doremi.storage.files import atomic_write_text, make_folder
from megatron_doremi.tokenization.tokenizer import Tokenizer, dataset_tokenizer

GROUP = "heldout"
# Of a file's name, which no file system bounds below 255 bytes.
_LONGEST_SLUG = 200


def build_parser() -> argparse.ArgumentParser:
    """Builds the command-line parser."""
    parser = FlagParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--domains", required=True, type=Path, metavar="FILE", help="manifest of the data, domains.json")
    add("--output-dir", required=True, type=Path, metavar="DIR", help="folder to write, for lm_eval's --include_path")
    documents_help = "held-out documents of each domain, from its first; 0: all (default: 100)"
    add("--documents", type=int, default=100, metavar="N", help=documents_help)
    return parser


def main() -> int:
    """Writes the documents and the tasks. Returns the exit code."""
    args = build_parser().parse_args()
    if args.documents < 0:
        raise ConfigError(Fault("--documents", str(args.documents), "0 or more", "give for example 100"))
    manifest = load_manifest(args.domains)
    tokenizer = dataset_tokenizer(manifest)
    if tokenizer is None:
        remedy = "make the data set with tools/preprocess_data.py"
        raise ConfigError(Fault(f"--domains {args.domains}", "no tokenizer", "a manifest that names one", remedy))
    streams = {domain.name: manifest.open_held_out(domain, tokenizer.vocab_size) for domain in manifest.domains}
    rule, remedy = "held-out text in at least one domain", "run tools/preprocess_data.py with --split valid"
    raise_if_any(
        [] if any(streams.values()) else [Fault(f"--domains {args.domains}", "none is held out", rule, remedy)]
    )
    if "::" in str(args.output_dir.resolve()):
        separator = "a path without '::', which the harness's library of data sets splits"
        raise ConfigError(Fault("--output-dir", str(args.output_dir), separator, "give another path"))
    make_folder(args.output_dir, "--output-dir")
    tasks: list[str] = []
    for name, stream in streams.items():
        if stream is None:
            continue
        lines = [json.dumps({"text": text, "domain": name}) for text in documents(stream, tokenizer, args.documents)]
        if not lines:
            # The harness cannot read a task without documents.
            print_stdout(f"left out, since its held-out documents are empty: {name!r}")
            continue
        task = f"{GROUP}_{slug(name, tasks)}"
        tasks.append(task)
        path = args.output_dir / f"{task}.jsonl"
        atomic_write_text(path, "\n".join(lines) + "\n")
        atomic_write_text(args.output_dir / f"{task}.yaml", json.dumps(task_entry(task, path), indent=2) + "\n")
        print_stdout(f"{task}: {len(lines):,} documents of {name!r}")
    if not tasks:
        raise ConfigError(Fault(f"--domains {args.domains}", "every held-out document is empty", rule, remedy))
    atomic_write_text(args.output_dir / f"{GROUP}.yaml", json.dumps({"group": GROUP, "task": tasks}, indent=2) + "\n")
    print_stdout(f"run them with: lm_eval run --tasks {GROUP} --include_path {args.output_dir} ...")
    return 0


def slug(name: str, taken: list[str]) -> str:
    """The part of a task's name for a domain: letters, digits and underscores, unlike those that are taken."""
    base = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:_LONGEST_SLUG] or "domain"
    number = 1
    while f"{GROUP}_{base}{'' if number == 1 else f'_{number}'}" in taken:
        number += 1
    return base if number == 1 else f"{base}_{number}"


def documents(stream: TokenStream, tokenizer: Tokenizer, limit: int) -> list[str]:
    """The text of the first documents of a stream (all if `limit` is 0), without empty ones."""
    texts: list[str] = []
    start, total = 0, limit or stream.num_documents
    with Progress("decoding held-out documents", total, "document") as progress:
        while start < stream.num_tokens and len(texts) < total:
            length = int(stream.documents_at(start, start + 1).lengths[0])
            ids = stream.tokens(start, min(length, stream.num_tokens - start))
            text = tokenizer.decode(ids[ids != tokenizer.eod])
            if text:
                texts.append(text)
            progress.update(1)
            start += length
    return texts


def task_entry(task: str, path: Path) -> dict[str, object]:
    """The definition of a task; YAML reads JSON. The path is a pattern there, which other files must not match."""
    return {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": glob.escape(str(path.resolve()))}},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
        "metadata": {"version": 1},
    }


def command() -> None:
    """Runs `main` as a program."""
    run_or_exit(main)


if __name__ == "__main__":
    command()
