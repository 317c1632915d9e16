"""Run, plan or sweep a recipe or a chain: `realsr-hpc launch recipe=grpo_tiny`; see --help."""

from __future__ import annotations

import importlib

from realsr_hpc.launch import chain_command, command
from realsr_hpc.launch.chain import ChainCommand


def chained() -> dict[str, ChainCommand]:
    """The commands that stages of a chain can run, by name; importing their modules is fast."""
    modules = {name: importlib.import_module(f"realsr_hpc.commands.{name}") for name in ("evaluate", "export_hf")}
    return {name: ChainCommand(module.DEFAULTS, module.check, module.fits) for name, module in modules.items()}


def main(arguments: list[str]) -> int:
    """Returns 0 if done or submitted, 2 for an invalid recipe, chain or option, else the job's exit code."""
    if any(argument.startswith("chain=") for argument in arguments) and not {"-h", "--help"} & set(arguments):
        return chain_command.main(arguments, chained())
    return command.main(arguments)
