"""`realsr-hpc make-shapes`: the made images that sft_tiny trains on beside photographs."""

from _door import run

run("make-shapes")
