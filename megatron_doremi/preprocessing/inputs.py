"""Finds the files that --input names: their formats, the files in folders, and duplicates."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_doremi.errors import Fault

LINES, CSV, PARQUET, ARROW, TEXT = "lines", "csv", "parquet", "arrow", "text"
_KINDS = {
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".json": LINES,
    ".csv": CSV,
    ".parquet": PARQUET,
    ".arrow": ARROW,
    ".txt": TEXT,
    ".md": TEXT,
}
_COMPRESSED = (".gz", ".zst", ".zstd")
FORMATS = (
    ".jsonl, .ndjson, .json or .csv files, optionally compressed (.jsonl.zst, .csv.gz); .parquet or .arrow files; "
    "folders of these or of .txt or .md files"
)
# Files about a Hugging Face data set, beside its data. A file cache-*.arrow holds an intermediate result of `datasets`.
_ABOUT = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
_CACHE = re.compile(r"(cache|tmp)[-_.a-z0-9]*\.arrow")
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
# What follows the domain in the name of a file: numbers (-00012, _3_of_8, .part2) and the split.
_AFTER_DOMAIN = re.compile(
    r"(?:[-_.]+(?:(?:part|shard|chunk)?[-_.]?\d+|of|part|shard|chunk|train|validation|valid|test))+$", re.IGNORECASE
)
_NO_NAME = re.compile(r"(?:part|shard|chunk|data)?\d*")
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
        with_held_out: the folders that hold a held-out split of their own.
    """

    files: list[InputFile] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    with_held_out: list[Path] = field(default_factory=list)


def kind_of(path: Path) -> str:
    """Returns the format that a file name indicates: LINES, CSV, PARQUET or TEXT; "" for other names."""
    name = _uncompressed_name(path)
    return next((kind for suffix, kind in _KINDS.items() if name.endswith(suffix)), "")


def _uncompressed_name(path: Path) -> str:
    """Returns the file name without a compression suffix. Parquet has its own compression, so it keeps the suffix."""
    name = path.name.lower()
    suffix = next((suffix for suffix in _COMPRESSED if name.endswith(suffix)), "")
    return name if name.endswith(".parquet" + suffix) else name.removesuffix(suffix)


def find_inputs(
    paths: Sequence[Path], domain_of_records: bool = False, domain_of_text: bool = False, split: str = "train"
) -> FoundInputs:
    """Finds the files of --input.

    Args:
        paths: files, folders, and patterns such as data/*.jsonl that the shell did not expand.
        domain_of_records: take the domain from each record instead of the folder.
        domain_of_text: take the domain of a text file from its path, by a rule, instead of the folder.
        split: the split to take from folders that hold several.
    """
    inputs = FoundInputs()
    for path in [path for given in paths for path in _expanded(given)]:
        try:
            if path.is_dir():
                _add_folder(inputs, path, domain_of_records, domain_of_text, split)
            elif not path.is_file() and glob.has_magic(str(path)):
                rule = "a pattern that matches a file or folder"
                inputs.faults.append(Fault("--input", f"{path} matches nothing", rule, "check the folder and pattern"))
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
    for name in sorted({file.domain for file in inputs.files if file.domain is not None and _not_utf8(file.domain)}):
        rule, remedy = (
            "a name in UTF-8, since it is that of a domain",
            "rename it, or give --domain-key or --domain-rules",
        )
        inputs.faults.append(Fault("--input", f"the folder {name!r}", rule, remedy))
    return inputs


def _not_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _expanded(path: Path) -> list[Path]:
    """The paths that a pattern matches, sorted; the path itself if it exists, is no pattern, or matches nothing."""
    if not glob.has_magic(str(path)) or os.path.lexists(path):
        return [path]
    return sorted(map(Path, glob.glob(str(path), recursive=True))) or [path]


