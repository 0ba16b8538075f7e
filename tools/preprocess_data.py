"""Encodes JSON, CSV, Parquet or text files into one indexed pair per domain and split, and writes their manifest.

    python tools/preprocess_data.py --input FOLDER --output-dir data --tokenizer-model tokenizer.model --append-eod

    python tools/preprocess_data.py --input train.jsonl.zst --output-dir data --split train ...
    python tools/preprocess_data.py --input valid.jsonl.zst --output-dir data --split valid ...

Without --split, folders and files named like splits (train, validation, test) give both; of other input a hash of each
text selects the held-out documents. The train split creates the manifest, data/domains.json; the valid split adds its
pairs. Documents keep the order of the input, regardless of the number of workers. Files get their final names only when
all of them are complete; an interrupted run resumes with --resume. In an array job each task takes --shard I of
--num-shards N, and tools/merge_datasets.py merges their output.
"""

from __future__ import annotations

import argparse
import errno
import signal
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:
    # Run as a script: the package is beside this folder.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from megatron_doremi.console import note, print_stderr, print_stdout, warn
from megatron_doremi.data.indexed_dataset import dtype_for
from megatron_doremi.data.manifest import TokenizerInfo, load_manifest, overwriting_faults
from megatron_doremi.errors import ConfigError, Fault, RunError, raise_if_any, run_or_exit
from megatron_doremi.flag_parser import FlagParser
from megatron_doremi.preprocessing.encoding import (
    TokenizerFiles,
    WorkerDied,
    bad_lines_error,
    encode_all,
)
from megatron_doremi.preprocessing.file_domains import domain_warnings, list_faults
from megatron_doremi.preprocessing.input_options import (
    Inputs,
    add_input_options,
    read_input_options,
    sample,
    with_held_out,
)
from megatron_doremi.preprocessing.inputs import split_by_name
from megatron_doremi.preprocessing.outputs import (
    Outputs,
    describe_kept_in_train,
    describe_tokenizer,
    describe_without_sizes,
    manifest_after,
    publish,
    save_tokenizer,
    tokenizer_in,
    train_prefixes,
)
from megatron_doremi.preprocessing.record_blocks import BLOCK_BYTES
from megatron_doremi.preprocessing.shards import Pair, ShardData, load_shard, run_of, save_shard, shard_folder
from megatron_doremi.preprocessing.sources import Shard, read_shard, shard_bytes
from megatron_doremi.preprocessing.summary import describe_skipped, print_summary, warn_of_lost_characters
from megatron_doremi.preprocessing.workspace import Workspace, partial_folder
from megatron_doremi.progress import Progress
from megatron_doremi.storage.files import make_folder
from megatron_doremi.tokenization.lost_characters import describe_lost
from megatron_doremi.tokenization.tokenizer import (
    GPT2,
    HUGGING_FACE,
    KINDS,
    SENTENCEPIECE,
    Tokenizer,
    kind_of_tokenizer,
)


def build_parser() -> argparse.ArgumentParser:
    """Builds the command-line parser."""
    parser = FlagParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add_input_options(parser)
    output_help = "folder in which to write the .bin/.idx pairs and domains.json"
    add("--output-dir", required=True, type=Path, metavar="DIR", help=output_help)
    split_help = (
        "split of the input files (default: both, where names of folders or files tell them apart, such as train and "
        "validation; else train, of which --valid-fraction is held out)"
    )
    add("--split", choices=("train", "valid"), help=split_help)
    valid_help = (
        "fraction of the documents to hold out as the valid split, by a hash of the text (default: 0 with --split; "
        "else 0.05, for more than 400 MB of files 20 MB of them, at least 0.001)"
    )
    add("--valid-fraction", type=float, metavar="F", help=valid_help)
    type_help = f"type of the tokenizer: {', '.join(KINDS)} (default: {HUGGING_FACE} for .json, else {SENTENCEPIECE})"
    add("--tokenizer-type", metavar="KIND", help=type_help)
    model_help = "tokenizer file: a SentencePiece model, a tokenizer.json, or GPT-2's vocab.json"
    add("--tokenizer-model", required=True, type=Path, metavar="FILE", help=model_help)
    add("--merge-file", type=Path, metavar="FILE", help="GPT-2's merges.txt (default: the one beside vocab.json)")
    eod_help = "end-of-document token, except for SentencePiece (default: <|endoftext|>, </s> or another usual one)"
    add("--eod-token", metavar="TOKEN", help=eod_help)
    special_help = "encode text that spells a special token as that token (default: as plain text)"
    add("--allow-special-tokens", action="store_true", help=special_help)
    lost_help = (
        "largest fraction of characters that the tokenizer may drop or encode as unknown; above it, nothing is "
        "published (default: 0.001)"
    )
    add("--max-dropped-share", type=float, default=0.001, metavar="F", help=lost_help)
    append_help = "append the end-of-document id to each document (default: append nothing)"
    add("--append-eod", action="store_true", help=append_help)
    add("--workers", type=int, default=2, metavar="N", help="number of encoding processes (default: 2)")
    add("--max-documents", type=int, metavar="N", help="encode only the first N documents (default: all)")
    resume_help = "resume an interrupted run, or start a new one if there is none (default: start over)"
    add("--resume", action="store_true", help=resume_help)
    journal_help = "seconds between saves of the journal; a killed run loses at most this much work (default: 15)"
    add("--journal-seconds", type=float, default=15.0, metavar="S", help=journal_help)
    add("--shard", type=int, default=0, metavar="I", help="index of this task of an array job, from 0 (default: 0)")
    add("--num-shards", type=int, default=1, metavar="N", help="number of tasks of the array job (default: 1)")
    return parser


