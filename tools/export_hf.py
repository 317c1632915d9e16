"""Run folder -> Hugging Face folder: python tools/export_hf.py run=RUN_DIR output=DIR [checkpoint=DIR] [licence=ID]."""

from __future__ import annotations

import sys
from pathlib import Path

USAGE = "usage: python tools/export_hf.py run=RUN_DIR output=DIR [checkpoint=RUN_DIR/checkpoints/step-N] [licence=ID]"


def main(arguments: list[str]) -> int:
    """Exit code: 0 written, 2 wrong usage or a run that cannot be exported."""
    given = dict(item.partition("=")[::2] for item in arguments)
    if not {"run", "output"} <= given.keys() <= {"run", "output", "checkpoint", "licence"}:
        print(USAGE, file=sys.stderr)
        return 2
    from realsr_hpc.export import export_run

    try:
        taken = export_run(
            Path(given["run"]),
            Path(given["output"]),
            checkpoint_path=Path(given["checkpoint"]) if "checkpoint" in given else None,
            licence=given.get("licence"),
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{given['output']}: {taken.name} of {given['run']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
