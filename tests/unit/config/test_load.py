"""Recipes and overrides: valid ones compose; all faults of invalid ones are reported in one message."""

from __future__ import annotations

import re
import shutil

import pytest

from realsr_hpc.config.identity import signature
from realsr_hpc.config.load import (
    RecipeError,
    compose,
    from_yaml,
    read_axes,
    recipe_names,
    swept_keys,
    to_yaml,
)
from realsr_hpc.paths import project_root


def fault(*overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        compose(["recipe=grpo_tiny", *overrides])
    return str(error.value)


def test_a_field_that_the_recipe_does_not_mention_can_be_overridden():
    assert compose(["recipe=grpo_tiny", "grpo.dual_clip=3.0"]).grpo.dual_clip == 3.0


def test_the_command_line_chooses_groups():
    config = compose(["recipe=grpo_7b", "cluster=local_gpus", "rewards=paper"])
    assert config.cluster.kind == "local" and "fidelity" not in config.rewards.terms


def test_a_group_that_the_recipe_does_not_list_can_be_chosen():
    assert "fidelity" not in compose(["recipe=sft_tiny", "rewards=paper"]).rewards.terms


def test_a_reward_can_be_removed_and_reweighted():
    config = compose(["recipe=grpo_tiny", "~rewards.terms.fidelity", "rewards.terms.format.weight=0.5"])
    assert "fidelity" not in config.rewards.terms and config.rewards.terms["format"].weight == 0.5


def test_an_unknown_recipe_is_named_with_the_nearest():
    with pytest.raises(RecipeError, match="no 'grpo_tinny'; did you mean 'grpo_tiny'"):
        compose(["recipe=grpo_tinny"])


def test_an_unknown_group_option_is_named_with_the_nearest():
    assert "cluster: no 'slrm'; did you mean 'slurm'?" in fault("cluster=slrm")


def test_all_faults_come_in_one_message():
    message = fault("grpo.kl_btea=1", "optim.lr=x", "grpo.aggregation=tokn")
    assert "3 faults" in message
    assert "grpo.kl_btea: unknown key; did you mean 'kl_beta'?" in message
    assert "optim.lr: 'x'" in message
    assert "grpo.aggregation: 'tokn' is not one of token, sequence, dr_grpo; did you mean 'token'?" in message


@pytest.mark.parametrize("override", ["+foo=1", "foo=1", "++grpo.foo=1"])
def test_no_way_leads_around_the_closed_schema(override):
    assert "unknown key" in fault(override)


@pytest.mark.parametrize("override", ["a=[1", "model.num_layers", "model=", "~grpo.nothing"])
def test_malformed_overrides_are_recipe_errors(override):
    assert "\n" not in fault(override)


def test_a_sweep_is_every_combination():
    overrides = ["recipe=grpo_tiny", "grpo.kl_beta=0,0.04", "seed=range(3)", "optim.lr=choice(1e-4,2e-4)"]
    configs = compose(overrides, multirun=True)
    assert len({(c.grpo.kl_beta, c.seed, c.optim.lr) for c in configs}) == len(configs) == 12
    assert swept_keys(overrides) == ["grpo.kl_beta", "seed", "optim.lr"]


def test_several_values_without_a_sweep_are_refused():
    assert "need -m" in fault("grpo.kl_beta=0,0.04")


def test_a_list_is_one_value():
    assert compose(["recipe=grpo_tiny", "vlcot.image_sizes_px=[32,64,128]"]).vlcot.image_sizes_px == (32, 64, 128)


@pytest.mark.parametrize("recipe", recipe_names())
def test_yaml_round_trip_is_the_identity(recipe, tmp_path):
    config = compose([f"recipe={recipe}"])
    (tmp_path / "recipe.yaml").write_text(to_yaml(config))
    assert from_yaml(tmp_path / "recipe.yaml") == config


def test_a_broken_recipe_file_is_a_recipe_error(tmp_path):
    path = tmp_path / "recipe.yaml"
    with pytest.raises(RecipeError, match="cannot be read"):
        from_yaml(path)
    whole = to_yaml(compose(["recipe=grpo_tiny"]))
    cut = whole[: whole.index("\nmodel:") + 1]  # still YAML, with the schema's defaults for the rest
    for content, said in {
        "name: [": "not YAML",
        "[" * 3000: "not YAML",
        "name: a\nname: b": "'name' is given twice",
        "": "holds no sections",
        "[1]": "holds no sections",
        cut: "cut off",
    }.items():
        path.write_text(content)
        with pytest.raises(RecipeError, match=said) as refused:
            from_yaml(path)
        assert str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("word", "mine.yaml: not a recipe"),
        ("defaults: 3", "mine.yaml: not a recipe"),
        ("defaults: [mine]", "extends itself (mine -> mine)"),
        ("defaults: [nowhere]", "recipe nowhere: not found"),
    ],
)
def test_a_recipe_that_is_none_is_named(text, said, tmp_path, monkeypatch):
    monkeypatch.setenv("REALSR_HPC_RECIPES", str(tmp_path))
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(RecipeError) as refused:
        compose(["recipe=mine"])
    assert said in str(refused.value)


