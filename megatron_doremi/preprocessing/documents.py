"""From parsed input records to documents: the text, its domain, and its split."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import regex

from megatron_doremi.errors import ConfigError, Fault, raise_if_any
from megatron_doremi.preprocessing.sources import BadFile, BadLine, Block, Text, parse_block
from megatron_doremi.storage.files import read_json_object

RULES_FORMAT = "megatron-doremi-domain-rules/1"
LIST_FORMAT = "megatron-doremi-domain-list/1"
# The key of a rule that matches the path of the input file instead of a field.
FILE_KEY = "@file"
# Seconds that one regular expression may take on one field.
_TIMEOUT_SECONDS = 5.0
# Timeouts of one regular expression that stop the run.
_MAX_TIMEOUTS = 3


class SlowRule(BadLine):
    """A line on which a regular expression took too long.

    Attributes:
        rule: describes the rule in messages.
    """

    def __init__(self, rule: str):
        super().__init__(f"{rule} took more than {_TIMEOUT_SECONDS:g} s")
        self.rule = rule


class NoDomain(BadLine):
    """A line without a domain; --default-domain gives it one."""


class NoText(BadLine):
    """A line without the field of the text."""


# preprocess_data.py hashes the repr of these classes and of DocumentReader to decide whether a run may resume: renaming
# a class or a field would orphan unfinished runs and array jobs.
@dataclass(frozen=True)
class Rule:
    r"""Assigns a domain to the records in which a field matches a pattern.

    Attributes:
        key: the field, with dots for nested objects, or "@file".
        pattern: a regular expression, searched for anywhere in the field.
        domain: the domain's name; \1 and \g<name> refer to groups of the pattern.
    """

    key: str
    pattern: regex.Pattern
    domain: str


@dataclass(frozen=True)
class DomainRules:
    """Ordered rules; the first rule that matches decides the domain.

    Attributes:
        rules: in order of priority. A rule does not match a record in which its field is missing.
        otherwise: the domain if no rule matches; None makes such a record a bad line.
    """

    rules: tuple[Rule, ...]
    otherwise: str | None = None

    @property
    def columns(self) -> set[str]:
        """The top-level fields that the rules read."""
        return {rule.key.split(".")[0] for rule in self.rules if rule.key != FILE_KEY}

    def domain_of(self, record: Any, file: str) -> str:
        """Returns the domain of a record. Raises BadLine if no rule matches or its domain is empty."""
        for rule in self.rules:
            value = file if rule.key == FILE_KEY else _domain_name(_value_at(record, rule.key))
            if not isinstance(value, str):
                continue
            try:
                match = rule.pattern.search(value, timeout=_TIMEOUT_SECONDS)
            except TimeoutError:
                raise SlowRule(f"the pattern {rule.pattern.pattern!r} on {rule.key!r}") from None
            if match:
                name = match.expand(rule.domain)
                if not name:
                    raise BadLine(f"{rule.key!r}: the pattern {rule.pattern.pattern!r} yields an empty domain")
                return name
        if self.otherwise is None:
            raise NoDomain("no domain rule matches")
        return self.otherwise


@dataclass(frozen=True)
class DomainKey:
    """Takes the domain from a field.

    Attributes:
        key: the field, with dots for nested objects.
    """

    key: str

    @property
    def columns(self) -> set[str]:
        """The top-level field of the key."""
        return {self.key.split(".")[0]}

    def domain_of(self, record: Any, file: str) -> str:
        """Returns the domain of a record. Raises BadLine if the field is missing, empty, or neither text nor an
        integer."""
        value = _value_at(record, self.key)
        if value is _MISSING:
            raise NoDomain(f"no key {self.key!r}")
        if value is None:
            raise NoDomain(f"{self.key!r} is null")
        name = _domain_name(value)
        if name is None:
            raise BadLine(f"{self.key!r} is not text")
        if not name.strip():
            raise NoDomain(f"{self.key!r} is empty")
        return name


def rule_by_file(pattern: str) -> DomainRules:
    """Returns the rule that takes the domain from group 1 of a pattern, which must match the full path of the file.
    Raises ConfigError if the pattern is invalid or has no group."""
    return DomainRules((_rule("--domain-from-file", FILE_KEY, f"^(?:{pattern})$", r"\1"),))


def _rule(subject: str, key: str, pattern: str, domain: str) -> Rule:
    try:
        compiled = regex.compile(pattern)
        names = {number: f"?P<{name}>" for name, number in compiled.groupindex.items()}
        # Expands the template on an empty match with the same groups, to reject it before any text is read.
        groups = "".join(f"({names.get(number, '')})" for number in range(1, compiled.groups + 1))
        regex.compile(groups).match("").expand(domain)
        domain.encode("utf-8")
    except (regex.error, IndexError, ValueError, OverflowError, RecursionError) as error:
        value = f"pattern {pattern!r}, domain {domain!r}: {error}"
        rule = "a valid regular expression, and a domain that refers only to its groups"
        raise ConfigError(Fault(subject, value, rule, "fix the pattern or the domain")) from error
    return Rule(key, compiled, domain)


def slow_rule_error(rule: str) -> ConfigError:
    """Returns the error of a run that stops because a regular expression timed out too often."""
    value = f"{rule} took more than {_TIMEOUT_SECONDS:g} s, {_MAX_TIMEOUTS} times"
    expected = "a pattern whose run time is linear in the length of the text"
    return ConfigError(Fault("domain rules", value, expected, "rewrite it without nested repetitions, such as (a|aa)+"))


def count_timeouts(timeouts: Counter[str], rules: Iterable[str]) -> None:
    """Adds `rules`, each of which timed out once, to `timeouts`. Raises ConfigError if one timed out too often."""
    timeouts.update(rules)
    for rule, count in timeouts.items():
        if count >= _MAX_TIMEOUTS:
            raise slow_rule_error(rule)


def name_fault(subject: str, name: str) -> Fault | None:
    """Returns the fault of a domain name that the user gave, or None if it is valid."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return Fault(subject, repr(name), "a name without lone surrogates", "give another name")
    return None if name.strip() else Fault(subject, repr(name), "a name that is not empty", "give another name")


