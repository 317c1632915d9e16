"""What every section of a recipe is made of: closed, frozen, finite, and marked with what its fields are for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]

Task = Literal["grpo", "sft", "tokenizer"]
Role = Literal["decides", "layout", "operation"]
"""What a field is. decides: another value is another experiment. layout: how the same computation is cut over
processes, which changes rounding alone. operation: where and how comfortably it runs."""


@dataclass(frozen=True)
class Mark:
    """The role of a field, and the tasks that read it. None in a field's own mark: as its section says."""

    role: Role | None = None
    tasks: frozenset[str] | None = None


LAYOUT = Mark("layout")
OPERATION = Mark("operation")
POLICY: tuple[Task, ...] = ("grpo", "sft")
"""Tasks that train a policy."""


def read_by(*tasks: Task) -> Mark:
    """Mark of a field that fewer tasks read than its section's."""
    return Mark(tasks=frozenset(tasks))


class Section(BaseModel):
    """Base of every section: unknown keys, NaN and infinities are errors; numbers may stand where text is asked for.

    `class GRPOConfig(Section, tasks=("grpo",))` marks all fields of a section, `field: Annotated[int, OPERATION]` one.
    `identity.py` reads the marks.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)
    mark: ClassVar[Mark] = Mark("decides", frozenset(get_args(Task)))

    def __init_subclass__(cls, role: Role = "decides", tasks: tuple[Task, ...] = get_args(Task), **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.mark = Mark(role, frozenset(tasks))
