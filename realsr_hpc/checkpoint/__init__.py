"""Sharded, resumable, verified checkpoints."""

from realsr_hpc.checkpoint.manifest import latest
from realsr_hpc.checkpoint.store import load, resume_path, save

__all__ = ["latest", "load", "resume_path", "save"]
