"""Sharded checkpoint <-> Hugging Face folder, both ways the identity.

Left out: optimizer states, random states and tracking; they belong to checkpoints.
"""

from realsr_hpc.export.incoming import import_folder
from realsr_hpc.export.outgoing import export_policy, export_run

__all__ = ["export_policy", "export_run", "import_folder"]
