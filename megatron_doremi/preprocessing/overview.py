"""An overview of a data set: sizes, epochs for a budget, and what looks wrong, from its manifest and indexes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_doremi.data.document_bytes import document_bytes
from megatron_doremi.data.indexed_dataset import IndexedDataset
from megatron_doremi.data.manifest import Domain, Manifest
from megatron_doremi.preprocessing.duplicates import DuplicateCounter, Duplicates
from megatron_doremi.preprocessing.file_domains import shown_names
from megatron_doremi.progress import Progress
from megatron_doremi.text_table import shown_text, table_lines

# A domain with fewer documents, or a smaller share of the tokens, is called tiny.
_FEW_DOCUMENTS, _SMALL_SHARE = 20, 0.0005
# Tokens of held-out data below which a domain's loss is mostly noise.
_FEW_HELD_OUT_DOCUMENTS = 5
_FEW_HELD_OUT = 2_000
# Passes over a domain beyond which more of them teach little (Muennighoff et al. 2023, arXiv 2305.16264).
_MANY_EPOCHS = 4.0
# Above this many domains a table shows only the largest and the smallest.
_ALL_SHOWN, _LARGEST, _SMALLEST = 40, 25, 10
# Domains that a remark on duplicates names.
_SHOWN_WORST = 6


@dataclass(frozen=True)
class DomainSizes:
    """The sizes of a domain, read from its pairs.

    Attributes:
        train: the training pair.
        valid: the held-out pair, or None.
        text_bytes: UTF-8 bytes of the training text; None if unknown.
        has_sizes: whether the held-out pair has PREFIX.bytes; True without such a pair.
    """

    domain: Domain
    train: IndexedDataset
    valid: IndexedDataset | None
    text_bytes: int | None
    has_sizes: bool


def read_sizes(manifest: Manifest) -> list[DomainSizes]:
    """Opens all pairs of a manifest. Raises ConfigError if one is damaged."""
    vocab_size = manifest.tokenizer.vocab_size if manifest.tokenizer else 0
    sizes = []
    for domain in manifest.domains:
        valid = None if domain.valid is None else IndexedDataset(domain.valid, vocab_size)
        has_bytes = domain.valid is None or document_bytes(domain.valid) is not None
        # Megatron-LM's lists name no tokenizer; their bytes are those of the ids.
        text_bytes = domain.bytes if manifest.tokenizer else None
        sizes.append(DomainSizes(domain, IndexedDataset(domain.train, vocab_size), valid, text_bytes, has_bytes))
    return sizes


def pairs_of(sizes: Sequence[DomainSizes]) -> Iterator[tuple[int, bool, IndexedDataset]]:
    """Yields (index of the domain, whether it is held out, pair) of every pair."""
    for index, each in enumerate(sizes):
        yield index, False, each.train
        if each.valid is not None:
            yield index, True, each.valid


def count_duplicates(manifest: Manifest, sizes: Sequence[DomainSizes], total: int) -> Duplicates:
    """Counts the duplicates of a data set whose ids are `total` bytes, with progress."""
    counter = DuplicateCounter(len(sizes), sum(dataset.num_documents for _, _, dataset in pairs_of(sizes)))
    eod = manifest.tokenizer.eod if manifest.tokenizer else None
    with Progress("counting duplicates", total, "byte") as progress:
        for index, held_out, dataset in pairs_of(sizes):
            for size in counter.add(index, held_out, dataset, eod):
                progress.update(size)
    return counter.count()


def shown_domains(tokens: Sequence[int], show_all: bool) -> list[int]:
    """The indices of the domains that a table shows, ascending: all, or of many the largest and the smallest."""
    if show_all or len(tokens) <= _ALL_SHOWN:
        return list(range(len(tokens)))
    by_size = sorted(range(len(tokens)), key=lambda index: -tokens[index])
    return sorted([*by_size[:_LARGEST], *by_size[-_SMALLEST:]])


def size_table(
    sizes: Sequence[DomainSizes],
    shown: Sequence[int],
    weights: NDArray[np.float64] | None,
    epochs: NDArray[np.float64] | None,
) -> list[str]:
    """The lines of the table of domains.

    Args:
        shown: the indices of the rows.
        weights: [k] sampling weights; None leaves the column out.
        epochs: [k] passes over each domain in the budget; None leaves the column out.
    """
    header = ["domain", "documents", "tokens", "share", "bytes", "bytes/token", "held-out"]
    header += [] if weights is None else ["weight"]
    header += [] if epochs is None else ["epochs"]
    total = sum(each.train.num_tokens for each in sizes)

    def row(name: str, selected: Sequence[DomainSizes], index: int | None) -> list[str]:
        tokens = sum(each.train.num_tokens for each in selected)
        known = [each.text_bytes for each in selected if each.text_bytes is not None]
        size = sum(known) if len(known) == len(selected) else None
        held_out = sum(each.valid.num_documents for each in selected if each.valid is not None)
        cells = [name, f"{sum(each.train.num_documents for each in selected):,}", f"{tokens:,}"]
        cells += [f"{100 * tokens / max(1, total):.2f} %", "-" if size is None else f"{size:,}"]
        cells += ["-" if size is None or not tokens else f"{size / tokens:.2f}", f"{held_out:,}" if held_out else "-"]
        for values, form in ((weights, ".4f"), (epochs, ",.2f")):
            if values is not None:
                cells.append("" if index is None else format(values[index], form))
        return cells

    rows = [row(sizes[index].domain.name, [sizes[index]], index) for index in shown]
    hidden = [each for index, each in enumerate(sizes) if index not in set(shown)]
    if hidden:
        rows.append(row(f"{len(hidden):,} more (--all shows them)", hidden, None))
    if len(sizes) > 1:
        rows.append(row("total", sizes, None))
    return table_lines(header, rows)


def remarks(manifest: Manifest, sizes: Sequence[DomainSizes], epochs: NDArray[np.float64] | None = None) -> list[str]:
    """What looks wrong with the sizes, one line for each kind. For `epochs` see `size_table`."""
    total = sum(each.train.num_tokens for each in sizes)
    lines = [warning.removeprefix(f"manifest {manifest.path}: ") for warning in manifest.warnings]
    if len(sizes) == 1:
        lines.append("a single domain: there is no mixture to learn")
    ratios = np.array([each.domain.bytes / max(1, each.train.num_tokens) for each in sizes])
    badly_encoded = (ratios < 0.5 * np.median(ratios)).tolist() if manifest.tokenizer else [False] * len(sizes)
    repeated = [False] * len(sizes) if epochs is None else (epochs > _MANY_EPOCHS).tolist()
    for text, wrong in (
        (
            f"tiny: fewer than {_FEW_DOCUMENTS} documents, or less than {100 * _SMALL_SHARE:g} % of the tokens",
            [_is_tiny(each, total) for each in sizes],
        ),
        ("other sizes than in the manifest; inspect_data.py verify says more", [_differs(each) for each in sizes]),
        ("no held-out data, so no evaluation", [each.valid is None for each in sizes]),
        (
            f"fewer than {_FEW_HELD_OUT:,} held-out tokens, so the held-out loss is mostly noise",
            [each.valid is not None and each.valid.num_tokens < _FEW_HELD_OUT for each in sizes],
        ),
        (
            f"fewer than {_FEW_HELD_OUT_DOCUMENTS} held-out documents, so a wide interval, or none",
            [each.valid is not None and each.valid.num_documents < _FEW_HELD_OUT_DOCUMENTS for each in sizes],
        ),
        ("no PREFIX.bytes beside the held-out pair, so no bits per byte", [not each.has_sizes for each in sizes]),
        ("bytes per token below half the median: the tokenizer does not fit", badly_encoded),
        (f"more than {_MANY_EPOCHS:g} epochs in this budget", repeated),
    ):
        names = [each.domain.name for each, is_wrong in zip(sizes, wrong, strict=True) if is_wrong]
        if names:
            lines.append(f"{text}: {shown_text(shown_names(names))}")
    return lines


def _is_tiny(sizes: DomainSizes, total: int) -> bool:
    return sizes.train.num_documents < _FEW_DOCUMENTS or sizes.train.num_tokens < _SMALL_SHARE * total


def _differs(sizes: DomainSizes) -> bool:
    domain, train = sizes.domain, sizes.train
    return (train.num_tokens, train.num_documents) != (domain.tokens, domain.documents)


def duplicate_remarks(names: Sequence[str], duplicates: Duplicates) -> list[str]:
    """The duplicate documents, one line for each kind, the worst domains first."""
    lines = []
    for text, counts, totals in (
        ("training documents that repeat an earlier one of their domain", duplicates.within, duplicates.counted),
        ("training documents that another domain holds as well", duplicates.across, duplicates.counted),
        ("held-out documents that are in the training data", duplicates.leaked, duplicates.held_out),
    ):
        if not counts.any():
            continue
        shares = counts / np.maximum(1, totals)
        worst = [index for index in np.argsort(-shares, kind="stable")[:_SHOWN_WORST] if counts[index]]
        listed = ", ".join(f"{names[index]} {100 * shares[index]:.3g} %" for index in worst)
        more = int((counts > 0).sum()) - len(worst)
        listed += f" and {more:,} more domains" if more else ""
        share = 100 * counts.sum() / max(1, totals.sum())
        lines.append(f"{text}: {counts.sum():,} ({share:.3g} %): {shown_text(listed)}")
    return lines
