"""`realsr-hpc sync-tracking`: send to MLflow what runs logged while it was away."""

from _door import run

run("sync-tracking")
