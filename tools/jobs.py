"""`realsr-hpc jobs`: runs, their states and logs; cancel, resume or follow one."""

from _door import run

run("jobs")
