"""Turns JSON, CSV, Parquet or text files into one indexed pair a domain and split, and the manifest that names them.

    python tools/preprocess_data.py --input train.jsonl.zst --output-dir data --split train \\
        --tokenizer-model tokenizer.model --append-eod --workers 8
    python tools/preprocess_data.py --input valid.jsonl.zst --output-dir data --split valid ...

The train split starts the manifest, data/domains.json; the valid split adds its pairs to it. Documents keep the
order of the input whatever the number of workers. Nothing appears under a final name before all of it is good; a run
that was stopped resumes with --resume. In an array job each task takes --shard I of --num-shards N, and
tools/merge_datasets.py joins what they leave.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import signal
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from megatron_doremi.data.indexed_dataset import dtype_for
from megatron_doremi.data.manifest import TokenizerInfo, load_manifest, overwriting_faults, similar_names
from megatron_doremi.errors import ConfigError, Fault, RunError, raise_if_any, run_or_exit
from megatron_doremi.preprocessing.documents import Document
from megatron_doremi.preprocessing.encoding import TokenizerFiles, WorkerDied, bad_lines_error, encode_all
from megatron_doremi.preprocessing.input_options import Inputs, add_input_options, read_input_options
from megatron_doremi.preprocessing.lost_characters import describe_lost
from megatron_doremi.preprocessing.outputs import (
    Outputs,
    keep_tokenizer,
    manifest_after,
    publish,
    tokenizer_in,
    train_prefixes,
)
from megatron_doremi.preprocessing.record_blocks import BLOCK_BYTES
from megatron_doremi.preprocessing.shards import Pair, ShardData, load_shard, run_of, save_shard, shard_folder
from megatron_doremi.preprocessing.sources import Shard, read_blocks, read_shard, shard_bytes
from megatron_doremi.preprocessing.tokenizer import GPT2, KINDS, SENTENCEPIECE, Tokenizer
from megatron_doremi.preprocessing.workspace import Workspace
from megatron_doremi.storage.files import make_folder

# Bytes of text on which tiktoken's ids are compared with those of the tokenizer itself.
_SAMPLE_BYTES = 1 << 18


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add_input_options(parser)
    add("--output-dir", required=True, type=Path, metavar="DIR", help="pairs and domains.json")
    add("--split", choices=("train", "valid"), default="train", help="of these files (default: train)")
    add(
        "--valid-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="hold out this part of them, by a hash of the text",
    )
    add(
        "--tokenizer-type", default=SENTENCEPIECE, metavar="KIND", help=f"{', '.join(KINDS)} (default: {SENTENCEPIECE})"
    )
    add("--tokenizer-model", required=True, type=Path, metavar="FILE", help="*.model, tokenizer.json or vocab.json")
    add("--merge-file", type=Path, metavar="FILE", help="GPT-2's merges.txt (default: beside its vocab.json)")
    add("--eod-token", metavar="TOKEN", help="what ends documents, where the tokenizer has no usual one")
    add("--allow-special-tokens", action="store_true", help="text that spells a special token becomes that token")
    lost_help = "refuse to publish if the tokenizer drops, or does not know, more of the characters (default: 0.001)"
    add("--max-dropped-share", type=float, default=0.001, metavar="F", help=lost_help)
    add("--append-eod", action="store_true", help="end each document with the end-of-document id")
    add("--workers", type=int, default=2, metavar="N", help="encoding processes (default: 2)")
    add("--max-documents", type=int, metavar="N", help="stop after the first N documents")
    add("--resume", action="store_true", help="resume where an earlier run was stopped; where there is none, start")
    add("--journal-seconds", type=float, default=15.0, metavar="S", help="what a killed run loses (default: 15)")
    add("--shard", type=int, default=0, metavar="I", help="the task of an array job, from 0 on")
    add("--num-shards", type=int, default=1, metavar="N", help="how many tasks it has (default: 1)")
    return parser


def check(args: argparse.Namespace) -> list[Fault]:
    """All that is wrong with the flags but those of the input."""
    faults = []
    for flag, value, least in (
        ("--workers", args.workers, 1),
        ("--num-shards", args.num_shards, 1),
        ("--max-documents", args.max_documents, 1),
    ):
        if value is not None and value < least:
            faults.append(Fault(flag, str(value), f"at least {least}", "give a positive number"))
    if not 0 <= args.shard < max(1, args.num_shards):
        rule = f"from 0 to --num-shards - 1, {args.num_shards - 1}"
        faults.append(Fault("--shard", str(args.shard), rule, "give the number of the task"))
    if not 0.0 <= args.valid_fraction < 1.0:
        faults.append(Fault("--valid-fraction", str(args.valid_fraction), "from 0 to below 1", "give such a number"))
    if not 0.0 <= args.max_dropped_share <= 1.0:
        faults.append(Fault("--max-dropped-share", str(args.max_dropped_share), "from 0 to 1", "give such a number"))
    if not 0.0 <= args.journal_seconds <= 86_400.0:
        faults.append(Fault("--journal-seconds", str(args.journal_seconds), "from 0 to 86400", "give such a number"))
    if args.eod_token is not None and args.tokenizer_type == SENTENCEPIECE:
        rule = "a tokenizer of another type; a SentencePiece model says itself what ends a document"
        faults.append(Fault("--eod-token", args.eod_token, rule, "leave it out"))
    if args.merge_file is not None and args.tokenizer_type != GPT2:
        rule = f"--tokenizer-type {GPT2}, which alone has merges in a file of their own"
        faults.append(Fault("--merge-file", str(args.merge_file), rule, "leave it out, or give that type"))
    if args.valid_fraction and args.split == "valid":
        rule = "the train split's run, which writes both"
        faults.append(Fault("--valid-fraction", "with --split valid", rule, "leave one of them out"))
    if args.split == "train":
        faults += overwriting_faults(args.output_dir / "domains.json")
    if args.max_documents and args.num_shards > 1:
        rule = "one process, which alone can count them"
        faults.append(Fault("--max-documents", "with --num-shards", rule, "leave one of them out"))
    return faults


def check_tokenizer(args: argparse.Namespace, tokenizer: Tokenizer, known: TokenizerInfo | None) -> list[Fault]:
    """A fault where held-out text would be encoded otherwise than the train split."""
    if known is not None and (known.sha256, known.eod) == (tokenizer.sha256, tokenizer.eod):
        return []
    value = f"{args.tokenizer_model} ({tokenizer.sha256[:12]}, documents end with {tokenizer.eod})"
    rule = f"that of {args.output_dir / 'domains.json'} ({f'{known.sha256[:12]}, {known.eod}' if known else 'none'})"
    return [Fault("--tokenizer-model", value, rule, "give that one, or make the train split again")]


def sample(inputs: Inputs) -> list[str]:
    """Texts from the beginnings of the inputs."""
    texts: list[str] = []
    files, reader = inputs.files, inputs.reader
    # Of many files the first of each of a few: a block is decompressed for each.
    for file in files[:: max(1, len(files) // 8)]:
        left = _SAMPLE_BYTES // min(8, len(files))
        for block in itertools.islice(read_blocks(file, reader.columns, reader.needed_of), 1):
            for _, document in reader.documents(block):
                if left <= 0:
                    break
                if isinstance(document, Document):
                    texts.append(document.text[:left])
                    left -= document.size
    return texts


def settings_of(args: argparse.Namespace, inputs: Inputs, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that the result depends on, as JSON: what a run that resumes, and the tasks of an array, have in common."""
    stats = [(path, path.stat()) for path in inputs.paths]
    reader = inputs.reader
    return {
        "inputs": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats],
        "size of blocks": BLOCK_BYTES,
        "documents": repr(replace(reader, known=None)),
        "domains of folders": sorted({each.domain for each in inputs.files if each.domain is not None}),
        "domain list": sorted(reader.known) if reader.known is not None and args.domain_list else None,
        "tokenizer": [tokenizer.type, tokenizer.sha256, tokenizer.eod],
        "--allow-special-tokens": args.allow_special_tokens,
        "--append-eod": args.append_eod,
        "--max-documents": args.max_documents,
        "--num-shards": args.num_shards,
        "shard": args.shard,
    }


