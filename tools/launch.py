"""Run, plan or sweep a recipe, here or on Slurm: `python tools/launch.py recipe=grpo_tiny`; --help tells the rest."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from realsr_hpc.launch.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
