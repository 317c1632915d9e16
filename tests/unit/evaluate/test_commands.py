"""The commands on a tiny policy with random weights: from a run folder to files."""

import importlib
import json
import re
import shutil
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from realsr_hpc.artifacts import restoration
from realsr_hpc.artifacts.restoration import Restoration, RestoredTile
from realsr_hpc.config.learning import RewardsConfig, RewardTerm
from realsr_hpc.config.load import compose_one
from realsr_hpc.data.loader import LQLoader
from realsr_hpc.parallel.process_groups import shutdown
from tests.random_run import random_checkpoint, random_recipe

torch.set_num_threads(1)


def command(name: str):
    return importlib.import_module(f"realsr_hpc.commands.{name}").main


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """One layer and an image tokenizer, both at random, with a checkpoint of step 3."""
    folder = tmp_path_factory.mktemp("run")
    terms = {"fidelity": RewardTerm(kind="fidelity"), "format": RewardTerm(kind="format")}
    random_checkpoint(folder, random_recipe(folder, rewards=RewardsConfig(terms=terms)), 3)
    yield folder
    shutdown()


def test_restore_writes_images_and_reasoning_and_repeats_itself(run_dir, tmp_path, capsys):
    Image.fromarray(data.astronaut()[:32, :48]).save(tmp_path / "face.png")
    main = command("restore")
    for output in ("first", "second"):
        assert main([f"run={run_dir}", f"input={tmp_path / 'face.png'}", f"output={tmp_path / output}"]) == 0
    assert "1 restored" in capsys.readouterr().out
    with Image.open(tmp_path / "first/face.png") as first, Image.open(tmp_path / "second/face.png") as second:
        assert first.size == (192, 128)
        np.testing.assert_array_equal(first, second)
    reasoning = json.loads((tmp_path / "first/face.json").read_text())
    assert len(reasoning["tiles"]) == 2 and all(tile["well_formed"] for tile in reasoning["tiles"])
    assert re.search(r"step-000003/sha256:[0-9a-f]{16} \{'temperature'", reasoning["source"])


def test_evaluate_writes_its_report_beside_the_checkpoint(run_dir, capsys):
    arguments = [f"checkpoint={run_dir / 'checkpoints/step-000003'}", "num_images=2", "temperature=0.5", "candidates=2"]
    assert command("evaluate")([*arguments, "choose=mean"]) == 0
    printed = capsys.readouterr().out
    assert "| bicubic | ours |" in printed and "has no MLflow run" in printed
    folder = run_dir / "evaluation/step-000003"
    assert {"metrics.csv", "metrics.md", "grid.png", "worst.png", "images.json"} <= {p.name for p in folder.iterdir()}
    text = (folder / "metrics.md").read_text()
    assert "reward_fidelity" in text and "not computed: `topiq_nr`" in text


@pytest.mark.parametrize("damage", ["flip", "empty", "gone", "no manifest"])
def test_a_checkpoint_that_is_named_is_compared_with_its_checksums(damage, run_dir, tmp_path, capsys):
    shutil.copytree(run_dir, copy := tmp_path / "run")
    folder = copy / "checkpoints/step-000003"
    file = folder / ("manifest.json" if damage == "no manifest" else ".metadata")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if damage == "flip" else b"")
    if damage in ("gone", "no manifest"):
        file.unlink()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    output = [f"checkpoint={folder}", f"output={tmp_path / 'out'}"]
    for name, words in {
        "restore": [f"input={tmp_path / 'a.png'}"],
        "evaluate": ["num_images=1"],
        "export_hf": [f"run={copy}"],
    }.items():
        assert command(name)([*output, *words]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"checkpoint {folder}") and file.name in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_evaluate_takes_finished_images_and_a_set_of_any_size(run_dir, tmp_path, capsys):
    for name, size in (("lq", 40), ("gt", 160), ("other", 160)):
        (tmp_path / name).mkdir()
        Image.fromarray(data.astronaut()).resize((size, size)).save(tmp_path / name / "face.png")
    place = [f"data={tmp_path}", "set=paired", "pyiqa=none"]
    assert command("evaluate")([f"images={tmp_path / 'other'}", *place]) == 0
    assert "| psnr_y ↑ |" in capsys.readouterr().out and (tmp_path / "other-evaluation/paired/metrics.md").exists()
    assert command("evaluate")([f"run={run_dir}", f"against={tmp_path / 'other'}", *place]) == 0  # in four tiles
    assert "bicubic 1, other 1, ours 1" in capsys.readouterr().out


