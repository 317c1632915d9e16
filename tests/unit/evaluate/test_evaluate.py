import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from realsr_hpc.artifacts.evaluation import INPUT, EvaluatedImage, MethodResult
from realsr_hpc.config.learning import RewardsConfig
from realsr_hpc.evaluate import (
    BICUBIC,
    Bicubic,
    FinishedImages,
    Metrics,
    World,
    bootstrap,
    cases_of,
    evaluate,
    open_set,
)
from realsr_hpc.evaluate.published import published_table
from realsr_hpc.evaluate.report import EvaluationReport
from realsr_hpc.evaluate.words import Confusion, text_scores
from realsr_hpc.quality.psnr_ssim import psnr_y
from realsr_hpc.records import Case, DegradationLabel, LQBatch, ParsedTrace, RestoredImage, SceneText
from realsr_hpc.rewards.mixture import RewardMixture
from realsr_hpc.rewards.understanding import chrf

torch.set_num_threads(1)
LABEL = DegradationLabel("light", "keep", "medium", "light", "upsample")
WRONG_BLUR = "heavy blur, keep, medium noise, light compression, upsample"
SCENE = SceneText("a cat", "a cat on a sofa", "a grey cat on a red sofa", ("cat", "sofa"))


@pytest.fixture(scope="module")
def cases():
    photographs = (data.astronaut(), data.coffee(), data.chelsea())
    pictures = [Image.fromarray(image).resize((192, 128)) for image in photographs]
    gts = [np.asarray(picture)[:, 20:148] for picture in pictures]
    lqs = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BOX)) for image in gts]
    return [Case(key, lq, gt, LABEL, SCENE, i) for i, (key, lq, gt) in enumerate(zip("abc", lqs, gts, strict=True))]


def half_way(cases):
    """The truth plus a constant; the image of `c` is missing."""
    results = []
    for case in cases:
        image = None if case.key == "c" else np.clip(case.gt.astype(int) + 5, 0, 255).astype(np.uint8)
        trace = ParsedTrace(WRONG_BLUR, ("a cat", "x", "x"), (None,) * 3, () if image is not None else ("fault",))
        results.append(RestoredImage(trace, (case.lq, None, image)))
    return results


METHODS = {BICUBIC: Bicubic(4), "ours": half_way}


@pytest.fixture(scope="module")
def report(cases, tmp_path_factory):
    metrics = Metrics(crop_px=4, rewards=RewardMixture(RewardsConfig()), pyiqa=["lpips"])
    return evaluate(METHODS, cases, tmp_path_factory.mktemp("report"), metrics=metrics, set_name="realsr")


def test_metrics_are_those_of_the_images_and_missing_ones_are_left_out(report, cases):
    truth = np.stack([case.gt for case in cases[:2]])
    given = np.stack([item.image for item in half_way(cases[:2])])
    values = report.values("ours", "psnr_y")
    np.testing.assert_allclose(values[:2], psnr_y(given, truth, 4))
    assert np.isnan(values[2]) and report.interval("ours", "psnr_y").num_images == 2
    assert report.interval("ours", "slot_accuracy").mean == pytest.approx(0.8)
    assert report.interval("ours", "well_formed").mean == pytest.approx(2 / 3)
    assert report.interval("ours", "text_tags").mean == pytest.approx(0.5)
    assert report.gain("ours", BICUBIC, "psnr_y").low > 0
    # A method without traces has only the reward terms that look at the image.
    assert report.interval(BICUBIC, "reward_fidelity").num_images == 3
    # of the four slots that weigh by default one is wrong
    assert report.interval("ours", "reward_degradation").mean == pytest.approx(0.75)
    assert "evaluate/realsr/bicubic/reward_format" not in report.summary()


def test_confusion_counts_what_was_said_for_what_was_true(report):
    blur = report.confusions("ours")[0]
    assert blur.counts.tolist() == [[0, 0, 3, 0], [0] * 4, [0] * 4] and blur.accuracy == 0.0
    assert [item.accuracy for item in report.confusions("ours")[1:]] == [1.0] * 4


