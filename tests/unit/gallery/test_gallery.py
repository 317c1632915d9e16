"""The page: what it holds, and what Chromium makes of it."""

import json
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from realsr_hpc.artifacts import restoration
from realsr_hpc.artifacts.restoration import Restoration, RestoredTile
from realsr_hpc.commands import gallery
from realsr_hpc.files import sha256_of
from realsr_hpc.gallery import read_evaluation, read_restored, read_run, render
from realsr_hpc.paths import project_root
from realsr_hpc.records import (
    Case,
    DegradationLabel,
    GroupRewards,
    LQBatch,
    ParsedTrace,
    RolloutGroup,
    SceneText,
    ScoredGroup,
)
from realsr_hpc.train.kept_rollouts import write_rollouts

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HEAVY = DegradationLabel("heavy", "keep", "medium", "light", "upsample")
LIGHT = DegradationLabel("light", "downsample", "medium", "light", "keep")
SCENE = SceneText("a cat", "a striped cat", "a striped cat looking to the left", ("cat",))


def group(source: Case, phrase: str, rewards: list[float], final: np.ndarray, faults=()) -> ScoredGroup:
    """Rollouts of one image, with their rewards and a final image."""
    size = len(rewards)
    empty = torch.zeros(size, 1, dtype=torch.int64)
    rollouts = RolloutGroup(empty[0], empty, empty[:, 0], empty.float(), empty.bool(), empty)
    trace = ParsedTrace(phrase, ("a cat <script>alert(1)</script>", None, "whiskers"), (None,) * 3, faults)
    values = torch.tensor(rewards)
    earned = GroupRewards(2 * values, {"fidelity": values, "format": values}, {"fidelity": 1.0, "format": 1.0})
    return ScoredGroup(source, rollouts, (trace,) * size, (final,) * size, earned, torch.tensor([-1.0, 1.0, 0.0]))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """Two groups of three rollouts kept at step 8, one of them again at step 16."""
    folder = tmp_path_factory.mktemp("runs") / "grpo_tiny-abc"
    images = [np.ascontiguousarray(image[100:228, 100:228]) for image in (data.chelsea(), data.coffee())]
    gt = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    lq = gt[:, :, ::4, ::4].contiguous()
    batch = LQBatch(lq, gt, (HEAVY, LIGHT), (SCENE, None), ("cat", "coffee"), torch.arange(2))
    groups = [
        group(batch.cases()[0], HEAVY.phrase, [0.2, 0.9, 0.4], images[0]),
        group(batch.cases()[1], HEAVY.phrase, [0.1, 0.3, 0.2], images[1], ("x",)),
    ]
    # of each rollout a rough and a final image, which are turned to grey the further the lower its reward
    pictures = [
        [(image[::4, ::4], None, (image * share).astype(np.uint8)) for share in (0.4, 0.7, 1.0)] for image in images
    ]
    write_rollouts(folder, 8, "train", groups, pictures)
    write_rollouts(folder, 16, "heldout", groups[:1], pictures[:1])
    return folder


def test_a_group_stands_with_its_rewards_words_and_images(run_dir):
    entries = read_run(run_dir)
    assert [(entry.kind, entry.step, entry.key) for entry in entries] == [
        ("rollouts", 8, "cat"), ("rollouts", 8, "coffee"), ("held-out", 16, "cat"),
    ]  # fmt: skip
    best = entries[0].results[1]
    assert best.total == pytest.approx(1.8) and best.advantage == 1.0 and set(best.images) == {"rough", "final"}
    page = render(entries, "Results & more")
    assert "<title>Results &amp; more</title>" in page and page.count('class="best"') == 3
    # What a model says is text, never markup; and the page asks no network for anything.
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    # A slot named wrongly is said in words, not by colour alone.
    assert "heavy blur" in page and "(wrong)" in page and "Not well formed: x" in page


@pytest.fixture(scope="module")
def page(run_dir) -> Path:
    output = run_dir.parent / "gallery.html"
    assert gallery.main([f"run={run_dir}", f"output={output}"]) == 0
    assert gallery.main([f"run={run_dir.parent}"]) == 2 and gallery.main([]) == 2
    return output


