"""`realsr-hpc demo`: the whole system in minutes on a CPU, one command after another."""

from _door import run

run("demo")
