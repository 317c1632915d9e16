"""`realsr-hpc restore`: images in, images out, with the reasoning beside them."""

from _door import run

run("restore")
