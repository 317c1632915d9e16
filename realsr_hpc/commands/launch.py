"""Run, plan or sweep a recipe or a chain: `realsr-hpc launch recipe=grpo_tiny`; --help tells the rest."""

from __future__ import annotations

from realsr_hpc.commands import evaluate, export_hf
from realsr_hpc.launch import chain_command, command

CHAINED = {"evaluate": tuple(evaluate.DEFAULTS), "export_hf": tuple(export_hf.DEFAULTS)}
"""Keys of the commands that a chain's stages may be."""


def main(arguments: list[str]) -> int:
    """Exit code: 0 done or submitted, 2 a faulty recipe, chain or option, else the job's."""
    if any(argument.startswith("chain=") for argument in arguments):
        return chain_command.main(arguments, CHAINED)
    return command.main(arguments)
