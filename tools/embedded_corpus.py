"""Builds a corpus of real text without a download, from files that are on every machine that can run this program.

    python tools/embedded_corpus.py --output-dir runs/quickstart/corpus

Six domains come from Python's standard library and the packages in requirements.txt, in the sizes in which they are
found, up to a limit. Two planted domains test DoReMi: noise, which cannot be learned, and boilerplate, which is learned
within a few steps. The output is in The Pile's format, split into train and valid by document.
"""

from __future__ import annotations

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

if not __package__:
    # Run as a script: the package is beside this folder.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_doremi.errors import ConfigError, Fault, raise_if_any, run_or_exit
from megatron_doremi.flag_parser import FlagParser
from megatron_doremi.progress import stage
from megatron_doremi.storage.files import atomic_write_text, make_folder

_MIN_DOCUMENT, _MAX_DOCUMENT = 200, 4_000  # characters
_MIN_DOMAIN_BYTES = 1_000_000
NOISE, BOILERPLATE = "noise", "boilerplate"


def package_folder(name: str) -> Path:
    """Returns the folder of an installed package without importing it. Raises ConfigError if it is missing."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        rule, remedy = "the packages in requirements.txt", "pip install -r requirements.txt"
        raise ConfigError(Fault("Python environment", f"no package {name}", rule, remedy))
    return Path(next(iter(spec.submodule_search_locations)))


def texts_of(paths: Iterable[Path]) -> Iterator[str]:
    """Yields the contents of UTF-8 files; skips files that are not UTF-8 or not readable."""
    for path in paths:
        try:
            yield path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue


def docstrings_of(paths: Iterable[Path]) -> Iterator[str]:
    """Yields the long docstrings of each Python file as one text."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for text in texts_of(paths):
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        docstrings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        yield "\n\n".join(doc for doc in docstrings if doc and len(doc) > 80)


