"""Domains that the folders and names of files give, and what looks wrong about them before any text is read."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

from megatron_doremi.errors import Fault
from megatron_doremi.preprocessing.documents import DocumentReader, DomainKey, DomainRules, NoDomain
from megatron_doremi.preprocessing.inputs import TEXT, InputFile, domain_of_name
from megatron_doremi.preprocessing.sources import BadLine, parse_block, read_blocks

# The field that holds the domain in The Pile.
DOMAIN_KEY = "meta.pile_set_name"
# Without a flag for domains, the first records of at most this many files tell whether they carry a domain.
_PROBED_FILES, _PROBED_RECORDS = 8, 100
# Domains that messages name.
_SHOWN_NAMES = 6
# Files that are a domain each, above which they are probably not meant so.
_MANY_DOMAINS = 50


def shown_names(names: Iterable[str]) -> str:
    """The first names, sorted, as text; the others are only counted."""
    ordered = sorted(names)
    more = len(ordered) - _SHOWN_NAMES
    return ", ".join(ordered[:_SHOWN_NAMES]) + (f" and {more:,} more" if more > 0 else "")


def named(file: InputFile) -> InputFile:
    """The file with the domain that its name gives, unless its folder gives one."""
    return file if file.domain is not None else replace(file, domain=domain_of_name(file.path))


def have_no_domains(files: Sequence[InputFile]) -> bool:
    """Whether the first records of a sample of the files can be read, and none carries the default key."""
    without = [file for file in files if file.domain is None and file.kind != TEXT]
    key, records = DomainKey(DOMAIN_KEY), 0
    for file in without[:: max(1, -(-len(without) // _PROBED_FILES))]:
        for block in itertools.islice(read_blocks(file, sorted(key.columns), lambda _: []), 1):
            for _, record in itertools.islice(parse_block(block), _PROBED_RECORDS):
                if not isinstance(record, dict):
                    continue
                records += 1
                try:
                    key.domain_of(record, "")
                except NoDomain:
                    continue
                except BadLine:
                    pass
                return False
    return records > 0


def pattern_faults(
    pattern: str, rules: DomainKey | DomainRules, files: Sequence[InputFile], on_error: str
) -> list[Fault]:
    """A fault if --domain-from-file does not match files: with --on-error skip, only if it matches none."""
    unmatched = []
    for file in files:
        try:
            rules.domain_of({}, str(file.path))
        except BadLine:
            unmatched.append(str(file.path))
    if not unmatched or (on_error == "skip" and len(unmatched) < len(files)):
        return []
    value = f"{pattern!r} does not match {len(unmatched):,} of {len(files):,} files, such as {unmatched[0]}"
    rule = "a regular expression that matches the full path of each file"
    return [Fault("--domain-from-file", value, rule, "start it with .*/ to match any folder, or give --default-domain")]


def list_faults(files: Sequence[InputFile], known: frozenset[str] | None, source: str) -> list[Fault]:
    """A fault if folders or names of files give domains that `known`, read from `source`, does not hold."""
    given = {file.domain for file in files if file.domain is not None}
    unknown = {name for name in given if known is not None and name not in known and name.strip() not in known}
    if not unknown or known is None:
        return []
    rule = f"the domains of {source}: {shown_names(known)}"
    remedy = "rename the files or folders, remove them from --input, or add the domains there"
    return [Fault("--input", f"domains {shown_names(unknown)}, by files and folders", rule, remedy)]


def domain_warnings(files: Sequence[InputFile], reader: DocumentReader) -> list[str]:
    """Warnings about the domains, if the files give all of them: before any text is read."""
    if isinstance(reader.domains, DomainRules) and not reader.domains.columns:
        names = {_by_rule(reader, file) for file in files}
    else:
        names = {file.domain for file in files}
    if None in names:
        return []
    if len(names) == 1:
        return [single_domain(str(*names))]
    if len(names) == len(files) > _MANY_DOMAINS:
        text = f"each of the {len(names):,} files is a domain of its own ({shown_names(map(str, names))})"
        return [f"{text}: --domain-from-file PATTERN or --domain-key can group them"]
    return []


def _by_rule(reader: DocumentReader, file: InputFile) -> str | None:
    try:
        return file.domain or reader.domains.domain_of({}, str(file.path))
    except BadLine:
        return reader.default_domain


def without_documents(files: Sequence[InputFile], written: Iterable[tuple[str, str]]) -> set[str]:
    """The domains that folders or names of files give, and of which no document is among the (domain, split) pairs."""
    found = {domain for domain, _ in written}
    return {file.domain for file in files if file.domain is not None and not {file.domain, file.domain.strip()} & found}


def single_domain(name: str) -> str:
    """The warning that all documents belong to one domain."""
    return (
        f"all documents are of a single domain, {name!r}, so there is no mixture to learn; a folder for each domain, "
        "--domain-key, --domain-from-file PATTERN or --domain-rules can split it"
    )
