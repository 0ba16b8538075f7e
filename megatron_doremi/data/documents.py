"""What a line of the input is: its text, its domain, and the split that it belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from megatron_doremi.data.files import read_json_object
from megatron_doremi.data.sources import BadLine, Block, entries
from megatron_doremi.errors import ConfigError, Fault, raise_if_any

RULES_FORMAT = "megatron-doremi-domain-rules/1"
LIST_FORMAT = "megatron-doremi-domain-list/1"
# The key of a rule that looks at the path of the input file instead of a field.
FILE_KEY = "@file"
# A file's name up to its number: arxiv-00012.jsonl.zst, books_3_of_8.parquet.
FILE_PATTERN = r"(?:.*/)?(.+?)(?:[-_.]*(?:\d+|of))*\.(?:jsonl|jsonl\.zst|jsonl\.gz|parquet)"
# Seconds that one expression may take over one field.
_PATIENCE = 5.0


@dataclass(frozen=True)
class Rule:
    r"""A line's domain where a field is like this.

    Attributes:
        key: the field, with dots into nested objects, or "@file".
        pattern: a regular expression that is found in it.
        domain: the name; \1 or \g<name> stand for what groups matched.
    """

    key: str
    pattern: regex.Pattern
    domain: str


@dataclass(frozen=True)
class DomainRules:
    """Ordered rules: the first that matches says the domain.

    Attributes:
        rules: in their order. A rule whose field a line lacks does not match.
        otherwise: the domain where none matches; None: the line is bad.
    """

    rules: tuple[Rule, ...]
    otherwise: str | None = None

    @property
    def columns(self) -> set[str]:
        """The fields at the top that rules look at."""
        return {rule.key.split(".")[0] for rule in self.rules if rule.key != FILE_KEY}

    def domain_of(self, entry: Any, file: str) -> str:
        """The domain of a line. Raises BadLine where no rule says it."""
        for rule in self.rules:
            value = file if rule.key == FILE_KEY else _find(entry, rule.key)
            if not isinstance(value, str):
                continue
            try:
                match = rule.pattern.search(value, timeout=_PATIENCE)
            except TimeoutError:
                raise BadLine(f"{rule.key!r} keeps the pattern {rule.pattern.pattern!r} too busy") from None
            if match:
                name = match.expand(rule.domain)
                if not name:
                    raise BadLine(f"{rule.key!r}: the pattern {rule.pattern.pattern!r} gives an empty domain")
                return name
        if self.otherwise is None:
            raise BadLine("no domain rule matches")
        return self.otherwise


@dataclass(frozen=True)
class DomainKey:
    """The domain is a field.

    Attributes:
        key: with dots into nested objects.
    """

    key: str

    @property
    def columns(self) -> set[str]:
        """The field at the top."""
        return {self.key.split(".")[0]}

    def domain_of(self, entry: Any, file: str) -> str:
        """The domain of a line. Raises BadLine where the field is missing or no text."""
        return _text_at(entry, self.key)


def rule_by_file(pattern: str) -> DomainRules:
    """The domain is the first group of a pattern that matches the file's whole path. Raises ConfigError."""
    return DomainRules((_rule("--domain-from-file", FILE_KEY, f"^(?:{pattern})$", r"\1"),))


def _rule(what: str, key: str, pattern: str, domain: str) -> Rule:
    try:
        compiled = regex.compile(pattern)
        # Says so of a group that the pattern does not have.
        for number in map(int, regex.findall(r"(?<!\\)\\(\d+)", domain)):
            if number > compiled.groups:
                raise regex.error(f"no group {number} in {pattern!r}")
        for name in regex.findall(r"\\g<(\w+)>", domain):
            if name not in compiled.groupindex and not (name.isdigit() and int(name) <= compiled.groups):
                raise regex.error(f"no group {name} in {pattern!r}")
    except regex.error as error:
        raise ConfigError(Fault(what, str(error), "a regular expression and its groups", "mend it")) from error
    return Rule(key, compiled, domain)


