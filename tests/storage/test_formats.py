"""Schemas of JSON files: every violation is a fault with its place, newer versions are refused as such."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest
from pydantic import Field

from megatron_doremi.errors import ConfigError
from megatron_doremi.storage.formats import Count, Name, Schema, check_entry, read_checked, sealed


class Inner(Schema):
    size: Count


class Example(Schema):
    FORMAT: ClassVar[str] = "example/2"
    OLDER_FORMATS: ClassVar[tuple[str, ...]] = ("example/1",)
    name: Name
    rate: float
    parts: list[Inner] = Field(default_factory=list)


GOOD = {"format": "example/2", "name": "a", "rate": 1, "parts": [{"size": 3}]}


def faults_of(entry):
    with pytest.raises(ConfigError) as caught:
        check_entry(entry, "file x", Example, "make it again")
    return caught.value.faults


def test_a_good_entry_is_read_and_older_formats_too(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(GOOD))
    example = read_checked(path, "file x", Example, "make it again")
    assert (example.name, example.rate, example.parts[0].size) == ("a", 1.0, 3)
    assert check_entry(GOOD | {"format": "example/1"}, "file x", Example, "").name == "a"


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"name": ""}, "name"),
        ({"name": 3}, "name"),
        ({"rate": True}, "rate"),
        ({"rate": "1"}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"rate": float("inf")}, "rate"),
        ({"rate": 10**400}, "rate"),
        ({"parts": [{"size": -1}]}, "parts.0.size"),
        ({"parts": [{"size": 2**63}]}, "parts.0.size"),
        ({"parts": [{"size": 10**5000}]}, "parts.0.size"),
        ({"parts": [{"size": 1.0}]}, "parts.0.size"),
        ({"parts": [{"size": True}]}, "parts.0.size"),
        ({"parts": {}}, "parts"),
        ({"parts": [{}]}, "parts.0.size"),
    ],
)
def test_a_violation_names_its_place(change, place):
    (fault,) = faults_of(GOOD | change)
    assert fault.subject == "file x"
    assert fault.value.startswith(place)


class Sealed(Example):
    SEALED: ClassVar[bool] = True


class SealedLater(Sealed):
    SEAL_OPTIONAL: ClassVar[bool] = True


@pytest.mark.parametrize("change", [{}, {"name": "other"}, {"sha256": "0" * 64}, {"sha256": None}, {"more": 1}])
def test_a_changed_object_does_not_fit_its_seal(change):
    for schema in (Sealed, SealedLater):
        entry = sealed(GOOD) | change
        if change:
            with pytest.raises(ConfigError, match="damaged or edited"):
                check_entry(entry, "file x", schema, "")
        else:
            check_entry(entry, "file x", schema, "")


def test_only_early_files_have_no_seal():
    check_entry(GOOD, "file x", SealedLater, "")
    check_entry(GOOD | {"format": "example/1"}, "file x", Sealed, "")
    with pytest.raises(ConfigError, match="damaged or edited"):
        check_entry(GOOD, "file x", Sealed, "")


def test_all_violations_are_said_at_once():
    assert len(faults_of({"format": "example/2", "rate": "x"})) == 2
    many = faults_of(GOOD | {"parts": [{"size": -1}] * 400})
    assert len(many) == 11
    assert "390 more" in many[-1].value


@pytest.mark.parametrize("found", ["example/0", "other/2", "example/", None, 3, ["example/2"], "example/2 "])
def test_another_format_is_refused(found):
    (fault,) = faults_of(GOOD | {"format": found})
    assert "format" in fault.value
    assert "newer" not in fault.value


@pytest.mark.parametrize("found", ["example/3", "example/10"])
def test_a_newer_format_is_refused_as_such(found):
    (fault,) = faults_of(GOOD | {"format": found, "name": 3})
    assert "newer version" in fault.value


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": -Infinity}', '{"a": 1, "a": 2}', "[1]", "{", "[" * 100000, ""])
def test_what_is_not_one_json_object_is_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ConfigError):
        read_checked(path, "file x", Example, "make it again")