def check(args: argparse.Namespace) -> list[Fault]:
    """Returns the faults of all flags except the input options."""
    faults = []
    for flag, value in (
        ("--workers", args.workers),
        ("--num-shards", args.num_shards),
        ("--max-documents", args.max_documents),
    ):
        if value is not None and value < 1:
            faults.append(Fault(flag, str(value), "at least 1", "give a positive number"))
    if not 0 <= args.shard < max(1, args.num_shards):
        rule = f"from 0 to --num-shards - 1 = {args.num_shards - 1}"
        faults.append(Fault("--shard", str(args.shard), rule, "give the index of the task"))
    if args.valid_fraction is not None and not 0.0 <= args.valid_fraction < 1.0:
        given, rule = str(args.valid_fraction), "at least 0 and less than 1"
        faults.append(Fault("--valid-fraction", given, rule, "give a number in that range"))
    if not 0.0 <= args.max_dropped_share <= 1.0:
        given = str(args.max_dropped_share)
        faults.append(Fault("--max-dropped-share", given, "from 0 to 1", "give a number in that range"))
    if not 0.0 <= args.journal_seconds <= 86_400.0:
        given = str(args.journal_seconds)
        faults.append(Fault("--journal-seconds", given, "from 0 to 86400", "give a number in that range"))
    if args.eod_token is not None and args.tokenizer_type == SENTENCEPIECE:
        rule = "another --tokenizer-type: a SentencePiece model defines its own end of documents"
        faults.append(Fault("--eod-token", args.eod_token, rule, "omit it"))
    if args.merge_file is not None and args.tokenizer_type != GPT2:
        rule = f"--tokenizer-type {GPT2}, the only type with a separate file of merges"
        faults.append(Fault("--merge-file", str(args.merge_file), rule, "omit it, or give that type"))
    if args.valid_fraction and args.split == "valid":
        rule = "--split train, which writes both splits"
        faults.append(Fault("--valid-fraction", "with --split valid", rule, "omit one of them"))
    if args.split != "valid":
        faults += overwriting_faults(args.output_dir / "domains.json")
    if args.max_documents and args.num_shards > 1:
        rule = "a single process: the tasks of an array job do not share a count"
        faults.append(Fault("--max-documents", "with --num-shards", rule, "omit one of them"))
    return faults


def check_tokenizer(args: argparse.Namespace, tokenizer: Tokenizer, expected: TokenizerInfo | None) -> list[Fault]:
    """Returns a fault if the valid split would be encoded with another tokenizer than the train split."""
    if expected is not None and (expected.sha256, expected.eod) == (tokenizer.sha256, tokenizer.eod):
        return []
    value = f"{args.tokenizer_model} ({describe_tokenizer(tokenizer.sha256, tokenizer.eod)})"
    described = describe_tokenizer(expected.sha256, expected.eod) if expected else "none"
    rule = f"the tokenizer in {args.output_dir / 'domains.json'} ({described})"
    return [Fault("--tokenizer-model", value, rule, "give that tokenizer, or make the train split again")]


