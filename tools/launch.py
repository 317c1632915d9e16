"""`realsr-hpc launch`: run, plan or sweep a recipe, here or on Slurm."""

from _door import run

run("launch")
