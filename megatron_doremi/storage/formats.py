"""Schemas of the JSON files that the program reads: types, ranges and versions, validated before use.

A file format is a subclass of `Schema`, defined next to the code that reads the file. `read_checked` turns every
violation into a fault, so that a damaged or foreign file gives one message and never a traceback later on.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from megatron_doremi.errors import ConfigError, Fault
from megatron_doremi.storage.files import read_json_object

_SHOWN_FAULTS = 10
_SHOWN_CHARACTERS = 60
# Sizes, counts and offsets: integers that have to fit in 64 bits.
Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def _text(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise PydanticCustomError("text", "should be text without lone surrogates") from None
    return text


def _path(text: str) -> str:
    if not _text(text) or "\0" in text:
        raise PydanticCustomError("path", "should be a path: not empty, no NUL character")
    return text


def _file_name(text: str) -> str:
    if _path(text) in (".", "..") or "/" in text or "\\" in text or len(text.encode("utf-8")) > _LONGEST_FILE_NAME:
        raise PydanticCustomError("file_name", "should be the name of a file in the same folder, not a path")
    return text


_LONGEST_FILE_NAME = 255
Name = Annotated[str, Field(min_length=1), AfterValidator(_text)]
# PathText: a path, relative or absolute. FileName: a name in the folder of the file that contains it.
PathText = Annotated[str, AfterValidator(_path)]
FileName = Annotated[str, AfterValidator(_file_name)]


class Schema(BaseModel):
    """One JSON object of a file. Strict: values are not converted to their field's type; NaN and Inf are refused.

    Attributes:
        FORMAT: "family/version", the value of the key `format`; "" if the file has no such key.
        FORMAT_OPTIONAL: early versions of the program wrote this file without the key `format`.
        OLDER_FORMATS: earlier formats that are still read.
        SEALED: `sealed` writes the file; `check_entry` verifies its SHA-256. Files of OLDER_FORMATS have none.
        SEAL_OPTIONAL: early versions wrote this format without a SHA-256; it is verified where it is present.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)
    FORMAT: ClassVar[str] = ""
    FORMAT_OPTIONAL: ClassVar[bool] = False
    OLDER_FORMATS: ClassVar[tuple[str, ...]] = ()
    SEALED: ClassVar[bool] = False
    SEAL_OPTIONAL: ClassVar[bool] = False


SchemaType = TypeVar("SchemaType", bound=Schema)


def read_checked(path: Path, subject: str, schema: type[SchemaType], remedy: str) -> SchemaType:
    """Reads a file that holds one JSON object and validates it.

    Args:
        subject: the file's name in messages, such as "--domains data/domains.json".
        remedy: what the user should do if the file cannot be read or violates the schema.

    Raises:
        ConfigError: with all faults; a file written by a newer version of this program is reported as such.
    """
    return check_entry(read_json_object(path, subject, remedy), subject, schema, remedy)


def check_entry(entry: Mapping[str, Any], subject: str, schema: type[SchemaType], remedy: str) -> SchemaType:
    """Validates a JSON object that was already read; see `read_checked`."""
    fault = format_fault(entry, subject, schema, remedy)
    if fault is not None:
        raise ConfigError(fault)
    try:
        checked = schema.model_validate(dict(entry))
    except ValidationError as error:
        raise ConfigError(_faults(error, subject, remedy)) from error
    if schema.SEALED:
        _check_seal(entry, subject, schema, remedy)
    return checked


def sealed(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An object with a SHA-256 of itself, for files that only this program writes: `check_entry` detects any change."""
    return {**entry, "sha256": _digest(entry)}


def _check_seal(entry: Mapping[str, Any], subject: str, schema: type[Schema], remedy: str) -> None:
    """Raises ConfigError if an object is not what `sealed` returned."""
    optional = schema.SEAL_OPTIONAL or entry.get("format") in schema.OLDER_FORMATS
    if optional and "sha256" not in entry:
        return
    if entry.get("sha256") != _digest({key: value for key, value in entry.items() if key != "sha256"}):
        raise ConfigError(Fault(subject, "damaged or edited", "content that matches its SHA-256", remedy))


def _digest(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode("ascii")).hexdigest()


def format_fault(entry: Mapping[str, Any], subject: str, schema: type[Schema], remedy: str) -> Fault | None:
    """The fault of an object's `format` key; None if the format is known."""
    if not schema.FORMAT or ("format" not in entry and schema.FORMAT_OPTIONAL):
        return None
    file_format = entry.get("format")
    if file_format in (schema.FORMAT, *schema.OLDER_FORMATS):
        return None
    if isinstance(file_format, str) and _is_newer(file_format, schema.FORMAT):
        return Fault(
            subject,
            f"format {file_format!r}, written by a newer version of this program",
            f"a format up to {schema.FORMAT}",
            "read it with that version",
        )
    return Fault(subject, f"format {_shown(file_format)}", f"format {schema.FORMAT}", remedy)


def _is_newer(file_format: str, known_format: str) -> bool:
    family, version = known_format.rsplit("/", 1)
    match = re.fullmatch(re.escape(family) + r"/([1-9][0-9]{0,8})", file_format)
    return match is not None and int(match.group(1)) > int(version)


def _faults(error: ValidationError, subject: str, remedy: str) -> list[Fault]:
    details = error.errors(include_url=False, include_context=False)
    faults = [
        Fault(subject, _value(detail["loc"], detail["type"], detail["input"]), detail["msg"], remedy)
        for detail in details[:_SHOWN_FAULTS]
    ]
    if len(details) > _SHOWN_FAULTS:
        faults.append(Fault(subject, f"{len(details) - _SHOWN_FAULTS} more faults of this kind", "none", remedy))
    return faults


def _value(location: Sequence[int | str], kind: str, given: Any) -> str:
    place = ".".join(map(str, location)) or "the object"
    return f"{place} is missing" if kind == "missing" else f"{place}: {_shown(given)}"


def _shown(value: Any) -> str:
    # repr raises for an integer of more than 4300 digits.
    text = "a huge integer" if isinstance(value, int) and abs(value) >= 10**300 else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."