def load_rules(path: Path) -> DomainRules:
    """Reads rules: {"format", "rules": [{"key", "pattern", "domain"}], "otherwise": NAME or null}.

    Raises:
        ConfigError: with every fault of the file.
    """
    what = f"--domain-rules {path}"
    entry = read_json_object(path, what)
    faults: list[Fault] = []
    if entry.get("format") != RULES_FORMAT:
        faults.append(Fault(what, f"format {entry.get('format')!r}", RULES_FORMAT, "see examples/domains"))
    listed, otherwise = entry.get("rules"), entry.get("otherwise")
    if not isinstance(listed, list) or not listed:
        faults.append(Fault(what, "no rules", "a list 'rules' of at least one", "see examples/domains"))
        listed = []
    if otherwise is not None and (not isinstance(otherwise, str) or not otherwise):
        faults.append(Fault(what, f"otherwise {otherwise!r}", "a name or null", "mend it"))
    rules = []
    for number, rule in enumerate(listed, 1):
        words = [rule.get(key) for key in ("key", "pattern", "domain")] if isinstance(rule, dict) else []
        if not words or not all(isinstance(word, str) and word for word in words):
            faults.append(Fault(what, f"rule {number}", "key, pattern and domain as text", "mend it"))
            continue
        try:
            rules.append(_rule(f"{what}, rule {number}", *map(str, words)))
        except ConfigError as error:
            faults += error.faults
    raise_if_any(faults)
    return DomainRules(tuple(rules), otherwise)


def load_domain_list(path: Path) -> tuple[str, ...]:
    """Reads the names that domains may have, in their order: {"format", "domains": [NAME, ...]}. Raises ConfigError."""
    what = f"--domain-list {path}"
    entry = read_json_object(path, what)
    names = entry.get("domains")
    good = isinstance(names, list) and names and all(isinstance(name, str) and name for name in names)
    if entry.get("format") != LIST_FORMAT or not good or len(set(names or ())) < len(names or ()):
        rule = f"format {LIST_FORMAT!r} and a list 'domains' of names, each once"
        raise ConfigError(Fault(what, "no list of domains", rule, "see examples/domains"))
    return tuple(names or ())


@dataclass(frozen=True)
class Document:
    """A document of the input.

    Attributes:
        size: bytes of the text in UTF-8.
    """

    text: str
    domain: str
    split: str
    size: int


@dataclass(frozen=True)
class DocumentReader:
    """How lines become documents.

    Attributes:
        text_key: the field of the text, with dots into nested objects.
        domains: how a line's domain is found.
        split: of all lines, or of those that the hash does not hold out.
        valid_fraction: the part of documents that goes to the valid split, by a hash of the text, so that all copies of
            a text fall to one side, whatever the order of the input.
        known: the names that a domain may have; None: any.
    """

    text_key: str
    domains: DomainKey | DomainRules
    split: str = "train"
    valid_fraction: float = 0.0
    known: frozenset[str] | None = None

    @property
    def columns(self) -> list[str]:
        """The fields at the top that are read."""
        return sorted({self.text_key.split(".")[0], *self.domains.columns})

    def read(self, entry: Any, file: str) -> Document:
        """The document of a line. Raises BadLine where it holds none."""
        text = _text_at(entry, self.text_key)
        domain = self.domains.domain_of(entry, file)
        if self.known is not None and domain not in self.known:
            raise BadLine(f"unknown domain {domain[:60]!r}")
        try:
            # Most text is ASCII, of which the size is known.
            size = len(text) if text.isascii() else len(text.encode("utf-8"))
            domain.encode("utf-8")
        except UnicodeEncodeError as error:
            key = self.text_key if error.object == text else "the domain"
            raise BadLine(f"{key!r} holds half a surrogate pair") from error
        held_out = self.valid_fraction > 0.0 and share_of(text.encode("utf-8")) < self.valid_fraction
        return Document(text, domain, "valid" if held_out else self.split, size)

    def documents(self, block: Block) -> Iterator[tuple[int, Document | BadLine]]:
        """(number, document or what is wrong) of each line of a block."""
        for number, entry in entries(block):
            try:
                yield number, entry if isinstance(entry, BadLine) else self.read(entry, block.file)
            except BadLine as error:
                yield number, error


def share_of(text: bytes) -> float:
    """A number in [0, 1) that only the text decides, evenly spread."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "big") / 2**48


def _find(entry: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(entry, dict) or part not in entry:
            return None
        entry = entry[part]
    return entry


def _text_at(entry: Any, key: str) -> str:
    value = entry
    parts: Sequence[str] = key.split(".")
    for part in parts:
        if not isinstance(value, dict) or part not in value:
            raise BadLine(f"no key {key!r}")
        value = value[part]
    if not isinstance(value, str):
        raise BadLine(f"{key!r} is no text")
    return value