def test_what_a_model_cannot_be_compared_with_is_named_and_nothing_is_written(run_dir, tmp_path, capsys):
    Image.fromarray(data.astronaut()[:32, :32]).save(tmp_path / "face.png")
    recipe = (run_dir / "recipe.yaml").read_text()
    for name, text in (
        ("unsaved", recipe),
        ("by two", recipe.replace("upscale: 4", "upscale: 2")),
        ("cut", recipe[:99]),
    ):
        left_out = ["evaluation*", *["checkpoints"] * (name == "unsaved")]  # other tests have evaluated the run
        shutil.copytree(run_dir, tmp_path / name, ignore=shutil.ignore_patterns(*left_out))
        (tmp_path / name / "recipe.yaml").write_text(text)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    wrong = {
        "strat": "did you mean 'start'?",
        "unsaved": "has no complete checkpoint",
        "by two": "its vlcot.upscale is 2, not 4",
        "cut": "recipe.yaml: ",
        "export": "has no recipe.yaml",
        "": "no file has the name of an image of the set: found face, expected ",
    }
    for name, said in wrong.items():
        against = name if name == "strat" else str(tmp_path / name).rstrip("/")
        words = [f"run={run_dir}", f"against={against}", f"output={tmp_path / 'out'}", "num_images=1", "pyiqa=none"]
        assert command("evaluate")(words) == 2, name
        told = capsys.readouterr().err
        assert against in told and said in told and told.count("\n") == 1, told
    assert not (tmp_path / "out").exists()


