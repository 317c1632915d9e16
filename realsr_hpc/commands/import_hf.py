"""realsr-hpc import-hf is renamed: realsr-hpc import-weights has the same source=, output= and recipe=, more formats.

It writes start weights (model.weights=DIR) and tokenizers, no longer a run folder.
"""

from __future__ import annotations

import shlex
import sys


def main(arguments: list[str]) -> int:
    """Exit code 2, as nothing was imported; 0 for --help."""
    if {"-h", "--help"} & set(arguments):
        print((__doc__ or "").strip())
        return 0
    print(f"import-hf is now: realsr-hpc import-weights {shlex.join(arguments)}".rstrip(), file=sys.stderr)
    return 2
