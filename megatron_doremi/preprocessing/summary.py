"""What a run of tools/preprocess_data.py wrote and skipped, as text for its user."""

from __future__ import annotations

import sys

from megatron_doremi.data.manifest import similar_names
from megatron_doremi.preprocessing.encoding import describe_bad_lines
from megatron_doremi.preprocessing.lost_characters import describe_lost
from megatron_doremi.preprocessing.outputs import Outputs


def print_summary(outputs: Outputs) -> None:
    """Prints a table of what was written, and what was skipped."""
    names = [domain if split == "train" else f"{domain} ({split})" for domain, split in outputs.by_key]
    width = max(map(len, [*names, "domain"]))
    print(f"{'domain':<{width}} {'documents':>11} {'tokens':>15} {'bytes':>15} {'bytes/token':>12}")
    for name, (_, output) in sorted(zip(names, outputs.by_key.items(), strict=True)):
        tokens = output.writer.num_tokens
        per_token = output.bytes / max(1, tokens)
        print(f"{name:<{width}} {output.documents:>11,} {tokens:>15,} {output.bytes:>15,} {per_token:>12.2f}")
    for group in similar_names(sorted({domain for domain, _ in outputs.by_key})):
        names_text = " and ".join(map(repr, group))
        warning = f"the domains {names_text} differ only by case or spaces; --domain-rules can merge them"
        print(f"warning: {warning}", file=sys.stderr)
    if skipped := describe_skipped(outputs):
        print("; ".join(skipped))


def describe_skipped(outputs: Outputs) -> list[str]:
    """Describes what of the input is missing from the output: empty texts, bad lines, lost characters."""
    messages = []
    if outputs.empty:
        messages.append(f"skipped {outputs.empty:,} empty text{'' if outputs.empty == 1 else 's'}")
    if outputs.bad_total:
        messages.append("skipped " + describe_bad_lines([*outputs.bad_files, *outputs.bad], outputs.bad_total))
    if outputs.lost:
        messages.append(f"the tokenizer lost {describe_lost(outputs.lost, outputs.characters)}")
    return messages
