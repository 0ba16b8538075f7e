"""The command-line options for input text, shared by the tools: which files to read, and where the text and the domain
of a document are."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_doremi.console import note, warn
from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.preprocessing.columns import check_text_column
from megatron_doremi.preprocessing.documents import (
    Document,
    DocumentReader,
    DomainKey,
    DomainRules,
    load_domain_list,
    load_rules,
    name_fault,
    rule_by_file,
)
from megatron_doremi.preprocessing.file_domains import (
    DOMAIN_KEY,
    domain_warnings,
    have_no_domains,
    list_faults,
    named,
    pattern_faults,
    shown_names,
)
from megatron_doremi.preprocessing.inputs import FORMATS, InputFile, find_inputs
from megatron_doremi.preprocessing.key_checks import key_faults
from megatron_doremi.preprocessing.sources import read_blocks
from megatron_doremi.settings import flag_of

# Value of --domain-from-file without a pattern.
BY_NAME = ""
_DOMAIN_FLAGS = ("domain_key", "domain_rules", "domain_from_file")
# Files are no longer checked after this many faults.
_MAX_FAULTS = 10
# Bytes of text that `sample` returns.
_SAMPLE_BYTES = 1 << 18


@dataclass(frozen=True)
class Inputs:
    """The input options, resolved.

    Attributes:
        files: in the order in which they are read.
        reader: turns their records into documents.
        order: the allowed domain names, in the order of --domain-list; () allows any.
        with_held_out: the paths of --input that hold, or are, held-out files.
    """

    files: tuple[InputFile, ...]
    reader: DocumentReader
    order: tuple[str, ...]
    with_held_out: tuple[Path, ...] = ()

    @property
    def paths(self) -> list[Path]:
        """The paths of the files."""
        return [file.path for file in self.files]


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """Adds --input and the options that describe the content of the files."""
    add = parser.add_argument
    add("--input", nargs="+", required=True, type=Path, metavar="PATH", help=f"files to read: {FORMATS}")
    text_help = "field that holds the text of a document; use dots for nested fields (default: text)"
    add("--text-key", default="text", metavar="KEY", help=text_help)
    key_help = (
        "field that holds the domain of a document; use dots for nested fields "
        f"(default: the name of the subfolder for a file in a folder given to --input; else {DOMAIN_KEY}; for files "
        "without it, --domain-from-file)"
    )
    add("--domain-key", metavar="KEY", help=key_help)
    rules_help = (
        "JSON file of regular expressions over fields or the path of the file; the first match gives the domain"
    )
    add("--domain-rules", type=Path, metavar="FILE", help=rules_help)
    file_help = (
        "take the domain from the path of the file: group 1 of PATTERN, a regular expression that matches the full "
        "path (without PATTERN: the file name without its number and split, as arxiv for arxiv-train-00012.jsonl.zst)"
    )
    add("--domain-from-file", nargs="?", const=BY_NAME, metavar="PATTERN", help=file_help)
    default_help = "domain of documents that have none (default: such a document is a bad line)"
    add("--default-domain", metavar="NAME", help=default_help)
    list_help = "JSON file of the allowed domain names, which also sets their order in the manifest (default: any name)"
    add("--domain-list", type=Path, metavar="FILE", help=list_help)
    error_help = "on bad lines and truncated or damaged files: fail the run, or skip and count them (default: fail)"
    add("--on-error", choices=("fail", "skip"), default="fail", help=error_help)


def read_input_options(
    args: argparse.Namespace, split: str = "train", valid_fraction: float = 0.0, more: list[Fault] | None = None
) -> Inputs:
    """Resolves the options of `add_input_options` and checks them before any text is read.

    Args:
        split, valid_fraction: see DocumentReader.
        more: faults of the tool's other flags, to be raised together with these.

    Raises:
        ConfigError: holds every fault.
    """
    faults = list(more or [])
    domain_flags = [flag for flag in _DOMAIN_FLAGS if getattr(args, flag) is not None]
    if len(domain_flags) > 1:
        value = ", ".join(flag_of(flag) for flag in domain_flags)
        faults.append(Fault("domains", value, "only one of them", "keep one; --domain-rules can read any field"))
    if args.default_domain is not None and (fault := name_fault("--default-domain", args.default_domain)):
        faults.append(fault)
    domains: DomainKey | DomainRules = DomainKey(args.domain_key or DOMAIN_KEY)
    order: tuple[str, ...] = ()
    try:
        if args.domain_rules is not None:
            domains = load_rules(args.domain_rules)
        elif args.domain_from_file:
            domains = rule_by_file(args.domain_from_file)
    except ConfigError as error:
        faults += error.faults
    try:
        order = load_domain_list(args.domain_list) if args.domain_list else ()
    except ConfigError as error:
        faults += error.faults
    default = args.default_domain.strip() if args.default_domain is not None else None
    known = frozenset(order) if order else None
    reader = DocumentReader(args.text_key, domains, split, valid_fraction, known, default)
    by_name = args.domain_from_file == BY_NAME
    by_rule = isinstance(domains, DomainRules) or by_name
    inputs = find_inputs(args.input, domain_of_records=bool(domain_flags), domain_of_text=by_rule, split=split)
    faults += inputs.faults
    notes = list(inputs.ignored)
    if not faults and (by_name or (not domain_flags and default is None and have_no_domains(inputs.files))):
        inputs.files = [named(file) for file in inputs.files]
        if not by_name:
            names = shown_names({file.domain for file in inputs.files if file.domain is not None})
            notes.append(f"no field {DOMAIN_KEY!r} in the records: the file's name gives the domain ({names})")
    if args.domain_from_file and not faults and default is None:
        faults += pattern_faults(args.domain_from_file, domains, inputs.files, args.on_error)
    faults += list_faults(inputs.files, known, f"--domain-list {args.domain_list}")
    warnings: list[str] = []
    for file in inputs.files:
        if len(faults) >= _MAX_FAULTS:
            break
        file_faults = check_text_column(file, args.text_key, reader.needed_of(file.domain))
        # A typo in --domain-key would silently assign every row of a table to the default domain.
        may_default = args.domain_key and default and file.domain is None and not file_faults
        if may_default and check_text_column(file, args.text_key, reader.columns):
            column = args.domain_key.split(".")[0]
            warnings.append(f"{file.path} has no column {column!r}: all of its documents go to {default!r}")
        faults += file_faults
    if not faults:
        faults += key_faults(inputs.files, reader, args.on_error)
    raise_if_any(faults)
    for warning in warnings:
        warn(warning)
    for text in notes:
        note(text)
    return Inputs(tuple(inputs.files), reader, order, tuple(inputs.with_held_out))


def sample(inputs: Inputs) -> list[str]:
    """Returns texts from the beginnings of up to 15 input files, on which two encoders of a tokenizer are compared."""
    texts: list[str] = []
    files, reader = inputs.files, inputs.reader
    # Not from every file: each costs the decompression of a block.
    for file in files[:: max(1, len(files) // 8)]:
        left = _SAMPLE_BYTES // min(8, len(files))
        for block in itertools.islice(read_blocks(file, reader.columns, reader.needed_of), 1):
            for _, document in reader.documents(block):
                if left <= 0:
                    break
                if isinstance(document, Document):
                    texts.append(document.text[:left])
                    left -= document.size
    return texts


def with_held_out(inputs: Inputs, split: str | None, valid_fraction: float | None, tasks: int) -> Inputs:
    """Returns the inputs with the default of --valid-fraction; prints it, and what looks wrong about the domains.

    Args:
        split, valid_fraction: the values of the flags; None where they are not given.
        tasks: of the array job, whose tasks read one split.
    """
    if split != "valid":
        for text in domain_warnings(inputs.files, inputs.reader):
            warn(text)
    if split is not None or valid_fraction is not None:
        return inputs
    if inputs.with_held_out:
        paths = " ".join(map(str, inputs.with_held_out))
        if tasks > 1:
            note(f"the same command with --split valid --input {paths} adds the held-out files")
        else:
            note(f"this run then adds the held-out files of {paths}")
        return inputs
    fraction = held_out_fraction(sum(path.stat().st_size for path in inputs.paths))
    print(f"holding out a fraction of {fraction:g} of the documents as the valid split (--valid-fraction)", flush=True)
    return replace(inputs, reader=replace(inputs.reader, valid_fraction=fraction))


def held_out_fraction(input_bytes: int) -> float:
    """Returns the default of --valid-fraction for files of this size: 5 % of few, enough for an evaluation of many."""
    return round(min(0.05, max(0.001, 20e6 / max(1, input_bytes))), 4)
