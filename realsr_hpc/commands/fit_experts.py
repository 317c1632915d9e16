"""Make and measure the generation experts: realsr-hpc fit-experts [only=niqe|ranker|measure] [steps=800].

Fits NIQE's pristine model and trains the ranker on the bundled train photographs, then prints how often each puts
two rungs of a degradation ladder of held-out photographs in the right order.
Files go to output=DIR, by default recipes/assets/tiny.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from realsr_hpc.config.arguments import read_arguments, read_count
from realsr_hpc.locks import sole_writer
from realsr_hpc.paths import resolve

PHOTOGRAPHS = "recipes/assets/photographs"
DEFAULTS = {"only": None, "steps": "800", "seed": "0", "output": "recipes/assets/tiny", "photographs": PHOTOGRAPHS}


def main(arguments: list[str]) -> int:
    """Exit code: 0 made and measured, 2 wrong usage."""
    try:
        given = read_arguments(arguments, DEFAULTS, __doc__)
        steps, seed = read_count(given, "steps", 1), read_count(given, "seed")
        if given["only"] not in (None, "niqe", "ranker", "measure"):
            raise ValueError(f"only={given['only']}: give niqe, ranker or measure, or leave it out for all three")
        with sole_writer(resolve(str(given["output"]))):
            _fit(given, steps, seed)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _fit(given: dict[str, str | None], steps: int, seed: int) -> None:
    from realsr_hpc.quality.fit import fit_niqe, photographs, train_ranker
    from realsr_hpc.rewards.generation import NIQE_PATH, RANKER_PATH

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    folder, output = resolve(str(given["photographs"])), resolve(str(given["output"]))
    train = photographs(folder, "train")
    if given["only"] in (None, "niqe"):
        fit_niqe(train).save(output / Path(NIQE_PATH).name)
    if given["only"] in (None, "ranker"):
        train_ranker(train, num_steps=steps, seed=seed).save(output / Path(RANKER_PATH).name)
    if given["only"] in (None, "measure"):
        print_measures(output, photographs(folder, "heldout"))


def print_measures(output: Path, heldout: list) -> None:
    """A Markdown table, an operator a row."""
    from realsr_hpc.quality.fit import measure
    from realsr_hpc.quality.niqe import NIQEModel, niqe
    from realsr_hpc.quality.ranker import Ranker
    from realsr_hpc.rewards.generation import NIQE_PATH, RANKER_PATH

    model, ranker = NIQEModel.load(output / Path(NIQE_PATH).name), Ranker.load(output / Path(RANKER_PATH).name)
    shares = {"niqe": measure(lambda images: -niqe(images, model), heldout), "ranker": measure(ranker.score, heldout)}
    print("| operator | niqe | ranker |\n|---|---|---|")
    for name in shares["niqe"]:
        print(f"| {name} | {shares['niqe'][name]:.3f} | {shares['ranker'][name]:.3f} |")
    means = [sum(column.values()) / len(column) for column in shares.values()]
    print(f"| mean | {means[0]:.3f} | {means[1]:.3f} |")
