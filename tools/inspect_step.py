"""Prints the windows that a run read at a step, with file, document, domain and text: what is behind a loss spike.

    python tools/inspect_step.py --run runs/main --step 4210
    python tools/inspect_step.py --run runs/main --step 4210 --domain Github --limit 5
    python tools/inspect_step.py --run runs/main --step 4210 --json > windows.jsonl

The windows follow from the run's config.json, its checkpoints and its metrics.jsonl, and are those of the loader at any
layout. Data that have changed since the run are refused. --json writes one JSON object a window, with all of its text.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    # Run as a script: the package is beside this folder.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from megatron_doremi.checkpoint.recorded_steps import RecordedStep, recorded_step, setting_at
from megatron_doremi.checkpoint.run_config import RunConfigFile, read_run_config
from megatron_doremi.console import print_stdout, wrapped
from megatron_doremi.data.blend import window_count
from megatron_doremi.data.content_hash import content_hash
from megatron_doremi.data.given_weights import did_you_mean
from megatron_doremi.data.manifest import Manifest, load_manifest, manifest_of_words
from megatron_doremi.data.token_stream import TokenStream
from megatron_doremi.errors import ConfigError, Fault, raise_if_any, run_or_exit
from megatron_doremi.flag_parser import FlagParser
from megatron_doremi.text_table import shown_text
from megatron_doremi.tokenization.tokenizer import Tokenizer, dataset_tokenizer

# Characters of a document's part that are shown without --json.
_SHOWN = 300


@dataclass(frozen=True)
class RunFiles:
    """What a run reads, opened again.

    Attributes:
        manifest: with the run's domains, in its order.
        streams: [k] training streams.
        seq_length: tokens of a window.
    """

    config: RunConfigFile
    manifest: Manifest
    streams: Sequence[TokenStream]
    seq_length: int


def build_parser() -> argparse.ArgumentParser:
    """Builds the command-line parser."""
    parser = FlagParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--run", required=True, type=Path, metavar="DIR", help="folder of the run (its --save folder)")
    add("--step", required=True, type=int, metavar="N", help="number of the step, from 1")
    add("--domain", metavar="NAME", help="show the windows of this domain only (default: all)")
    add("--limit", type=int, default=20, metavar="N", help="windows to show; 0: all (default: 20; with --json all)")
    add("--ids", action="store_true", help="show token ids in place of text")
    add("--json", action="store_true", help="write one JSON object a window to standard output")
    add("--domains", type=Path, metavar="FILE", help="manifest of the data, if it was moved (default: the run's)")
    return parser


def open_run(folder: Path, domains: Path | None, step: int) -> RunFiles:
    """Opens a run's files and data. Raises ConfigError if they are missing, or are not those of the step."""
    config = read_run_config(folder, "--run")
    data = config.settings.get("data", {})
    split = _split(data.get("split", ""))
    if domains is None and data.get("data_path"):
        manifest = manifest_of_words(data["data_path"], split)
    else:
        manifest = load_manifest(domains or Path(data.get("domains", "domains.json")), split)
    missing = [name for name in config.domains if name not in manifest.names]
    if missing:
        rule, remedy = "the domains of the run", "give --domains the run's manifest"
        raise ConfigError(Fault(f"manifest {manifest.path}", f"no {', '.join(map(repr, missing))}", rule, remedy))
    manifest = manifest.without([name for name in manifest.names if name not in config.domains])
    vocab_size = manifest.tokenizer.vocab_size if manifest.tokenizer else 0
    entries = {domain.name: domain for domain in manifest.domains}
    streams = [manifest.open_train(entries[name], vocab_size) for name in config.domains]
    _check_content(config, streams, step)
    return RunFiles(config, manifest, streams, int(data.get("seq_length", 0)) or config.gpt.max_positions)


def _split(text: str) -> tuple[float, ...] | None:
    shares = [float(word) for word in text.split(",")] if text else []
    return (*shares, 0.0, 0.0)[:3] if shares else None


def _check_content(config: RunConfigFile, streams: Sequence[TokenStream], step: int) -> None:
    """Raises ConfigError if the data differ from those of the step."""
    recorded = config.identity.entries().get("data_content") if config.identity is not None else None
    expected = setting_at(config, "data_content", step, recorded)
    if expected is not None and content_hash(config.domains, streams) != expected:
        rule, remedy = f"the data that step {step:,} read", "give --domains the manifest of those data"
        raise ConfigError(Fault("training data", "other tokens", rule, remedy))


def window_entries(files: RunFiles, recorded: RecordedStep, rows: Sequence[int], tokenizer: Tokenizer | None) -> Any:
    """Yields an entry for each of the batch's rows; without a tokenizer it has ids in place of text."""
    epochs = recorded.epochs()
    for row in rows:
        domain, window = int(recorded.batch.domains[row]), int(recorded.batch.windows[row])
        stream, start = files.streams[domain], window * files.seq_length
        ids = stream.tokens(start, files.seq_length + 1)
        spans = stream.documents_at(start, start + len(ids))
        documents = []
        for number, low, high, first, length in zip(
            spans.documents.tolist(),
            spans.bounds[:-1].tolist(),
            spans.bounds[1:].tolist(),
            spans.starts.tolist(),
            spans.lengths.tolist(),
            strict=True,
        ):
            part = ids[low - start : high - start]
            content = {"ids": part.tolist()} if tokenizer is None else {"text": tokenizer.decode(part)}
            place = {"document": stream.first_document + number, "first": low - first, "last": high - 1 - first}
            documents.append({**place, "tokens": length, **content})
        yield {
            "row": row,
            "domain": files.config.domains[domain],
            "file": str(stream.prefix),
            "window": window,
            "windows": recorded.blend.window_counts[domain],
            "epoch": int(epochs[row]) + 1,
            "documents": documents,
        }


