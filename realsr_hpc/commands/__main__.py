"""`python -m realsr_hpc.commands COMMAND ...`, for torchrun and for Pythons whose bin folder is not on PATH."""

import sys

from realsr_hpc.commands import main

if __name__ == "__main__":
    sys.exit(main())
