"""Defines the identity of a run from the marks of the schema's fields. Signature, resume and compare all use it.

- The signature, which names a run's folder, covers the fields that decide the result, and the layout (which changes
  rounding), if the run's task reads them. Paths below the output root are relative to it, because it may be moved.
- Resuming may change layout and operation.
- A comparison treats runs that differ in layout, operation or seed as repetitions of one experiment.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cache

from realsr_hpc.config.derived import world_size
from realsr_hpc.config.places import ROOT, output_root, without_root
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.config.section import Mark, Section
from realsr_hpc.files import Json

Tree = dict[str, Json]
"""A JSON object: a dumped recipe or section, or fields by path."""
WORLD = frozenset({"cluster.nodes", "cluster.tasks_per_node"})
"""Only their product is part of the layout: 2 nodes with 4 processes each compute the same as 1 node with 8."""


@cache
def marks() -> dict[str, Mark]:
    """Role and tasks of every field, by its path; a mapping (`rewards.terms`) is one field."""
    return dict(_section_marks(RunConfig, ""))


def _section_marks(section: type[Section], prefix: str) -> Iterator[tuple[str, Mark]]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from _section_marks(kind, f"{prefix}{name}.")
            continue
        own = next((item for item in field.metadata if isinstance(item, Mark)), Mark())
        yield f"{prefix}{name}", Mark(own.role or section.mark.role, own.tasks or section.mark.tasks)


def fields_at(key: str) -> dict[str, Mark]:
    """The fields that an override of `key` sets: the field itself, all fields of a section, or the mapping that
    contains the key; none if it is unknown."""
    return {
        path: mark
        for path, mark in marks().items()
        if path == key or path.startswith(f"{key}.") or key.startswith(f"{path}.")
    }


def may_change_on_resume(key: str) -> bool:
    """Whether a resumed run may change this key: it must not decide the result."""
    found = fields_at(key)
    return bool(found) and all(mark.role != "decides" for mark in found.values())


def decides(key: str, task: str | None = None) -> bool:
    """Whether runs that differ in this key (for `task`, if given) are different experiments; true for unknown keys."""
    found = fields_at(key).values()
    return not found or any(mark.role == "decides" and (task is None or task in (mark.tasks or ())) for mark in found)


def identity(tree: Tree, task: str) -> Tree:
    """The fields of a dumped recipe that `signature` covers, by path."""
    return {
        path: _value(tree, path)
        for path, mark in marks().items()
        if mark.role != "operation" and task in (mark.tasks or ()) and path not in WORLD
    }


def signature(config: RunConfig) -> str:
    """Hash, 12 hexadecimal digits, of exactly the fields that affect the bits of a result."""
    fields = identity(config.model_dump(mode="json"), config.task) | {"world_size": world_size(config)}
    return digest(without_root(fields, output_root(config)))[:12]


def differences(before: RunConfig, now: RunConfig) -> dict[str, tuple[Json, Json]]:
    """Both values of every key that makes two recipes of one task different runs; None: that recipe lacks the key."""
    one, two = flatten(before), flatten(now)
    found: dict[str, tuple[Json, Json]] = {
        key: (one.get(key), two.get(key))
        for key in one | two
        if one.get(key) != two.get(key) and key not in WORLD and _names_the_run(key, before.task)
    }
    sizes = world_size(before), world_size(now)
    return found if sizes[0] == sizes[1] else {**found, "cluster.nodes x cluster.tasks_per_node": sizes}


def _names_the_run(key: str, task: str) -> bool:
    found = fields_at(key).values()
    return key in ("name", "task") or any(mark.role != "operation" and task in (mark.tasks or ()) for mark in found)


@cache
def scheme() -> str:
    """Hash, 8 hexadecimal digits, of the fields that signatures cover, with their marks; see `load.SCHEME_LINE`."""
    covered = {path: [mark.role, sorted(mark.tasks or ())] for path, mark in marks().items()}
    return digest({"paths from": ROOT, **covered})[:8]


def digest(value: object) -> str:
    """SHA-256 of a JSON value as hexadecimal digits, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _value(tree: Tree, path: str) -> Json:
    section, _, rest = path.partition(".")
    inner = tree[section]
    return _value(inner, rest) if rest and isinstance(inner, dict) else inner


def flatten(config: RunConfig) -> Tree:
    """All leaves by path: `{"grpo.kl_beta": 0.01, ...}`. Lists are leaves; empty mappings are omitted."""
    return dict(_leaves(config.model_dump(mode="json"), ""))


def _leaves(tree: Tree, prefix: str) -> Iterable[tuple[str, Json]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
