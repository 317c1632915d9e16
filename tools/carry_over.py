"""`realsr-hpc carry-over`: a policy that goes on with other tokenizers."""

from _door import run

run("carry-over")