def natural_domains(seed: int) -> dict[str, Iterator[str]]:
    """Returns the natural domains and their texts, which are read lazily."""
    library = Path(sysconfig.get_paths()["stdlib"])
    excluded = {
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
        """Returns the files with one of the suffixes, in an order that depends only on the seed and their names."""
        keyed = []
        for folder in folders:
            for path in folder.rglob("*"):
                parts = path.relative_to(folder).parts
                if path.suffix in suffixes and not set(parts) & excluded:
                    name = "/".join((folder.name, *parts))
                    keyed.append((hashlib.sha256(f"{seed}/{name}".encode()).digest(), name, path))
        return [path for _, _, path in sorted(keyed)]

    torch, deepspeed, numpy, networkx, sympy = map(package_folder, ("torch", "deepspeed", "numpy", "networkx", "sympy"))
    return {
        "Python source": texts_of(files([library], ".py")),
        "C++ headers": texts_of(files([torch / "include" / "ATen"], ".h")),
        "GPU kernels": texts_of(files([torch, deepspeed], ".cu", ".cuh", ".cpp")),
        "Docstrings": docstrings_of(files([torch, numpy, networkx], ".py")),
        "Mathematics": docstrings_of(files([sympy], ".py")),
        "Type stubs": texts_of(files([torch, numpy], ".pyi")),
    }


def documents_of(texts: Iterator[str]) -> Iterator[str]:
    """Splits texts into documents at line ends; drops lines that are longer than a document may be."""
    for text in texts:
        lines: list[str] = []
        size = 0
        for line in text.splitlines(keepends=True):
            if size + len(line) > _MAX_DOCUMENT and lines:
                yield "".join(lines)
                lines, size = [], 0
            if len(line) <= _MAX_DOCUMENT:
                lines.append(line)
                size += len(line)
        yield "".join(lines)


def gather(texts: Iterator[str], target_bytes: int) -> list[str]:
    """Returns the first documents of a domain, without duplicates, until they reach a number of bytes."""
    seen: set[bytes] = set()
    documents, size = [], 0
    for document in documents_of(texts):
        if size >= target_bytes:
            break
        # The hash ignores white space, so re-indented copies are duplicates.
        digest = hashlib.sha256("".join(document.split()).encode("utf-8", "replace")).digest()
        if len(document) >= _MIN_DOCUMENT and digest not in seen:
            seen.add(digest)
            documents.append(document)
            size += len(document.encode("utf-8", "replace"))
    return documents


def noise(target_bytes: int, seed: int) -> list[str]:
    """Returns documents of uniformly random symbols: no model can get below the entropy of the symbols."""
    generator = random.Random(f"{seed}/{NOISE}")
    symbols = string.ascii_letters + string.digits + string.punctuation + " "
    return ["".join(generator.choices(symbols, k=2000)) for _ in range(target_bytes // 2000)]


def boilerplate(target_bytes: int, seed: int) -> list[str]:
    """Returns documents that repeat one sentence with a counter."""
    generator = random.Random(f"{seed}/{BOILERPLATE}")
    documents: list[str] = []
    size = 0
    while size < target_bytes:
        first = generator.randrange(10_000)
        lines = [
            f"Order {first + n} was received. Thank you for your order; it will be sent within 3 working days.\n"
            for n in range(20)
        ]
        documents.append("".join(lines))
        size += len(documents[-1])
    return documents


def gather_all(domain_bytes: int, seed: int, planted: bool) -> dict[str, list[str]]:
    """Returns the documents of every domain, of at most about `domain_bytes`.

    Raises ConfigError if this machine has too little text for one.
    """
    corpus, faults = {}, []
    for name, texts in natural_domains(seed).items():
        corpus[name] = gather(texts, domain_bytes)
        size = sum(len(document.encode("utf-8", "replace")) for document in corpus[name])
        if size < min(domain_bytes, _MIN_DOMAIN_BYTES):
            value, rule = f"{size:,} bytes on this machine", f"at least {_MIN_DOMAIN_BYTES:,}"
            remedy = "give the quickstart your own text: bash examples/quickstart.sh TRAIN VALID"
            faults.append(Fault(f"domain {name!r}", value, rule, remedy))
    raise_if_any(faults)
    if planted:
        size = domain_bytes // 2
        corpus[NOISE], corpus[BOILERPLATE] = noise(size, seed), boilerplate(size, seed)
    return corpus


def held_out(document: str, fraction: float, seed: int) -> bool:
    """Returns whether a document is held out. A hash of its text decides, so copies land in the same split."""
    digest = hashlib.sha256(f"{seed}/held out/{document}".encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def main() -> int:
    """Builds the corpus, splits it, shuffles it and writes it. Returns the exit code."""
    parser = FlagParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    output_help = "folder in which to write train.jsonl and valid.jsonl"
    add("--output-dir", required=True, type=Path, metavar="DIR", help=output_help)
    bytes_help = "largest size of a domain in bytes of text, both splits together (default: 6000000)"
    add("--domain-bytes", type=int, default=6_000_000, metavar="N", help=bytes_help)
    fraction_help = "fraction of the documents in the valid split (default: 0.05)"
    add("--valid-fraction", type=float, default=0.05, metavar="F", help=fraction_help)
    add("--without-planted", action="store_true", help="leave out noise and boilerplate (default: add them)")
    seed_help = "seed that selects, splits and shuffles the documents (default: 1234)"
    add("--seed", type=int, default=1234, metavar="N", help=seed_help)
    args = parser.parse_args()
    faults = []
    if args.domain_bytes < 10_000:
        faults.append(Fault("--domain-bytes", str(args.domain_bytes), "at least 10000", "give a larger number"))
    if not 0 < args.valid_fraction < 1:
        value, rule = str(args.valid_fraction), "greater than 0 and less than 1"
        faults.append(Fault("--valid-fraction", value, rule, "give a number in that range"))
    raise_if_any(faults)
    make_folder(args.output_dir, "--output-dir")
    with stage("gathering text"):
        corpus = gather_all(args.domain_bytes, args.seed, not args.without_planted)
    splits: dict[str, list[str]] = {"train": [], "valid": []}
    print(f"{'domain':<16} {'documents':>10} {'bytes':>12} {'held out':>10}")
    for name, documents in corpus.items():
        held_out_count = 0
        for document in documents:
            split = "valid" if held_out(document, args.valid_fraction, args.seed) else "train"
            held_out_count += split == "valid"
            splits[split].append(json.dumps({"text": document, "meta": {"pile_set_name": name}}) + "\n")
        size = sum(len(document.encode("utf-8", "replace")) for document in documents)
        print(f"{name:<16} {len(documents):>10,} {size:>12,} {held_out_count:>10,}")
    for split, lines in splits.items():
        random.Random(f"{args.seed}/{split}").shuffle(lines)
        atomic_write_text(args.output_dir / f"{split}.jsonl", "".join(lines))
    return 0


def command() -> None:
    """Runs `main` as a program."""
    run_or_exit(main)


if __name__ == "__main__":
    command()
