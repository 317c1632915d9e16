"""A benchmark's own whole-number options, and everything else as overrides of the recipe."""

from __future__ import annotations

from collections.abc import Mapping


def split_options(arguments: list[str], defaults: Mapping[str, int]) -> tuple[dict[str, int], list[str]]:
    """Own options by name, and the rest. A value that is no whole number from 1 up ends the program with one line."""
    options, rest = dict(defaults), []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in defaults:
            rest.append(argument)
            continue
        if not value.isdigit() or int(value) < 1:
            raise SystemExit(f"{argument}: {name} is a whole number from 1 up, {defaults[name]} by default")
        options[name] = int(value)
    return options, rest
