"""Gathers a corpus of real text that every machine has which can run this program, without a download.

    python tools/embedded_corpus.py --output-dir runs/quickstart/corpus

Six natural domains, cut from Python's standard library and from what requirements.txt installs, and two planted
ones that DoReMi must see through: noise, which cannot be learned, and boilerplate, which is learned at once.
Written in The Pile's format, split into train and held-out by document.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import random
import string
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_doremi.errors import ConfigError, Fault, raise_if_any, run_or_exit
from megatron_doremi.storage.files import atomic_write_text, make_folder

_SMALLEST_DOCUMENT, _LARGEST_DOCUMENT = 200, 8_000  # characters
_SMALLEST_DOMAIN = 1_000_000  # bytes
NOISE, BOILERPLATE = "noise", "boilerplate"


def package_folder(name: str) -> Path:
    """Folder of an installed package, without importing it. Raises ConfigError where it is missing."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            Fault(
                "Python environment",
                f"no package {name}",
                "requirements.txt installed",
                "pip install -r requirements.txt",
            )
        )
    return Path(next(iter(spec.submodule_search_locations)))


def texts_of(paths: Iterable[Path]) -> Iterator[str]:
    """Contents of text files; files in another encoding are passed over."""
    for path in paths:
        try:
            yield path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue


