"""`realsr-hpc stage-weights`: what a recipe needs beside the code; collect, check and pack it."""

from _door import run

run("stage-weights")
