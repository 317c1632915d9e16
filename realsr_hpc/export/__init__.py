"""Converts sharded checkpoints to Hugging Face folders, and public weights to start weights; round trips are exact.

An export has no optimizer state, random state or tracking; those belong to checkpoints.
"""

from realsr_hpc.export.incoming import Imported, Sources, import_weights
from realsr_hpc.export.outgoing import export_policy, export_run

__all__ = ["Imported", "Sources", "export_policy", "export_run", "import_weights"]