def dump_dom(page: Path, view: str, profile: Path) -> str:
    """The document after its script has run, at an address that carries a view."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        f"--user-data-dir={profile}", "--virtual-time-budget=3000", "--dump-dom", f"{page.as_uri()}{view}",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian package chromium)")
def test_in_a_browser_filters_hide_the_slider_cuts_and_the_best_is_shown(page, tmp_path):
    dom = dump_dom(page, "#slot=heavy+blur&kind=rollouts&slide=25&order=spread", tmp_path)
    shown = [match for match in re.findall(r"<article[^>]*>", dom) if "hidden" not in match]
    assert len(shown) == 1 and 'data-step="8"' in shown[0]
    assert ">1 of 3 shown<" in dom
    assert dom.count("--cut: 25%") == 3
    # The best rollout stands on the right of the slider without a click.
    assert dom.count('<span class="shown">rollout 2</span>') == 3
    everything = dump_dom(page, "", tmp_path)
    assert ">3 of 3 shown<" in everything


def test_it_is_served_on_loopback_and_nothing_beside_it(page):
    command = [sys.executable, str(project_root() / "tools/gallery.py"), f"run={page.parent / 'grpo_tiny-abc'}"]
    command += [f"output={page}", "serve=true", "port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = [server.stdout.readline() for _ in range(2)][1].strip()
            assert address.startswith("http://127.0.0.1:")
            with urllib.request.urlopen(address, timeout=60) as answer:
                assert b"grpo_tiny-abc" in answer.read()
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(address + "grpo_tiny-abc/rollouts", timeout=60)
            refused.value.close()
        finally:
            server.terminate()


def test_an_evaluations_total_weighs_its_rewards_as_the_recipe_does(tmp_path):
    made = {"metrics": {"reward_a": 0.5, "reward_b": 1.0, "psnr_y": 20.0}, "degradation": None, "files": {}}
    methods = {
        "ours": {**made, "texts": ["x", "y", "z"], "faults": []},
        "malformed": {**made, "texts": ["x", None, None], "faults": ["no end"]},
        "bicubic": made,
    }
    item = {"key": "k", "files": {}, "captions": None, "degradation": None, "methods": methods}
    for weights, total in (({"weights": {"a": 0.2, "b": 3.0}}, pytest.approx(3.1)), ({}, None)):
        (tmp_path / "images.json").write_text(json.dumps([item | weights]), encoding="utf-8")
        ours, malformed, bicubic = read_evaluation(tmp_path)[0].results
        assert ours.total == total and malformed.total is None and bicubic.total is None


def test_a_damaged_record_and_one_of_a_newer_version_are_left_out_and_named(run_dir, tmp_path, caplog):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    newer, cut = sorted(copy.glob("rollouts/*/rollouts.json"))
    newer.write_text(json.dumps(json.loads(newer.read_text()) | {"version": 2}), encoding="utf-8")
    entries = read_run(copy)
    assert [entry.step for entry in entries] == [16] and "written in version 2 of its format" in caplog.text
    cut.write_text(cut.read_text()[:-9], encoding="utf-8")
    with pytest.raises(ValueError, match="neither rollouts/"):
        read_run(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"reward": "much"}, {"reward": "0.5"}, {"reward": True}, {"advantage": "1"}, {"texts": "abc"}, {"texts": [3]},
        {"rewards": [1]}, {"rewards": {"a": "1"}}, {"faults": None}, {"files": {"final": 3}}, {"degradation": 1},
        {"files": {"final": "/etc/hostname"}}, {"files": {"final": "../../step-000016-heldout/0-input.png"}},
    ],
)  # fmt: skip
def test_values_of_other_types_and_files_of_elsewhere_are_left_out_and_named(change, run_dir, tmp_path, caplog):
    shutil.copytree(run_dir, copy := tmp_path / "copy")
    path, _ = sorted(copy.glob("rollouts/*/rollouts.json"))
    kept = json.loads(path.read_text())
    kept["groups"][0]["rollouts"][0] |= change
    path.write_text(json.dumps(kept), encoding="utf-8")
    assert [entry.step for entry in read_run(copy)] == [16]
    assert f"groups.0.rollouts.0.{next(iter(change))}" in caplog.text


@pytest.mark.parametrize("value", ["null", "NaN", "1e999", "-1e999"])
def test_a_reward_that_is_not_finite_is_not_shown_and_never_best(value, run_dir, tmp_path):
    shutil.copytree(run_dir, folder := tmp_path / run_dir.name)
    file = folder / "rollouts" / "step-000016-heldout" / "rollouts.json"
    kept = json.loads(file.read_text())
    for item in (kept["groups"][0]["rollouts"][1], kept["groups"][0]["rollouts"][1]["rewards"]):
        item["reward" if "reward" in item else "format"] = "HERE"
    file.write_text(json.dumps(kept).replace('"HERE"', value))
    [entry] = [entry for entry in read_run(folder) if entry.step == 16]
    assert [result.total for result in entry.results] == [pytest.approx(0.4), None, pytest.approx(0.8)]
    assert [sorted(result.numbers) for result in entry.results] == [
        ["fidelity", "format"],
        ["fidelity"],
        ["fidelity", "format"],
    ]
    page = render([entry], "")
    assert 'data-best="0.8' in page and 'data-spread="0.4' in page and page.count('class="best"') == 1
    assert "nan" not in page.partition("<main>")[2].partition("</main>")[0].replace("data:", "").lower().split()


def test_a_folder_in_the_place_of_a_record_hides_no_others(run_dir, tmp_path, caplog):
    shutil.copytree(run_dir, folder := tmp_path / run_dir.name)
    (folder / "evaluation" / "step-000016" / "images.json").mkdir(parents=True)
    assert len(read_run(folder)) == len(read_run(run_dir)) and "has no images.json" in caplog.text


def test_a_link_out_of_the_folder_and_a_replaced_input_are_not_shown(run_dir, tmp_path):
    shutil.copytree(run_dir, copy := tmp_path / "copy")
    folder, _ = sorted(copy.glob("rollouts/*"))
    (folder / "0-input.png").unlink()
    (folder / "0-input.png").symlink_to(run_dir / folder.relative_to(copy) / "0-input.png")
    assert set(read_run(copy)[0].images) == {"truth"}
    (restored := tmp_path / "restored").mkdir()
    (restored / "restore.json").write_text("{}")
    for name in ("input", "a"):
        Image.fromarray(data.chelsea()[:32, :32]).save(restored / f"{name}.png")
    tile = RestoredTile(0, 0, True, False, None, (), ())
    for digest, shown in ((sha256_of(restored / "input.png"), {"input"}), ("0" * 64, set())):
        restoration.write(restored / "a.png", Restoration((tile,), "input.png", digest))
        assert set(read_restored(restored)[0].images) == shown
    Image.fromarray(data.chelsea()[:32, :32]).save(secret := tmp_path / "secret.png")
    for named, digest, shown in (("input.png", "", {"input"}), (str(secret), "", set()), ("../secret.png", "", set())):
        restoration.write(restored / "a.png", Restoration((tile,), named, digest))
        assert set(read_restored(restored)[0].images) == shown
    restoration.write(restored / "a.png", Restoration((tile,), str(secret), sha256_of(secret)))
    assert set(read_restored(restored)[0].images) == {"input"}
    (restored / "a.png").unlink()
    (restored / "a.png").symlink_to(secret)
    assert not read_restored(restored)


def test_sources_that_are_called_alike_are_told_apart_by_the_folders_above(run_dir, tmp_path, capsys):
    for place in ("one", "two/more"):
        shutil.copytree(run_dir, tmp_path / place / run_dir.name)
    runs = [tmp_path / "one" / run_dir.name, tmp_path / "two/more" / run_dir.name]
    page = tmp_path / "page.html"
    assert gallery.main([f"run={runs[0]},{runs[1]}", f"output={page}"]) == 0
    text = page.read_text()
    assert f"one/{run_dir.name}" in text and f"two/more/{run_dir.name}" in text
    assert gallery.main([f"run={runs[0]}", f"output={page}"]) == 0 and f"one/{run_dir.name}" not in page.read_text()
    assert gallery.main([f"run={runs[0]},{runs[0]}", f"output={page}"]) == 2
    assert "is given twice; name it once" in capsys.readouterr().err
