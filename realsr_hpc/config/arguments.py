"""Reads `key=value` command lines, for all programs: commands, launching, chains and benchmarks.

Errors name the key, its value, the nearest valid key and a remedy. The overrides of a recipe (`section.field=value`)
are read by Hydra; this module only separates them from a program's own keys.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from realsr_hpc.config.schema import GROUPS, RunConfig
from realsr_hpc.paths import expanded

Default = TypeVar("Default", str, str | None)
RECIPE_KEYS = {"recipe", *GROUPS, *RunConfig.model_fields}
"""Keys that an override without a dot may set."""
FLAGS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


class ArgumentError(ValueError):
    """Raised for a command line that cannot be parsed."""


def read_arguments(
    arguments: Sequence[str], valid: Mapping[str, Default], usage: str | None
) -> dict[str, Default | str]:
    """Values by key; `valid` holds each key's default. `--help` prints `usage` and exits with 0.

    `~` and `~user` are expanded, which shells do not do after `=`. Raises ArgumentError for an argument that is not
    key=value, an empty value, a key given twice, and an unknown key, naming the nearest valid one.
    """
    values, _ = _read(arguments, valid, usage, lambda key: False)
    return values


def read_with_overrides(
    arguments: Sequence[str], valid: Mapping[str, Default], usage: str | None, *, sections_only: bool = False
) -> tuple[dict[str, Default | str], list[str]]:
    """Like `read_arguments`, but also returns the overrides of a recipe, in the order given.

    sections_only: only keys with a dot (`grpo.group_size=4`) are overrides; otherwise every key that is not in
    `valid`, and `~key`, which deletes one.
    """
    return _read(arguments, valid, usage, lambda key: "." in key or not sections_only)


def take_switch(arguments: Sequence[str], *names: str) -> tuple[bool, list[str]]:
    """Whether a switch such as `-m` is given under one of its `names`, and the other arguments."""
    rest = [argument for argument in arguments if argument not in names]
    return len(rest) < len(arguments), rest


def read_count(arguments: Mapping[str, str | None], key: str, minimum: int = 0) -> int:
    """The whole number under `key`. ArgumentError: it is missing, no whole number, or below `minimum`."""
    value = arguments[key]
    if value is None:
        raise ArgumentError(f"{key}=N is needed: a whole number of at least {minimum}")
    try:
        number = int(value)
    except ValueError:
        raise ArgumentError(f"{key}={value!r} is not a whole number; give one of at least {minimum}") from None
    if number < minimum:
        raise ArgumentError(f"{key}={number} is below {minimum}; give {minimum} or more")
    return number


def read_counts(arguments: Mapping[str, str], keys: Iterable[str]) -> dict[str, int]:
    """The whole numbers, each at least 1, under several keys. ArgumentError: one of them is not."""
    return {key: read_count(arguments, key, 1) for key in keys}


def read_number(arguments: Mapping[str, str | None], key: str, remedy: str) -> float:
    """The number under `key`. ArgumentError, ending in `remedy`: it is missing or no number."""
    try:
        return float(arguments[key] or "")
    except ValueError:
        raise ArgumentError(f"{key}={arguments[key]!r} is not a number; {remedy}") from None


def read_shard(arguments: Mapping[str, str | None], key: str = "shard") -> tuple[int, int]:
    """`k/n` under `key` as (k, n), 1 <= k <= n: task k of n. ArgumentError: anything else."""
    number, _, count = (arguments[key] or "").partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ArgumentError(f"{key}={arguments[key]!r}: give k/n with k from 1 to n, such as 1/16")
    return int(number), int(count)


def read_choice(arguments: Mapping[str, str | None], key: str, options: Collection[str]) -> str:
    """The value of `key`. ArgumentError: it is not one of `options`."""
    value = arguments[key]
    if value is None or value not in options:
        raise ArgumentError(f"{key}={value!r} is not one of {', '.join(options)}; name one")
    return value


def read_flag(arguments: Mapping[str, str | None], key: str) -> bool:
    """True or false under `key`, also written as yes and no or 1 and 0. ArgumentError: anything else."""
    value = arguments[key]
    if value is None or value.lower() not in FLAGS:
        raise ArgumentError(f"{key}={value!r} is neither true nor false; give one of them")
    return FLAGS[value.lower()]


def _read(
    arguments: Sequence[str], valid: Mapping[str, Default], usage: str | None, is_override: Callable[[str], bool]
) -> tuple[dict[str, Default | str], list[str]]:
    if {"-h", "--help"} & set(arguments):
        print((usage or "").strip())
        raise SystemExit(0)
    given: dict[str, str] = {}
    overrides: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in valid and not key.startswith("-") and (equals or key.startswith("~")) and is_override(key):
            _refuse_unknown_override(key, valid)
            overrides.append(argument)
            continue
        if not equals or key.startswith("-"):
            raise ArgumentError(f"argument {argument!r}: write key=value; {_valid_keys(key.lstrip('-'), valid)}")
        if key not in valid:
            raise ArgumentError(f"unknown key {key!r}; {_valid_keys(key, valid)}")
        if not value:
            raise ArgumentError(f"key {key!r} is empty; give it a value or leave it out")
        if key in given:
            raise ArgumentError(f"key {key!r} is given twice: {given[key]!r} and {value!r}; keep one")
        given[key] = ",".join(str(expanded(part)) if part.startswith("~") else part for part in value.split(","))
    return {**valid, **given}, overrides


def _refuse_unknown_override(key: str, valid: Collection[str]) -> None:
    """ArgumentError for a key without a dot that neither the program nor a recipe has: it may be meant for either."""
    bare = key.lstrip("+~")
    if not {".", ":"} & set(bare) and bare not in RECIPE_KEYS:  # STAGE:KEY may belong to a command of a chain
        close = difflib.get_close_matches(bare, [*valid, *sorted(RECIPE_KEYS)], n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        own = f"{', '.join(valid)}; " if valid else ""
        of_recipe = ", ".join(sorted(RECIPE_KEYS))
        raise ArgumentError(f"unknown key {key!r}; {hint}valid keys: {own}of the recipe: {of_recipe}")


def _valid_keys(key: str, valid: Collection[str]) -> str:
    close = difflib.get_close_matches(key, list(valid), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid keys: {', '.join(valid) or 'none'}"
