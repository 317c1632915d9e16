"""`realsr-hpc replay`: a kept GRPO step computed again."""

from _door import run

run("replay")
