"""`python -m realsr_hpc RUN_DIR`: execute the recipe RUN_DIR/recipe.yaml.

Without RANK in the environment this process is the node's supervisor, which starts one process per task and watches
them. With RANK, set by the supervisor or by torchrun, it is one of those processes. `realsr-hpc launch` submits runs.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
from importlib import import_module
from pathlib import Path

from realsr_hpc.config.load import RecipeError
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.paths import CHECKOUT_VARIABLE
from realsr_hpc.tracking.place import read_place, recipe_of


def main(arguments: list[str]) -> int:
    """Execute a run; returns the exit code.

    0: done; 2: wrong usage or invalid recipe; 85: stopped with a checkpoint; any other: failed.
    """
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m realsr_hpc RUN_DIR   (a run folder made by realsr-hpc launch)", file=sys.stderr)
        return 2
    run_dir = Path(arguments[0]).resolve()
    try:
        config = recipe_of(run_dir)
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    if (place := read_place(run_dir)) and place.checkout:
        os.environ[CHECKOUT_VARIABLE] = place.checkout
    if "RANK" in os.environ:
        return run_rank(config, run_dir)
    from realsr_hpc.launch.job import run_node

    return run_node(run_dir)


def run_rank(config: RunConfig, run_dir: Path) -> int:
    """Run one process of the run's training loop; returns its exit code."""
    from realsr_hpc.launch.signals import StopFlag

    # Before the slow imports, so that a signal during them does not kill the rank.
    stop = StopFlag.install()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("megatron").setLevel(logging.WARNING)  # it lists every parameter
    train = import_module(f"realsr_hpc.train.{config.task}")
    # The imported modules hold a million permanent objects. Megatron runs the garbage collector at every
    # checkpoint, and Python several times at exit. Frozen objects are skipped, which saves half a second per checkpoint
    # and seconds at exit.
    gc.freeze()
    atexit.register(gc.freeze)
    code = train.main(config, run_dir, stop)
    stop.retire()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