def load_rules(path: Path) -> DomainRules:
    """Reads domain rules: {"format", "rules": [{"key", "pattern", "domain"}], "otherwise": NAME or null}.

    Raises:
        ConfigError: holds every fault of the file.
    """
    subject = f"--domain-rules {path}"
    content = read_json_object(path, subject)
    faults: list[Fault] = []
    if content.get("format") != RULES_FORMAT:
        faults.append(Fault(subject, f"format {content.get('format')!r}", RULES_FORMAT, "see examples/domains"))
    listed, otherwise = content.get("rules"), content.get("otherwise")
    if not isinstance(listed, list) or not listed:
        faults.append(Fault(subject, "no rules", "a list 'rules' of at least one", "see examples/domains"))
        listed = []
    if otherwise is not None and (not isinstance(otherwise, str) or name_fault(subject, otherwise)):
        faults.append(Fault(subject, f"otherwise {otherwise!r}", "a name or null", "give one of these"))
    rules = []
    for number, rule in enumerate(listed, 1):
        fields = [rule.get(key) for key in ("key", "pattern", "domain")] if isinstance(rule, dict) else []
        if not fields or not all(isinstance(field, str) and field for field in fields):
            expected = "an object with key, pattern and domain, all non-empty text"
            faults.append(Fault(subject, f"rule {number}", expected, "fix that rule"))
            continue
        try:
            rules.append(_rule(f"{subject}, rule {number}", *map(str, fields)))
        except ConfigError as error:
            faults += error.faults
    raise_if_any(faults)
    return DomainRules(tuple(rules), otherwise)


def load_domain_list(path: Path) -> tuple[str, ...]:
    """Reads the allowed domain names, in order: {"format", "domains": [NAME, ...]}. Raises ConfigError."""
    subject = f"--domain-list {path}"
    content = read_json_object(path, subject)
    names = content.get("domains")
    valid_names = (
        isinstance(names, list)
        and names
        and all(isinstance(name, str) and name_fault(subject, name) is None for name in names)
    )
    if content.get("format") != LIST_FORMAT or not valid_names or (names and len(set(names)) < len(names)):
        rule = f"format {LIST_FORMAT!r} and a list 'domains' of unique names"
        raise ConfigError(Fault(subject, "not a list of domains", rule, "see examples/domains"))
    return tuple(names or ())


@dataclass(frozen=True)
class Document:
    """A document of the input.

    Attributes:
        text: may be empty.
        split: "train" or "valid".
        size: bytes of the text in UTF-8.
    """

    text: str
    domain: str
    split: str
    size: int