def split_by_name(paths: Sequence[Path]) -> tuple[list[Path], list[Path], list[str]]:
    """Divides the paths of --input into those of the train and of the held-out split, where names tell both, such as
    data/train and data/validation; the held-out split is the one called validation, or else test.

    Returns:
        the paths of the train split (all, if the names do not tell both), those of the held-out split, and notes on
        paths that are in neither.
    """
    expanded = [path for given in paths for path in _expanded(given)]
    splits = {path: _split_of_path(path) for path in expanded}
    if not {"train", "valid"} <= set(splits.values()) and not {"train", "test"} <= set(splits.values()):
        return list(paths), [], []
    chosen = {split: _of_split(splits, split) for split in ("train", "valid")}
    skipped = [str(path) for path in splits if path not in (*chosen["train"], *chosen["valid"])]
    notes = [f"not read, beside a validation split: {', '.join(skipped)}"] if skipped else []
    return chosen["train"], chosen["valid"], notes


def _split_of_path(path: Path) -> str:
    """The split that the name of a folder, or of a file, gives; "" if it gives none."""
    words = [path.name.lower()] if path.is_dir() else _split_words(path)
    return next((_SPLITS[word] for word in reversed(words) if word in _SPLITS), "")


def domain_of_name(path: Path) -> str:
    """The domain that the name of a file gives: without suffix, numbers and split (arxiv-train-00012.jsonl.zst: arxiv).

    A name of numbers and a split alone takes the folder's, as for NAME/data/train-00000-of-00002.parquet.
    """
    stem = _stem(path)
    name = _AFTER_DOMAIN.sub("", stem)
    words = re.split(r"[-_.]+", name, maxsplit=1)
    if len(words) == 2 and words[0].lower() in _SPLITS:
        name = words[1]
    if name.lower() not in _SPLITS and not _NO_NAME.fullmatch(name.lower()):
        return name
    folders = [part for part in path.resolve().parts[1:-1] if part not in _NO_DOMAIN and part.lower() not in _SPLITS]
    return folders[-1] if folders else stem


