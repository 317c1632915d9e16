"""`realsr-hpc gallery`: one HTML page of rollouts, rewards, evaluations and restored images."""

from _door import run

run("gallery")
