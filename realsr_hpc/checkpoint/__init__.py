"""Sharded, resumable, verified checkpoints."""

from realsr_hpc.checkpoint.integrity import Keep, best, latest
from realsr_hpc.checkpoint.loading import load, refuse_damaged, resume_path
from realsr_hpc.checkpoint.saving import NotSaved, Saver, save

__all__ = ["Keep", "NotSaved", "Saver", "best", "latest", "load", "refuse_damaged", "resume_path", "save"]
