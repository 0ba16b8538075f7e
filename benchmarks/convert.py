"""Time and peak memory of converting a model to Hugging Face's format and back, against its size on disk.

    python benchmarks/convert.py --output-dir /tmp/convert
    python benchmarks/convert.py --output-dir /tmp/convert --model-size 8b --dtype bfloat16 --sparse

The model has random weights, sharded over `--tensor-size` ranks as a checkpoint is; with --sparse they are zeros that
take no space on disk, and only reading them is measured. Each direction runs in a process of its own, whose peak is the
largest resident memory beyond that of the process once everything is imported: pages of the file that is read are part
of it. A plain copy of the same bytes (read and write, block by block) is timed beside it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
from safetensors.torch import save_file

from megatron_doremi.checkpoint.weights import WeightsFolder
from megatron_doremi.config import PAPER_SHAPES, GPTConfig
from megatron_doremi.hugging_face.config_file import choose_architecture, config_entry
from megatron_doremi.hugging_face.conversion import write_hugging_face, write_native
from megatron_doremi.hugging_face.model_folder import open_model
from megatron_doremi.model.sizes import parameter_specs
from megatron_doremi.parallel.parameters import shard
from megatron_doremi.storage.tensor_file import DTYPES, tensor_bytes

DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16"}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model-size", default="1b", choices=PAPER_SHAPES, help="default: 1b")
    parser.add_argument("--vocab-size", type=int, default=50257, help="default: 50257")
    parser.add_argument("--dtype", default="float32", choices=DTYPE_NAMES, help="default: float32")
    parser.add_argument("--tensor-size", type=int, default=2, help="tensor parallel ranks that wrote it (default: 2)")
    parser.add_argument("--sparse", action="store_true", help="zeros without space on disk in place of random weights")
    parser.add_argument("--to-hf-only", action="store_true", help="leave out the way back")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder; it is removed at the end")
    return parser.parse_args()


def shape(args: argparse.Namespace) -> GPTConfig:
    """A shape of the paper with the program's default flags."""
    layers, heads, channels, hidden, ffn = PAPER_SHAPES[args.model_size]
    return GPTConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=channels,
        vocab_size=args.vocab_size,
        max_positions=1024,
    )


def write_checkpoint(folder: Path, gpt: GPTConfig, args: argparse.Namespace) -> int:
    """The weights files of a checkpoint, one for each tensor rank; returns their bytes."""
    specs, size, dtype = parameter_specs(gpt), args.tensor_size, DTYPES[DTYPE_NAMES[args.dtype]]
    padded = gpt.padded_vocab_size(size)
    folder.mkdir(parents=True)
    generator, total = torch.Generator().manual_seed(1), 0
    full_entries, shards = {}, [dict[str, torch.Tensor]() for _ in range(size)]
    for name, spec in specs.items():
        rows = padded if spec.dim is not None and spec.padded else 0
        entry = {"shape": list(spec.shape), "dim": spec.dim, "blocks": spec.blocks, "padded": rows, "size": size}
        full_entries[name] = entry
        as_written = type(spec)(spec.shape, spec.dim, spec.blocks, rows)
        ranks = range(size) if spec.dim is not None else range(1)
        full = None if args.sparse else torch.empty(spec.shape).normal_(0.0, 0.02, generator=generator).to(dtype)
        for rank in ranks:
            local = torch.empty(as_written.local_shape(size), dtype=dtype, device="meta")
            shards[rank][name] = local if full is None else shard(full, as_written, size, rank).contiguous()
    for rank, tensors in enumerate(shards):
        path = folder / f"model-pipe000-tensor{rank:03d}.safetensors"
        metadata = {"cut": json.dumps({name: full_entries[name] for name in tensors})}
        if args.sparse:
            write_sparse(path, tensors, metadata, DTYPE_NAMES[args.dtype])
        else:
            save_file(tensors, path, metadata=metadata)
        total += path.stat().st_size
    return total


def write_sparse(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], dtype: str) -> None:
    """A safetensors file whose data are a hole."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor_bytes(tensor.dtype, tensor.shape)
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def to_hugging_face(source: Path, out: Path, gpt: GPTConfig) -> None:
    """The work of tools/convert_checkpoint.py --to hf, without the tokenizer."""
    architecture = choose_architecture(gpt)
    out.mkdir()
    write_hugging_face(out, WeightsFolder(source), gpt, architecture, None, lambda: None)
    (out / "config.json").write_text(json.dumps(config_entry(architecture, gpt, "float32", None)))


def to_native(source: Path, out: Path, _: GPTConfig) -> None:
    """The work of tools/convert_checkpoint.py --to native, without the tokenizer."""
    opened = open_model(source, "SOURCE")
    out.mkdir()
    write_native(out, opened.weights, opened.gpt, None, lambda: None)


def copy_files(source: Path, out: Path, _: GPTConfig) -> None:
    """Reads and writes the same bytes, 16 MiB at a time, and makes them durable."""
    out.mkdir()
    for path in source.glob("*.safetensors"):
        with path.open("rb") as read, (out / path.name).open("wb") as written:
            shutil.copyfileobj(read, written, 16 << 20)
            written.flush()
            os.fsync(written.fileno())


def measured(work: Callable[[Path, Path, GPTConfig], None], source: Path, out: Path, gpt: GPTConfig) -> None:
    """Seconds of `work`, and its peak memory over that of the process before it."""
    pipe, other = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(other, work, source, out, gpt))
    process.start()
    seconds, grown, before = pipe.recv()
    process.join()
    print(
        f"{work.__name__:>16}: {seconds:7.1f} s, peak {grown / 2**30:5.2f} GiB over {before / 2**30:.2f} GiB",
        flush=True,
    )


def _child(pipe, work, source: Path, out: Path, gpt: GPTConfig) -> None:  # type: ignore[no-untyped-def]
    # The kernel starts to count anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    began = time.monotonic()
    work(source, out, gpt)
    pipe.send((time.monotonic() - began, _peak() - before, before))


def _peak() -> int:
    """Bytes of the largest resident memory so far."""
    status = Path("/proc/self/status").read_text().split("\n")
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


def main() -> None:
    """Writes the model, converts it, and prints what it took."""
    args = parse()
    gpt, folder = shape(args), args.output_dir
    shutil.rmtree(folder, ignore_errors=True)
    size = write_checkpoint(folder / "weights", gpt, args)
    specs = parameter_specs(gpt)
    count = sum(torch.Size(spec.shape).numel() for spec in specs.values())
    largest = max(torch.Size(spec.shape).numel() for spec in specs.values())
    itemsize = DTYPES[DTYPE_NAMES[args.dtype]].itemsize
    print(
        f"{args.model_size}, {count:,} parameters in {args.dtype}: {size / 2**30:.2f} GiB on disk in "
        f"{args.tensor_size} files; largest parameter {largest * itemsize / 2**30:.2f} GiB"
    )
    if not args.sparse:
        measured(copy_files, folder / "weights", folder / "copy", gpt)
        shutil.rmtree(folder / "copy")
    measured(to_hugging_face, folder / "weights", folder / "hf", gpt)
    if not args.to_hf_only:
        shutil.rmtree(folder / "weights")
        measured(to_native, folder / "hf", folder / "back", gpt)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
