"""Restore images: realsr-hpc restore run=RUN_DIR input=DIR_OR_FILE output=DIR.

checkpoint=RUN_DIR/checkpoints/step-N or export=DIR (a Hugging Face export of this project) can replace run=. Beside
each NAME.png are NAME.json and NAME.steps.jpg with the degradation that the model named, its texts, and its rough and
middle images. Repeating the command restores only missing images.

  upscale=4            1 up to the model's factor
  candidates=4         results sampled per tile, of which choose= takes one: ranker, niqe, fidelity (to the input),
                       mean (of all), or pyiqa:METRIC with weights_dir=DIR
  colour=back_projection   correct the result by the input: none, wavelet or adain (colours), back_projection (all that
                       is coarser than an input pixel)
  temperature=0.7 text_temperature= image_top_k= text_top_k= top_p= cfg_scale=   with colour=: the recipe's `restore`
  overlap_px=4         overlap of tiles, in input pixels
  steps=false          only the restored image: no rough and middle images, no NAME.steps.jpg
  batch_size=64        tiles restored at once by each worker (a CPU core); default: chosen for speed and free memory
"""

from __future__ import annotations

import sys
from pathlib import Path

from realsr_hpc.config.arguments import read_arguments, read_count, read_flag, read_number
from realsr_hpc.config.restoring import RESTORING, check_restoring

DEFAULTS: dict[str, str | None] = {
    "run": None,
    "checkpoint": None,
    "export": None,
    "input": None,
    "output": None,
    "upscale": None,
    "batch_size": None,
    "steps": "true",
    **RESTORING,
}


def main(arguments: list[str]) -> int:
    """Exit code: 0 all restored, 1 some files could not be read, 2 wrong usage."""
    try:
        given = read_arguments(arguments, DEFAULTS, __doc__)
        if not given["input"] or not given["output"]:
            raise ValueError("input=DIR_OR_FILE and output=DIR are needed")
        report = _restore(given)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(report)
    return 1 if report.failed else 0


def _restore(given: dict[str, str | None]):
    batch_size = 0 if given["batch_size"] is None else read_count(given, "batch_size", 1)
    check_restoring(given)
    steps, upscale = read_flag(given, "steps"), 0.0  # 0: the model's
    if given["upscale"]:
        upscale = read_number(given, "upscale", "give one from 1 up to the model's factor")
        if not upscale >= 1.0:
            raise ValueError(f"upscale={given['upscale']} is below 1; give one from 1 up to the model's factor")
    from realsr_hpc.restore import find_model, inputs_of, open_with_options, restore_folder, with_sampling

    source, output = Path(given["input"] or ""), Path(given["output"] or "")
    inputs_of(source, output)
    config, checkpoint, name = find_model(given)
    config = with_sampling(config, given)
    restorer, settings = open_with_options(
        given, config, checkpoint, name, upscale=upscale, batch_size=batch_size, steps=steps
    )
    return restore_folder(restorer, source, output, settings, steps=steps)