def test_score_prints_a_table_and_keeps_it(tmp_path, capsys):
    for name, image in (("a", data.astronaut()), ("b", data.chelsea())):
        Image.fromarray(image[:128, :128]).save(tmp_path / f"{name}.png")
    arguments = [f"input={tmp_path}", f"truth={tmp_path}", "metric=niqe,ranker,psnr_y", f"output={tmp_path / 't.csv'}"]
    assert command("score")(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "mean"
    rows = (tmp_path / "t.csv").read_text().splitlines()
    assert rows[0] == "image,niqe,ranker,psnr_y" and rows[1].startswith("a.png,") and rows[1].endswith(",100.0")


def test_broken_files_are_named_and_the_rest_is_measured(tmp_path, capsys):
    for folder in ("lq", "other"):
        (tmp_path / folder).mkdir()
        Image.fromarray(data.chelsea()[:128, :128]).save(tmp_path / folder / "cat.png")
        (tmp_path / folder / "empty.jpg").touch()
    whole = (tmp_path / "lq/cat.png").read_bytes()
    (tmp_path / "lq/torn.png").write_bytes(whole)
    (tmp_path / "other/torn.png").write_bytes(whole[: len(whole) // 2])
    arguments = [f"input={tmp_path / 'other'}", f"lq={tmp_path / 'lq'}", "rewards=tiny", f"output={tmp_path / 't.csv'}"]
    assert command("score")(arguments) == 1
    told = capsys.readouterr().err
    assert "left out: empty.jpg cannot be read (broken" in told and "left out: torn.png cannot be read" in told
    assert [row.split(",")[0] for row in (tmp_path / "t.csv").read_text().splitlines()] == ["image", "cat.png"]
    assert command("evaluate")([f"images={tmp_path / 'other'}", f"data={tmp_path}", "set=unpaired", "pyiqa=none"]) == 1
    printed = capsys.readouterr().out
    assert "bicubic 2, other 1" in printed and "left out: empty: cannot be read (broken" in printed
    assert "- other has no readable image for 1 of 2: torn" in printed
    (tmp_path / "lq/empty.jpg").unlink()
    arguments = [f"images={tmp_path / 'other'}", f"data={tmp_path}", "set=unpaired", "pyiqa=none"]
    assert command("evaluate")(arguments) == 1  # of the method alone something is missing
    (tmp_path / "other/cat.png").write_bytes(b"")
    assert command("evaluate")([*arguments, f"output={tmp_path / 'none'}"]) == 2
    assert f"{tmp_path / 'other'}: none of its images can be read" in capsys.readouterr().err


def test_degraded_photographs_are_the_recipes_and_a_test_set(tmp_path, capsys):
    arguments = ["recipe=grpo_tiny", f"output={tmp_path / 'set'}", "images=2", "data.num_threads=1"]
    assert command("degrade")(arguments) == 0
    loader = LQLoader(compose_one(arguments[:1]), "heldout", 2, shuffle=False)
    batch = loader.next()
    loader.close()
    rows = (tmp_path / "set/labels.csv").read_text().splitlines()
    assert len(rows) == 3
    for number, row in enumerate(rows[1:]):
        name, *words = row.split(",")
        assert words == list(astuple(batch.labels[number]))
        for folder, pixels in (("lq", batch.lq), ("gt", batch.gt)):
            with Image.open(tmp_path / "set" / folder / f"{name}.png") as image:
                np.testing.assert_array_equal(np.asarray(image), pixels[number].permute(1, 2, 0))
    assert command("evaluate")([f"images={tmp_path / 'set/gt'}", f"data={tmp_path / 'set'}", "set=paired"]) == 0
    assert "bicubic 2, gt 2" in capsys.readouterr().out
    assert command("degrade")(arguments) == 2 and "not empty" in capsys.readouterr().err


def test_degrading_and_freezing_end_with_1_where_a_photograph_was_left_out(tmp_path, capsys, caplog):
    (tmp_path / "in").mkdir()
    for name in ("a", "b", "c"):
        Image.fromarray(data.chelsea()[:160, :160]).save(tmp_path / "in" / f"{name}.png")
    assert command("prepare_data")([f"source={tmp_path / 'in'}", f"output={tmp_path / 'out'}", "num_threads=1"]) == 0
    (tmp_path / "in" / "b.png").write_bytes(b"")
    words = ["recipe=grpo_tiny", f"data.manifest={tmp_path / 'out/manifest.parquet'}", f"output={tmp_path / 'set'}"]
    assert command("degrade")([*words, "images=3", "split=train", "data.num_threads=1"]) == 1
    assert "left out: b: broken" in caplog.text and "3 pairs" in capsys.readouterr().out
    words[-1] = f"output={tmp_path / 'traces'}"
    assert command("freeze_traces")([*words, "samples=3", "data.train_split=train", "data.num_threads=1"]) == 1


def test_score_takes_the_rewards_of_a_recipe_group(tmp_path, capsys):
    for folder in ("sr", "lq"):
        (tmp_path / folder).mkdir()
    Image.fromarray(data.chelsea()[:128, :128]).save(tmp_path / "sr" / "chelsea.png")
    Image.fromarray(data.chelsea()[:128, :128]).resize((32, 32)).save(tmp_path / "lq" / "chelsea.png")
    tile = RestoredTile(0, 0, True, False, "light blur", ("cat", "a cat.", "a cat sits."), ())
    restoration.write(tmp_path / "sr" / "chelsea.png", Restoration((tile,)))
    manifest = "recipes/assets/photographs/manifest.parquet"
    arguments = [f"input={tmp_path / 'sr'}", f"lq={tmp_path / 'lq'}", f"manifest={manifest}"]

    def scores_of(chosen):
        assert command("score")([*arguments, chosen, f"output={tmp_path / 't.csv'}"]) == 0
        assert "left out: degradation needs the degradation" in capsys.readouterr().err
        header, row = (line.split(",") for line in (tmp_path / "t.csv").read_text().splitlines())
        return dict(zip(header[1:], map(float, row[1:]), strict=True))

    scores, trained_on = scores_of("rewards=default"), scores_of("recipe=grpo_tiny")
    weights = {name: term.weight for name, term in compose_one(["recipe=grpo_tiny"]).rewards.terms.items()}
    assert {name: trained_on[name] for name in weights if name in scores} == {
        name: scores[name] for name in weights if name in scores
    }
    assert trained_on["total"] == pytest.approx(sum(weights.get(name, 0.0) * scores[name] for name in scores))
    assert scores["format"] == 1.0 and scores["fidelity"] > 0.8 and scores["understanding"] > 0
    assert scores["total"] == pytest.approx(sum(value for name, value in scores.items() if name != "total"))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("restore", ["run=x", "inptu=y"], "did you mean 'input'"),
        ("restore", ["run=x"], "input=DIR_OR_FILE"),
        ("evaluate", ["run=/nowhere"], "recipe.yaml"),
        ("evaluate", ["num_images=none"], "not a whole number"),
        ("score", ["metric=niqe"], "input=DIR is needed"),
        ("score", ["input=recipes/assets/photographs", "metric=psnr_y"], "needs truth=DIR"),
        ("score", ["input=recipes/assets/photographs", "metric=stripes", "output=recipes"], "output=recipes: a folder"),
        ("fit_experts", ["only=all"], "give niqe, ranker or measure"),
    ],
)
def test_wrong_usage_is_said_in_one_line(name, arguments, message, capsys):
    assert command(name)(arguments) == 2
    assert message in capsys.readouterr().err
