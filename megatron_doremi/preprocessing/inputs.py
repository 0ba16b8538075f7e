"""Finds the files that --input names: their formats, the files in folders, and duplicates."""

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
FORMATS = (
    ".jsonl, .ndjson, .json or .csv files, optionally compressed (.jsonl.zst, .csv.gz); .parquet files; "
    "folders of these or of .txt or .md files"
)
# Folders between the root of a Hugging Face data set and the folders of its domains.
_NO_DOMAIN = frozenset({"data"})
# Names of splits in Hugging Face data sets.
_SPLITS = {
    "train": "train",
    "validation": "valid",
    "valid": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
}
_MAX_FAULTS = 10


@dataclass(frozen=True)
class InputFile:
    """A file of documents.

    Attributes:
        domain: the domain of all its documents, given by its folder; None if each record has its own.
    """

    path: Path
    domain: str | None = None

    @property
    def kind(self) -> str:
        """See `kind_of`."""
        return kind_of(self.path)

    @property
    def may_be_array(self) -> bool:
        """Whether the file may hold one JSON array: a .json file holds an array or JSON lines."""
        return _uncompressed_name(self.path).endswith(".json")


@dataclass
class FoundInputs:
    """The files that --input names.

    Attributes:
        files: in the order given; the files of a folder are sorted by name.
        faults: faults of the paths.
        ignored: notes on the files in folders that are not read.
    """

    files: list[InputFile] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def kind_of(path: Path) -> str:
    """Returns the format that a file name indicates: LINES, CSV, PARQUET or TEXT; "" for other names."""
    name = _uncompressed_name(path)
    return next((kind for suffix, kind in _KINDS.items() if name.endswith(suffix)), "")


def _uncompressed_name(path: Path) -> str:
    """Returns the file name without a compression suffix. Parquet has its own compression, so it keeps the suffix."""
    name = path.name.lower()
    suffix = next((suffix for suffix in _COMPRESSED if name.endswith(suffix)), "")
    return name if name.endswith(".parquet" + suffix) else name.removesuffix(suffix)


def find_inputs(paths: Sequence[Path], domain_of_records: bool = False, domain_of_text: bool = False) -> FoundInputs:
    """Finds the files of --input.

    Args:
        domain_of_records: take the domain from each record instead of the folder.
        domain_of_text: take the domain of a text file from its path, by a rule, instead of the folder.
    """
    inputs = FoundInputs()
    for path in paths:
        try:
            if path.is_dir():
                _add_folder(inputs, path, domain_of_records, domain_of_text)
            elif not path.is_file():
                inputs.faults.append(Fault("--input", str(path), "an existing file or folder", "check the path"))
            elif kind_of(path) in ("", TEXT):
                remedy = "give the folder that holds it" if kind_of(path) else "convert the file to JSON lines"
                inputs.faults.append(Fault("--input", str(path), FORMATS, remedy))
            else:
                inputs.files.append(InputFile(path))
        except (OSError, ValueError) as error:
            inputs.faults.append(_unreadable(path, error))
    inputs.faults += _faults_of_files(inputs.files)
    return inputs


def _unreadable(path: Path, error: OSError | ValueError) -> Fault:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    name = str(path) if len(str(path)) <= 300 else str(path)[:300] + "..."
    return Fault("--input", f"{name}: {reason}", "a readable file or folder", "check the path and its permissions")


def _faults_of_files(files: Sequence[InputFile]) -> list[Fault]:
    """Returns the faults of unreadable files and of duplicates, including duplicates through links."""
    faults: list[Fault] = []
    seen: dict[tuple[int, int], Path] = {}
    for path in (file.path for file in files):
        try:
            with path.open("rb") as raw:
                stat = os.fstat(raw.fileno())
        except OSError as error:
            faults.append(_unreadable(path, error))
            continue
        first = seen.setdefault((stat.st_dev, stat.st_ino), path)
        if first is not path:
            value = f"{path} is the same file as {first}" if first != path else f"{first} twice"
            rule = "each file once, or its documents count twice"
            faults.append(Fault("--input", value, rule, "remove the duplicate"))
    if len(faults) > _MAX_FAULTS:
        hidden = len(faults) - _MAX_FAULTS
        faults[_MAX_FAULTS:] = [Fault("--input", f"{hidden} more such faults", "no faults", "fix those above first")]
    return faults


def _add_folder(inputs: FoundInputs, folder: Path, domain_of_records: bool, domain_of_text: bool) -> None:
    paths = list(_walk(folder))
    records = [path for path in paths if kind_of(path) not in ("", TEXT)]
    text = [path for path in paths if kind_of(path) == TEXT]
    # Text beside records is documentation, such as the README.md of a data set.
    chosen = records or text
    if not chosen:
        inputs.faults.append(Fault("--input", f"{folder} holds no input files", FORMATS, "check the path"))
        return
    splits = _splits_of(folder, chosen)
    if len(splits) > 1:
        names = "; ".join(f"{split}: {path.relative_to(folder)}" for split, path in sorted(splits.items()))
        remedy = "give the files of one split, such as DIR/*/train-*, with --domain-from-file '.*/([^/]+)/[^/]+'"
        inputs.faults.append(Fault("--input", f"{folder} holds several splits ({names})", "one split per run", remedy))
        return
    ignored = [path for path in paths if path not in set(chosen)]
    if ignored:
        names = ", ".join(str(path.relative_to(folder)) for path in ignored[:3]) + (" ..." if len(ignored) > 3 else "")
        inputs.ignored.append(f"{folder}: ignoring {len(ignored)} of {len(paths)} files, of other kinds: {names}")
    for path in chosen:
        is_text = kind_of(path) == TEXT
        by_record = domain_of_text if is_text else domain_of_records
        inputs.files.append(InputFile(path, None if by_record else _domain_of(folder, path, is_text)))


def _walk(folder: Path) -> Iterator[Path]:
    """Yields all files below a folder, sorted by name, except hidden ones. Follows links to folders, not in cycles."""

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
    """Returns the name of the subfolder of `folder` that contains a file. A text file directly in `folder` takes the
    name of `folder`; a file of records there has no domain of its own (None)."""
    parts = [part for part in path.relative_to(folder).parts[:-1] if part not in _NO_DOMAIN]
    if parts:
        return parts[0]
    return folder.resolve().name if is_text else None


def _splits_of(folder: Path, paths: Sequence[Path]) -> dict[str, Path]:
    """Returns the splits that occur in the file names, as in Hugging Face data sets, each with an example file."""
    splits: dict[str, Path] = {}
    for path in paths:
        parts = path.relative_to(folder).parts
        words = [*parts[1:-1], parts[-1].lower().split(".")[0].split("-")[0].split("_")[0]]
        named = [_SPLITS[word.lower()] for word in words if word.lower() in _SPLITS]
        if named:
            splits.setdefault(named[-1], path)
    return splits
