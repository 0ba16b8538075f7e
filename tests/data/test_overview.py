"""tools/inspect_data.py MANIFEST: sizes, epochs, samples, duplicates and what looks wrong, in aligned columns.

Run alone: python -m pytest tests/data/test_overview.py
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_doremi.data.document_bytes import bytes_path
from megatron_doremi.data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from megatron_doremi.data.manifest import load_manifest
from megatron_doremi.preprocessing import duplicates
from megatron_doremi.preprocessing.duplicates import DuplicateCounter
from megatron_doremi.preprocessing.overview import duplicate_remarks
from megatron_doremi.text_table import shown_text, table_lines, width_of

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools import inspect_data

UINT16 = np.dtype("<u2")
EOD = 9


def write(prefix, documents, sizes=True):
    with IndexedDatasetWriter(prefix, UINT16) as writer:
        for document in documents:
            writer.add_document(document)
    if sizes:
        np.full(len(documents), 4, "<u4").tofile(bytes_path(prefix))


def manifest_of(folder, domains):
    """A manifest without tokenizer of {name: (training documents, held-out documents)}."""
    entries = []
    for number, (name, (train, valid)) in enumerate(domains.items()):
        write(folder / f"{number}_train", train)
        if valid:
            write(folder / f"{number}_valid", valid)
        counts = {"tokens": sum(map(len, train)), "documents": len(train), "bytes": 4 * len(train)}
        held_out = f"{number}_valid" if valid else None
        entries.append({"name": name, "train": f"{number}_train", "valid": held_out} | counts)
    entry = {"format": "megatron-doremi-domains/1", "tokenizer": None, "domains": entries}
    (folder / "domains.json").write_text(json.dumps(entry))
    return folder / "domains.json"


def overview(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["inspect_data.py", *map(str, words)])
    assert inspect_data.main() == 0
    return capsys.readouterr().out.splitlines()


def test_numbers_of_tokens_and_the_version(monkeypatch, capsys):
    assert [inspect_data.whole_number(text) for text in ("2000", "2e3", "2_000")] == [2000] * 3
    for text in ("1e400", "nan", "2.5", "1B"):
        with pytest.raises(ValueError):
            inspect_data.whole_number(text)
    with pytest.raises(SystemExit):
        overview(monkeypatch, capsys, "--version")
    assert capsys.readouterr().out.startswith("Megatron-DoReMi ")


# --- duplicates


def counted(pairs, domains, documents, monkeypatch, **limits):
    monkeypatch.setattr(duplicates, "_BYTES_AT_ONCE", 64)
    monkeypatch.setattr(duplicates, "_DOCUMENTS_AT_ONCE", 7)
    counter = DuplicateCounter(domains, documents, **limits)
    for domain, held_out, prefix in pairs:
        dataset = IndexedDataset(prefix)
        read = sum(counter.add(domain, held_out, dataset, EOD))
        assert read == dataset.num_tokens * 2
    return counter.count()


def test_duplicates_are_those_of_a_plain_count(tmp_path, monkeypatch):
    """Texts with and without the end-of-document token are the same; documents without tokens are left out."""
    generator = np.random.default_rng(3)
    content, pairs = {}, []
    for domain in range(3):
        for held_out in (False, True):
            texts = [tuple(generator.integers(0, 3, generator.integers(0, 4)).tolist()) for _ in range(60)]
            documents = [[*text, EOD] if place % 2 and text else list(text) for place, text in enumerate(texts)]
            write(tmp_path / f"{domain}{held_out}", documents)
            pairs.append((domain, held_out, tmp_path / f"{domain}{held_out}"))
            content[domain, held_out] = [text for text in texts if text]
    duplicates = counted(pairs, 3, 360, monkeypatch)
    train = {domain: Counter(content[domain, False]) for domain in range(3)}
    assert duplicates.part == 1.0
    for domain in range(3):
        others = set().union(*(train[other] for other in range(3) if other != domain))
        assert duplicates.counted[domain] == train[domain].total()
        assert duplicates.within[domain] == train[domain].total() - len(train[domain])
        assert duplicates.across[domain] == sum(count for text, count in train[domain].items() if text in others)
        held_out = content[domain, True]
        assert duplicates.held_out[domain] == len(held_out)
        assert duplicates.leaked[domain] == sum(any(text in each for each in train.values()) for text in held_out)


def test_a_part_of_the_hashes_keeps_all_copies_together(tmp_path, monkeypatch):
    """Each text occurs twice in one domain and once in the other: the fractions do not depend on the part."""
    texts = [[number // 250, number % 250] for number in range(4000)]
    write(tmp_path / "a", texts + texts)
    write(tmp_path / "b", texts)
    duplicates = counted(
        [(0, False, tmp_path / "a"), (1, True, tmp_path / "b")], 2, 12_000, monkeypatch, max_hashes=2000
    )
    assert duplicates.part == 0.125
    assert 300 < duplicates.held_out[1] < 700
    assert duplicates.counted.tolist() == [2 * duplicates.held_out[1], 0]
    assert (duplicates.within[0], duplicates.leaked[1]) == (duplicates.held_out[1], duplicates.held_out[1])
    lines = duplicate_remarks(["A", "B"], duplicates)
    leaked = f"{duplicates.leaked[1]:,}"
    assert lines[0] == f"training documents that repeat an earlier one of their domain: {leaked} (50 %): A 50 %"
    assert lines[1] == f"held-out documents that are in the training data: {leaked} (100 %): B 100 %"


# --- the table and the remarks


def test_columns_stay_aligned_whatever_the_names_hold():
    names = ["plain", "\u4f60\u597d", "e\u0301t\u00e9", "a\nb", "\x1b[1m", "x" * 90, "\ud800"]
    for encoding in ("utf-8", "ascii"):
        shown = [shown_text(name, 40, encoding) for name in names]
        assert all(text.isprintable() and width_of(text) <= 40 for text in shown)
        assert shown[3:6] == ["a\\nb", "\\x1b[1m", "x" * 37 + "..."]
    lines = table_lines(["name", "n"], [[name, "1"] for name in names])
    assert {width_of(line) for line in lines} == {width_of(lines[0])}


def test_an_overview_says_what_looks_wrong(tmp_path, monkeypatch, capsys):
    many = [[number % 8, number // 8 % 8, 1] for number in range(64)] * 20
    domains = {"Web": (many, [[5, 5]] * 800), "web": ([[2, 3, 4]], [])}
    lines = overview(monkeypatch, capsys, manifest_of(tmp_path, domains), "--tokens", 38430)
    assert lines[0].endswith("domains.json: 2 domains, no tokenizer")
    table = [line.split() for line in lines[1:5]]
    assert table[0][-2:] == ["weight", "epochs"]
    assert table[1][:5] == ["Web", "1,280", "3,840", "99.92", "%"]
    assert table[1][-2:] == ["0.9992", "10.00"]
    assert [row[0] for row in table] == ["domain", "Web", "web", "total"]
    assert any(line.startswith("  web ") and line.endswith("2 3 4") for line in lines)
    text = "\n".join(lines)
    for words in (
        "'Web', 'web' differ only by case",
        "tiny: fewer than 20 documents, or less than 0.05 % of the tokens: web",
        "no held-out data, so no evaluation: web",
        "fewer than 2,000 held-out tokens, so the held-out loss is mostly noise: Web",
        "more than 4 epochs in this budget: Web, web",
        "training documents that repeat an earlier one of their domain: 1,216 (94.9 %): Web 95 %",
    ):
        assert words in text, text
    assert "training documents" not in "\n".join(
        overview(monkeypatch, capsys, tmp_path / "domains.json", "--duplicates", "none")
    )


def test_a_few_long_held_out_documents_are_named(tmp_path, monkeypatch, capsys):
    """An interval over documents needs several, however many tokens they have."""
    domains = {"Web": ([[1, 2]] * 30, [[5] * 700] * 4), "Law": ([[1, 2]] * 30, [[5] * 700] * 5)}
    text = "\n".join(overview(monkeypatch, capsys, manifest_of(tmp_path, domains)))
    assert "fewer than 5 held-out documents, so a wide interval, or none: Web" in text
    assert "held-out tokens" not in text


def test_hundreds_of_domains_stay_readable(tmp_path, monkeypatch, capsys):
    names = {f"domain {number:03}": ([[number]] * (1 + number), []) for number in range(120)}
    lines = overview(monkeypatch, capsys, manifest_of(tmp_path, names))
    assert len(lines) < 90
    assert any("85 more (--all shows them)" in line for line in lines)
    assert not any("domain 050 " in line for line in lines[:40])
    assert max(map(len, lines)) <= 120
    assert sum("domain " in line for line in overview(monkeypatch, capsys, tmp_path / "domains.json", "--all")) > 240


def test_a_budget_of_steps_counts_epochs_in_windows_and_needs_its_sizes(tmp_path, monkeypatch, capsys):
    path = manifest_of(tmp_path, {"a": ([[1] * 41], []), "b": ([[1] * 30, [2] * 15], [])})
    budget = ["--train-iters", 10, "--global-batch-size", 2, "--seq-length", 10]
    lines = overview(monkeypatch, capsys, path, *budget, "--domain-weights", "uniform")
    assert [line.split()[-2:] for line in lines[2:4]] == [["0.5000", "2.50"]] * 2
    monkeypatch.setattr(sys, "argv", ["inspect_data.py", str(path), "--train-iters", "5"])
    with pytest.raises(inspect_data.ConfigError, match="--global-batch-size and --seq-length beside it"):
        inspect_data.main()
    assert load_manifest(path).names == ("a", "b")
