"""`key=value` arguments of the commands: unknown keys are errors that name the nearest valid key."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

from realsr_hpc.paths import expanded

Default = TypeVar("Default", str, str | None)


def read_arguments(
    arguments: Sequence[str], valid: Mapping[str, Default], usage: str | None
) -> dict[str, Default | str]:
    """Values by key; `valid` holds each key's default. `--help` prints `usage` and exits with 0.

    `~` and `~user` are filled in, as no shell does behind `=`. Raises ValueError for an argument without `=`, a key
    given twice, and an unknown key, naming the nearest valid one.
    """
    if {"-h", "--help"} & set(arguments):
        print((usage or "").strip())
        raise SystemExit(0)
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not value:
            raise ValueError(f"argument {argument!r} is not key=value; valid keys: {', '.join(valid) or 'none'}")
        if key not in valid:
            close = difflib.get_close_matches(key, list(valid), n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"unknown key {key!r}; {hint}valid keys: {', '.join(valid)}")
        if key in given:
            raise ValueError(f"key {key!r} is given twice: {given[key]!r} and {value!r}; keep one")
        given[key] = ",".join(str(expanded(part)) if part.startswith("~") else part for part in value.split(","))
    return {**valid, **given}


def read_with_overrides(
    arguments: Sequence[str], valid: Mapping[str, Default], usage: str | None, *, sections_only: bool = False
) -> tuple[dict[str, Default | str], list[str]]:
    """As `read_arguments`, and the overrides of a recipe among the arguments.

    sections_only: overrides are keys with a dot (`grpo.group_size=4`); else every key that is none of `valid`.
    """
    overrides = []
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if equals and key not in valid and ("." in key or not sections_only):
            overrides.append(argument)
    return read_arguments([argument for argument in arguments if argument not in overrides], valid, usage), overrides


def read_count(arguments: Mapping[str, str | None], key: str, minimum: int = 0) -> int:
    """The whole number under `key`. Raises ValueError when it is none, or below `minimum`."""
    value = arguments[key]
    if value is None:
        raise ValueError(f"{key}=N is needed: a whole number from {minimum} up")
    try:
        number = int(value)
    except ValueError:
        raise ValueError(f"{key}={value!r} is no whole number; give one from {minimum} up") from None
    if number < minimum:
        raise ValueError(f"{key}={number} is below {minimum}; give {minimum} or more")
    return number


def read_choice(arguments: Mapping[str, str | None], key: str, options: Collection[str]) -> str:
    """What stands under `key`. Raises ValueError when it is none of `options`."""
    value = arguments[key]
    if value is None or value not in options:
        raise ValueError(f"{key}={value!r} is none of {', '.join(options)}; name one")
    return value


def read_flag(arguments: Mapping[str, str | None], key: str) -> bool:
    """True or false under `key`. Raises ValueError for anything else."""
    value = arguments[key]
    if value not in ("true", "false"):
        raise ValueError(f"{key}={value!r} is neither true nor false; give one of them")
    return value == "true"
