"""Which fields decide a result is defined once: signature, resuming and comparison use the same marks."""

from __future__ import annotations

from typing import get_args

import pytest

from realsr_hpc.config import identity as room
from realsr_hpc.config.identity import decides, differences, identity, marks, may_change_on_resume, scheme, signature
from realsr_hpc.config.load import SCHEME_LINE, compose_one, to_yaml
from realsr_hpc.config.section import Mark, Role, Task
from realsr_hpc.launch.rundir import run_folder

RECIPES = {"grpo": "grpo_tiny", "sft": "sft_tiny", "tokenizer": "tokenizer_tiny"}


def test_every_field_has_a_role_and_somebody_who_reads_it():
    assert len(marks()) > 150
    for path, mark in marks().items():
        assert mark.role in get_args(Role) and mark.tasks and mark.tasks <= set(get_args(Task)), path


def test_a_fields_own_mark_takes_precedence_over_its_sections():
    tasks = {
        "vlcot.text_slots": {"sft"},
        "vlcot.instruction": {"grpo", "sft", "tokenizer"},
        "parallel.scoring_microbatches": {"grpo"},
        "image_tokenizer.weights": {"grpo", "sft"},
        "data.mode": {"grpo", "sft"},
    }
    assert {path: marks()[path].tasks for path in tasks} == tasks
    roles = {
        "rewards.batch_size": "layout",
        "rollout.batch_size": "layout",
        "optim.cpu_offload": "layout",
        "cluster.nodes": "layout",
        "rewards.offload": "operation",
        # limits that stop a run, and pictures that it draws, change no number
        "grpo.mismatch_kl_gate": "operation",
        "optim.max_skipped_in_a_row": "operation",
        "sft.sample_every_steps": "operation",
    }
    assert {path: marks()[path].role for path in roles} == roles


@pytest.mark.parametrize("task", RECIPES)
def test_a_changed_field_is_another_run_if_it_decides_and_is_read_and_only_then(task):
    tree = compose_one([f"recipe={RECIPES[task]}"]).model_dump(mode="json")
    before = identity(tree, task)
    for path, mark in marks().items():
        *sections, name = path.split(".")
        place = tree
        for section in sections:
            place = place[section]
        kept, place[name] = place[name], "changed"
        matters = (
            mark.role != "operation" and task in mark.tasks and path not in ("cluster.nodes", "cluster.tasks_per_node")
        )
        assert (identity(tree, task) != before) == matters, path
        place[name] = kept


@pytest.mark.parametrize(
    "change", ["checkpoint.every_steps=3", "data.num_threads=2", "data.prefetch=3", "grpo.kl_beta=0.5", "name=other"]
)
def test_what_does_not_touch_the_result_of_sft_is_the_same_run(change):
    assert signature(compose_one(["recipe=sft_tiny", change])) == signature(compose_one(["recipe=sft_tiny"]))


@pytest.mark.parametrize("change", ["seed=1", "parallel.tp=2", "cluster.tasks_per_node=4", "optim.lr=5e-4"])
def test_what_touches_it_is_another(change):
    assert signature(compose_one(["recipe=sft_tiny", change])) != signature(compose_one(["recipe=sft_tiny"]))


def test_two_nodes_of_four_are_one_of_eight():
    flat, tall = (
        compose_one(
            [
                "recipe=grpo_7b",
                f"cluster.nodes={nodes}",
                f"cluster.tasks_per_node={8 // nodes}",
                "cluster.gpus_per_node=8",
            ]
        )
        for nodes in (1, 2)
    )
    assert signature(flat) == signature(tall)


def test_resuming_changes_layout_and_operation_alone():
    for key in ("parallel.tp", "parallel", "cluster.nodes", "data.num_threads", "tracking.tags.who", "restore"):
        assert may_change_on_resume(key), key
    for key in ("grpo.kl_beta", "data", "data.manifest", "rewards.terms.fidelity.weight", "seed", "nope"):
        assert not may_change_on_resume(key), key


def test_comparing_sees_what_decides_for_the_task():
    assert decides("grpo.kl_beta", "grpo") and decides("rewards.terms.fidelity.weight", "grpo")
    assert not decides("grpo.kl_beta", "sft")
    assert not decides("parallel.tp", "grpo") and not decides("checkpoint.every_steps", "grpo")
    assert decides("a.field.of.an.older.version", "grpo")


def test_differences_are_those_that_make_two_runs():
    """The name counts too, as folders are named after it; fields that only operation or another task reads do not."""
    before = compose_one(["recipe=grpo_tiny"])
    changes = ["name=other", "seed=1", "parallel.microbatch_tokens=2048", "data.num_threads=3", "sft.z_loss=0.5"]
    now = compose_one(["recipe=grpo_tiny", *changes, "cluster.tasks_per_node=4"])
    found = differences(before, now)
    assert found.pop("cluster.nodes x cluster.tasks_per_node") == (2, 4)
    assert found.pop("parallel.microbatch_tokens")[1] == 2048
    assert found == {"name": ("grpo_tiny", "other"), "seed": (0, 1)}


@pytest.mark.parametrize("mark", [Mark("layout", marks()["seed"].tasks), Mark("decides", frozenset({"sft"}))])
def test_the_scheme_covers_roles_and_tasks(mark, monkeypatch):
    """Otherwise a run of an earlier version would be looked up by a signature that covers other fields."""
    of_today, changed = scheme(), marks() | {"seed": mark}
    monkeypatch.setattr(room, "marks", lambda: changed)
    assert scheme.__wrapped__() != of_today


def test_a_run_of_an_earlier_signature_is_found(tmp_path):
    config = compose_one(["recipe=grpo_tiny", f"output_root={tmp_path}"])
    assert run_folder(config) == tmp_path / f"grpo_tiny-{signature(config)}"
    text = to_yaml(config)
    assert text.startswith(f"{SCHEME_LINE}{scheme()}\n")
    older = text.partition("\n")[2].replace("  prefetch: 1\n", "")  # a schema that lacked a field of today
    for folder, content in {
        "grpo_tiny-0123456789ab": older,
        "grpo_tiny-aaaaaaaaaaaa": "name: [",
        "grpo_tiny-b": "",
    }.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "recipe.yaml").write_text(content)
    assert run_folder(config) == tmp_path / "grpo_tiny-0123456789ab"
    assert run_folder(compose_one(["recipe=grpo_tiny", "seed=5", f"output_root={tmp_path}"])).name not in (
        "grpo_tiny-0123456789ab",
        "grpo_tiny-aaaaaaaaaaaa",
    )
    run_folder(config).joinpath("recipe.yaml").write_text(text)  # written under today's scheme: its name would be equal
    assert run_folder(config).name == f"grpo_tiny-{signature(config)}"
