"""Run, plan or sweep a recipe, here or on Slurm: `realsr-hpc launch recipe=grpo_tiny`; --help tells the rest."""

from realsr_hpc.launch.command import main

__all__ = ["main"]
