"""Hugging Face folder -> run folder: python tools/import_hf.py source=DIR output=RUN_DIR [recipe=NAME ...].

Without recipe= the source must be an export of ours. The run folder can be continued, evaluated and exported like any.
"""

from __future__ import annotations

import sys
from pathlib import Path

USAGE = "usage: python tools/import_hf.py source=DIR output=RUN_DIR [recipe=NAME [section.field=value ...]]"


def main(arguments: list[str]) -> int:
    """Exit code: 0 written, 2 wrong usage or a folder that does not fit."""
    given = {key: value for key, _, value in (item.partition("=") for item in arguments) if key in ("source", "output")}
    overrides = [item for item in arguments if item.partition("=")[0] not in given]
    if len(given) != 2:
        print(USAGE, file=sys.stderr)
        return 2
    from realsr_hpc.config.load import compose_one
    from realsr_hpc.export import import_folder

    try:
        config = compose_one(overrides) if overrides else None
        written = import_folder(Path(given["source"]), Path(given["output"]), config)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"checkpoint {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
