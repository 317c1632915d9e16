"""Convert public weights to the files a recipe starts from: policy, tokenizer.json, image_tokenizer.safetensors.

realsr-hpc import-weights source=DIR_OR_FILE output=DIR [recipe=NAME field=value ...]
    image_tokenizer=FILE   vqgan.ckpt, vq_ds8_c2i.pt or vq_ds16_c2i.pt, if the source has no image decoder
    text_tokenizer=FILE    text_tokenizer.json or tokenizer.json, if the source has none
    rotary=interleaved     order of queries and keys in the source (or halves), if its files do not state it

Recognised: Meta's folder of Chameleon and Anole's, Hugging Face folders of Chameleon's architecture (facebook's,
Lumina-mGPT's, Anole's, PURE's; safetensors or .bin), vqgan.ckpt, LlamaGen's tokenizers, and exports of this project
(which need no recipe). The output has start weights and no training state: use it with model.weights=DIR.
"""

from __future__ import annotations

import sys

from realsr_hpc.config.arguments import read_with_overrides
from realsr_hpc.config.downloads import ORDERS

DEFAULTS = {"source": None, "output": None, "image_tokenizer": None, "text_tokenizer": None, "rotary": None}


def main(arguments: list[str]) -> int:
    """Exit code: 0 written, 2 wrong usage, or a source that is not recognised or does not fit."""
    try:
        given, overrides = read_with_overrides(arguments, DEFAULTS, __doc__)
        if not given["source"] or not given["output"]:
            raise ValueError("source=DIR_OR_FILE and output=DIR are needed, and recipe=NAME unless it is our export")
        if given["rotary"] not in (None, *ORDERS):
            raise ValueError(f"rotary={given['rotary']} is not one of {', '.join(ORDERS)}")
        _import(given, overrides)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _import(given: dict[str, str | None], overrides: list[str]) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    from realsr_hpc.config.load import compose_one
    from realsr_hpc.export import Sources, import_weights
    from realsr_hpc.paths import expanded

    paths = {name: expanded(value) for name, value in given.items() if value and name != "rotary"}
    output = paths.pop("output")
    config = compose_one(overrides) if overrides else None
    bar = Progress(BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=Console(stderr=True))
    task = bar.add_task("weights", total=None)

    def show(written: int, total: int) -> None:
        bar.start()  # an error before the first tensor stands alone
        bar.update(task, completed=written, total=total)

    try:
        done = import_weights(Sources(rotary=given["rotary"], **paths), output, config, show)  # type: ignore[arg-type]
    finally:
        if bar.live.is_started:
            bar.stop()
    for line in done.recognised:
        print(line)
    print(f"written to {done.output}; start from it with recipe=NAME {' '.join(done.overrides)}".rstrip())
