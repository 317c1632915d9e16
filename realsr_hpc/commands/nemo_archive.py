"""Convert an export to `.nemo` and back.

realsr-hpc nemo-archive pack=EXPORT output=FILE.nemo
realsr-hpc nemo-archive unpack=FILE.nemo output=DIR

Needs the extra `nemo`. EXPORT is a folder that export-hf wrote; import-weights reads an unpacked one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from realsr_hpc.config.arguments import read_arguments

DEFAULTS = {"pack": None, "unpack": None, "output": None}


def main(arguments: list[str]) -> int:
    """Exit code: 0 written, 2 wrong usage, a folder or archive that does not fit, or no nemo-toolkit."""
    try:
        given = read_arguments(arguments, DEFAULTS, __doc__)
        source = given["pack"] or given["unpack"]
        if not source or not given["output"] or (given["pack"] and given["unpack"]):
            raise ValueError("pack=EXPORT or unpack=FILE.nemo is needed, and output=")
        from realsr_hpc.export import nemo_archive

        run = nemo_archive.pack if given["pack"] else nemo_archive.unpack
        run(Path(source), Path(given["output"]))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(given["output"])
    return 0
