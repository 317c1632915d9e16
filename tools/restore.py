"""Restore images: python tools/restore.py run=RUN_DIR input=DIR_OR_FILE output=DIR.

Also checkpoint=RUN_DIR/checkpoints/step-N or export=DIR (a Hugging Face export of ours) instead of run=. Beside each
NAME.png stand NAME.json and NAME.steps.jpg: the degradation it named, its texts, its rough and middle images. Run
again, it does only what is missing.

  upscale=4            1 up to the model's factor
  candidates=4         results sampled for each tile, of which choose= takes one: ranker, niqe, fidelity (to the input),
                       mean (of all), or pyiqa:METRIC with weights_dir=DIR
  colour=wavelet       give the result the input's colours: none, wavelet or adain
  temperature=0.7 text_temperature= image_top_k= text_top_k= top_p= cfg_scale=   the recipe's section `restore`
  overlap_px=8         by which tiles overlap, in input pixels
  batch_size=64        tiles restored at once
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from realsr_hpc.config.arguments import read_arguments, read_count  # noqa: E402
from realsr_hpc.config.schema import RestoreConfig  # noqa: E402

DEFAULTS: dict[str, str | None] = {
    "run": None,
    "checkpoint": None,
    "export": None,
    "input": None,
    "output": None,
    "upscale": None,
    "candidates": "1",
    "choose": "ranker",
    "weights_dir": None,
    "colour": "none",
    "overlap_px": "8",
    "batch_size": "64",
    **dict.fromkeys(RestoreConfig.model_fields),
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
    overlap_px, batch_size = read_count(given, "overlap_px"), read_count(given, "batch_size", 1)
    candidates, upscale = read_count(given, "candidates", 1), _upscale(given["upscale"])
    from realsr_hpc.restore import BestOf, RestoreSettings, find_model, open_restorer, restore_folder, with_sampling
    from realsr_hpc.restore.candidates import build_chooser
    from realsr_hpc.restore.colour import COLOUR_FIXES

    colour = next((fix for fix in COLOUR_FIXES if fix == given["colour"]), None)
    if colour is None:
        raise ValueError(f"colour={given['colour']!r} is none of {', '.join(COLOUR_FIXES)}; name one")
    choice = given["choose"] or ""
    if candidates > 1 and choice != "mean":
        build_chooser(choice, given["weights_dir"])  # a wrong name fails before the model is loaded
    config, checkpoint, name = find_model(given)
    config = with_sampling(config, given)
    factor = config.vlcot.upscale
    tile_px = config.vlcot.image_sizes_px[-1] // factor
    sampled = config.restore.model_dump(exclude_none=True)
    source = f"{name} {sampled}" + (f" best of {candidates} by {choice}" if candidates > 1 else "")
    settings = RestoreSettings(source, tile_px, factor, upscale, overlap_px, colour, batch_size)
    restorer = open_restorer(config, checkpoint)
    if candidates > 1:
        restorer = BestOf(restorer, candidates, choice, given["weights_dir"])
    return restore_folder(restorer, Path(given["input"] or ""), Path(given["output"] or ""), settings)


def _upscale(text: str | None) -> float:
    """0: the model's."""
    try:
        return float(text or 0)
    except ValueError:
        raise ValueError(f"upscale={text!r} is no number; give one from 1 up to the model's factor") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
