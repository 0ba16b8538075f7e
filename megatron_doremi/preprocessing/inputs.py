"""The files that --input names: their kinds, the files of folders, and that none is given twice."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_doremi.errors import Fault

LINES, CSV, PARQUET, TEXT = "lines", "csv", "parquet", "text"
_KINDS = {
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".json": LINES,
    ".csv": CSV,
    ".parquet": PARQUET,
    ".txt": TEXT,
    ".md": TEXT,
}
_COMPRESSED = (".gz", ".zst", ".zstd")
FORMATS = ".jsonl, .ndjson, .json, .csv, also compressed (.jsonl.zst, .csv.gz); .parquet; folders of these or .txt, .md"
# Folders between the root of a Hugging Face data set and its domains.
_NO_DOMAIN = frozenset({"data"})
_SPLITS = {
    "train": "train",
    "validation": "valid",
    "valid": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
}
_SHOWN = 10


@dataclass(frozen=True)
class InputFile:
    """A file of documents.

    Attributes:
        domain: of all its documents, where its folder says it; None: its records do.
    """

    path: Path
    domain: str | None = None

    @property
    def kind(self) -> str:
        """What its name promises: LINES, CSV, PARQUET or TEXT; "" for other files."""
        return kind_of(self.path)

    @property
    def may_be_array(self) -> bool:
        """A .json file holds one array, or lines."""
        return _bare_name(self.path).endswith(".json")


@dataclass
class FoundInputs:
    """What --input names.

    Attributes:
        files: in their order; those of a folder by name.
        faults: what is wrong.
        left_out: remarks on files of folders that are not read.
    """

    files: list[InputFile] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def kind_of(path: Path) -> str:
    """LINES, CSV, PARQUET or TEXT by a file's name; "" for other names."""
    name = _bare_name(path)
    return next((kind for suffix, kind in _KINDS.items() if name.endswith(suffix)), "")


def _bare_name(path: Path) -> str:
    """The name without the suffix of a compression; Parquet compresses itself."""
    name = path.name.lower()
    suffix = next((suffix for suffix in _COMPRESSED if name.endswith(suffix)), "")
    return name if name.endswith(".parquet" + suffix) else name.removesuffix(suffix)


def find_inputs(paths: Sequence[Path], domain_of_records: bool = False, domain_of_text: bool = False) -> FoundInputs:
    """Finds the files of --input.

    Args:
        domain_of_records: records say their domains, and the folders that hold their files do not.
        domain_of_text: the path of a text file says its domain by a rule, and its folder does not.
    """
    found = FoundInputs()
    for path in paths:
        try:
            if path.is_dir():
                _add_folder(found, path, domain_of_records, domain_of_text)
            elif not path.is_file():
                found.faults.append(Fault("--input", str(path), "an existing file or folder", "check the path"))
            elif kind_of(path) in ("", TEXT):
                remedy = "give the folder that holds it" if kind_of(path) else "convert the file to JSON lines"
                found.faults.append(Fault("--input", str(path), FORMATS, remedy))
            else:
                found.files.append(InputFile(path))
        except (OSError, ValueError) as error:
            found.faults.append(_unreadable(path, error))
    found.faults += _faults_of_files(found.files)
    return found


def _unreadable(path: Path, error: OSError | ValueError) -> Fault:
    said = error.strerror if isinstance(error, OSError) else str(error)
    name = str(path) if len(str(path)) <= 300 else str(path)[:300] + "..."
    return Fault("--input", f"{name}: {said}", "a readable file or folder", "check path and permissions")


def _faults_of_files(files: Sequence[InputFile]) -> list[Fault]:
    """Files that cannot be read, and files that are given twice, through links too."""
    faults: list[Fault] = []
    seen: dict[tuple[int, int], Path] = {}
    for each in files:
        try:
            with each.path.open("rb") as file:
                stat = os.fstat(file.fileno())
        except OSError as error:
            faults.append(_unreadable(each.path, error))
            continue
        first = seen.setdefault((stat.st_dev, stat.st_ino), each.path)
        if first is not each.path:
            value = f"{each.path} is the same file as {first}" if first != each.path else f"{first} twice"
            faults.append(Fault("--input", value, "each file once: its documents would count twice", "leave one out"))
    if len(faults) > _SHOWN:
        rest = len(faults) - _SHOWN
        faults[_SHOWN:] = [Fault("--input", f"{rest} more faults of this kind", "none", "mend those above first")]
    return faults


def _add_folder(found: FoundInputs, folder: Path, domain_of_records: bool, domain_of_text: bool) -> None:
    every = list(_walk(folder))
    records = [path for path in every if kind_of(path) not in ("", TEXT)]
    text = [path for path in every if kind_of(path) == TEXT]
    # Beside records text is documentation, such as the README.md of a data set.
    chosen = records or text
    if not chosen:
        rule = f"a folder that holds {FORMATS}"
        found.faults.append(Fault("--input", f"{folder}: no such files", rule, "check the path"))
        return
    splits = _splits_of(folder, chosen)
    if len(splits) > 1:
        names = "; ".join(f"{split}: {path.relative_to(folder)}" for split, path in sorted(splits.items()))
        remedy = "give the files of one split, such as DIR/*/train-*, with --domain-from-file '.*/([^/]+)/[^/]+'"
        found.faults.append(Fault("--input", f"{folder} holds several splits ({names})", "one split a run", remedy))
        return
    others = [path for path in every if path not in set(chosen)]
    if others:
        names = ", ".join(str(path.relative_to(folder)) for path in others[:3]) + (" ..." if len(others) > 3 else "")
        found.left_out.append(f"{folder}: {len(chosen)} files are read, {len(others)} of other kinds are not: {names}")
    for path in chosen:
        is_text = kind_of(path) == TEXT
        by_record = domain_of_text if is_text else domain_of_records
        found.files.append(InputFile(path, None if by_record else _domain_of(folder, path, is_text)))


def _walk(folder: Path) -> Iterator[Path]:
    """All files below a folder by name, but for hidden ones. Links to folders are followed, if not in a circle."""

    def fail(error: OSError) -> None:
        raise error

    seen = set()
    for root, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        stat = Path(root).stat()
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(files) if not name.startswith("."))


def _domain_of(folder: Path, path: Path, is_text: bool) -> str | None:
    """The folder below `folder` that holds a file; of text beside it, `folder` itself."""
    parts = [part for part in path.relative_to(folder).parts[:-1] if part not in _NO_DOMAIN]
    if parts:
        return parts[0]
    return folder.resolve().name if is_text else None


def _splits_of(folder: Path, paths: Sequence[Path]) -> dict[str, Path]:
    """The splits that files' names speak of, as Hugging Face's do, each with one of its files."""
    splits: dict[str, Path] = {}
    for path in paths:
        parts = path.relative_to(folder).parts
        words = [*parts[1:-1], parts[-1].lower().split(".")[0].split("-")[0].split("_")[0]]
        named = [_SPLITS[word.lower()] for word in words if word.lower() in _SPLITS]
        if named:
            splits.setdefault(named[-1], path)
    return splits
