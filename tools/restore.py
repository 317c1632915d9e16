"""Restore images: python tools/restore.py run=RUN_DIR input=DIR_OR_FILE output=DIR [overlap_px=8] [batch_size=16].

Also checkpoint=RUN_DIR/checkpoints/step-N instead of run=. Run again, it does only what is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from realsr_hpc.config.arguments import read_arguments, read_count  # noqa: E402

DEFAULTS = {"run": None, "checkpoint": None, "input": None, "output": None, "overlap_px": "8", "batch_size": "16"}


def main(arguments: list[str]) -> int:
    """Exit code: 0 all restored, 1 some files could not be read, 2 wrong usage."""
    try:
        given = read_arguments(arguments, DEFAULTS)
        if not given["input"] or not given["output"]:
            raise ValueError("input=DIR_OR_FILE and output=DIR are needed")
        overlap_px, batch_size = read_count(given, "overlap_px"), read_count(given, "batch_size", 1)
        report = _restore(given, Path(given["input"]), Path(given["output"]), overlap_px, batch_size)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(report)
    return 1 if report.failed else 0


def _restore(given: dict[str, str | None], source: Path, output: Path, overlap_px: int, batch_size: int):
    from realsr_hpc.restore import RestoreSettings, find_run, open_restorer, restore_folder

    config, checkpoint = find_run(given["run"], given["checkpoint"])
    upscale = config.vlcot.upscale
    tile_px = config.vlcot.image_sizes_px[-1] // upscale
    settings = RestoreSettings(str(checkpoint), tile_px, upscale, overlap_px, batch_size)
    return restore_folder(open_restorer(config, checkpoint), source, output, settings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
