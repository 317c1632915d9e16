"""The base class of recipe sections: closed, frozen, with finite numbers, and fields marked by their role."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Annotated, ClassVar, Literal, Unpack, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from realsr_hpc.files import Json

Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]

Task = Literal["grpo", "sft", "tokenizer"]
Role = Literal["decides", "layout", "operation"]
"""What a field affects. decides: the result, so that another value is another experiment. layout: how the same
computation is distributed over processes, which changes only rounding. operation: where the run executes and what it
reports."""


@dataclass(frozen=True)
class Mark:
    """The role of a field, and the tasks that read it. None: as in the mark of its section."""

    role: Role | None = None
    tasks: frozenset[str] | None = None


LAYOUT = Mark("layout")
OPERATION = Mark("operation")
POLICY: tuple[Task, ...] = ("grpo", "sft")
"""Tasks that train a policy."""


def read_by(*tasks: Task) -> Mark:
    """Mark of a field that only these tasks read."""
    return Mark(tasks=frozenset(tasks))


LARGEST = 1e15
"""Largest number in a recipe. No count, size, rate or seed needs more; larger integers would not fit tensors, seeds and
floats."""


class Section(BaseModel):
    """Base of every section. Unknown keys, NaN, infinities, huge numbers, and true in place of a number are errors.

    A number in place of text is accepted.

    `class GRPOConfig(Section, tasks=("grpo",))` marks all fields of a section, `field: Annotated[int, OPERATION]` one.
    `identity.py` reads the marks.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)
    mark: ClassVar[Mark] = Mark("decides", frozenset(get_args(Task)))

    def __init_subclass__(
        cls, role: Role = "decides", tasks: tuple[Task, ...] = get_args(Task), **kwargs: Unpack[ConfigDict]
    ):
        super().__init_subclass__(**kwargs)
        cls.mark = Mark(role, frozenset(tasks))

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Json, info: ValidationInfo) -> Json:
        """Refuses true and false for numbers, which pydantic would turn into 1 and 0."""
        kinds = _kinds(cls, info.field_name or "")
        if any(issubclass(kind, BaseModel) for kind in kinds):  # sections check their own fields
            return value
        for item in _plain_values(value):
            if isinstance(item, bool) and bool not in kinds:
                raise ValueError("true and false are only for switches; give a value")
            if isinstance(item, int | float) and LARGEST < abs(item) < math.inf:
                raise ValueError(f"larger than any run needs; give one up to {LARGEST:.0e}")
        return value


def _plain_values(value: Json) -> list[Json]:
    if isinstance(value, dict):
        value = list(value.values())
    return [inner for item in value for inner in _plain_values(item)] if isinstance(value, list | tuple) else [value]


@cache
def _kinds(section: type[Section], field: str) -> frozenset[type]:
    """All classes that occur in a field's annotation."""
    parts = [section.model_fields[field].annotation]
    for part in parts:
        parts.extend(get_args(part))
    return frozenset(part for part in parts if isinstance(part, type))
