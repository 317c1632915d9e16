"""Hugging Face folder -> run folder: realsr-hpc import-hf source=DIR output=RUN_DIR [recipe=NAME field=value ...].

Without recipe= the source must be an export of ours. The run folder can be continued, evaluated and exported like any.
"""

from __future__ import annotations

import sys
from pathlib import Path

from realsr_hpc.config.arguments import read_with_overrides

DEFAULTS = {"source": None, "output": None}


def main(arguments: list[str]) -> int:
    """Exit code: 0 written, 2 wrong usage or a folder that does not fit."""
    try:
        given, overrides = read_with_overrides(arguments, DEFAULTS, __doc__)
        if not given["source"] or not given["output"]:
            raise ValueError("source=DIR and output=RUN_DIR are needed, and recipe=NAME for weights of others")
        written = _import(Path(given["source"]), Path(given["output"]), overrides)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"checkpoint {written}")
    return 0


def _import(source: Path, output: Path, overrides: list[str]) -> Path:
    from realsr_hpc.config.load import compose_one
    from realsr_hpc.export import import_folder

    return import_folder(source, output, compose_one(overrides) if overrides else None)