def docstrings_of(paths: Iterable[Path]) -> Iterator[str]:
    """The docstrings of Python files, those of one file together."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for text in texts_of(paths):
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        yield "\n\n".join(doc for doc in found if doc and len(doc) > 80)


def natural_domains(seed: int) -> dict[str, Iterator[str]]:
    """The natural domains and their texts, read as they are asked for."""
    library = Path(sysconfig.get_paths()["stdlib"])
    left_out = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "testing",
        "idlelib",
        "lib2to3",
        "pydoc_data",
    }

    def files(folders: Iterable[Path], *suffixes: str) -> list[Path]:
        """Files with one of the suffixes, in an order that depends on seed and names alone."""
        found = []
        for folder in folders:
            for path in folder.rglob("*"):
                parts = path.relative_to(folder).parts
                if path.suffix in suffixes and not set(parts) & left_out:
                    name = "/".join((folder.name, *parts))
                    found.append((hashlib.sha256(f"{seed}/{name}".encode()).digest(), name, path))
        return [path for _, _, path in sorted(found)]

    torch, deepspeed, numpy, matplotlib, networkx, sympy = map(
        package_folder, ("torch", "deepspeed", "numpy", "matplotlib", "networkx", "sympy")
    )
    return {
        "Python source": texts_of(files([library], ".py")),
        "C++ headers": texts_of(files([torch / "include" / "ATen"], ".h")),
        "GPU kernels": texts_of(files([torch, deepspeed], ".cu", ".cuh", ".cpp")),
        "Docstrings": docstrings_of(files([torch, numpy, matplotlib, networkx], ".py")),
        "Mathematics": docstrings_of(files([sympy], ".py")),
        "Type stubs": texts_of(files([torch, numpy, matplotlib], ".pyi")),
    }


def documents_of(texts: Iterator[str]) -> Iterator[str]:
    """Texts cut to documents, at line ends."""
    for text in texts:
        lines: list[str] = []
        size = 0
        for line in text.splitlines(keepends=True):
            if size + len(line) > _LARGEST_DOCUMENT and lines:
                yield "".join(lines)
                lines, size = [], 0
            if len(line) <= _LARGEST_DOCUMENT:
                lines.append(line)
                size += len(line)
        yield "".join(lines)


def gather(texts: Iterator[str], most_bytes: int) -> list[str]:
    """The first documents of a domain up to a number of bytes, each once."""
    seen: set[bytes] = set()
    chosen, size = [], 0
    for document in documents_of(texts):
        if size >= most_bytes:
            break
        # The hash leaves white space out, so that re-indented copies count as the same.
        digest = hashlib.sha256("".join(document.split()).encode("utf-8", "replace")).digest()
        if len(document) >= _SMALLEST_DOCUMENT and digest not in seen:
            seen.add(digest)
            chosen.append(document)
            size += len(document.encode("utf-8", "replace"))
    return chosen


def noise(most_bytes: int, seed: int) -> list[str]:
    """Documents of symbols drawn uniformly: no model can do better than the symbols' entropy."""
    generator = random.Random(f"{seed}/{NOISE}")
    symbols = string.ascii_letters + string.digits + string.punctuation + " "
    return ["".join(generator.choices(symbols, k=2000)) for _ in range(most_bytes // 2000)]


def boilerplate(most_bytes: int, seed: int) -> list[str]:
    """Documents of one template with counters: learned at once."""
    generator = random.Random(f"{seed}/{BOILERPLATE}")
    documents: list[str] = []
    size = 0
    while size < most_bytes:
        first = generator.randrange(10_000)
        lines = [
            f"Order {first + n} was received. Thank you for your order; it will be sent within 3 working days.\n"
            for n in range(20)
        ]
        documents.append("".join(lines))
        size += len(documents[-1])
    return documents


def gather_all(domain_bytes: int, seed: int) -> dict[str, list[str]]:
    """The documents of every domain. Raises ConfigError where the machine has too little of a natural one."""
    corpus, faults = {}, []
    for name, texts in natural_domains(seed).items():
        corpus[name] = gather(texts, domain_bytes)
        size = sum(len(document.encode("utf-8", "replace")) for document in corpus[name])
        if size < min(domain_bytes, _SMALLEST_DOMAIN):
            faults.append(
                Fault(
                    f"domain {name!r}",
                    f"{size:,} bytes on this machine",
                    f"at least {_SMALLEST_DOMAIN:,}",
                    "give the quickstart your own text: bash examples/quickstart.sh TRAIN VALID",
                )
            )
    raise_if_any(faults)
    corpus[NOISE], corpus[BOILERPLATE] = noise(domain_bytes, seed), boilerplate(domain_bytes, seed)
    return corpus


def held_out(document: str, fraction: float, seed: int) -> bool:
    """Whether a document is held out: decided by its text, so that equal ones land on one side."""
    digest = hashlib.sha256(f"{seed}/held out/{document}".encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def main() -> int:
    """Gathers, splits, shuffles and writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--output-dir", required=True, type=Path, metavar="DIR")
    parser.add_argument("--domain-bytes", type=int, default=1_500_000, help="text of each domain (default: 1500000)")
    parser.add_argument("--valid-fraction", type=float, default=0.06, help="held out (default: 0.06)")
    parser.add_argument("--seed", type=int, default=1234, help="(default: 1234)")
    args = parser.parse_args()
    raise_if_any(
        [Fault("--domain-bytes", str(args.domain_bytes), "at least 10000", "give more")] * (args.domain_bytes < 10_000)
        + [Fault("--valid-fraction", str(args.valid_fraction), "above 0, below 1", "give a fraction")]
        * (not 0 < args.valid_fraction < 1)
    )
    corpus = gather_all(args.domain_bytes, args.seed)
    splits: dict[str, list[str]] = {"train": [], "valid": []}
    print(f"{'domain':<16} {'documents':>10} {'bytes':>12} {'held out':>10}")
    for name, documents in corpus.items():
        out = 0
        for document in documents:
            split = "valid" if held_out(document, args.valid_fraction, args.seed) else "train"
            out += split == "valid"
            splits[split].append(json.dumps({"text": document, "meta": {"pile_set_name": name}}) + "\n")
        size = sum(len(document.encode("utf-8", "replace")) for document in documents)
        print(f"{name:<16} {len(documents):>10,} {size:>12,} {out:>10,}")
    make_folder(args.output_dir, "--output-dir")
    for split, lines in splits.items():
        random.Random(f"{args.seed}/{split}").shuffle(lines)
        atomic_write_text(args.output_dir / f"{split}.jsonl", "".join(lines))
    return 0


if __name__ == "__main__":
    run_or_exit(main)
