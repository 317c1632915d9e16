"""Loads recipes and command-line overrides as RunConfig. Only this file uses Hydra.

Hydra only composes YAML (its compose API: no `outputs/` folder, no change of directory); the closed pydantic schema
validates the result. So every field can be overridden whether or not the recipe mentions it, `+foo=1` cannot add
unknown fields, and all errors come in one message. Hydra's launchers, sweepers and logging are not used; a sweep is a
list of RunConfigs.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from realsr_hpc.config.checks import faults
from realsr_hpc.config.identity import scheme
from realsr_hpc.config.schema import GROUPS, RunConfig
from realsr_hpc.config.yaml_files import CUT_LINE, LAST_LINE, RecipeError, read_yaml
from realsr_hpc.files import Json, first_line
from realsr_hpc.paths import recipe_folders

MOST_RUNS = 10_000
"""Largest number of runs in one sweep; more are likely a mistake, which would take minutes to show."""
_KINDS = ("bool", "int", "float", "str")
"""pydantic's names of the types of plain values in a mapping such as `cluster.extra_sbatch`."""
SCHEME_LINE = "# fields that the signature covers: "
"""First line of a resolved recipe, before `identity.scheme`."""


def recipe_names() -> list[str]:
    """All valid values of `recipe=`."""
    return yaml_names()


def yaml_names(group: str = "") -> list[str]:
    """Names of the YAML files in this subfolder of the recipe folders."""
    return sorted({path.stem for folder in recipe_folders() for path in (folder / group).glob("*.yaml")})


def yaml_file(name: str) -> Path | None:
    """NAME.yaml, or GROUP/NAME.yaml, in the first recipe folder that holds it."""
    files = (folder / f"{name}.yaml" for folder in recipe_folders())
    return next((path for path in files if path.is_file()), None)


def compose(overrides: list[str], *, multirun: bool = False) -> RunConfig | list[RunConfig]:
    """`["recipe=grpo_7b", "grpo.kl_beta=0.04"]` -> RunConfig; with `multirun`, every combination of the swept values.

    Raises RecipeError with all faults.
    """
    composer = _Composer()
    configs = [composer.config(combination) for combination in _expand(_parse(overrides), multirun)]
    return configs if multirun else configs[0]


def compose_one(overrides: list[str]) -> RunConfig:
    """One recipe with its overrides. RecipeError lists all faults; one of them is a swept override."""
    if several := [item.input_line or "" for item in _parse(overrides) if item.is_sweep_override()]:
        raise RecipeError(f"{several[0]}: several values where one is needed; sweep with launch -m, or quote the text")
    return _Composer().config(overrides)


def compose_each(combinations: Iterable[list[str]]) -> list[RunConfig]:
    """Several recipes, each with its own overrides, none of them swept."""
    composer = _Composer()
    return [composer.config(combination) for combination in combinations]


def swept_keys(overrides: list[str]) -> list[str]:
    """Keys that a multirun varies, in the order given."""
    return [str(item.key_or_group) for item in _parse(overrides) if item.is_sweep_override()]


@dataclass(frozen=True)
class Axis:
    """The values that a sampler may choose for one key: one of `choices`, or a number from `low` to `high`."""

    key: str
    choices: tuple[str, ...] = ()
    """In the syntax of Hydra's overrides."""
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    """Whether values are drawn uniformly in the logarithm: `tag(log, interval(1e-6, 1e-4))`."""


def search_space(overrides: list[str]) -> tuple[list[str], list[Axis]]:
    """The overrides that are fixed, and the axes of those that vary; intervals are for samplers only."""
    parsed = _parse(overrides)
    fixed = [item.input_line or "" for item in parsed if not item.is_sweep_override()]
    return fixed, [_axis(item) for item in parsed if item.is_sweep_override()]


def _axis(item: Override) -> Axis:
    value = item.value()
    if isinstance(value, IntervalSweep):
        return Axis(item.key_or_group, low=float(value.start or 0), high=float(value.end or 0), log="log" in value.tags)
    return Axis(item.key_or_group, choices=tuple(item.sweep_string_iterator()))