def encode_into(
    workspace: Workspace, args: argparse.Namespace, files: TokenizerFiles, fast: bool, inputs: Inputs
) -> None:
    """Encodes what is not in yet, with a bar that shows the input's bytes, rate and time left."""
    outputs, shard, reader = workspace.outputs, Shard(args.shard, args.num_shards), inputs.reader
    blocks = read_shard(inputs.files, reader.columns, shard, outputs.blocks, reader.needed_of)
    start, end = shard_bytes([path.stat().st_size for path in inputs.paths], shard)
    most = args.max_documents or sys.maxsize
    began, text_bytes = time.monotonic(), 0
    # Closed whatever happens: the workers must not outlive an error.
    with (
        closing(encode_all(blocks, files, fast, reader, args.append_eod, args.workers)) as encoded_blocks,
        tqdm(total=end - start, unit="B", unit_scale=True, desc=f"encoding {args.split}", mininterval=0.5) as bar,
    ):
        for encoded in encoded_blocks:
            part = encoded.first(most - outputs.documents)
            outputs.add(part)
            workspace.save_journal()
            text_bytes += part.text_bytes
            bar.set_postfix_str(f"{text_bytes / 1e6 / (time.monotonic() - began):.1f} MB/s of text", refresh=False)
            bar.update(min(encoded.progress.done, bar.total) - bar.n)
            if outputs.documents >= most:
                break
        else:
            bar.update(bar.total - bar.n)


