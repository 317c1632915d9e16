"""Comparisons from a real MLflow store."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.stats import t as student

from realsr_hpc.artifacts import rollouts
from realsr_hpc.artifacts.rollouts import KeptGroup, KeptRollout, KeptRollouts
from realsr_hpc.commands import compare as compare_command
from realsr_hpc.compare import compare, connect, estimate, find_runs, find_sweep, group_runs, image_rows, write_report
from realsr_hpc.compare.axes import plot_axes
from realsr_hpc.compare.repetitions import Group
from realsr_hpc.compare.runs import ComparedRun, Comparison
from realsr_hpc.compare.summary import evaluation_table, verdict
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.tracking import prepare_sweep, sync, write_launch_tags
from realsr_hpc.tracking.spool import Spool
from realsr_hpc.tracking.store import PARENT_TAG

REWARDS = {
    ("0.0", 0): [0.1, 0.5, 0.9],
    ("0.0", 1): [0.2, 0.6, 0.8],
    ("0.04", 0): [0.1, 0.3, 0.4],
    ("0.04", 1): [0.2, 0.3, 0.3],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def store(root):
    """Two values of kl_beta, two seeds each, in one sweep; rewards of three steps, and held-out images kept."""
    for (kl_beta, seed), rewards in REWARDS.items():
        grpo = {"kl_beta": float(kl_beta)}
        tree = {"name": f"beta{kl_beta}-{seed}", "task": "grpo", "seed": seed, "output_root": str(root), "grpo": grpo}
        config = RunConfig.model_validate({**tree, "cluster": {"tasks_per_node": 2}})
        run_dir = root / config.name
        run_dir.mkdir()
        write_launch_tags(run_dir, {PARENT_TAG: prepare_sweep(config, "betas")})
        (run_dir / "recipe.yaml").write_text(json.dumps(config.model_dump(mode="json")))
        spool = Spool(run_dir)
        for step, value in enumerate(rewards, 1):
            metrics = {"rewards/total/mean": value, "heldout/total/mean": 2 * value, "optim/lr": 1e-4}
            metrics |= {"time/rollout/s": 900.0, "rollout/tokens_per_s/mean": 10.0}
            metrics |= {"evaluate/real/ours/psnr_y": 20 + value, "evaluate/real/start/psnr_y": 20.0}
            spool.append({"kind": "metrics", "step": step, "time_ms": step, "metrics": metrics})
        spool.close()
        sync(run_dir)
        keep_images(run_dir, seed)
    return connect(f"sqlite:///{root / 'mlflow.db'}")


def keep_images(run_dir, shade):
    folder = run_dir / "rollouts" / "step-000003-heldout"
    folder.mkdir(parents=True)
    for name in ("i.png", "t.png", "f.png"):
        Image.fromarray(np.full((16, 16, 3), 50 * shade, np.uint8)).save(folder / name)
    member = KeptRollout(None, (), (), 1.0, {}, None, {"final": "f.png"})
    group = KeptGroup("cat", None, None, {}, {"input": "i.png", "truth": "t.png"}, (member,))
    rollouts.write(folder, KeptRollouts(run_dir.name, 3, "heldout", (group,)))


def test_a_sweep_is_its_children_and_the_best_has_the_highest_reward(store):
    comparison = compare(find_sweep(store, "realsr_hpc", "betas"))
    assert [run.name for run in comparison.runs] == ["beta0.0-0", "beta0.0-1", "beta0.04-0", "beta0.04-1"]
    assert comparison.metric == "heldout/total/mean"
    assert comparison.best is not None and comparison.best.name == "beta0.0-0"
    assert comparison.differing == ("grpo.kl_beta", "name", "seed") and comparison.deciding == ("grpo.kl_beta",)


def test_seeds_are_one_group_with_an_interval_and_paired_differences(store):
    zero, some = group_runs(compare(find_sweep(store, "realsr_hpc", "betas"), "rewards/total/mean", store))
    assert (zero.label, some.label) == ("kl_beta=0.0", "kl_beta=0.04") and len(zero.runs) == 2
    final = zero.final("rewards/total/mean")
    half = student.ppf(0.975, 1) * np.std([0.9, 0.8], ddof=1) / np.sqrt(2)
    np.testing.assert_allclose([final.mean, final.low, final.high], [0.85, 0.85 - half, 0.85 + half])
    assert zero.less(some, "rewards/total/mean").mean == pytest.approx(0.5)  # 0.9 - 0.4, 0.8 - 0.3
    assert zero.less(some, "rewards/total/mean").excludes_zero
    assert zero.change("heldout/total/mean").mean == pytest.approx(2 * (0.8 + 0.6) / 2)
    assert zero.process_hours().mean == pytest.approx(3 * 900 * 2 / 3600)
    assert zero.rollout_tokens().mean == pytest.approx(3 * 900 * 10 * 2)
    alone = estimate([1.0])
    assert str(alone) == "1" and not alone.excludes_zero


def test_runs_are_found_by_name_and_unknown_ones_named(store):
    assert [run.info.run_name for run in find_runs(store, "realsr_hpc", ["beta0.04-0"])] == ["beta0.04-0"]
    with pytest.raises(ValueError, match="several names begin with it"):
        find_runs(store, "realsr_hpc", ["beta"])
    with pytest.raises(ValueError, match="available: betas"):
        find_sweep(store, "realsr_hpc", "gammas")
    with pytest.raises(ValueError, match="experiment=other: MLflow has none of that name"):
        find_sweep(store, "other", "betas")


def test_the_command_prints_the_groups_and_writes_the_report(store, root, capsys):
    assert compare_command.main(["sweep=betas", f"root={root}"]) == 0
    printed = capsys.readouterr().out
    assert "kl_beta=0.04" in printed and "best by heldout/total/mean: beta0.0-0" in printed
    assert (root / "compare" / "betas" / "comparison.html").exists()
    assert compare_command.main(["sweep=betas", "runs=x", f"root={root}"]) == 2


def test_the_report_holds_every_run_and_group(store, tmp_path):
    comparison = compare(find_sweep(store, "realsr_hpc", "betas"), "rewards/total/mean", store)
    files = write_report(comparison, tmp_path / "out", "betas")
    assert {file.name for file in files} == {
        "comparison.md", "comparison.html", "comparison.csv", "curves.png", "axes.png", "grid.png",
    }  # fmt: skip
    with (tmp_path / "out/comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["rewards/total/mean"]) for row in rows] == [0.9, 0.8, 0.4, 0.3]
    text = (tmp_path / "out/comparison.md").read_text()
    assert "Best by rewards/total/mean (higher is better): kl_beta=0.0, 0.85 [" in text
    assert "| grpo.kl_beta | 0.0 | 0.04 |" in text and "| process-hours per run | 1.5 [" in text
    with Image.open(tmp_path / "out/grid.png") as grid:
        assert grid.width > 4 * 128  # input, two groups, truth
    page = (tmp_path / "out/comparison.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "kl_beta=0.04" in page


def test_evaluated_sets_are_told_less_the_start(store):
    comparison = compare(find_sweep(store, "realsr_hpc", "betas"))
    table = evaluation_table(comparison, group_runs(comparison))
    half = student.ppf(0.975, 1) * np.std([0.9, 0.8], ddof=1) / np.sqrt(2)
    assert [row[0] for row in table.rows] == ["real: psnr_y"]
    assert table.rows[0][1] == f"0.85 [{0.85 - half:.4g}, {0.85 + half:.4g}] *"
    unrated = tuple(replace(run, metrics={"evaluate/real/ours/psnr_y": 1.0}) for run in comparison.runs)
    comparison = replace(comparison, runs=unrated)
    assert not evaluation_table(comparison, group_runs(comparison)).rows


def test_axes_are_drawn_for_one_two_and_many_keys(tmp_path):
    grid = [(a, b, c) for a in ("0.5", "10", "2") for b in ("x", "y") for c in ("1", "2")]
    keys = ("a", "b", "c")
    runs = [
        ComparedRun(str(n), str(n), "FINISHED", dict(zip(keys, values, strict=True)), {"m": float(n)})
        for n, values in enumerate(grid)
    ]
    groups = [Group(run.name, (run,)) for run in runs]
    pictures = {}
    for shown in (keys[:1], keys[:2], keys):
        path = tmp_path / f"{len(shown)}.png"
        assert plot_axes(groups, shown, "m", path)
        pictures[len(shown)] = path.read_bytes()
    assert len(set(pictures.values())) == 3
    assert not plot_axes(groups, (), "m", tmp_path / "none.png") and not (tmp_path / "none.png").exists()
    assert not plot_axes(groups, keys, "unmeasured", tmp_path / "none.png")


def test_no_run_is_best_where_none_has_the_metric(store, tmp_path):
    comparison = compare(find_sweep(store, "realsr_hpc", "betas"), "heldout/none")
    assert comparison.best is None
    write_report(comparison, tmp_path, "betas")
    assert "No run has heldout/none yet." in (tmp_path / "comparison.md").read_text()


def test_pictures_are_of_one_seed_that_every_group_has(store):
    zero, other = group_runs(compare(find_sweep(store, "realsr_hpc", "betas")))
    swapped = replace(other, runs=other.runs[::-1])
    _, rows = image_rows([zero, swapped])
    assert len(rows) == 1 and all((image == rows[0][0]).all() for image in rows[0])  # a shade a seed
    assert image_rows([replace(zero, runs=zero.runs[:1]), replace(other, runs=other.runs[1:])]) == ([], [])


def test_a_loss_is_best_at_its_lowest_and_a_diverged_run_never():
    losses = {"a": 2.0, "b": 1.5, "c": math.inf, "d": 1.7976931348623157e308}
    runs = tuple(
        ComparedRun(name, name, "FINISHED", {"task": "sft", "optim.lr": name}, {"heldout/loss/mean": loss})
        for name, loss in losses.items()
    )
    comparison = Comparison(runs, ("optim.lr",), "heldout/loss/mean")
    assert comparison.best is not None and comparison.best.name == "b"
    said = verdict(comparison, group_runs(comparison))
    assert said.startswith("Best by heldout/loss/mean (lower is better): lr=b, 1.5") and "2 run(s) diverged" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("sweep=betas metric=heldout/total/maen", "metric=heldout/total/maen: no run has it; the nearest are: heldout"),
        ("sweep=betas experiment=nope", "experiment=nope: MLflow has none of that name"),
        ("sweep=betas uri=sqlite:///{damaged}", "cannot be opened"),
        ("sweep=betas uri=sqlite:///{root}/none.db", "no such file"),
        ("sweep=betas uri=nope://x", "MLflow does not answer"),
        ("sweep=betas uri=http://127.0.0.1:9", "MLflow does not answer"),
    ],
)
def test_a_store_or_metric_that_is_not_there_is_one_line(words, said, store, root, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (damaged := tmp_path / "mlflow.db").write_bytes((root / "mlflow.db").read_bytes()[:5000])
    given = words.format(root=root, damaged=damaged).split()
    assert compare_command.main([*given, f"root={root}", f"output={tmp_path / 'out'}"]) == 2
    shown = capsys.readouterr().out
    assert said in shown and shown.count("\n") == 1 and not (tmp_path / "out").exists()


def a_run(root, name, **model):
    """A run that MLflow knows, with one step."""
    tree = {"name": name, "task": "grpo", "output_root": str(root), "seed": len(name), "model": model}
    (run_dir := root / name).mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(json.dumps(RunConfig.model_validate(tree).model_dump(mode="json")))
    spool = Spool(run_dir)
    spool.append({"kind": "metrics", "step": 1, "time_ms": 1, "metrics": {"heldout/total/mean": 1.0}})
    spool.close()
    sync(run_dir)
    return run_dir


def test_after_a_move_runs_are_repetitions_still_and_their_images_are_found(tmp_path):
    keep_images(a_run(tmp_path / "runs", "a", weights=str(tmp_path / "runs" / "stages" / "x")), 1)
    (tmp_path / "runs").rename(moved := tmp_path / "B")
    keep_images(a_run(moved, "bb", weights=str(moved / "stages" / "x")), 2)
    a_run(moved, "ccc", weights=str(tmp_path / "elsewhere"))
    mlflow = connect(f"sqlite:///{moved / 'mlflow.db'}")
    alike = compare(find_runs(mlflow, "realsr_hpc", ["a", "bb"]), root=moved)
    assert alike.deciding == () and len(group_runs(alike)) == 1
    assert [run.run_dir for run in alike.runs] == [moved / "a", moved / "bb"]
    other = compare(find_runs(mlflow, "realsr_hpc", ["a", "ccc"]), root=moved)
    assert other.deciding == ("model.weights",)


def test_a_sweep_of_more_runs_than_a_page_is_whole(store, monkeypatch):
    monkeypatch.setattr("realsr_hpc.compare.runs.PAGE_RUNS", 1)
    assert len(find_sweep(store, "realsr_hpc", "betas")) == len(REWARDS)


def test_a_deleted_experiment_says_how_it_comes_back(tmp_path, capsys):
    run_dir = a_run(tmp_path, "a")
    mlflow = connect(f"sqlite:///{tmp_path / 'mlflow.db'}")
    mlflow.delete_experiment(mlflow.get_experiment_by_name("realsr_hpc").experiment_id)
    words = ["runs=a", f"root={tmp_path}", f"output={tmp_path / 'c'}"]
    assert compare_command.main(words) == 2
    assert "experiment=realsr_hpc: it was deleted in MLflow; realsr-hpc sync-tracking" in capsys.readouterr().out
    assert sync(run_dir) == 0 and compare_command.main(words) == 0


def test_a_damaged_picture_and_a_group_without_rollouts_hide_no_others(tmp_path, capsys):
    folders = [a_run(tmp_path, name) for name in ("a", "bb")]
    for number, run_dir in enumerate(folders):
        keep_images(run_dir, number)
        kept = run_dir / "rollouts" / "step-000003-heldout"
        known = rollouts.read(kept)
        rollouts.write(kept, replace(known, groups=(replace(known.groups[0], key="none", rollouts=()), *known.groups)))
    (kept / "f.png").write_bytes((kept / "f.png").read_bytes()[:40])
    mlflow = connect(f"sqlite:///{tmp_path / 'mlflow.db'}")
    headers, rows = image_rows(
        [
            Group(run.name, (replace(run, params={}),))
            for run in compare(find_runs(mlflow, "realsr_hpc", ["a", "bb"])).runs
        ]
    )
    assert headers == ["input", "a", "bb", "truth"] and len(rows) == 1
    assert rows[0][1] is not None and rows[0][2] is None


def test_a_run_named_twice_is_no_repetition_and_many_runs_have_a_folder(store):
    with pytest.raises(ValueError, match="run 'beta0.0-0': is named twice, also as 'beta0.0-0'"):
        find_runs(store, "realsr_hpc", ["beta0.0-0", "beta0.04-0", "beta0.0-0"])
    many = [",".join(f"run-{start + number}-of-a-long-name" for number in range(30)) for start in (0, 1)]
    names = [compare_command.folder_name({"sweep": "", "runs": runs}) for runs in many]
    assert max(map(len, names)) < 100 and len(set(names)) == 2
    assert compare_command.folder_name({"sweep": "", "runs": "a,b"}) == "a-vs-b"
