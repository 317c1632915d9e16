"""Every shipped recipe validates, plans and fits; every group file is used by a composition that succeeds."""

from __future__ import annotations

import pytest

from realsr_hpc.config.load import compose, recipe_names
from realsr_hpc.paths import project_root
from realsr_hpc.plan import plan

GROUP_FILES = sorted(
    (path.parent.name, path.stem)
    for path in (project_root() / "recipes").glob("*/*.yaml")
    if path.parent.name in ("model", "data", "rewards", "parallel", "cluster")
)
NEEDED_WITH = {
    ("model", "chameleon_7b"): ["parallel.microbatch_tokens=10240", "rollout.max_new_tokens=2048"],
    ("model", "chameleon_7b_f8"): ["parallel.microbatch_tokens=10496", "rollout.max_new_tokens=5600"],
    ("model", "chameleon_30b"): ["parallel.microbatch_tokens=8192", "rollout.max_new_tokens=2048"],
    ("parallel", "tp4"): ["cluster.tasks_per_node=4"],
    ("parallel", "tp4_pp2"): ["cluster.tasks_per_node=8"],
    ("cluster", "slurm"): ["grpo.prompts_per_step=8"],
    ("cluster", "local_gpu"): ["cluster.tasks_per_node=1"],
    ("model", "small"): ["parallel.microbatch_tokens=9216", "rollout.max_new_tokens=1920"],
    ("cluster", "local_gpu_24"): ["cluster.tasks_per_node=1"],
    ("cluster", "local_gpus"): ["grpo.prompts_per_step=8"],
}


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_validates_plans_and_fits(recipe):
    config = compose([f"recipe={recipe}"])
    assert config.name == recipe
    estimate = plan(config)
    assert estimate.fits is not False
    assert estimate.parameters > 0


@pytest.mark.parametrize(("group", "name"), GROUP_FILES)
def test_a_group_file_composes(group, name):
    overrides = NEEDED_WITH.get((group, name), [])
    assert compose(["recipe=grpo_tiny", f"{group}={name}", *overrides]).name == "grpo_tiny"


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if "7b" in name or "30b" in name])
def test_a_large_recipe_has_the_published_size(recipe):
    assert plan(compose([f"recipe={recipe}"])).parameters in (7_013_158_912, 7_080_267_776, 34_293_448_704)