def main() -> int:
    """Encodes the inputs and publishes pairs and manifest."""
    args = build_parser().parse_args()
    inputs = read_input_options(args, args.split, args.valid_fraction, check(args))
    shard = Shard(args.shard, args.num_shards)
    files = TokenizerFiles(
        args.tokenizer_type, args.tokenizer_model, args.merge_file, args.eod_token, args.allow_special_tokens
    )
    tokenizer = files.load()
    folder = shard_folder(args.output_dir, args.split, shard) if shard.count > 1 else args.output_dir
    known = {}
    if args.split == "valid":
        manifest = load_train_split(args.output_dir / "domains.json")
        raise_if_any(check_tokenizer(args, tokenizer, manifest.tokenizer))
        known = train_prefixes(manifest, folder)
        names = frozenset(manifest.names) & (inputs.reader.known or frozenset(manifest.names))
        inputs = replace(inputs, reader=replace(inputs.reader, known=names))
    elif shard.count == 1:
        say_replaced(args.output_dir / "domains.json")
    make_folder(folder, "--output-dir")
    settings = settings_of(args, inputs, tokenizer)
    if args.resume and is_done(folder, settings, shard):
        print(f"shard {shard.index} of {shard.count} is there already")
        return 0
    texts = sample(inputs)
    tokenizer.choose_encoder(texts)
    warn_of_losses(args, tokenizer, texts)
    print(f"encoding with {tokenizer.encoder}, {tokenizer.vocab_size:,} ids, in {args.workers} processes", flush=True)
    partial = folder / f".partial-{args.split}"
    outputs = Outputs(folder, partial, dtype_for(tokenizer.vocab_size), known)
    try:
        with Workspace(partial, outputs, settings, args.resume, args.journal_seconds) as workspace:
            if workspace.resumed:
                print(f"going on after {outputs.documents:,} documents of an earlier run", flush=True)
            encode_into(workspace, args, files, tokenizer.encoder == "tiktoken", inputs)
            finish(args, workspace, tokenizer, settings, inputs.order)
    except KeyboardInterrupt:
        print("interrupted: nothing was published", file=sys.stderr)
        say_resume(partial)
        return 130
    except WorkerDied:
        print("error: a worker was killed; did memory run out? Fewer --workers need less.", file=sys.stderr)
        return say_resume(partial)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return say_resume(partial)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error.strerror}: nothing was published; make room", file=sys.stderr)
        return say_resume(partial)
    report(outputs)
    return 0


def say_replaced(path: Path) -> None:
    """Says that a train split which is there already will be replaced."""
    try:
        names = load_manifest(path).names
    except ConfigError:
        return
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    text = f"warning: {path} names a train split already ({shown}); this run will replace it"
    print(text, file=sys.stderr, flush=True)


def warn_of_losses(args: argparse.Namespace, tokenizer: Tokenizer, texts: list[str]) -> None:
    """Says before everything is encoded that it will hardly be published."""
    lost, characters = tokenizer.lost_characters(texts), sum(map(len, texts))
    if lost.total() > args.max_dropped_share * characters:
        said = f"of the beginnings of the input, the tokenizer loses {describe_lost(lost, characters)}"
        print(f"warning: {said}; see --max-dropped-share", file=sys.stderr, flush=True)


def load_train_split(path: Path) -> Any:
    """The manifest that a valid split is added to. Raises ConfigError."""
    try:
        return load_manifest(path)
    except ConfigError as error:
        raise ConfigError([replace(fault, remedy="make the train split first") for fault in error.faults]) from error


