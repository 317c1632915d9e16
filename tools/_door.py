"""Opens a command of the package: `python tools/NAME.py ...` does what `realsr-hpc NAME ...` does."""

import sys

try:
    from realsr_hpc.commands import main
except ModuleNotFoundError as error:
    if error.name != "realsr_hpc":
        raise
    sys.exit("realsr_hpc is not installed for this Python; in the project's folder: make install, or pip install -e .")


def run(name: str) -> None:
    """End the process with the command's exit code."""
    sys.argv[1:1] = [name]
    sys.exit(main())
