"""Run folder -> Hugging Face folder: python tools/export_hf.py run=RUN_DIR output=DIR [checkpoint=DIR] [dtype=bf16]."""

from __future__ import annotations

import sys
from pathlib import Path

USAGE = """\
usage: python tools/export_hf.py run=RUN_DIR output=DIR [checkpoint=RUN_DIR/checkpoints/step-N] [licence=ID]
                                 [dtype=bf16|fp32]   (rounds the policy's weights; default: as they are)"""
KEYS = {"run", "output", "checkpoint", "licence", "dtype"}
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def main(arguments: list[str]) -> int:
    """Exit code: 0 written, 2 wrong usage or a run that cannot be exported."""
    given = dict(item.partition("=")[::2] for item in arguments)
    if not {"run", "output"} <= given.keys() <= KEYS or given.get("dtype", "bf16") not in DTYPES:
        print(USAGE, file=sys.stderr)
        return 2
    import torch

    from realsr_hpc.export import export_run

    try:
        taken = export_run(
            Path(given["run"]),
            Path(given["output"]),
            checkpoint_path=Path(given["checkpoint"]) if "checkpoint" in given else None,
            licence=given.get("licence"),
            dtype=getattr(torch, DTYPES[given["dtype"]]) if "dtype" in given else None,
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{given['output']}: {taken.name} of {given['run']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
