"""What a line of the input is: its text, its domain, and the split that it belongs to."""

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
from megatron_doremi.preprocessing.sources import BadFile, BadLine, Block, Text, entries
from megatron_doremi.storage.files import read_json_object

RULES_FORMAT = "megatron-doremi-domain-rules/1"
LIST_FORMAT = "megatron-doremi-domain-list/1"
# The key of a rule that looks at the path of the input file instead of a field.
FILE_KEY = "@file"
# A file's name up to its number: arxiv-00012.jsonl.zst, books_3_of_8.parquet.
FILE_PATTERN = r"(?:.*/)?(.+?)(?:[-_.]*(?:\d+|of))*\.(?:(?:jsonl|ndjson|json|csv|txt|md)(?:\.(?:zstd?|gz))?|parquet)"
# Seconds that one expression may take over one field.
_PATIENCE = 5.0
# Fields over which an expression may take longer before the run stops.
_TIMEOUTS = 3


class SlowRule(BadLine):
    """A line over which an expression took too long.

    Attributes:
        rule: what is said of the rule.
    """

    def __init__(self, rule: str):
        super().__init__(f"{rule} took more than {_PATIENCE:g} s")
        self.rule = rule


class NoDomain(BadLine):
    """A line that says no domain; --default-domain gives it one."""


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
            value = file if rule.key == FILE_KEY else _named(_find(entry, rule.key))
            if not isinstance(value, str):
                continue
            try:
                match = rule.pattern.search(value, timeout=_PATIENCE)
            except TimeoutError:
                raise SlowRule(f"the pattern {rule.pattern.pattern!r} over {rule.key!r}") from None
            if match:
                name = match.expand(rule.domain)
                if not name:
                    raise BadLine(f"{rule.key!r}: the pattern {rule.pattern.pattern!r} gives an empty domain")
                return name
        if self.otherwise is None:
            raise NoDomain("no domain rule matches")
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
        """The domain of a line. Raises BadLine where the field is missing, empty, or neither text nor an integer."""
        value = _find(entry, self.key)
        if value is _MISSING:
            raise NoDomain(f"no key {self.key!r}")
        if value is None:
            raise NoDomain(f"{self.key!r} is null")
        name = _named(value)
        if name is None:
            raise BadLine(f"{self.key!r} is not text")
        if not name.strip():
            raise NoDomain(f"{self.key!r} is empty")
        return name


def rule_by_file(pattern: str) -> DomainRules:
    """The domain is the first group of a pattern that matches the file's whole path. Raises ConfigError."""
    return DomainRules((_rule("--domain-from-file", FILE_KEY, f"^(?:{pattern})$", r"\1"),))


def _rule(what: str, key: str, pattern: str, domain: str) -> Rule:
    try:
        compiled = regex.compile(pattern)
        names = {number: f"?P<{name}>" for name, number in compiled.groupindex.items()}
        # A match with the same groups, on which the template is tried.
        groups = "".join(f"({names.get(number, '')})" for number in range(1, compiled.groups + 1))
        regex.compile(groups).match("").expand(domain)
        domain.encode("utf-8")
    except (regex.error, IndexError, ValueError, OverflowError, RecursionError) as error:
        value = f"pattern {pattern!r}, domain {domain!r}: {error}"
        raise ConfigError(Fault(what, value, "a regular expression, and groups that it has", "mend it")) from error
    return Rule(key, compiled, domain)


def slow_rule_error(rule: str) -> ConfigError:
    """The error of a run that an expression holds up."""
    value = f"{rule} took more than {_PATIENCE:g} s, {_TIMEOUTS} times"
    rule = "patterns whose time grows with the length of the text alone"
    return ConfigError(Fault("domain rules", value, rule, "rewrite it without nested repetitions, such as (a|aa)+"))


def count_timeouts(seen: Counter[str], more: Iterable[str]) -> None:
    """Counts rules that took too long. Raises ConfigError where one of them did too often."""
    seen.update(more)
    for rule, count in seen.items():
        if count >= _TIMEOUTS:
            raise slow_rule_error(rule)