def test_files_say_the_same_as_the_report(report):
    rows = list(csv.DictReader((report.folder / "metrics.csv").read_text().splitlines()))
    assert len(rows) == 6 and [row["method"] for row in rows[:2]] == [BICUBIC, "ours"]
    assert float(rows[1]["psnr_y"]) == report.values("ours", "psnr_y")[0]
    text = (report.folder / "metrics.md").read_text()
    assert "| psnr_y ↑ |" in text and "| niqe ↓ |" in text
    assert "bicubic 3, ours 2" in text and "4 px of border left out" in text
    assert "- not computed: `lpips`" in text  # named, not silently absent
    assert "RealSR usually" not in text and "| RealSR-R1 | 22.89 |" in text
    records = json.loads((report.folder / "images.json").read_text())["images"]
    assert (
        records[0]["methods"]["ours"]["texts"][0] == "a cat" and "final" not in records[2]["methods"]["ours"]["files"]
    )
    for name in ("grid.png", "worst.png", "slots.png"):
        with Image.open(report.folder / name) as picture:
            assert picture.width > 3 * 128
    assert [image.key for image in report.worst(1)] == ["c"]


def test_finished_images_of_another_method_score_alike(report, cases, tmp_path):
    finished = FinishedImages(report.folder / "images" / "ours")
    metrics = Metrics(crop_px=4)
    again = evaluate({BICUBIC: Bicubic(4), "other": finished}, cases, tmp_path, metrics=metrics)
    np.testing.assert_array_equal(again.values("other", "psnr_y"), report.values("ours", "psnr_y"))
    assert again.interval("other", "well_formed").num_images == 0 and not (tmp_path / "slots.png").exists()


def test_ranks_share_the_cases_and_the_first_one_reports(cases, tmp_path):
    metrics, posted = Metrics(), []

    def gather(value):
        posted.append(value)
        return [posted[1], value] if len(posted) == 4 else [value]

    second = World(1, 2, gather)
    assert evaluate(METHODS, cases, tmp_path, metrics=metrics, world=second, batch_size=2) is None
    first = evaluate(METHODS, cases, tmp_path, metrics=metrics, world=World(0, 2, gather), batch_size=2)
    assert [image.key for image in first.images] == ["a", "b", "c"]


@pytest.fixture
def test_set(tmp_path, cases):
    """Pairs in RealSR's own names, one with a truth of the wrong size, one broken."""
    folder = tmp_path / "Test" / "4"
    folder.mkdir(parents=True)
    for case in cases:
        Image.fromarray(case.lq).save(folder / f"{case.key}_LR4.png")
        Image.fromarray(case.gt[:64] if case.key == "b" else case.gt).save(folder / f"{case.key}_HR.png")
    (folder / "c_LR4.png").write_bytes(b"nonsense")
    return tmp_path


def test_a_set_is_read_in_its_layout_and_what_cannot_be_used_is_named(test_set, tmp_path):
    found, remarks = open_set("realsr", test_set, 4)
    assert found.keys() == ["a", "b", "c"] and "usually has 100 images" in remarks[0]
    report = evaluate({BICUBIC: Bicubic(4)}, found, tmp_path / "out", metrics=Metrics(), remarks=remarks)
    assert [image.key for image in report.images] == ["a"]
    assert "is not 4 x low quality" in report.skipped["b"] and "cannot be read" in report.skipped["c"]


@pytest.mark.parametrize(("lq", "gt"), [("test_LR", "test_HR"), ("lq", "gt"), ("StableSR/LR", "StableSR/HR")])
def test_two_folders_side_by_side_are_pairs(lq, gt, cases, tmp_path):
    for name, tag, pixels in ((lq, "x4", cases[0].lq), (gt, "", cases[0].gt)):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / name / f"0001{tag}.png")
    case = open_set("paired", tmp_path, 4)[0][0]
    assert case.key == "0001" and case.gt.shape == (128, 128, 3)
    blind = open_set("unpaired", tmp_path / lq, 4)[0]
    assert len(blind) == 1 and blind[0].gt is None


def test_without_truth_only_reference_free_metrics_remain(cases, tmp_path):
    blind = [Case(case.key, case.lq) for case in cases]
    report = evaluate({BICUBIC: Bicubic(4)}, blind, tmp_path, metrics=Metrics())
    assert report.names == ("restored", "niqe") and report.interval(BICUBIC, "niqe").num_images == 3
    assert published_table("heldout") == [] and report.worst(1)[0].key in "abc"


def test_what_does_not_fit_is_said(cases, tmp_path):
    with pytest.raises(ValueError, match="returned 2 images for 3"):
        evaluate({BICUBIC: Bicubic(4), "x": lambda c: half_way(c)[:2]}, cases, tmp_path, metrics=Metrics())
    with pytest.raises(ValueError, match="a: image .128, 64. px|a: image .128, 64., truth"):
        narrow = lambda c: [RestoredImage(half_way([case])[0].trace, (None, None, case.gt[:, :64])) for case in c]  # noqa: E731
        evaluate({BICUBIC: Bicubic(4), "x": narrow}, cases[:1], tmp_path, metrics=Metrics())
    with pytest.raises(ValueError, match="bicubic is missing"):
        evaluate({"ours": half_way}, cases, tmp_path, metrics=Metrics())
    with pytest.raises(ValueError, match="set='relasr' is not one of realsr"):
        open_set("relasr", tmp_path, 4)


