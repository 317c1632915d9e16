"""Sharded, resumable, verified checkpoints."""

from realsr_hpc.checkpoint.manifest import Keep, best, latest
from realsr_hpc.checkpoint.saving import NotSaved, Saver, save
from realsr_hpc.checkpoint.store import load, resume_path

__all__ = ["Keep", "NotSaved", "Saver", "best", "latest", "load", "resume_path", "save"]
