"""`realsr-hpc evaluate`: metrics of a run, an export or finished images on a test set."""

from _door import run

run("evaluate")
