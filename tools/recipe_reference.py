"""Write docs/recipes.md from the schema: python tools/recipe_reference.py; check=true only says if it is current."""

from __future__ import annotations

import ast
import inspect
import json
import sys
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from realsr_hpc.config import learning, reward_options, schema
from realsr_hpc.config.arguments import read_arguments, read_flag
from realsr_hpc.config.identity import marks
from realsr_hpc.config.load import recipe_names, yaml_names
from realsr_hpc.config.section import Section, Task
from realsr_hpc.paths import project_root, recipe_folders

PAGE = project_root() / "docs" / "recipes.md"
HEAD = """# Recipes

<!-- Written by tools/recipe_reference.py from the classes of realsr_hpc/config: change them there. -->

`python tools/launch.py recipe=NAME section.field=value ...`. For a misspelt field, the error names the nearest valid
one; one message lists all faults of a recipe. `resolve=true` prints the whole recipe.

Each field has a role. *decides*: it affects the result; another value is another experiment. *layout*: how the same
computation is distributed over processes; it changes only rounding. *operation*: where the run executes and what it
reports. A run's signature, which names its folder, covers the first two, as far as the run's task reads them. Resuming
may change the last two. A comparison treats runs as repetitions of one experiment if they differ in no field that
decides, or only in their seed.
"""


def main(arguments: list[str]) -> int:
    """Exit code: 0 written or up to date, 1 out of date, 2 wrong usage."""
    try:
        check = read_flag(read_arguments(arguments, {"check": "false"}, __doc__), "check")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    text = reference()
    if check:
        return 0 if PAGE.read_text(encoding="utf-8") == text else 1
    PAGE.write_text(text, encoding="utf-8")
    print(PAGE)
    return 0


def reference() -> str:
    """The page."""
    parts = [HEAD, "## Recipes and groups\n", *_lists()]
    parts.append("\n## Whole run\n\n" + _table(schema.RunConfig, ""))
    for name, field in schema.RunConfig.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            parts.append(
                f"\n## `{name}`\n\n{' '.join([_first_line(kind), *_read_by(kind)])}\n\n{_table(kind, f'{name}.')}"  # pyright: ignore[reportArgumentType]
            )
    parts.append(f"\n## `rewards.terms.NAME`\n\n{_first_line(learning.RewardTerm)}\n\n{_table(learning.RewardTerm)}")
    for kind, options in reward_options.OPTIONS.items():
        parts.append(f"\n### Options of kind `{kind}`\n\n{_table(options)}")
    elsewhere = _table(reward_options.HttpOptions)
    link = "[a judge in another process](judge.md)"
    parts.append(f"\n### Options of any kind with `expert: http` ({link})\n\n{elsewhere}")
    return "\n".join(parts)


OPTION_OF = {"chains": "chain", "sweeps": "axes"}
"""The option of launching that takes the files of a folder, where it is not the folder's name."""


def _lists() -> list[str]:
    lines = [f"- `recipe=`: {', '.join(f'`{name}`' for name in recipe_names())}"]
    for group in sorted({path.name for folder in recipe_folders() for path in folder.iterdir() if path.is_dir()}):
        if names := ", ".join(f"`{name}`" for name in yaml_names(group)):
            lines.append(f"- `{OPTION_OF.get(group, group)}=`: {names}")
    return lines


def _read_by(section: type[Section]) -> list[str]:
    """A sentence about which tasks read a section, where not all do."""
    tasks = [f"`{task}`" for task in get_args(Task) if task in (section.mark.tasks or ())]
    if len(tasks) == len(get_args(Task)):
        return []
    return [
        f"Only the tasks {' and '.join(tasks)} read it." if len(tasks) > 1 else f"Only the task {tasks[0]} reads it."
    ]


def _table(section: type[BaseModel], prefix: str | None = None) -> str:
    """Fields of a section; with `prefix`, the beginning of their paths, also their roles."""
    notes = _docstrings(section)
    head = "| field | type | default | role | |" if prefix is not None else "| field | type | default | |"
    rows = [head, "|---" * (head.count("|") - 1) + "|"]
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            continue
        default = "required" if field.is_required() else f"`{_value(field.get_default())}`"
        limits = "".join(f", {text}" for text in map(_limit, field.metadata) if text)
        note = notes.get(name, "").replace("|", "\\|")
        role = f" {marks()[prefix + name].role} |" if prefix is not None else ""
        rows.append(f"| `{name}` | {_type(field.annotation)}{limits} | {default} |{role} {note} |")
    return "\n".join(rows) + "\n"


def _docstrings(section: type[BaseModel]) -> dict[str, str]:
    """The string under each field."""
    tree = ast.parse(Path(inspect.getfile(section)).read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == section.__name__)
    notes = {}
    for field, below in zip(body, body[1:], strict=False):
        is_note = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_note:
            notes[field.target.id] = " ".join(str(below.value.value).split())  # pyright: ignore[reportAttributeAccessIssue]
    return notes


def _type(annotation: Any) -> str:
    """In words that a YAML author uses."""
    if annotation is type(None):
        return "null"
    options = get_args(annotation)
    if "Literal" in str(annotation).split("[")[0]:
        return " \\| ".join(f"`{option}`" for option in options)
    name = getattr(annotation, "__name__", str(annotation))
    if options and name in ("tuple", "list"):
        return f"list of {_type(options[0])}"
    if options and name == "dict":
        return f"{_type(options[0])}: {_type(options[1])}"
    if hasattr(annotation, "__metadata__"):
        return _type(options[0]) + "".join(f", {text}" for text in map(_limit, annotation.__metadata__) if text)
    if options:
        return " or ".join(_type(option) for option in options)
    return {"int": "whole number", "float": "number", "str": "text", "bool": "true or false"}.get(name, f"`{name}`")


def _limit(constraint: Any) -> str:
    """Limits of a number, also where pydantic nests them."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [f"{sign} {getattr(constraint, key):g}" for key, sign in signs.items() if hasattr(constraint, key)]
    nested = [_limit(item) for item in getattr(constraint, "metadata", [])]
    return ", ".join(text for text in [*found, *nested] if text)


def _value(value: Any) -> str:
    plain = {key: item.model_dump() for key, item in value.items()} if isinstance(value, dict) and value and all(
        isinstance(item, BaseModel) for item in value.values()
    ) else value  # fmt: skip
    if isinstance(plain, dict) and len(plain) > 2:
        return ", ".join(plain)
    text = json.dumps(plain, ensure_ascii=False) if not isinstance(plain, str) else plain
    return (text if len(text) <= 60 else text[:59] + "…").replace("|", "\\|")


def _first_line(kind: type[BaseModel]) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
