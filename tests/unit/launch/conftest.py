"""What launching's own tests train on, and a Slurm that answers as they want."""

import os

import pytest

from tests.slurm.conftest import image_tokenizer

__all__ = ["image_tokenizer"]

SLURM = ["recipe=sft_tiny", "cluster.kind=slurm", "data=bundled"]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Commands of a Slurm that says what a test wants: `slurm(sbatch="exit 1")`."""
    (bin_dir := tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(bin_dir), prepend=os.pathsep)

    def say(**commands):
        for name, body in ({"squeue": "", "scontrol": "", "srun": "", "sbatch": "exit 1"} | commands).items():
            (bin_dir / name).write_text(f"#!/bin/bash\n{body}\n")
            (bin_dir / name).chmod(0o755)

    say()
    return say
