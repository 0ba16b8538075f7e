"""Writes text with a model: to look at what it says.

    python tools/generate.py --load runs/main --prompt "Once upon a time"
    python tools/generate.py --load runs/main@2000 --prompt "def main(" --temperature 0 --max-new-tokens 50
    echo "The law" | python tools/generate.py --load llama-folder --prompt - --samples 3 --seed 7

--load takes a run (its newest checkpoint, or RUN@STEP), a model folder or a Hugging Face folder; Transformers runs what
this program's GPT cannot express. One process, a CPU or one GPU. Every token is a forward pass over the text so far;
tools/convert_checkpoint.py exports a model to serve it.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    # Run as a script: the package is beside this folder.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# DeepSpeed, which the model's layers are built with, has nothing to look for: no collective runs here.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from torch import Tensor

from megatron_doremi.errors import ConfigError, Fault, raise_if_any, run_or_exit
from megatron_doremi.flag_parser import FlagParser
from megatron_doremi.hugging_face.inference import generate, load_model
from megatron_doremi.hugging_face.model_config import HUGGING_FACE, kind_of_model
from megatron_doremi.hugging_face.model_folder import end_of_text, open_model
from megatron_doremi.hugging_face.tokenizer_files import load_folder_tokenizer, run_tokenizer
from megatron_doremi.hugging_face.transformers_config import why_not_ours
from megatron_doremi.hugging_face.transformers_model import load_by_transformers, read_transformers_shape
from megatron_doremi.progress import stage
from megatron_doremi.run_settings import folder_and_step
from megatron_doremi.text_table import shown_text
from megatron_doremi.tokenization.tokenizer import Tokenizer


def build_parser() -> argparse.ArgumentParser:
    """Builds the command-line parser."""
    parser = FlagParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    load_help = "a run (RUN@STEP for another step than the newest), a model folder or a Hugging Face folder"
    add("--load", required=True, metavar="MODEL", help=load_help)
    add(
        "--prompt",
        default="",
        metavar="TEXT",
        help="text to continue; - reads standard input (default: a new document)",
    )
    add("--max-new-tokens", type=int, default=100, metavar="N", help="tokens to write at most (default: 100)")
    add("--samples", type=int, default=1, metavar="N", help="number of texts (default: 1)")
    temperature_help = "divides the logits; 0: always the most likely token (default: 1)"
    add("--temperature", type=float, default=1.0, metavar="T", help=temperature_help)
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K most likely tokens; 0: all (default: 0)")
    top_p_help = "draw from the most likely tokens that sum to P (default: 1, all)"
    add("--top-p", type=float, default=1.0, metavar="P", help=top_p_help)
    add("--seed", type=int, default=0, metavar="N", help="seed of the draws (default: 0)")
    add("--bf16", action="store_true", help="compute in bfloat16 (default: float32)")
    add("--domains", type=Path, metavar="FILE", help="manifest that names a run's tokenizer, if it was moved")
    return parser


def main() -> int:
    """Loads the model and prints the texts as they are written. Returns the exit code."""
    args = build_parser().parse_args()
    raise_if_any(_faults(args))
    folder, step = folder_and_step(args.load)
    source = _source(Path(folder), step, args.domains)
    tokenizer = source.tokenizer
    prompt = _read_stdin() if args.prompt == "-" else args.prompt
    ids = tokenizer.encode(prompt).tolist() if prompt else [tokenizer.eod]
    if max(ids) >= source.vocab_size:
        value, rule = f"id {max(ids):,} of the prompt", f"less than {source.vocab_size:,}, the model's vocabulary"
        raise ConfigError(Fault(f"--load {folder}: tokenizer", value, rule, "give the tokenizer of the model"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with stage(f"loading {folder}"):
        model = source.load(torch.bfloat16 if args.bf16 else torch.float32, device)
    generator = torch.Generator().manual_seed(args.seed)
    for number in range(args.samples):
        if args.samples > 1:
            print(f"{'' if number == 0 else chr(10)}--- {number + 1} of {args.samples}")
        print(shown_lines(prompt), end="", flush=True)
        written: list[int] = []
        shown = ""
        settings = (args.max_new_tokens, args.temperature, args.top_k, args.top_p, generator)
        for token in generate(model, source.max_positions, device, ids, *settings):
            if token == tokenizer.eod:
                break
            written.append(token)
            text = tokenizer.decode(written)
            # The bytes of a character may be several tokens: it is printed once it is whole.
            if not text.endswith("\ufffd"):
                print(shown_lines(text[len(shown) :]), end="", flush=True)
                shown = text
        print(shown_lines(tokenizer.decode(written)[len(shown) :]))
    return 0


def _read_stdin() -> str:
    """The text of standard input, without the end of its last line; bytes that are not UTF-8 become U+FFFD."""
    if sys.stdin is None:
        raise ConfigError(Fault("--prompt", "- without a standard input", "text to read", "give the text itself"))
    return sys.stdin.buffer.read().decode("utf-8", "replace").removesuffix("\n")


@dataclass(frozen=True)
class _Source:
    """A model that is not loaded yet.

    Attributes:
        vocab_size: rows of its output layer.
        max_positions: its longest text; None: any.
        load: (type of the weights, device) -> the model as a function, [1, seq] ids -> [1, seq, vocab] logits.
    """

    vocab_size: int
    max_positions: int | None
    tokenizer: Tokenizer
    load: Callable[[torch.dtype, torch.device], Callable[[Tensor], Tensor]]


def _source(folder: Path, step: int | None, domains: Path | None) -> _Source:
    """Opens a model, in whatever form, with its tokenizer; `domains` as --domains."""
    is_folder = step is None and kind_of_model(folder, "--load") == HUGGING_FACE
    reason = why_not_ours(folder, "--load") if is_folder else ""
    if reason:
        shape = read_transformers_shape(folder, "--load", reason)
        tokenizer = _folder_tokenizer(folder, end_of_text(folder, "--load", shape.vocab_size))

        def by_transformers(dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], Tensor]:
            model = load_by_transformers(folder, dtype, device, loss_chunk_tokens=0)
            return lambda tokens: next(model.logits(tokens))

        return _Source(shape.vocab_size, shape.max_positions, tokenizer, by_transformers)
    opened = open_model(folder, "--load", step)
    if opened.run is not None:
        tokenizer = run_tokenizer(opened.run, domains, "give --domains the manifest")[0]
    else:
        tokenizer = _folder_tokenizer(folder, opened.eod)

    def ours(dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], Tensor]:
        return load_model(opened.gpt, opened.weights, device, dtype).logits

    return _Source(opened.gpt.vocab_size, opened.gpt.max_positions, tokenizer, ours)


def shown_lines(text: str) -> str:
    """A text whose control characters, but for tabs and ends of lines, do nothing to a terminal."""
    return "".join(part if part in ("\n", "\t") else shown_text(part) for part in re.split(r"([\n\t])", text))


def _faults(args: argparse.Namespace) -> list[Fault]:
    faults = []
    for flag, value, low, high in (
        ("--max-new-tokens", args.max_new_tokens, 1, 1_000_000),
        ("--samples", args.samples, 1, 1_000_000),
        ("--temperature", args.temperature, 0.0, 1e6),
        ("--top-k", args.top_k, 0, 1 << 31),
        ("--top-p", args.top_p, 1e-6, 1.0),
        ("--seed", args.seed, 0, (1 << 63) - 1),
    ):
        if not low <= value <= high:
            faults.append(Fault(flag, str(value), f"from {low} to {high}", "give a number in that range"))
    return faults


def _folder_tokenizer(folder: Path, eod: int | None) -> Tokenizer:
    if eod is None:
        rule, remedy = "an eos_token_id, which ends a text", "add it to config.json"
        raise ConfigError(Fault(f"--load {folder}: config.json", "eos_token_id is missing", rule, remedy))
    return load_folder_tokenizer(folder, "--load", eod)


def command() -> None:
    """Runs `main` as a program."""
    run_or_exit(main)


if __name__ == "__main__":
    command()