def is_done(folder: Path, settings: dict[str, Any], shard: Shard) -> bool:
    """Whether this task of an array is complete, by a run like this one."""
    return shard.count > 1 and (folder / "shard.json").is_file() and load_shard(folder).run == run_of(settings)


def say_resume(partial: Path) -> int:
    """Says how to go on. Returns the exit code of a fault of the machine."""
    if partial.is_dir():
        print(f"What was encoded is in {partial}; the same command with --resume resumes from there.", file=sys.stderr)
    return 1


def finish(
    args: argparse.Namespace,
    workspace: Workspace,
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    order: tuple[str, ...],
) -> None:
    """Publishes what is encoded. Raises ConfigError where lines were bad, or there was nothing."""
    outputs, shard = workspace.outputs, Shard(args.shard, args.num_shards)
    if outputs.bad_total and args.on_error == "fail":
        workspace.save_journal(now=True)
        remedy = "mend the input, or give --on-error skip --resume to leave them out; nothing is encoded again then"
        raise bad_lines_error([*outputs.bad_files, *outputs.bad], outputs.bad_total, remedy)
    if outputs.lost_share > args.max_dropped_share:
        workspace.save_journal(now=True)
        value = f"loses {describe_lost(outputs.lost, outputs.characters)}"
        remedy = (
            "take a tokenizer that spells unknown characters in bytes (tools/train_tokenizer.py makes such), or give "
            "--resume with a higher --max-dropped-share; nothing is encoded again then"
        )
        rule = f"a part of at most --max-dropped-share {args.max_dropped_share:g}"
        raise ConfigError(Fault(f"--tokenizer-model {args.tokenizer_model}", value, rule, remedy))
    if not outputs.by_key and shard.count == 1:
        workspace.remove()
        said = "; ".join(["no documents", *left_out(outputs)])
        raise ConfigError(Fault("--input", said, "text", "give files that hold documents"))
    workspace.save_journal(now=True)
    path = args.output_dir / "domains.json"
    info = tokenizer_in(outputs.folder, tokenizer)
    if shard.count == 1:
        moved = outputs.keep_in_train() if args.split == "train" else []
        manifest = manifest_after(path, args.split, outputs.by_key, info, order)
        keep_tokenizer(tokenizer, info)
        publish(outputs, manifest, args.split)
        for domain in moved:
            print(f"domain {domain!r}: all of it fell to the held-out part; it stays in the train split")
    else:
        keep_tokenizer(tokenizer, info)
        outputs.publish(lambda: (outputs.folder / "shard.json").unlink(missing_ok=True))
        pairs = {key: Pair(each.prefix, each.documents, each.bytes) for key, each in outputs.by_key.items()}
        save_shard(ShardData(outputs.folder, shard, args.split, run_of(settings), info, pairs, order))
    workspace.remove()


def report(outputs: Outputs) -> None:
    """Prints what was written and what was left out."""
    names = [domain if split == "train" else f"{domain} ({split})" for domain, split in outputs.by_key]
    width = max(map(len, [*names, "domain"]))
    print(f"{'domain':<{width}} {'documents':>11} {'tokens':>15} {'bytes':>15} {'bytes/token':>12}")
    for name, (_, output) in sorted(zip(names, outputs.by_key.items(), strict=True)):
        tokens = output.writer.num_tokens
        per_token = output.bytes / max(1, tokens)
        print(f"{name:<{width}} {output.documents:>11,} {tokens:>15,} {output.bytes:>15,} {per_token:>12.2f}")
    for group in similar_names(sorted({domain for domain, _ in outputs.by_key})):
        remark = "differ only by case or spaces; --domain-rules can merge them"
        print(f"warning: the domains {' and '.join(map(repr, group))} {remark}", file=sys.stderr)
    if said := left_out(outputs):
        print("; ".join(said))


def left_out(outputs: Outputs) -> list[str]:
    """What of the input became no document."""
    said = []
    if outputs.empty:
        said.append(f"left out {outputs.empty:,} empty texts")
    if outputs.bad_total:
        named = [*outputs.bad_files, *outputs.bad]
        said.append(f"left out {outputs.bad_total:,} bad lines, among them: " + "; ".join(named))
    if outputs.lost:
        said.append(f"the tokenizer lost {describe_lost(outputs.lost, outputs.characters)}")
    return said


def stop(*_: object) -> None:
    """SIGTERM, as clusters send it, ends like Ctrl-C: files closed, workers gone, the journal there."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    run_or_exit(main)