def _stem(path: Path) -> str:
    name = path.name[: len(_uncompressed_name(path))]
    suffix = next((suffix for suffix in _KINDS if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def _unreadable(path: Path, error: OSError | ValueError) -> Fault:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    # A folder below may be what cannot be read.
    name = str(error.filename or path) if isinstance(error, OSError) else str(path)
    name = name if len(name) <= 300 else name[:300] + "..."
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


def _add_folder(inputs: FoundInputs, folder: Path, domain_of_records: bool, domain_of_text: bool, split: str) -> None:
    paths = list(_walk(folder))
    records = [path for path in paths if kind_of(path) not in ("", TEXT)]
    if any(kind_of(path) == ARROW for path in records):
        records = [path for path in records if path.name not in _ABOUT and not _CACHE.fullmatch(path.name)]
    text = [path for path in paths if kind_of(path) == TEXT]
    chosen = [*records, *_domains_of_text(folder, records, text)] if records else text
    if not chosen:
        inputs.faults.append(Fault("--input", f"{folder} holds no input files", FORMATS, "check the path"))
        return
    empty = [path for path in chosen if path.stat().st_size == 0]
    if empty:
        inputs.ignored.append(f"{len(empty):,} empty file{'' if len(empty) == 1 else 's'}: {_first_names(empty)}")
    read = set(chosen)
    ignored = [path for path in paths if path not in read and path.name not in _ABOUT]
    if ignored:
        names = _first_names([path.relative_to(folder) for path in ignored])
        inputs.ignored.append(f"{folder}: ignoring {len(ignored)} of {len(paths)} files, of other kinds: {names}")
    by_split = _splits_of(folder, chosen)
    named = sorted(set(by_split.values()) - {""})
    if len(named) > 1:
        chosen = _of_split(by_split, split)
        skipped = ", ".join(each for each in named if each not in {by_split[path] for path in chosen})
        inputs.ignored.append(f"{folder} holds several splits: reading {len(chosen)} files of {split}, not {skipped}")
        if {"valid", "test"} & set(named):
            inputs.with_held_out.append(folder)
    if not chosen:
        rule, remedy = f"files of the split {split}", "give the files themselves"
        inputs.faults.append(Fault("--input", f"{folder} holds only {', '.join(named)}", rule, remedy))
    below_splits = _starts_with_splits(folder, chosen)
    for path in chosen:
        is_text = kind_of(path) == TEXT
        by_record = domain_of_text if is_text else domain_of_records
        inputs.files.append(InputFile(path, None if by_record else _domain_of(folder, path, is_text, below_splits)))


def _domains_of_text(folder: Path, records: Sequence[Path], text: Sequence[Path]) -> list[Path]:
    """The text files in subfolders without records, where each record file is in the subfolder of its domain as well.
    Other text beside records is documentation, such as the README.md of a data set."""

    def subfolder(path: Path) -> str:
        parts = path.relative_to(folder).parts
        return parts[0] if len(parts) > 1 else ""

    of_records = {subfolder(path) for path in records}
    if any(name in ("", *_NO_DOMAIN) or name.lower() in _SPLITS for name in of_records):
        return []
    return [path for path in text if subfolder(path) not in ("", *of_records)]


def _first_names(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths[:3])) + (" ..." if len(paths) > 3 else "")


def _of_split(by_split: dict[Path, str], split: str) -> list[Path]:
    """The files of a split; the held-out split is the one called validation, or else test."""
    wanted = {"train": {"train", ""}, "valid": {"valid"} if "valid" in by_split.values() else {"test"}}[split]
    return [path for path, each in by_split.items() if each in wanted]


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


def _folders(folder: Path, path: Path) -> list[str]:
    return [part for part in path.relative_to(folder).parts[:-1] if part not in _NO_DOMAIN]


def _starts_with_splits(folder: Path, paths: Sequence[Path]) -> bool:
    """Whether the subfolders of `folder` are splits: all of them are named so, and no file is beside them."""
    return all(parts and parts[0].lower() in _SPLITS for parts in (_folders(folder, path) for path in paths))


def _domain_of(folder: Path, path: Path, is_text: bool, below_splits: bool) -> str | None:
    """Returns the name of the subfolder of `folder`, or of its split, that contains a file. A text file directly there
    takes the name of `folder`, or of the one that holds it if it is named like a split; a file of records there has no
    domain of its own (None)."""
    parts = _folders(folder, path)[below_splits:]
    if parts:
        return parts[0]
    if not is_text:
        return None
    named = folder.resolve()
    return named.parent.name if named.name.lower() in _SPLITS and named.parent.name else named.name


def _splits_of(folder: Path, paths: Sequence[Path]) -> dict[Path, str]:
    """Returns the split that each file's folders or name give, as in Hugging Face data sets; "" if they give none."""
    below_splits = _starts_with_splits(folder, paths)
    splits: dict[Path, str] = {}
    words = {path: [word for word in _split_words(path) if word in _SPLITS] for path in paths}
    # The splits of text files whose names differ by the split alone: train.txt and valid.txt, but not test-plan.txt.
    alike: dict[tuple[Path, tuple[str, ...]], set[str]] = {}
    for path in paths:
        alike.setdefault((path.parent, _other_words(path)), set()).update(_SPLITS[word] for word in words[path])
    for path in paths:
        folders = [part.lower() for part in _folders(folder, path)[0 if below_splits else 1 :]]
        if kind_of(path) == TEXT and len(alike[path.parent, _other_words(path)]) < 2:
            words[path] = []
        named = [_SPLITS[word] for word in (*folders, *words[path]) if word in _SPLITS]
        splits[path] = named[-1] if named else ""
    return splits


def _other_words(path: Path) -> tuple[str, ...]:
    """The words of a file's name that are neither numbers nor names of splits."""
    words = re.split(r"[-_.]", _stem(path).lower())
    return tuple(word for word in words if word not in _SPLITS and not word.isdigit())


def _split_words(path: Path) -> list[str]:
    """The words of a file's name that may be the name of its split: the first, and the last of the usual names."""
    words = re.split(r"[-_.]", _stem(path).lower())
    last = [word for word in words[1:] if word in ("train", "validation", "valid", "test")][-1:]
    return [words[0], *last]
