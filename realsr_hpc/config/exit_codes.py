"""Exit codes that training and its launcher agree on; the launcher's others are in `launch.verdict`."""

DONE, STOPPED = 0, 85
"""Finished; all ranks stopped at a step boundary with a checkpoint, to be continued."""
