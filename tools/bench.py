"""Measure side by side: python tools/bench.py [NAME [option=value ...] | all]; without a name it lists what there is.

A benchmark is a module of tools/benchmarks with a `main(arguments) -> int` that prints one table of ratios, all of them
measured in that one run. Figures with their commands stand in docs/benchmarks.md.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

from realsr_hpc.config.arguments import ArgumentError

FOLDER = Path(__file__).resolve().parent / "benchmarks"


def names() -> list[str]:
    """The benchmarks: modules whose name does not begin with an underscore."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))


def summary(name: str) -> str:
    """First line of a benchmark's docstring, read without importing it."""
    documented = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))) or ""
    return documented.partition("\n")[0]


def main(arguments: list[str]) -> int:
    """Exit code of the first benchmark that failed, else 0; 2 for an unknown name or argument."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        for name in names():
            print(f"  {name:<14} {summary(name)}")
        return 0
    name, *options = arguments
    if name != "all" and name not in names():
        print(f"no benchmark {name!r}; available: {', '.join(names())}, all", file=sys.stderr)
        return 2
    for chosen in names() if name == "all" else [name]:
        try:
            code = importlib.import_module(f"tools.benchmarks.{chosen}").main(options)
        except ArgumentError as error:
            print(f"{chosen}: {error}", file=sys.stderr)
            return 2
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
