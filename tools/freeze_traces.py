"""`realsr-hpc freeze-traces`: tokenise VLCoT traces once, for SFT without images."""

from _door import run

run("freeze-traces")
