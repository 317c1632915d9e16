"""`realsr-hpc import-hf`: a Hugging Face folder to a run."""

from _door import run

run("import-hf")
