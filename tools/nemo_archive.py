"""`realsr-hpc nemo-archive`: an export to a NeMo archive and back."""

from _door import run

run("nemo-archive")