@dataclass(frozen=True)
class DocumentReader:
    """Turns records into documents.

    Attributes:
        text_key: the field of the text, with dots for nested objects.
        domains: decides the domain of a record.
        split: the split of all documents, except those held out by `valid_fraction`.
        valid_fraction: fraction of documents that goes to the valid split. A hash of the text decides, so all copies of
            a text land in the same split, regardless of the order of the input.
        known: the allowed domain names; None allows any.
        default_domain: the domain of records without one; None makes such records bad lines.
    """

    text_key: str
    domains: DomainKey | DomainRules
    split: str = "train"
    valid_fraction: float = 0.0
    known: frozenset[str] | None = None
    default_domain: str | None = None

    @property
    def columns(self) -> list[str]:
        """The top-level fields that are read."""
        return sorted({self.text_key.split(".")[0], *self.domains.columns})

    def needed_of(self, domain: str | None = None) -> list[str]:
        """Returns the columns that a CSV or Parquet file must have.

        Args:
            domain: the domain that the file's folder gives, if any.
        """
        text = self.text_key.split(".")[0]
        # Rules accept missing fields.
        optional = domain is not None or self.default_domain is not None or isinstance(self.domains, DomainRules)
        return [text] if optional else sorted({text, *self.domains.columns})

    def read(self, record: Any, file: str, domain: str | None = None) -> Document:
        """Returns the document of a record; its text may be empty. Raises BadLine if the record holds none.

        Args:
            file: the path of the record's file.
            domain: the domain that the file's folder gives, if any.
        """
        text = record.text if isinstance(record, Text) else _text_at(record, self.text_key)
        domain = self._domain(record, file, domain)
        try:
            # Most text is ASCII, which needs no encoding to be measured.
            size = len(text) if text.isascii() else len(text.encode("utf-8"))
            domain.encode("utf-8")
        except UnicodeEncodeError as error:
            key = repr(self.text_key) if error.object is text else "the domain name"
            raise BadLine(f"{key} contains a lone surrogate") from error
        held_out = self.valid_fraction > 0.0 and share_of(text.encode("utf-8")) < self.valid_fraction
        return Document(text, domain, "valid" if held_out else self.split, size)

    def _domain(self, record: Any, file: str, folder_domain: str | None) -> str:
        """Returns the domain name, stripped unless `known` lists it with its white space."""
        try:
            name = self.domains.domain_of(record, file) if folder_domain is None else folder_domain
        except NoDomain:
            if self.default_domain is None:
                raise
            name = self.default_domain
        domain = name if self.known is not None and name in self.known else name.strip()
        if self.known is not None and domain not in self.known:
            raise BadLine(f"unknown domain {domain[:60]!r}")
        return domain

    def documents(self, block: Block) -> Iterator[tuple[int, Document | BadLine]]:
        """Yields (number, document or fault) for each record of a block.

        Raises:
            ConfigError: the regular expression of a rule timed out too often.
        """
        timeouts: Counter[str] = Counter()
        for number, record in parse_block(block):
            try:
                yield number, record if isinstance(record, BadLine) else self.read(record, block.file, block.domain)
            except SlowRule as error:
                count_timeouts(timeouts, [error.rule])
                yield number, error
            except BadLine as error:
                yield number, error


def share_of(text: bytes) -> float:
    """Returns a hash of the text, uniform in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "big") / 2**48


_MISSING = object()


def _value_at(record: Any, key: str) -> Any:
    """Returns the value of a key, or `_MISSING`. Dots in the key descend into objects, including those that are
    stored as JSON text."""
    value = record
    for part in key.split("."):
        if isinstance(value, str) and value.lstrip()[:1] == "{":
            # Tables often store nested objects as JSON text.
            try:
                value = orjson.loads(value)
            except (orjson.JSONDecodeError, UnicodeEncodeError):
                return _MISSING
        if not isinstance(value, dict) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _domain_name(value: Any) -> str | None:
    """Returns the domain name in a field, which is text or an integer; None for any other type."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _text_at(record: Any, key: str) -> str:
    value = _value_at(record, key)
    if value is _MISSING:
        raise NoText(f"no key {key!r}")
    if not isinstance(value, str):
        raise BadLine(f"{key!r} is {'null' if value is None else 'not text'}")
    return value


def describe(block: Block, number: int, fault: BadLine) -> str:
    """Describes a bad line or file in a message."""
    place = fault.place if isinstance(fault, BadFile) else block.place(number)
    return f"{block.file}, {place}: {fault}" if place else f"{block.file}: {fault}"