def settings_of(args: argparse.Namespace, inputs: Inputs, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns everything that the result depends on, as JSON values. A run resumes only if they are equal; for
    array jobs see `run_of`."""
    stats = [(path, path.stat()) for path in inputs.paths]
    reader = inputs.reader
    return {
        "inputs": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats],
        "size of blocks": BLOCK_BYTES,
        "documents": repr(replace(reader, known=None)),
        "domains of folders": sorted({file.domain for file in inputs.files if file.domain is not None}),
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
    """Encodes the blocks that are not in the outputs yet; a progress bar shows bytes of input, rate and time left."""
    outputs, shard, reader = workspace.outputs, Shard(args.shard, args.num_shards), inputs.reader
    blocks = read_shard(inputs.files, reader.columns, shard, outputs.blocks, reader.needed_of)
    start, end = shard_bytes([path.stat().st_size for path in inputs.paths], shard)
    max_documents = args.max_documents or sys.maxsize
    # `closing` stops the workers on any error.
    with (
        closing(encode_all(blocks, files, fast, reader, args.append_eod, args.workers)) as encoded_blocks,
        Progress(f"encoding {args.split}", end - start, "byte") as progress,
    ):
        done = 0
        for encoded in encoded_blocks:
            kept = encoded.first(max_documents - outputs.documents)
            outputs.add(kept)
            workspace.save_journal()
            progress.update(min(encoded.progress.done, end - start) - done)
            done = min(encoded.progress.done, end - start)
            if outputs.documents >= max_documents:
                break


def main() -> int:
    """Encodes the inputs, of one split or of both. Returns the exit code."""
    args = build_parser().parse_args()
    args.tokenizer_type = args.tokenizer_type or kind_of_tokenizer(args.tokenizer_model)
    by_name, held_out, notes = args.split is None and args.valid_fraction is None, list[Path](), list[str]()
    if by_name:
        args.input, held_out, notes = split_by_name(args.input)
    inputs = read_input_options(args, args.split or "train", args.valid_fraction or 0.0, check(args))
    for text in notes:
        note(text)
    inputs = replace(inputs, with_held_out=(*inputs.with_held_out, *held_out))
    inputs = with_held_out(inputs, args.split, args.valid_fraction, args.num_shards)
    args.split = args.split or "train"
    if args.num_shards > 1 or not (by_name and inputs.with_held_out):
        return encode_split(args, inputs)
    valid_args = argparse.Namespace(**{**vars(args), "input": list(inputs.with_held_out), "split": "valid"})
    # Before the train split is encoded, so that faults of the held-out files are found first.
    valid_inputs = read_input_options(valid_args, "valid")
    unfinished = {split for split in ("train", "valid") if partial_folder(args.output_dir, split).is_dir()}
    # The valid split is begun when the train split is complete.
    if not (args.resume and unfinished == {"valid"}):
        code = encode_split(args, inputs)
        if code:
            return code
        # What an earlier run left of the valid split belongs to an earlier train split.
        valid_args.resume = False
    return encode_split(valid_args, valid_inputs)


def encode_split(args: argparse.Namespace, inputs: Inputs) -> int:
    """Encodes the inputs of `args.split` and publishes the pairs and the manifest. Returns the exit code."""
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
        raise_if_any(list_faults(inputs.files, frozenset(manifest.names), str(manifest.path)))
        inputs = replace(inputs, reader=replace(inputs.reader, known=names))
    elif shard.count == 1:
        warn_of_replacement(args.output_dir / "domains.json")
    make_folder(folder, "--output-dir")
    settings = settings_of(args, inputs, tokenizer)
    if args.resume and is_done(folder, settings, shard):
        print(f"shard {shard.index} of {shard.count} is already complete")
        return 0
    texts = sample(inputs)
    tokenizer.choose_encoder(texts)
    warn_of_lost_characters(tokenizer, texts, args.max_dropped_share)
    setup = f"{tokenizer.encoder}, vocabulary size {tokenizer.vocab_size:,}, {args.workers} worker processes"
    print(f"encoding with {setup}", flush=True)
    partial = partial_folder(folder, args.split)
    outputs = Outputs(folder, partial, dtype_for(tokenizer.vocab_size), known)
    try:
        with Workspace(partial, outputs, settings, args.resume, args.journal_seconds) as workspace:
            if workspace.resumed:
                print(f"resuming after {outputs.documents:,} documents of an earlier run", flush=True)
            encode_into(workspace, args, files, tokenizer.encoder == "tiktoken", inputs)
            finish(args, workspace, tokenizer, settings, inputs.order)
    except KeyboardInterrupt:
        print("interrupted: nothing was published", file=sys.stderr)
        print_resume_hint(partial)
        return 130
    except WorkerDied:
        print_stderr("error: a worker was killed, probably because memory ran out; try fewer --workers")
        return print_resume_hint(partial)
    except RunError as error:
        print_stderr(f"error: {error}")
        return print_resume_hint(partial)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        place = error.filename or partial
        remedy = "raise ulimit -f" if error.errno == errno.EFBIG else "free disk space or raise the quota there"
        text = f"{place}: {error.strerror}; nothing was published; {remedy}"
        print_stderr(f"error: {text}")
        return print_resume_hint(partial)
    # A task of an array job may see a single domain of many.
    single_reported = shard.count > 1 or bool(domain_warnings(inputs.files, inputs.reader))
    read_in_full = () if shard.count > 1 or args.max_documents else inputs.files
    extended = load_manifest(args.output_dir / "domains.json") if args.split == "valid" and shard.count == 1 else None
    print_summary(outputs, inputs.reader.valid_fraction > 0, single_reported, read_in_full, extended)
    return 0


def warn_of_replacement(path: Path) -> None:
    """Warns that this run will replace an existing train split."""
    try:
        names = load_manifest(path).names
    except ConfigError:
        return
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    warn(f"{path} already contains a train split ({shown}); this run will replace it")


def load_train_split(path: Path) -> Any:
    """Loads the manifest to which a valid split is added. Raises ConfigError."""
    try:
        return load_manifest(path)
    except ConfigError as error:
        raise ConfigError([replace(fault, remedy="make the train split first") for fault in error.faults]) from error


def is_done(folder: Path, settings: dict[str, Any], shard: Shard) -> bool:
    """Returns whether an earlier run with the same settings completed this task of an array job."""
    return shard.count > 1 and (folder / "shard.json").is_file() and load_shard(folder).run == run_of(settings)


def print_resume_hint(partial: Path) -> int:
    """Prints how to resume. Returns 1, the exit code of a machine's failure."""
    if partial.is_dir():
        print_stderr(f"Encoded data is kept in {partial}; run the same command with --resume to continue.")
    return 1


def finish(
    args: argparse.Namespace,
    workspace: Workspace,
    tokenizer: Tokenizer,
    settings: dict[str, Any],
    order: tuple[str, ...],
) -> None:
    """Publishes the encoded data. Raises ConfigError if there were bad lines, too many lost characters, or no
    documents."""
    outputs, shard = workspace.outputs, Shard(args.shard, args.num_shards)
    if outputs.bad_total and args.on_error == "fail":
        workspace.save_journal(now=True)
        remedy = "fix the input, or skip the bad lines with --on-error skip --resume, which encodes nothing again"
        raise bad_lines_error([*outputs.bad_files, *outputs.bad], outputs.bad_total, remedy)
    if outputs.lost_share > args.max_dropped_share:
        workspace.save_journal(now=True)
        value = f"loses {describe_lost(outputs.lost, outputs.characters)}"
        remedy = (
            "use a tokenizer that encodes unknown characters as bytes, as tools/train_tokenizer.py makes them, or give "
            "--resume with a higher --max-dropped-share, which encodes nothing again"
        )
        rule = f"a fraction of at most --max-dropped-share {args.max_dropped_share:g}"
        raise ConfigError(Fault(f"--tokenizer-model {args.tokenizer_model}", value, rule, remedy))
    if not outputs.by_key and shard.count == 1:
        workspace.remove()
        value = "; ".join(["no documents", *describe_skipped(outputs)])
        raise ConfigError(Fault("--input", value, "at least one document", "give files that hold documents"))
    workspace.save_journal(now=True)
    path = args.output_dir / "domains.json"
    info = tokenizer_in(outputs.folder, tokenizer)
    if shard.count == 1:
        moved = outputs.keep_in_train() if args.split == "train" else []
        manifest = manifest_after(path, args.split, outputs.by_key, info, order)
        save_tokenizer(tokenizer, info)
        publish(outputs, manifest, args.split)
        for domain in moved:
            print_stdout(describe_kept_in_train(domain))
    else:
        save_tokenizer(tokenizer, info)
        outputs.publish(lambda: (outputs.folder / "shard.json").unlink(missing_ok=True))
        pairs = {
            key: Pair(output.prefix, output.documents, output.bytes, output.sizes is not None)
            for key, output in outputs.by_key.items()
        }
        save_shard(ShardData(outputs.folder, shard, args.split, run_of(settings), info, pairs, order))
    for text in describe_without_sizes(outputs):
        print_stdout(text)
    workspace.remove()


def stop(*_: object) -> None:
    """Handles SIGTERM, which clusters send, like Ctrl-C: closes files, stops workers, keeps the journal."""
    raise KeyboardInterrupt


def command() -> None:
    """Runs `main` as a program."""
    signal.signal(signal.SIGTERM, stop)
    run_or_exit(main)


if __name__ == "__main__":
    command()
