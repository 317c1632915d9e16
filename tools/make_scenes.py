"""`realsr-hpc make-scenes`: the made shapes and signs that sft_tiny trains on beside photographs."""

from _door import run

run("make-scenes")