def test_bootstrap_interval_covers_the_normal_one():
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    interval = bootstrap(np.append(values, np.nan))
    half = 1.96 * values.std() / 20
    assert interval.num_images == 400 and interval.mean == pytest.approx(values.mean())
    np.testing.assert_allclose([interval.low, interval.high], [values.mean() - half, values.mean() + half], atol=0.015)
    assert bootstrap(np.array([np.nan])).num_images == 0


@pytest.mark.parametrize(("gt", "size"), [(None, (30, 48, 3)), (np.zeros((31, 50, 3), np.uint8), (31, 50, 3))])
def test_bicubic_has_the_truths_size_or_enlarges_by_the_factor(gt, size):
    lq = np.zeros((10, 16, 3), np.uint8)
    assert Bicubic(3)([Case("a", lq, gt)])[0].image.shape == size


def test_a_report_that_could_not_be_written_to_its_end_has_no_metrics_csv(tmp_path):
    """A chain takes the file as the sign that evaluating worked, also with exit code 1, which an exception has too."""
    values = {"restored": 1.0, "psnr_y": 5.0}
    results = {BICUBIC: MethodResult(values), "ours": MethodResult(values)}
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    report = EvaluationReport(
        tmp_path, "x", (BICUBIC, "ours"), [EvaluatedImage("a", {INPUT: "a.png"}, results)], Metrics()
    )
    report.write()
    before = (tmp_path / "metrics.csv").read_bytes()
    assert before == b"key,method,restored,psnr_y\r\na,bicubic,1.0,5.0\r\na,ours,1.0,5.0\r\n"
    (tmp_path / "worst.png").unlink()
    (tmp_path / "worst.png").mkdir()
    with pytest.raises(IsADirectoryError):
        report.write()
    assert not (tmp_path / "metrics.csv").exists()


@pytest.mark.parametrize(("metric", "order"), [("psnr_y", "cab"), ("niqe", "cba")])
def test_the_worst_are_without_an_image_then_of_lowest_psnr_or_highest_niqe(metric, order, tmp_path):
    """Of the last method."""
    values = {"a": 3.0, "b": 7.0, "c": np.nan}
    images = [
        EvaluatedImage(key, {}, {BICUBIC: MethodResult({metric: 5.0}), "ours": MethodResult({metric: value})})
        for key, value in values.items()
    ]
    report = EvaluationReport(tmp_path, "x", (BICUBIC, "ours"), images, Metrics())
    assert "".join(image.key for image in report.worst()) == order
    assert [image.key for image in report.worst(1)] == ["c"]


def test_chance_is_the_share_of_the_commonest_true_word():
    counts = np.array([[1, 2, 2, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    assert (Confusion("blur", counts).chance, Confusion("blur", counts).accuracy) == (5 / 6, 1 / 6)


def test_a_photograph_that_stands_in_a_batch_twice_is_numbered():
    nothing = (None,) * 3
    pixels = torch.arange(3 * 3 * 4).view(3, 3, 2, 2).to(torch.uint8)
    batch = LQBatch(pixels, None, nothing, nothing, ("a", "b", "a"), torch.tensor([4, 5, 9]))
    found = cases_of(batch)
    assert [(case.key, case.index) for case in found] == [("a-4", 4), ("b", 5), ("a-9", 9)]
    assert all(np.array_equal(case.lq, image) for case, image in zip(found, pixels.permute(0, 2, 3, 1), strict=True))


def test_texts_are_scored_against_the_truth_that_there_is():
    """The rough text names tags and the word; a missing text is as wrong as can be; no truth is no score."""
    sign = SceneText("sign STOP", "", "a red sign", ("sign", "red"), word="stop")
    said = ParsedTrace(None, ("sign SHOP, red", "STOP", None), (None,) * 3, ())
    found = text_scores(said, sign)
    assert found["text_tags"] == 1.0 and found["text_word"] == 0.0 and found["text_letters"] == 0.75
    assert found["text_chrf"] == pytest.approx(chrf("sign SHOP, red", "sign STOP") / 2)
    unknown = text_scores(said, SceneText("", "", "", ()))
    assert all(np.isnan(value) for value in (*unknown.values(), *text_scores(said, None).values()))
