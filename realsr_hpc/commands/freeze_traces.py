"""Tokenise VLCoT traces once, for SFT without images: realsr-hpc freeze-traces recipe=sft_7b output=DIR samples=N

samples=N       number of samples of the training split, each with its own crop and degradation; if it exceeds the
                number of photographs, they are used again
per_file=1024   samples per file; a killed command continues at the first missing file
shard=k/n       write every n-th file only, as task k of a Slurm array
device=cuda     where the image tokenizer runs

All other arguments override the recipe.
"""

from __future__ import annotations

import sys
from pathlib import Path

from realsr_hpc.config.arguments import read_count, read_shard, read_with_overrides

DEFAULTS = {"output": None, "samples": None, "per_file": "1024", "shard": "1/1", "device": "cpu"}


def main(arguments: list[str]) -> int:
    """Exit code: 0 written, 1 no photograph gave a trace or some could not be read, 2 wrong usage."""
    try:
        given, overrides = read_with_overrides(arguments, DEFAULTS, __doc__)
        if not given["output"]:
            raise ValueError("output=DIR is needed")
        samples, per_file = read_count(given, "samples", 1), read_count(given, "per_file", 1)
        shard = read_shard(given)
        from realsr_hpc.config.load import compose_one

        config = compose_one(overrides)
        from realsr_hpc.data.traces import freeze_traces
        from realsr_hpc.parallel.backend import named_device

        skipped: dict[str, str] = {}
        count = freeze_traces(
            config,
            Path(str(given["output"])),
            samples,
            per_file,
            device=named_device(str(given["device"])),
            shard=shard,
            on_file=lambda done, total: print(f"\r{done} of {total} files", end="", file=sys.stderr, flush=True),
            skipped=skipped,
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"\n{given['output']}: {count} traces")
    if not count:
        print("no photograph has captions; write them with realsr-hpc prepare-data", file=sys.stderr)
    return 0 if count and not skipped else 1
