"""Sharded checkpoint -> Hugging Face folder, and folders of others -> start weights; both ways the identity.

Left out: optimizer states, random states and tracking; they belong to checkpoints.
"""

from realsr_hpc.export.incoming import Imported, Sources, import_weights
from realsr_hpc.export.outgoing import export_policy, export_run

__all__ = ["Imported", "Sources", "export_policy", "export_run", "import_weights"]
