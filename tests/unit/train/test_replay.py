"""A saved step is recomputed from a checkpoint or through earlier steps and gives the run's numbers; refusals."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from realsr_hpc.commands.replay import main
from realsr_hpc.config.learning import GRPOConfig
from realsr_hpc.config.load import compose_one, from_yaml, override, to_yaml
from realsr_hpc.grpo.advantages import configured_advantages, contributions
from realsr_hpc.paths import project_root
from realsr_hpc.tracking.spool import metrics_by_step
from realsr_hpc.train import grpo
from realsr_hpc.train.kept_steps import all_groups, read_step
from realsr_hpc.train.parts import build_grpo_parts
from realsr_hpc.train.replay import reweighted
from tests.distributed.test_training import GRPO, SMALL

RUN = [*GRPO, *SMALL, "cluster.tasks_per_node=1", "grpo.num_steps=3", "grpo.heldout_every_steps=0", "grpo.credit=part"]
KEPT = ["tracking.replay_every_steps=1", "checkpoint.every_steps=2", "tracking.rollouts_every_steps=0"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of two updates, all of them saved, with checkpoints of steps 2 and 3."""
    from realsr_hpc.tokenizer.image import ImageTokenizer
    from realsr_hpc.tokenizer.image_file import save_image_tokenizer

    root = tmp_path_factory.mktemp("it's kept")
    weights = root / "image_tokenizer.safetensors"
    config = compose_one([*RUN, *KEPT, f"image_tokenizer.weights={weights}", f"output_root={root}"])
    torch.manual_seed(0)
    save_image_tokenizer(ImageTokenizer(config.image_tokenizer), weights)
    folder = root / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(to_yaml(config))
    assert grpo.main(config, folder) == 0
    return folder


def replayed(run_dir: Path, number: int, *overrides: str) -> dict:
    """The report of a replay that reproduces the run's numbers."""
    output = run_dir.parent / "out"
    assert main([f"run={run_dir}", f"step={number}", f"output={output}", *overrides]) == 0
    assert (output / "replay.png").stat().st_size > 1000
    return json.loads((output / "replay.json").read_text())


def test_the_parts_of_a_run_are_those_of_its_recipe(run_dir):
    parts = build_grpo_parts(from_yaml(run_dir / "recipe.yaml"))
    assert parts.optimiser.total_steps == 3 * 2  # where the learning rate's decay ends: updates, not steps
    assert parts.rewards.with_places and parts.sampler.seed == 3
    assert parts.reference is not None and parts.reference is not parts.policy
    assert not any(parameter.requires_grad for parameter in parts.reference.parameters())


@pytest.mark.parametrize("number", [2, 3])
def test_a_step_is_the_runs_bit_for_bit_from_a_checkpoint_or_through_the_steps_before(number, run_dir):
    found = replayed(run_dir, number)
    assert found["same_layout"] and found["other"] is None and not found["faults"]
    assert found["again"]["metrics"] == found["reported"]
    assert {"grpo/loss/mean", "optim/grad_norm/step", "grpo/ratio/mean"} <= set(found["reported"])
    assert sum(found["again"]["shares"].values()) == pytest.approx(1.0)


def test_what_training_waited_for_a_checkpoint_is_logged_with_its_step(run_dir):
    waited = {step: values.get("time/checkpoint/s", 0.0) for step, values in metrics_by_step(run_dir).items()}
    assert {step for step, seconds in waited.items() if seconds > 0.0} == {2, 3}


def test_a_reward_left_out_and_another_clip_change_what_they_act_on_and_the_rest_stays(run_dir):
    term = "rewards.terms.format.weight=0"
    found = replayed(run_dir, 3, term, "grpo.clip_low=1e-9", "grpo.clip_high=1e-9")
    again, other = found["again"], found["other"]
    assert again["metrics"] == found["reported"]
    assert other["shares"]["format"] == 0.0 and sum(other["shares"].values()) == pytest.approx(1.0)
    assert other["metrics"]["grpo/clip_fraction/mean"] > again["metrics"]["grpo/clip_fraction/mean"]


def test_another_layout_agrees_within_its_tolerance(run_dir, tmp_path):
    words = [f"run={run_dir}", "step=3", f"output={tmp_path}", "parallel.tp=2", "cluster.tasks_per_node=2"]
    command = [sys.executable, str(project_root() / "tools" / "replay.py"), *words]
    other = tmp_path / "another checkout"
    (other / "realsr_hpc").mkdir(parents=True)
    (other / "realsr_hpc" / "__init__.py").write_text("raise SystemExit('imported from the current folder')")
    answer = subprocess.run(command, capture_output=True, text=True, cwd=other)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    found = json.loads((tmp_path / "replay.json").read_text())
    assert not found["same_layout"] and found["again"]["metrics"] != found["reported"]
    assert found["again"]["metrics"]["grpo/loss/mean"] == pytest.approx(found["reported"]["grpo/loss/mean"], rel=1e-3)


def test_after_a_resume_on_another_layout_a_step_is_replayed_on_its_own(run_dir, tmp_path):
    resumed = tmp_path / 'the "other" one'
    shutil.copytree(run_dir, resumed)
    now = override(from_yaml(run_dir / "recipe.yaml"), ["parallel.tp=2", "cluster.tasks_per_node=2"])
    (resumed / "recipe.yaml").write_text(to_yaml(now))  # as jobs.py resume=RUN parallel.tp=2 leaves it
    found = replayed(resumed, 3, "grpo.advantage=mean")
    again, other = found["again"], found["other"]
    assert found["same_layout"] and again["metrics"] == found["reported"]
    assert other["advantages"] != again["advantages"]
    assert other["metrics"]["optim/grad_norm/step"] != again["metrics"]["optim/grad_norm/step"]