def test_an_option_that_nothing_reads_is_refused():
    assert "expert=ranker does not read it" in fault("rewards.terms.generation.options.weights_dir=x")


@pytest.mark.parametrize(
    "field", ["seed", "grpo.num_steps", "cluster.nodes", "optim.lr", "rewards.terms.format.weight"]
)
@pytest.mark.parametrize(("value", "said"), [("true", "are only for switches"), ("1e16", "larger than any run needs")])
def test_a_number_is_no_switch_and_not_huge(field, value, said):
    assert f"{field}: " in fault(f"{field}={value}") and said in fault(f"{field}={value}")


def test_the_signature_follows_the_result_and_nothing_else():
    base = compose(["recipe=grpo_tiny"])
    other_place = compose(
        ["recipe=grpo_tiny", "output_root=elsewhere", "tracking.uri=http://host", "cluster.time_min=9"]
    )
    assert signature(base) == signature(other_place) and len(signature(base)) == 12
    assert signature(base) != signature(compose(["recipe=grpo_tiny", "seed=1"]))
    four_processes = compose(["recipe=grpo_tiny", "cluster.tasks_per_node=4"])
    assert signature(base) != signature(four_processes)


@pytest.mark.parametrize("text", ["don't", "(1)", "Größe 3", "a b", "back\\", "it's \\' x", "50%", "null hypothesis"])
def test_text_on_the_command_line_arrives_as_it_is(text):
    assert compose(["recipe=grpo_tiny", f"tracking.description={text}"]).tracking.description == text


@pytest.mark.parametrize("line", ["grpo.kl_beta=[1,", "seed=range(3", "grpo.kl_beta", "=3"])
def test_what_cannot_be_read_is_named(line):
    with pytest.raises(RecipeError, match=re.escape(line)):
        compose(["recipe=grpo_tiny", line])


def test_numbers_are_text_where_text_is_asked_for():
    assert compose(["recipe=grpo_tiny", "cluster.account=123"]).cluster.account == "123"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "field", ["grpo.kl_beta", "optim.weight_decay", "rewards.terms.fidelity.weight", "grpo.entropy_weight"]
)
def test_numbers_are_finite(field, value):
    assert field in fault(f"{field}={value}")


AXES = {
    "grpo.kl_beta: [0, 0.01]": ["grpo.kl_beta=0,0.01"],
    "rollout.text_temperature: [null, 0.5]": ["rollout.text_temperature=null,0.5"],
    "rewards.gate_malformed: [true, false]": ["rewards.gate_malformed=true,false"],
    "seed: range(3)": ["seed=range(3)"],
    "tracking.description: [don't, 'a, b']": ["tracking.description='don\\'t','a, b'"],
    "vlcot.image_sizes_px: [[32, 64, 96], [32, 64, 128]]": ["vlcot.image_sizes_px=[32,64,96],[32,64,128]"],
}


@pytest.mark.parametrize("text", AXES)
def test_axes_are_written_as_overrides_that_compose(text, tmp_path, monkeypatch):
    shutil.copytree(project_root() / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("assets"))
    monkeypatch.setenv("REALSR_HPC_RECIPES", str(tmp_path / "recipes"))
    (tmp_path / "recipes" / "sweeps" / "mine.yaml").write_text(text)
    assert read_axes("mine") == AXES[text]
    assert len(compose(["recipe=grpo_tiny", *AXES[text]], multirun=True)) in (2, 3)


@pytest.mark.parametrize("text", ["", "[1, 2]", "word", "seed: []", "a: [", "seed: [1]\nseed: [2]"])
def test_axes_that_are_none_are_refused_by_file(text, tmp_path, monkeypatch):
    monkeypatch.setenv("REALSR_HPC_RECIPES", str(tmp_path))
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "mine.yaml").write_text(text)
    with pytest.raises(RecipeError, match="mine.yaml"):
        read_axes("mine")


def test_a_value_of_no_kind_is_one_fault_and_a_sweep_of_too_many_runs_is_refused():
    for value in ("null", "[a,b]", "{a:1}"):
        with pytest.raises(
            RecipeError, match=r"^recipe sft_tiny: cluster\.extra_sbatch\.mem: .*: give text, a number, true"
        ):
            compose(["recipe=sft_tiny", f"cluster.extra_sbatch={{mem:{value}}}"])
    with pytest.raises(RecipeError, match="seed=range.*: 40000 runs; a sweep has at most 10000"):
        compose(["recipe=sft_tiny", "seed=range(0,20000)", "optim.lr=1e-3,1e-4"], multirun=True)
