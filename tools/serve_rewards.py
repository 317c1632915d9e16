"""`realsr-hpc serve-rewards`: serve a recipe's rewards to runs elsewhere."""

from _door import run

run("serve-rewards")
