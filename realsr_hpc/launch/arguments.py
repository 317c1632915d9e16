"""`key=value` arguments of the small commands: closed, with a hint for a misspelt key."""

from __future__ import annotations

from realsr_hpc.config.load import nearest


def read_options(arguments: list[str], defaults: dict[str, str], usage: str) -> dict[str, str]:
    """`defaults` with what `arguments` say; ValueError for an unknown key. `--help` prints `usage` and exits 0."""
    if any(argument in ("-h", "--help") for argument in arguments):
        print(usage.strip())
        raise SystemExit(0)
    options = dict(defaults)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in defaults or not equals:
            raise ValueError(f"{argument!r}: unknown option{nearest(key, defaults)}; there are: {', '.join(defaults)}")
        options[key] = value
    return options
