"""The command line: flags derived from the dataclasses of config.py, parsed with all faults collected.

Flags are spelled as in Megatron-LM. Values are parsed here and not by argparse, because argparse exits at the first
error.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from megatron_doremi.config import SECTIONS, Config, planned_world_size
from megatron_doremi.errors import Fault, raise_if_any
from megatron_doremi.flag_parser import FlagParser, unknown_faults
from megatron_doremi.settings import flag_of
from megatron_doremi.validation import find_faults, phase_faults

_TITLES = {
    "data": "phase and data",
    "model": "model",
    "parallel": "parallel layout",
    "doremi": "DoReMi",
    "training": "training",
    "optimizer": "optimizer",
    "run": "run",
    "planning": "machine of a dry run",
}


# Placeholders of values, by type; of paths and mixtures, by flag.
_METAVARS: dict[Any, str] = {
    "int": "N",
    "float": "X",
    "str": "DIR",
    "domains": "FILE",
    "data_path": "WORD",
    "split": "SHARES",
    "domain_weights": "MIXTURE",
    "domain_names": "MAP",
    "wandb_project": "NAME",
    "reference_losses": "{online,DIR}",
}


def build_parser() -> FlagParser:
    """The parser of pretrain_doremi.py; values stay text until `parse_config` reads them."""
    parser = FlagParser(
        prog="pretrain_doremi.py",
        description="Pretrain GPTs on a mixture of domains whose weights are learned by DoReMi.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for section, cls in SECTIONS.items():
        group = parser.add_argument_group(_TITLES[section])
        for field in dataclasses.fields(cls):
            _add_flag(group, field)
    return parser


def _add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field[Any]) -> None:
    name = flag_of(field.name)
    text = field.metadata["help"].replace("%", "%%")
    if field.type == "bool":
        group.add_argument(name, action="store_true", help=text)
        return
    if field.type == "tuple[str, ...]":
        group.add_argument(name, nargs="+", metavar=_METAVARS.get(field.name, "NAME"), help=text)
        return
    choices = field.metadata["choices"]
    metavar = "{" + ",".join(map(str, choices)) + "}" if choices else _METAVARS.get(field.name, _METAVARS[field.type])
    # A 0 whose meaning the help text does not give is no value, but stands for "not given".
    shown = field.default or (0 if field.default == 0 and (choices or "0:" in text) else "")
    stated = "(default: " in text or "ot given:" in text
    default = "" if shown in ("", ()) or stated else f" (default: {shown})"
    group.add_argument(name, metavar=metavar, help=text + default)


def parse_config(argv: Sequence[str], world_size: int) -> Config:
    """Parses and checks the command line.

    Raises:
        ConfigError: with all faults of the command line.
    """
    config, faults = read_command_line(argv, world_size)
    raise_if_any(faults)
    return config


def read_command_line(argv: Sequence[str], world_size: int | None) -> tuple[Config, list[Fault]]:
    """The settings, and all faults of the command line. A setting with a fault has its default or the given value.

    Args:
        argv: the arguments without the program's name.
        world_size: number of processes that were launched; None if it is unknown.
    """
    parser = build_parser()
    faults: list[Fault] = []
    known, readable = argparse.Namespace(), True
    unknown: list[str] = []
    try:
        # The deepspeed launcher adds --local_rank; launch.py reads LOCAL_RANK, which it sets as well.
        arguments = [word for word in argv if not word.startswith("--local_rank=")]
        known, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        faults.append(Fault("command line", str(error), "each flag with its value", "see --help"))
        readable = False
    flags = [flag_of(field.name) for cls in SECTIONS.values() for field in dataclasses.fields(cls)]
    faults += unknown_faults(unknown, flags)
    faults += phase_faults(getattr(known, "phase", ""), vars(known))
    unreadable: set[str] = set()
    sections = {}
    for section, cls in SECTIONS.items():
        values = {}
        for field in dataclasses.fields(cls):
            if hasattr(known, field.name):
                value, fault = _read(field, getattr(known, field.name))
                values[field.name] = value
                faults += fault
                unreadable |= {each.subject for each in fault}
        sections[section] = cls(**values)
    config = Config(**sections, given=frozenset(vars(known)))
    # A flag whose value cannot be parsed has its default here; faults that follow from that default are not the user's.
    parallel = config.parallel
    smallest = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    ranks = planned_world_size(config.run, smallest if world_size is None else world_size)
    setting_faults = find_faults(config, ranks) if readable else []
    return config, faults + [fault for fault in setting_faults if not unreadable & _flags_in(fault)]


def _flags_in(fault: Fault) -> set[str]:
    """The flags from whose values a fault follows."""
    return set(re.findall(r"--[a-z][a-z0-9-]*", f"{fault.subject} {fault.value} {fault.rule}"))


def _read(field: dataclasses.Field[Any], text: Any) -> tuple[Any, list[Fault]]:
    """The parsed value of a flag, or its default and a fault."""
    flag = flag_of(field.name)
    if field.type == "bool":
        return text, []
    if field.type == "tuple[str, ...]" and not field.metadata["identifiers"]:
        return tuple(text), []
    if field.type == "tuple[str, ...]":
        return tuple(name.replace("-", "_") for word in text for name in word.split(",") if name), []
    value: Any = text
    try:
        if field.type == "int":
            value = int(text)
        elif field.type == "float":
            value = float(text)
            if not math.isfinite(value):
                raise ValueError
    except ValueError:
        kind = "a whole number" if field.type == "int" else "a finite number"
        return field.default, [Fault(flag, text, kind, f"give {flag} {kind}")]
    choices = field.metadata["choices"]
    if choices and value not in choices:
        listed = ", ".join(map(str, choices))
        return field.default, [Fault(flag, text, f"one of {listed}", f"give {flag} one of these")]
    return value, []