def read_axes(name: str) -> list[str]:
    """The overrides in recipes/sweeps/NAME.yaml. A list is swept; text is used as the value of an override.

    RecipeError if the file is missing or holds no axes.
    """
    if (path := yaml_file(f"sweeps/{name}")) is None:
        names = yaml_names("sweeps")
        raise RecipeError(f"axes: no {name!r}{nearest(name, names)}; available: {', '.join(names)}")
    axes = read_yaml(path)
    if not isinstance(axes, dict) or not axes:
        raise RecipeError(f"{path}: holds no axes; write lines such as `grpo.kl_beta: [0, 0.01]`")
    if empty := [str(key) for key, value in axes.items() if value == []]:
        raise RecipeError(f"{path}: {empty[0]}: an empty list; name at least one value")
    return [f"{key}={_written(value)}" for key, value in axes.items()]


def values_of(line: str) -> list[str]:
    """The overrides that a swept override expands to; an override that is not swept expands to itself."""
    return [only for [only] in _expand([_parse_one(line)], True)]


def _written(value: Json) -> str:
    """A YAML value in the syntax of Hydra's overrides: a list becomes a sweep, text is already in that syntax."""
    if isinstance(value, list):
        return ",".join(map(written, value))
    return value if isinstance(value, str) else written(value)


def written(value: Json) -> str:
    """A plain value in the syntax of Hydra's overrides, which read it back unchanged."""
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{written(item)}" for key, item in value.items()) + "}"
    return quoted(value) if isinstance(value, str) else json.dumps(value)


def quoted(text: str) -> str:
    """Text, quoted so that Hydra's overrides read it back unchanged."""
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{chr(92) * trailing}'"


def validate(tree: object, *, source: str) -> RunConfig:
    """Validate a plain tree: first the schema, then the rules across sections. RecipeError lists every fault."""
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = dict.fromkeys(map(_explain, error.errors()))  # every member of a union reports the same fault
        raise RecipeError(_message(source, list(lines))) from None
    broken = faults(config)
    if broken:
        raise RecipeError(_message(source, broken))
    return config


def to_yaml(config: RunConfig) -> str:
    """The resolved recipe; `from_yaml` reads it back to an equal RunConfig."""
    tree = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120, allow_unicode=True)
    return f"{SCHEME_LINE}{scheme()}\n{CUT_LINE}{tree}{LAST_LINE}"


def from_yaml(path: Path) -> RunConfig:
    """Read a resolved recipe. RecipeError if it is missing or faulty."""
    return validate(read_yaml(path, "launch the run again to write it"), source=str(path))


def override(config: RunConfig, overrides: list[str]) -> RunConfig:
    """Apply plain `section.field=value` overrides to a resolved recipe."""
    tree = OmegaConf.create(config.model_dump(mode="json"))
    for item in _parse(overrides):
        OmegaConf.update(tree, item.key_or_group, item.value(), merge=True, force_add=True)
    return validate(OmegaConf.to_container(tree), source=config.name)


def _parse(overrides: list[str]) -> list[Override]:
    return [_parse_one(line) for line in overrides]


def _parse_one(line: str) -> Override:
    """Parse one override. A value that Hydra's grammar cannot parse (`don't`, `(1)`, `Größe`) is taken as text."""
    parser = OverridesParser.create()
    if line.startswith("="):
        raise RecipeError(f"{line}: no field before '='; write section.field=value")
    try:
        return parser.parse_override(line)
    except HydraException as error:
        key, equals, value = line.partition("=")
        if not equals or not key or not value or _looks_composed(value):
            raise RecipeError(f"{line}: {first_line(error)}") from None  # Hydra repeats it on further lines
        try:
            return parser.parse_override(f"{key}={quoted(value)}")
        except HydraException:
            raise RecipeError(f"{line}: {first_line(error)}") from None  # Hydra repeats it on further lines


