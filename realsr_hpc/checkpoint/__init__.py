"""Sharded, resumable, verified checkpoints."""

from realsr_hpc.checkpoint.integrity import Keep, best, latest
from realsr_hpc.checkpoint.loading import RunState, load, refuse_damaged, resume_path
from realsr_hpc.checkpoint.saving import NotSaved, Saver, save

__all__ = ["Keep", "NotSaved", "RunState", "Saver", "best", "latest", "load", "refuse_damaged", "resume_path", "save"]
