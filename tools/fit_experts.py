"""`realsr-hpc fit-experts`: make and measure the small quality experts of the generation reward."""

from _door import run

run("fit-experts")
