"""Adapt a trained policy to a recipe's tokenizers: realsr-hpc carry-over policy=DIR recipe=sft_tiny output=DIR

policy=DIR      export folder with its recipe.yaml, which names the policy's tokenizers
images=2000     training samples of the recipe that are encoded with both tokenizers
output=DIR      new start weights, for model.weights=DIR

Overrides of the recipe follow. `policy.image_tokenizer=FILE` and `policy.text_tokenizer=FILE` name the policy's
tokenizers if they are no longer where its recipe.yaml says.
"""

from __future__ import annotations

import sys
from pathlib import Path

from realsr_hpc import runfolder
from realsr_hpc.config.arguments import read_count, read_with_overrides

DEFAULTS = {
    "policy": None,
    "images": "2000",
    "output": None,
    "policy.image_tokenizer": None,
    "policy.text_tokenizer": None,
}


def main(arguments: list[str]) -> int:
    """Exit code: 0 written, 2 wrong usage."""
    try:
        given, overrides = read_with_overrides(arguments, DEFAULTS, __doc__)
        if not given["policy"] or not given["output"]:
            raise ValueError("policy=DIR and output=DIR are needed")
        run({key: str(value) for key, value in given.items() if value}, read_count(given, "images", 1), overrides)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def run(given: dict[str, str], num_images: int, overrides: list[str]) -> None:
    """Read both recipes and write the folder."""
    import torch

    from realsr_hpc.config.load import compose_one, from_yaml
    from realsr_hpc.data.loader import LQLoader
    from realsr_hpc.export.carry_over import carry_over
    from realsr_hpc.export.weight_files import refuse_taken
    from realsr_hpc.tokenizer.trace import TraceTokenizer

    refuse_taken(Path(given["output"]))
    new = compose_one(overrides)
    old = from_yaml(Path(given["policy"]) / runfolder.RECIPE)
    tokenizers = {"image_tokenizer": "weights", "text_tokenizer": "path"}
    for section, field in tokenizers.items():
        if f"policy.{section}" in given:
            changed = getattr(old, section).model_copy(update={field: given[f"policy.{section}"]})
            old = old.model_copy(update={section: changed})
    before, after = (TraceTokenizer.load(config, torch.device("cpu")) for config in (old, new))
    loader = LQLoader(new, new.data.train_split, 16)
    try:
        batches = (loader.next() for _ in range(-(-num_images // 16)))
        images = (picture for batch in batches for picture in (batch.gt, batch.lq) if picture is not None)
        carry_over(Path(given["policy"]), before, after, images, Path(given["output"]))
    finally:
        loader.close()
