"""`realsr-hpc export-hf`: a run to a Hugging Face folder."""

from _door import run

run("export-hf")