def _looks_composed(value: str) -> bool:
    """Whether a value looks like a list, mapping, quoted text or sweep, so that a syntax error in it must be
    reported."""
    return value[0] in "[{\"'" or re.match(r"(choice|range|interval|tag|sort|shuffle|glob)\(", value) is not None


def _expand(parsed: list[Override], multirun: bool) -> list[list[str]]:
    """Cartesian product of the swept overrides; one combination when none is swept."""
    swept = [item.input_line or "" for item in parsed if item.is_sweep_override()]
    if swept and not multirun:
        raise RecipeError(f"{', '.join(swept)}: several values need -m (a sweep)")
    drawn = [item.input_line or "" for item in parsed if item.is_interval_sweep()]
    if drawn:
        raise RecipeError(
            f"{', '.join(drawn)}: an interval needs sampler=optuna or asha; to try every value write range(..)"
        )
    choices: list[list[str]] = []
    for item in parsed:
        if item.is_sweep_override():
            key = item.get_key_element()
            choices.append([f"{key}={value}" for value in item.sweep_string_iterator()])
        else:
            choices.append([item.input_line or ""])
    if (count := math.prod(map(len, choices))) > MOST_RUNS:
        raise RecipeError(f"{', '.join(swept)}: {count} runs; a sweep has at most {MOST_RUNS}, so give fewer values")
    return [list(combination) for combination in itertools.product(*choices)]


def _split_recipe(overrides: list[str]) -> tuple[str, list[str]]:
    names = recipe_names()
    chosen = [item.partition("=")[2] for item in overrides if item.startswith("recipe=")]
    rest = [item for item in overrides if not item.startswith("recipe=")]
    if len(chosen) > 1:
        raise RecipeError(f"recipe: named {len(chosen)} times ({', '.join(chosen)}); name one")
    if not chosen:
        raise RecipeError(f"recipe: name one, recipe=NAME; available: {', '.join(names)}")
    if chosen[0] not in names:
        hint = nearest(chosen[0], names)
        raise RecipeError(f"recipe: there is no {chosen[0]!r}{hint}; available: {', '.join(names)}")
    return chosen[0], rest


class _Composer:
    """Composes many recipes that share files: Hydra composes each choice of groups once; values are set on a copy."""

    def __init__(self) -> None:
        self._parsed: dict[str, Override] = {}
        self._trees: dict[tuple[str, ...], DictConfig] = {}

    def config(self, overrides: list[str]) -> RunConfig:
        """One recipe with its overrides, none of them swept."""
        recipe, rest = _split_recipe(overrides)
        return validate(self.tree(recipe, rest), source=f"recipe {recipe}")

    def _parse(self, line: str) -> Override:
        if line not in self._parsed:
            [self._parsed[line]] = _parse([line])
        return self._parsed[line]

    def tree(self, recipe: str, lines: list[str]) -> object:
        """The plain tree of a recipe, not yet validated. RecipeError if Hydra cannot compose it."""
        groups, overrides = _groups_of(recipe), [self._parse(line) for line in lines]
        chosen = [item for item in overrides if item.key_or_group in GROUPS or item.is_delete()]
        key = (recipe, *(_as_hydra(item, groups) for item in chosen))
        try:
            if key not in self._trees:
                first, *others = recipe_folders()
                search = [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in others)}]"] if others else []
                with initialize_config_dir(config_dir=str(first), version_base="1.3"):
                    self._trees[key] = hydra_compose(recipe, [*search, *key[1:]])
            # plain values are set on a copy, which is much faster than composing again
            tree = copy.deepcopy(self._trees[key])
            for item in overrides:
                if item not in chosen:
                    # force_add: also fields that the recipe does not mention; the schema rejects unknown ones later
                    OmegaConf.update(tree, item.key_or_group, item.value(), merge=True, force_add=True)
            return OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise RecipeError(f"recipe {recipe}: {first_line(error)}") from None  # Hydra repeats it on further lines