def summary(run: Path, step: int, files: RunFiles, recorded: RecordedStep) -> list[str]:
    """The lines above the windows: the step's losses, and how far the replay is confirmed."""
    line = recorded.line
    size = f"{len(recorded.batch.domains):,} windows of {files.seq_length:,} tokens"
    losses = f"; loss {_number(line, 'loss'):.4f}, gradient norm {_number(line, 'grad_norm'):.3f}" if line else ""
    lines = [f"step {step:,} of {run} ({files.config.phase}): {size}{losses}"]
    origin = f"replayed from iteration {recorded.replayed_from:,}"
    confirmed = "metrics.jsonl has the same windows by domain" if line else "metrics.jsonl has no line of this step"
    lines.append(f"{origin}; {confirmed}")
    if step > recorded.newest:
        taken = f"the last that is recorded is {recorded.newest:,}" if recorded.newest else "none is recorded"
        lines.append(f"the run may not have taken this step yet: {taken}; below is what the step reads")
    recorded_losses = (line or {}).get("domain_loss")
    if isinstance(recorded_losses, dict) and recorded_losses:
        # NaN first: it is what a user looks for.
        by_domain = {name: _number(recorded_losses, name) for name in recorded_losses}
        worst = sorted(by_domain.items(), key=lambda item: (not math.isnan(item[1]), -item[1]))
        lines.append("loss by domain: " + ", ".join(f"{name} {loss:.3f}" for name, loss in worst[:10]))
    return lines


def _number(values: Mapping[str, Any], name: str) -> float:
    """A number of metrics.jsonl; NaN if it is missing or null."""
    value = values.get(name)
    return float(value) if isinstance(value, int | float) else math.nan


def entry_lines(entry: dict[str, Any]) -> list[str]:
    """A window as text for people."""
    head = f"== row {entry['row']}: {entry['domain']}, window {entry['window']:,} of {entry['windows']:,}, "
    lines = wrapped(head + f"epoch {entry['epoch']}, {entry['file']}")
    for part in entry["documents"]:
        place = f"tokens {part['first']:,} to {part['last']:,} of {part['tokens']:,}"
        lines.append(f"-- document {part['document']:,}, {place}")
        text = " ".join(map(str, part["ids"])) if "ids" in part else part["text"]
        more = f" [{len(text) - _SHOWN:,} more characters]" if len(text) > _SHOWN else ""
        # A document may hold control characters, which a terminal would obey.
        lines += [shown_text(line) for line in text[:_SHOWN].split("\n")]
        lines[-1] += more
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the windows; returns the exit code."""
    args = build_parser().parse_args(arguments)
    faults = [
        Fault(flag, str(value), f"at least {smallest}", "give such a number")
        for flag, value, smallest in (("--step", args.step, 1), ("--limit", args.limit, 0))
        if value < smallest
    ]
    raise_if_any(faults)
    files = open_run(args.run, args.domains, args.step)
    names = files.config.domains
    if args.domain is not None and args.domain not in names:
        remedy = did_you_mean(args.domain, names) or "give one of these"
        raise ConfigError(Fault("--domain", args.domain, "one of " + ", ".join(map(repr, names)), remedy))
    if args.step > max(files.config.train_iters(), 1):
        rule = f"a step of the run, which has {files.config.train_iters():,}"
        raise ConfigError(Fault("--step", f"{args.step:,}", rule, "give an earlier step"))
    counts = tuple(window_count(stream.num_tokens, files.seq_length) for stream in files.streams)
    recorded = recorded_step(args.run, files.config, counts, args.step)
    wanted = None if args.domain is None else names.index(args.domain)
    rows = [row for row, domain in enumerate(recorded.batch.domains.tolist()) if wanted in (None, domain)]
    shown = rows if args.json or not args.limit else rows[: args.limit]
    tokenizer = None if args.ids else dataset_tokenizer(files.manifest)
    entries = window_entries(files, recorded, shown, tokenizer)
    if args.json:
        for entry in entries:
            print(json.dumps({"step": args.step, **entry}))
        return 0
    for line in summary(args.run, args.step, files, recorded):
        print_stdout(line)
    for entry in entries:
        print("\n".join(entry_lines(entry)))
    if len(shown) < len(rows):
        left = len(rows) - len(shown)
        print(f"{left:,} more window{'s' if left > 1 else ''}: --limit 0 shows all")
    return 0


def command() -> None:
    """Runs `main` as a program."""
    run_or_exit(main)


if __name__ == "__main__":
    command()
