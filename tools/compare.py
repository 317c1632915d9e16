"""`realsr-hpc compare`: tables, curves and images of several runs of one sweep or comparison."""

from _door import run

run("compare")
