"""Reads hand-written YAML files strictly: notations that YAML interprets in a surprising way are refused."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path

import yaml

from realsr_hpc.files import Json

CUT_LINE = "# cut off where the last line is not `# end`\n"
LAST_LINE = "# end\n"
"""A truncated YAML file is still valid YAML; the missing fields would silently get the schema's defaults."""
MOST_VALUES = 1_000_000
"""Largest number of values in a file after expanding aliases; a few lines of aliases can exceed the memory."""


class RecipeError(ValueError):
    """A recipe or its overrides are wrong. The message has one line per fault, with path, value and remedy."""


class _Loader(yaml.SafeLoader):
    """Refuses keys that occur twice in a mapping (the first would be lost), and numbers in surprising notations."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        """Like SafeLoader, but ConstructorError if a key occurs twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else "")
        return super().construct_mapping(node, deep)

    def construct_plain_number(self, node: yaml.ScalarNode) -> float:
        """A number in YAML 1.1. ConstructorError for `1:30:00` (5400) and `010` (8)."""
        is_int = node.tag == "tag:yaml.org,2002:int"
        value = self.construct_yaml_int(node) if is_int else self.construct_yaml_float(node)
        if ":" in node.value or (is_int and re.match(r"[-+]?0[0-9_]", node.value)):
            problem = f"{node.value} would be read as the number {value}; put it in quotes, or write the number"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return value

    def construct_date(self, node: yaml.ScalarNode) -> object:
        """Its text, as Hydra reads it."""
        return self.construct_scalar(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_plain_number)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.construct_date)


def read_yaml(path: Path, remedy: str = "name another file") -> Json:
    """The content of a YAML file. RecipeError if it cannot be read, is truncated, or is not YAML."""
    try:
        text = path.read_text(encoding="utf-8")
        if CUT_LINE in text and not text.endswith(LAST_LINE):
            raise RecipeError(f"{path}: cut off; copy it again, or {remedy}")
        tree = yaml.load(text, _Loader)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 ({error.reason}); {remedy}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: an invalid number or date
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{path}: not YAML ({' '.join(str(error).split())[:200]}); {remedy}") from None
    try:
        count = _num_values(tree, {})
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None
    if count > MOST_VALUES:
        raise RecipeError(f"{path}: its aliases stand for more than {MOST_VALUES:,} values; write the values out")
    return tree


def _num_values(tree: Json, known: dict[int, int]) -> int:
    """Number of values in a tree with its aliases expanded; above `MOST_VALUES` for a tree that contains itself.

    ValueError for values other than text, numbers, true, false, null, and lists and mappings of these.
    """
    if not isinstance(tree, dict | list):
        if not isinstance(tree, str | int | float | None):
            raise ValueError(f"holds a {type(tree).__name__}, {tree!r:.60}; write text, a number, a list or a mapping")
        return 1
    if id(tree) not in known:
        known[id(tree)] = MOST_VALUES + 1
        if wrong := [key for key in tree if isinstance(tree, dict) and not isinstance(key, str)]:
            raise ValueError(f"key {wrong[0]!r} is not text; put it in quotes")
        inside = tree.values() if isinstance(tree, dict) else tree
        known[id(tree)] = 1 + sum(_num_values(value, known) for value in inside)
    return known[id(tree)]
