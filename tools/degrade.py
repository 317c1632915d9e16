"""`realsr-hpc degrade`: degrade photographs as training does, to look at or to test on."""

from _door import run

run("degrade")
