"""Chains of runs and commands as recipes: recipes/chains/NAME.yaml, typed and closed.

    name: tiny
    stages:
      sft: {recipe: sft_tiny, set: {sft.num_steps: 4}}
      grpo: {recipe: grpo_tiny, set: {model.weights: "{sft.export}"}}
      evaluate: {command: evaluate, set: {run: "{grpo.run}"}}

A stage refers to the output of an earlier one as `{STAGE.OUTPUT}`; `OF_RUN` and `OF_COMMAND` list the outputs.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from pydantic_core import ErrorDetails

from realsr_hpc.config.load import RecipeError, nearest, read_yaml, yaml_file, yaml_names
from realsr_hpc.config.operation import ClusterConfig

NAME = r"[A-Za-z][A-Za-z0-9_-]*"
PLACEHOLDER = re.compile(rf"\{{({NAME})\.([a-z_]+)\}}")
OF_RUN = {
    "run": "the run's folder; a command uses its newest checkpoint",
    "best": "its best checkpoint (checkpoint.keep_best)",
    "export": "a Hugging Face folder of its last checkpoint, exported if a stage uses it",
    "best_export": "a Hugging Face folder of its best checkpoint",
}
"""Outputs of a stage that runs a recipe."""
OF_COMMAND = {"output": "the folder that the command wrote"}

StageName = Annotated[str, Field(pattern=f"^{NAME}$")]


class StageConfig(BaseModel):
    """A recipe with its overrides, or a command with its arguments."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    recipe: str | None = None
    """A run of this recipe."""
    command: Literal["evaluate", "export_hf"] | None = None
    """A command that works on the outputs of earlier stages; the chain sets its output=."""
    set: dict[str, JsonValue] = {}
    """Overrides of the recipe, or arguments of the command."""
    cluster: dict[str, JsonValue] = {}
    """Only for a command: fields of `cluster` for its job. Default: one task, the others from the run it works on."""

    @model_validator(mode="after")
    def names_a_recipe_or_a_command(self) -> StageConfig:
        """A stage has either a recipe or a command; only a command has `cluster`. ValueError otherwise."""
        if (self.recipe is None) == (self.command is None):
            raise ValueError("give either recipe or command")
        if self.recipe is not None and self.cluster:
            raise ValueError("cluster is for commands; a recipe takes set: {cluster.FIELD: VALUE}")
        if unknown := [key for key in self.cluster if key not in ClusterConfig.model_fields]:
            hint = nearest(unknown[0], ClusterConfig.model_fields)
            raise ValueError(f"cluster.{unknown[0]}: unknown key{hint}")
        return self


class ChainConfig(BaseModel):
    """A named sequence of stages."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    stages: Annotated[dict[StageName, StageConfig], Field(min_length=1)]


def read_chain(name: str) -> ChainConfig:
    """Read recipes/chains/NAME.yaml. RecipeError lists all its faults."""
    path = yaml_file(f"chains/{name}")
    if path is None:
        names = yaml_names("chains")
        raise RecipeError(f"chain: no {name!r}{nearest(name, names)}; available: {', '.join(names)}")
    try:
        return ChainConfig.model_validate(read_yaml(path))
    except ValidationError as error:
        raise RecipeError("\n".join(f"chain {name}: {_explain(item)}" for item in error.errors())) from None


def _explain(item: ErrorDetails) -> str:
    parts = [str(part) for part in item["loc"]]
    path = ".".join(parts)
    if item["type"] == "extra_forbidden":
        valid = list(StageConfig.model_fields if len(parts) > 1 else ChainConfig.model_fields)
        return f"{path}: unknown key{nearest(parts[-1], valid) or f'; valid here: {chr(44).join(valid)}'}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{path or 'the file'}: {message[:1].lower()}{message[1:]}" + (
        f" (given: {item['input']!r})" if isinstance(item["input"], str | int | float | None) else ""
    )