def _as_hydra(item: Override, groups: set[str]) -> str:
    """The override in Hydra's syntax; a group that the recipe does not list is appended with `+`."""
    line = item.input_line or ""
    if item.key_or_group in GROUPS and not item.is_delete():
        options = yaml_names(item.key_or_group)
        if item.value() not in options:
            hint = nearest(str(item.value()), options)
            raise RecipeError(f"{item.key_or_group}: no {item.value()!r}{hint}; available: {', '.join(options)}")
        _refuse_odd_yaml(item.key_or_group, item.value())
        return line if item.key_or_group in groups else f"+{line.lstrip('+')}"
    return line


def _refuse_odd_yaml(group: str, option: object) -> None:
    """Raise RecipeError if a group's file contains YAML that Hydra would interpret in a surprising way."""
    path = yaml_file(f"{group}/{option}") if isinstance(option, str) else None
    if path is not None:
        read_yaml(path)


def _groups_of(recipe: str, extended_by: tuple[str, ...] = ()) -> set[str]:
    """Groups in the defaults list of the recipe and of the recipes it extends."""
    path = yaml_file(recipe)
    if path is None:
        raise RecipeError(f"recipe {recipe}: not found in {', '.join(map(str, recipe_folders()))}")
    if recipe in extended_by:
        raise RecipeError(f"recipe {recipe}: extends itself ({' -> '.join((*extended_by, recipe))}); remove one")
    tree = read_yaml(path) or {}
    listed = tree.get("defaults", []) if isinstance(tree, dict) else None
    if not isinstance(listed, list):
        raise RecipeError(f"{path}: not a recipe: write sections, and `defaults` as a list of recipes and groups")
    groups: set[str] = set()
    for entry in listed:
        if isinstance(entry, dict):
            chosen = {str(key).removeprefix("override ").lstrip("/"): option for key, option in entry.items()}
            groups |= chosen.keys()
            for group, option in chosen.items():
                _refuse_odd_yaml(group, option)
        elif entry != "_self_":
            groups |= _groups_of(str(entry).lstrip("/"), (*extended_by, recipe))
    return groups


def _explain(item: ErrorDetails) -> str:
    """One line about a fault that pydantic found: field, value, and the valid values."""
    path = ".".join(str(part) for part in item["loc"])
    field, _, kind = path.rpartition(".")
    if kind in _KINDS:
        return f"{field}: {item['input']!r}: give text, a number, true or false"
    if not path:
        return f"holds no sections, but {item['input']!r:.60}; copy it again, or launch the run again to write it"
    if item["type"] == "extra_forbidden":
        names = list(_fields_at(item["loc"][:-1]))
        hint = nearest(str(item["loc"][-1]), names) or f"; valid here: {', '.join(names)}"
        return f"{path}: unknown key{hint}"
    if item["type"] == "missing":
        return f"{path}: missing; the recipe must give it"
    if item["type"] == "literal_error":
        expected = str(item.get("ctx", {}).get("expected", ""))
        options = [part.strip().strip("'") for part in expected.replace(" or ", ", ").split(",")]
        return f"{path}: {item['input']!r} is not one of {', '.join(options)}{nearest(str(item['input']), options)}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{path}: {item['input']!r}: {message[0].lower()}{message[1:]}"


def _fields_at(loc: tuple[int | str, ...]) -> Iterable[str]:
    """Field names of the section that `loc` leads to; none inside a free mapping."""
    section: object = RunConfig
    for part in loc:
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return ()
        field = section.model_fields.get(str(part))
        section = None if field is None else field.annotation
    return section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else ()


def nearest(word: str, options: Iterable[str]) -> str:
    """`; did you mean 'kl_beta'?`, or an empty string if no option is similar."""
    close = difflib.get_close_matches(word, list(options), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _message(source: str, lines: list[str]) -> str:
    if len(lines) == 1:
        return f"{source}: {lines[0]}"
    return "\n".join([f"{source}: {len(lines)} faults", *(f"  {line}" for line in lines)])