def test_a_step_whose_update_was_skipped_is_the_runs_where_its_numbers_are_not_finite(run_dir, tmp_path, capsys):
    broken, output = tmp_path / "broken", tmp_path / "out"
    shutil.copytree(run_dir, broken)
    words = [f"run={broken}", "step=3", f"output={output}"]
    kept, groups = (broken / "replay" / "step-000003" / name for name in ("step.json", "dp-0.safetensors"))
    tensors, facts = load_file(groups), safe_open(groups, "pt").metadata()
    save_file(tensors | {"0.rewards.format": torch.full_like(tensors["0.rewards.format"], math.nan)}, groups, facts)
    assert main(words) == 1 and "Step 3 is NOT reproduced" in capsys.readouterr().out
    again = json.loads((output / "replay.json").read_text())["again"]["metrics"]
    unknown = [name for name, value in again.items() if math.isnan(value)]
    assert "grpo/loss/mean" in unknown and again["optim/grad_norm/step"] == math.inf
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"metrics": again}))  # as training reported that step
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "Step 3 is reproduced" in told and all(f"| {name} | nan | nan | equal |" in told for name in unknown)


@pytest.mark.parametrize("layout", [[], ["parallel.tp=2", "cluster.tasks_per_node=2"]])
def test_a_step_above_the_gate_is_one_line_with_the_remedy_and_compared_without_the_gate(
    layout, run_dir, tmp_path, capfd
):
    strict = tmp_path / "strict"
    shutil.copytree(run_dir, strict)
    (strict / "recipe.yaml").write_text(
        to_yaml(override(from_yaml(run_dir / "recipe.yaml"), ["grpo.mismatch_kl_gate=1e-30"]))
    )
    words = [f"run={strict}", "step=3", f"output={tmp_path / 'out'}", *layout]
    assert main(words) == 2
    said = capfd.readouterr().err
    [told] = [line for line in said.splitlines() if "mismatch_kl_gate" in line]
    assert "above grpo.mismatch_kl_gate=1e-30" in told and told.endswith("=null compares its numbers all the same")
    assert "Traceback" not in said and "ChildFailedError" not in said
    assert main([*words, "grpo.mismatch_kl_gate=null"]) == 0
    assert json.loads((tmp_path / "out" / "replay.json").read_text())["other"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["step=3", "grpo.group_size=4"], "grpo.group_size=4: a replay may change"),
        (["step=3", "rewards.terms.fromat.weight=0"], "a replay may change"),
        (["step=3", "grpo.clip_hgih=1"], "did you mean 'grpo.clip_high'?"),
        (["step=3", "grpo.clip_high=nan"], "grpo.clip_high: nan: input should be a finite number"),
        (["step=3", "parallel.tp=2"], "parallel: tp 2 x pp 1 = 2: must divide the world size 1"),
        (["step=3", "run=nowhere"], "run 'nowhere': no recipe.yaml at this path"),
        (["step=9"], "step=9 was not saved; saved steps: "),
        (["step=two"], "step='two' is not a whole number"),
    ],
)
def test_what_cannot_be_replayed_is_said_in_one_sentence(words, said, run_dir, capsys):
    named = [] if any(word.startswith("run=") for word in words) else [f"run={run_dir}"]
    assert main([*named, *words]) == 2
    assert said in capsys.readouterr().err


def test_with_other_weights_the_total_is_their_sum_and_with_its_own_the_runs(run_dir):
    group, *_ = all_groups(read_step(run_dir / "replay" / "step-000002"))
    rewards, config = group.rewards, from_yaml(run_dir / "recipe.yaml")
    torch.testing.assert_close(reweighted(group, rewards.weights, config).rewards.total, rewards.total)
    name = next(name for name, column in rewards.breakdown.items() if column.any())
    other = reweighted(group, dict.fromkeys(rewards.breakdown, 0.0) | {name: 3.0}, config).rewards
    torch.testing.assert_close(other.total, 3 * rewards.breakdown[name])


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("kind", ["mean_std", "mean", "leave_one_out"])
def test_the_rewards_contributions_are_the_advantage(kind, each):
    config = GRPOConfig(advantage=kind, normalise_each_reward=each)
    generator = torch.Generator().manual_seed(0)
    breakdown = {name: torch.rand(3, 5, generator=generator) for name in ("a", "b")}
    weights = {"a": 2.0, "b": 0.5}
    parts = contributions(breakdown, weights, config)
    whole = configured_advantages(breakdown, weights, config)
    torch.testing.assert_close(sum(parts.values()).float(), whole, rtol=1e-5, atol=1e-6)


WHOLE = {"format": 1, "step": 8, "dp_size": 1, "metrics": {}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "it is empty"),
        ("[]", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ('{"format": 1}', "step: Field required"),
        (json.dumps(WHOLE | {"format": 2}), "format 2, this version reads 1"),
        (json.dumps(WHOLE | {"dp_size": -1}), "on -1 ranks"),
        (json.dumps(WHOLE | {"step": 9}), "step.json is of step 9"),
        (json.dumps(WHOLE | {"metrics": {"a": "x"}}), "metrics.a: "),
        (json.dumps(WHOLE), "is damaged"),  # its groups are no safetensors file
        (json.dumps(WHOLE | {"dp_size": 2}), "is damaged"),
    ],
)
def test_a_damaged_kept_step_is_named(content, said, tmp_path):
    (folder := tmp_path / "step-000008").mkdir()
    (folder / "step.json").write_text(content)
    (folder / "dp-0.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError) as refused:
        read_step(folder)
    told = str(refused.value)
    assert f"step={folder}" in told and said in told and "\n" not in told
