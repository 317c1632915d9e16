"""`realsr-hpc import-weights`: public weights to what a recipe starts from."""

from _door import run

run("import-weights")
