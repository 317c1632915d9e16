"""`realsr-hpc import-hf`: renamed to import-weights."""

from _door import run

run("import-hf")
