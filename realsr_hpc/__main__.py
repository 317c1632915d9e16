"""`python -m realsr_hpc RUN_DIR`: run what RUN_DIR/recipe.yaml says.

Without RANK in the environment it is this node's supervisor, which starts one process per task and watches them; with
RANK (set by that supervisor, or by torchrun) it is one of those processes. Submitting is `realsr-hpc launch`'s work.
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
    """Exit code: 0 done, 2 wrong usage or recipe, 85 stopped to be requeued, anything else failed."""
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
    """One process of the run."""
    from realsr_hpc.launch.signals import StopFlag

    # Before the heavy imports: a signal that comes while they run must not kill the rank.
    stop = StopFlag.install()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("megatron").setLevel(logging.WARNING)  # it lists every parameter
    train = import_module(f"realsr_hpc.train.{config.task}")
    # A million objects of imported modules live to the end. Megatron collects garbage at every checkpoint, and Python
    # several times while it leaves: frozen, they are passed over, which saves half a second there and seconds here.
    gc.freeze()
    atexit.register(gc.freeze)
    code = train.main(config, run_dir, stop)
    stop.retire()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
