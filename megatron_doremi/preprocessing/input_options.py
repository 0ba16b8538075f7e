"""The options by which tools read text: which files, and what in them is a document and its domain."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.preprocessing.columns import check_text_column
from megatron_doremi.preprocessing.documents import (
    FILE_PATTERN,
    DocumentReader,
    DomainKey,
    DomainRules,
    load_domain_list,
    load_rules,
    name_fault,
    rule_by_file,
)
from megatron_doremi.preprocessing.inputs import FORMATS, InputFile, find_inputs

DOMAIN_KEY = "meta.pile_set_name"
_WAYS = ("domain_key", "domain_rules", "domain_from_file")
_SHOWN = 10


@dataclass(frozen=True)
class Inputs:
    """What the options say.

    Attributes:
        files: in their order.
        reader: how their records become documents.
        order: the names that domains may have, in their order; (): any.
    """

    files: tuple[InputFile, ...]
    reader: DocumentReader
    order: tuple[str, ...]

    @property
    def paths(self) -> list[Path]:
        """The files' paths."""
        return [each.path for each in self.files]


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """Adds --input and the options that say what is in the files."""
    add = parser.add_argument
    add("--input", nargs="+", required=True, type=Path, metavar="PATH", help=FORMATS)
    add("--text-key", default="text", metavar="KEY", help="the field of the text, dots for nested ones (default: text)")
    key_help = f"the field that names the domain (default: {DOMAIN_KEY}; of folders of files: the folder's name)"
    add("--domain-key", metavar="KEY", help=key_help)
    add("--domain-rules", type=Path, metavar="FILE", help="ordered regular expressions over fields instead")
    file_help = (
        "the first group of a regular expression over the file's path instead (default: its name up to a number)"
    )
    add("--domain-from-file", nargs="?", const=FILE_PATTERN, metavar="PATTERN", help=file_help)
    add("--default-domain", metavar="NAME", help="the domain of documents that name none (default: they are bad lines)")
    add("--domain-list", type=Path, metavar="FILE", help="the names that domains may have, in their order")
    skip_help = "bad lines and what follows a break in a file: fail the run, or leave them out (default: fail)"
    add("--on-error", choices=("fail", "skip"), default="fail", help=skip_help)


def read_input_options(
    args: argparse.Namespace, split: str = "train", valid_fraction: float = 0.0, more: list[Fault] | None = None
) -> Inputs:
    """What the options of `add_input_options` say; all that is wrong with them is found before any text is read.

    Args:
        split, valid_fraction: see DocumentReader.
        more: faults of the tool's other flags, to be said together with these.

    Raises:
        ConfigError: with every fault.
    """
    faults = list(more or [])
    ways = [flag for flag in _WAYS if getattr(args, flag) is not None]
    if len(ways) > 1:
        value = ", ".join("--" + flag.replace("_", "-") for flag in ways)
        faults.append(Fault("domains", value, "one of them", "leave the others out; rules may look at any field"))
    if args.default_domain is not None and (fault := name_fault("--default-domain", args.default_domain)):
        faults.append(fault)
    domains: DomainKey | DomainRules = DomainKey(args.domain_key or DOMAIN_KEY)
    order: tuple[str, ...] = ()
    try:
        if args.domain_rules is not None:
            domains = load_rules(args.domain_rules)
        elif args.domain_from_file is not None:
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
    found = find_inputs(args.input, domain_of_records=bool(ways), domain_of_text=isinstance(domains, DomainRules))
    faults += found.faults
    notes: list[str] = []
    for each in found.files:
        if len(faults) >= _SHOWN:
            break
        wrong = check_text_column(each, args.text_key, reader.needed_of(each.domain))
        # A typing mistake in the key would send whole tables to one domain silently.
        by_default = args.domain_key and default and each.domain is None and not wrong
        if by_default and check_text_column(each, args.text_key, reader.columns):
            column = args.domain_key.split(".")[0]
            notes.append(f"{each.path} has no column {column!r}: all of its documents go to {default!r}")
        faults += wrong
    raise_if_any(faults)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    for remark in found.left_out:
        print(f"note: {remark}", file=sys.stderr)
    return Inputs(tuple(found.files), reader, order)
