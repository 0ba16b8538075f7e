"""Converts a run to a Hugging Face folder, or a Hugging Face folder to a model of this program.

    python tools/convert_checkpoint.py --to hf runs/main main-hf
    python tools/convert_checkpoint.py --to hf runs/main@2000 main-hf-2000 --dtype bfloat16
    python tools/convert_checkpoint.py --to native llama-folder llama-native

The written folder opens with Transformers' `AutoModelForCausalLM` and `AutoTokenizer`, without code of this program.
Weights are read from a checkpoint of any layout and written parameter by parameter: memory holds one parameter and its
copy. A shape that no class of Transformers has is refused, with the flags that make it so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if not __package__:
    # Run as a script: the package is beside this folder.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# DeepSpeed, which the model's layers are built with, has nothing to look for: no collective runs here.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from megatron_doremi.checkpoint.folder import changed_file
from megatron_doremi.console import print_stdout
from megatron_doremi.errors import ConfigError, Fault, raise_if_any, run_or_exit
from megatron_doremi.flag_parser import FlagParser
from megatron_doremi.hugging_face.architectures import ARCHITECTURES, Architecture
from megatron_doremi.hugging_face.config_file import choose_architecture, config_entry
from megatron_doremi.hugging_face.conversion import LARGEST_FILE, write_hugging_face, write_native
from megatron_doremi.hugging_face.model_config import HUGGING_FACE, RUN
from megatron_doremi.hugging_face.model_folder import (
    GENERATION,
    WEIGHTS,
    OpenedModel,
    copy_companions,
    model_entry,
    open_model,
)
from megatron_doremi.hugging_face.tokenizer_files import run_tokenizer, sample_texts, write_tokenizer
from megatron_doremi.progress import Progress
from megatron_doremi.run_settings import folder_and_step
from megatron_doremi.storage.files import atomic_write_text, make_durable, make_folder, sha256_of
from megatron_doremi.storage.folder_lock import LOCK, FolderLock
from megatron_doremi.tokenization.tokenizer import Tokenizer
from megatron_doremi.version import version_text

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HASHED_AT_ONCE = 4
_TIES = (
    "its tokenizer.json chooses otherwise than tokenizer.model between equally likely splits, as of runs of spaces, "
    "in some of the text on which it was tried (docs/huggingface.md)"
)


def build_parser() -> argparse.ArgumentParser:
    """Builds the command-line parser."""
    parser = FlagParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="a run (its --save folder; RUN@STEP for another step than the newest), or a model",
    )
    add("out", type=Path, metavar="OUT", help="folder to write, which must not exist or be empty")
    to_help = "hf: a Hugging Face folder from a run or a native model; native: a model from a Hugging Face folder"
    add("--to", required=True, choices=("hf", "native"), help=to_help)
    dtype_help = "type of the written weights (default: as they are stored, bfloat16 for a --bf16 run, else float32)"
    add("--dtype", choices=tuple(_DTYPES), help=dtype_help)
    architecture_help = "class of Transformers to write (default: the first that has the model's shape)"
    add("--architecture", choices=tuple(ARCHITECTURES), help=architecture_help)
    domains_help = "manifest that names the tokenizer, if it was moved (default: the run's)"
    add("--domains", type=Path, metavar="FILE", help=domains_help)
    add("--without-tokenizer", action="store_true", help="write the model alone")
    size_help = "GB of weights in one file (default: 5)"
    add("--max-file-gb", type=float, default=LARGEST_FILE / 1e9, metavar="N", help=size_help)
    return parser


def main() -> int:
    """Checks the source, writes the folder under a temporary name, and renames it. Returns the exit code."""
    args = build_parser().parse_args()
    folder, step = folder_and_step(args.source)
    raise_if_any(_argument_faults(args, Path(folder)))
    opened = open_model(Path(folder), "SOURCE", step)
    if args.to == "native":
        if opened.kind != HUGGING_FACE:
            rule, remedy = (
                "a Hugging Face folder",
                "a run and a native model need no conversion; give --to hf to export it",
            )
            raise ConfigError(Fault(f"SOURCE {folder}", f"a {opened.kind} of this program", rule, remedy))
        architecture = None
        tokenizer = None
    else:
        architecture = choose_architecture(opened.gpt, args.architecture or opened.model_type)
        tokenizer = None if args.without_tokenizer else _tokenizer(opened, args.domains)
    raise_if_any(_damage(opened))
    # A link is followed: what it names is written.
    out = args.out.resolve()
    partial = out.with_name(f".{out.name}.partial")
    make_folder(partial, "OUT")
    lock = FolderLock(partial, "OUT")
    try:
        _clear(partial)
        same_ids = _write(args, opened, architecture, tokenizer, partial)
        for path in [*partial.rglob("*"), partial]:
            make_durable(path)
    except BaseException:
        # A hidden folder of many gigabytes would keep a full disk full.
        with contextlib.suppress(OSError):
            _clear(partial)
            lock.release()
            partial.rmdir()
        raise
    finally:
        lock.release()
    if out.is_dir():
        out.rmdir()
    partial.rename(out)
    make_durable(out.parent)
    print_stdout("\n".join([*_summary(args, opened, architecture), *([] if same_ids else [_TIES])]) + "\n")
    return 0


def _argument_faults(args: argparse.Namespace, source: Path) -> list[Fault]:
    faults = []
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        faults.append(Fault("OUT", f"{args.out} already exists", "a new or empty folder", "give another path"))
    if args.out.resolve() in (source.resolve(), Path.cwd()):
        rule = "a folder other than SOURCE and the current one"
        faults.append(Fault("OUT", str(args.out), rule, "give another path"))
    if not 0.0 < args.max_file_gb <= 1e6:
        faults.append(Fault("--max-file-gb", str(args.max_file_gb), "a positive number", "give for example 5"))
    if args.to == "native":
        given = {"--architecture": args.architecture, "--domains": args.domains}
        rule, remedy = "only with --to hf", "leave it out"
        faults += [Fault(flag, str(value), rule, remedy) for flag, value in given.items() if value is not None]
    return faults


def _damage(opened: OpenedModel) -> list[Fault]:
    """Faults of weights files that have changed since the run wrote them."""
    files = sorted(opened.checksums)
    with (
        Progress(f"verifying {opened.folder}", len(files), "file") as progress,
        ThreadPoolExecutor(_HASHED_AT_ONCE) as pool,
    ):
        faults = []
        for path, value in zip(files, pool.map(sha256_of, files), strict=True):
            if value != opened.checksums[path]:
                faults.append(changed_file(path, "copy the checkpoint again, or give another step"))
            progress.update(1)
    return faults


def _clear(partial: Path) -> None:
    """Removes what a killed conversion left."""
    for path in partial.iterdir():
        if path.name == LOCK:
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _tokenizer(opened: OpenedModel, domains: Path | None) -> tuple[Tokenizer, list[str]] | None:
    """A run's tokenizer, and text that it encoded; None for a model whose folder has the tokenizer's files."""
    if opened.run is None:
        return None
    remedy = "give --domains the manifest, or --without-tokenizer to write the model alone"
    tokenizer, manifest = run_tokenizer(opened.run, domains, remedy)
    return tokenizer, sample_texts(manifest, tokenizer)


def _write(
    args: argparse.Namespace,
    opened: OpenedModel,
    architecture: Architecture | None,
    tokenizer: tuple[Tokenizer, list[str]] | None,
    folder: Path,
) -> bool:
    """Writes the weights, the tokenizer and, last, config.json; returns what `write_tokenizer` does."""
    same_ids = True
    dtype, largest = _DTYPES.get(args.dtype), round(args.max_file_gb * 1e9)
    names = opened.weights.names()
    with Progress(f"writing {args.out}", len(names), "parameter") as progress:
        if architecture is None:
            (folder / WEIGHTS).mkdir()
            write_native(folder / WEIGHTS, opened.weights, opened.gpt, dtype, lambda: progress.update(1), largest)
        else:
            write_hugging_face(
                folder, opened.weights, opened.gpt, architecture, dtype, lambda: progress.update(1), largest
            )
    if tokenizer is not None:
        same_ids = write_tokenizer(folder, tokenizer[0], opened.gpt.max_positions, tokenizer[1])
    elif opened.kind != RUN and not args.without_tokenizer:
        copy_companions(opened.folder, folder)
    if architecture is None:
        entry = model_entry(opened, {"folder": str(opened.folder), "converted by": version_text()})
    else:
        eod = tokenizer[0].eod if tokenizer else opened.eod
        entry = config_entry(architecture, opened.gpt, _dtype_name(args, opened), eod)
        if not (folder / GENERATION).exists():
            generation = {"bos_token_id": None, "eos_token_id": eod, "pad_token_id": eod}
            atomic_write_text(folder / GENERATION, json.dumps(generation, indent=2) + "\n")
    atomic_write_text(folder / "config.json", json.dumps(entry, indent=2) + "\n")
    return same_ids


def _dtype_name(args: argparse.Namespace, opened: OpenedModel) -> str:
    """The type of the written weights: as given, or that of the embedding, since each parameter keeps its own."""
    return args.dtype or str(opened.weights.dtype("embedding.weight")).removeprefix("torch.")


def _summary(args: argparse.Namespace, opened: OpenedModel, architecture: Architecture | None) -> list[str]:
    """What was written, for the user."""
    total = sum(math.prod(opened.weights.spec(name).shape) for name in opened.weights.names())
    dtype = _dtype_name(args, opened)
    model = architecture.class_name if architecture else "model of this program"
    step = f" at step {opened.iteration:,}" if opened.kind == RUN else ""
    lines = [f"wrote {args.out}: {model}, {total:,} parameters in {dtype}, from {opened.folder}{step}"]
    if not any((args.out / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        lines.append("it has no tokenizer")
    resets = {"--reset-attention-mask": opened.gpt.reset_attention_mask}
    resets |= {"--reset-position-ids": opened.gpt.reset_position_ids}
    if architecture is not None and any(resets.values()):
        flags = " and ".join(flag for flag, given in resets.items() if given)
        lines.append(
            f"it was trained with {flags}, which Transformers does not know: give it one document at a time, or it "
            "attends across documents"
        )
    if architecture is not None:
        lines.append(f'open it with AutoModelForCausalLM.from_pretrained("{args.out}")')
    else:
        lines.append(f"use it with --init-from, --reference-load, --load or --to hf: {args.out}")
    return lines


def command() -> None:
    """Runs `main` as a program."""
    run_or_exit(main)


if __name__ == "__main__":
    command()
