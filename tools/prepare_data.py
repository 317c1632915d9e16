"""`realsr-hpc prepare-data`: folders of photographs or WebDataset tars to a checked manifest."""

from _door import run

run("prepare-data")
