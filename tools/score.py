"""`realsr-hpc score`: score a folder of images with metrics or rewards."""

from _door import run

run("score")