def name_fault(what: str, name: str) -> Fault | None:
    """What is wrong with a domain's name that the user gave, if anything."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return Fault(what, repr(name), "a name without lone surrogates", "mend it")
    return None if name.strip() else Fault(what, repr(name), "a name that is not empty", "mend it")


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
    if otherwise is not None and (not isinstance(otherwise, str) or name_fault(what, otherwise)):
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
    good = (
        isinstance(names, list)
        and names
        and all(isinstance(name, str) and name_fault(what, name) is None for name in names)
    )
    if entry.get("format") != LIST_FORMAT or not good or (names and len(set(names)) < len(names)):
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
        default_domain: of lines that say none; None: such lines are bad.
    """

    text_key: str
    domains: DomainKey | DomainRules
    split: str = "train"
    valid_fraction: float = 0.0
    known: frozenset[str] | None = None
    default_domain: str | None = None

    @property
    def columns(self) -> list[str]:
        """The fields at the top that are read."""
        return sorted({self.text_key.split(".")[0], *self.domains.columns})

    def needed_of(self, domain: str | None = None) -> list[str]:
        """Those of the columns that a CSV or Parquet file has to have.

        Args:
            domain: where the file's folder says it.
        """
        text = self.text_key.split(".")[0]
        # A rule passes over fields that are missing.
        given = domain is not None or self.default_domain is not None or isinstance(self.domains, DomainRules)
        return [text] if given else sorted({text, *self.domains.columns})

    def read(self, entry: Any, file: str, domain: str | None = None) -> Document:
        """The document of a line, whose text may be empty. Raises BadLine where it holds none.

        Args:
            domain: where the file's folder says it.
        """
        text = entry.text if isinstance(entry, Text) else _text_at(entry, self.text_key)
        domain = self._domain(entry, file, domain)
        try:
            # Most text is ASCII, of which the size is known.
            size = len(text) if text.isascii() else len(text.encode("utf-8"))
            domain.encode("utf-8")
        except UnicodeEncodeError as error:
            key = repr(self.text_key) if error.object is text else "the domain's name"
            raise BadLine(f"{key} holds half a surrogate pair") from error
        held_out = self.valid_fraction > 0.0 and share_of(text.encode("utf-8")) < self.valid_fraction
        return Document(text, domain, "valid" if held_out else self.split, size)

    def _domain(self, entry: Any, file: str, given: str | None) -> str:
        """The name without the white space around it, unless it is known with it."""
        try:
            name = self.domains.domain_of(entry, file) if given is None else given
        except NoDomain:
            if self.default_domain is None:
                raise
            name = self.default_domain
        domain = name if self.known is not None and name in self.known else name.strip()
        if self.known is not None and domain not in self.known:
            raise BadLine(f"unknown domain {domain[:60]!r}")
        return domain

    def documents(self, block: Block) -> Iterator[tuple[int, Document | BadLine]]:
        """(number, document or what is wrong) of each line of a block.

        Raises:
            ConfigError: a rule's expression takes too long again and again.
        """
        slow: Counter[str] = Counter()
        for number, entry in entries(block):
            try:
                yield number, entry if isinstance(entry, BadLine) else self.read(entry, block.file, block.domain)
            except SlowRule as error:
                count_timeouts(slow, [error.rule])
                yield number, error
            except BadLine as error:
                yield number, error


def share_of(text: bytes) -> float:
    """A number in [0, 1) that only the text decides, evenly spread."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "big") / 2**48


_MISSING = object()


def _find(entry: Any, key: str) -> Any:
    """The value of a key, with dots into nested objects and into text that holds one; `_MISSING` where it is not."""
    for part in key.split("."):
        if isinstance(entry, str) and entry.lstrip()[:1] == "{":
            # Tables often hold what was an object as its JSON.
            try:
                entry = orjson.loads(entry)
            except (orjson.JSONDecodeError, UnicodeEncodeError):
                return _MISSING
        if not isinstance(entry, dict) or part not in entry:
            return _MISSING
        entry = entry[part]
    return entry


def _named(value: Any) -> str | None:
    """A domain's name: text, or an integer."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _text_at(entry: Any, key: str) -> str:
    value = _find(entry, key)
    if value is _MISSING:
        raise BadLine(f"no key {key!r}")
    if not isinstance(value, str):
        raise BadLine(f"{key!r} is not text")
    return value


def describe(block: Block, number: int, fault: BadLine) -> str:
    """A bad line, or what is wrong with a file, as messages name it."""
    place = fault.place if isinstance(fault, BadFile) else block.place(number)
    return f"{block.file}, {place}: {fault}" if place else f"{block.file}: {fault}"
