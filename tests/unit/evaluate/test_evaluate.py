import csv

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from realsr_hpc.config.schema import RewardsConfig
from realsr_hpc.evaluate import BICUBIC, bootstrap, evaluate
from realsr_hpc.records import DegradationLabel, LQBatch, ParsedTrace, RestoredImage
from realsr_hpc.rewards.metrics import psnr_y
from realsr_hpc.rewards.mixture import RewardMixture

torch.set_num_threads(1)
LABEL = DegradationLabel("light", "keep", "medium", "light", "upsample")
WRONG_BLUR = "heavy blur, keep, medium noise, light compression, upsample"


@pytest.fixture(scope="module")
def batch():
    photographs = (data.astronaut(), data.coffee(), data.chelsea())
    pictures = [Image.fromarray(image).resize((192, 128)) for image in photographs]
    gt = np.stack([np.asarray(picture)[:, 20:148] for picture in pictures])
    lq = np.stack([np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BOX)) for image in gt])
    to_tensor = lambda images: torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()  # noqa: E731
    return LQBatch(to_tensor(lq), to_tensor(gt), (LABEL,) * 3, (None,) * 3, ("a", "b", "c"), torch.arange(3))


def half_way(batch):
    """The truth plus a constant; the last image is missing."""
    truths = [image.permute(1, 2, 0).numpy() for image in batch.gt]
    images = [np.clip(image.astype(int) + 5, 0, 255).astype(np.uint8) for image in truths[:2]] + [None]
    traces = [ParsedTrace(WRONG_BLUR, ("x",) * 3, (None,) * 3, () if image is not None else ("f",)) for image in images]
    return [RestoredImage(image, trace, (None, None, image)) for image, trace in zip(images, traces, strict=True)]


def test_metrics_are_those_of_the_images_and_missing_ones_are_left_out(batch):
    report = evaluate(half_way, batch, crop_px=4)
    truth = batch.gt[:2].permute(0, 2, 3, 1).numpy()
    given = np.stack([item.image for item in half_way(batch)[:2]])
    values = report.values("ours", "psnr_y")
    np.testing.assert_allclose(values[:2], psnr_y(given, truth, 4))
    assert np.isnan(values[2]) and report.num_restored("ours") == 2 and report.num_restored(BICUBIC) == 3
    assert report.interval("ours", "psnr_y").num_images == 2
    assert report.interval("ours", "slot_accuracy").mean == pytest.approx(0.8)
    assert report.interval("ours", "well_formed").mean == pytest.approx(2 / 3)
    assert report.gain("ours", BICUBIC, "psnr_y").low > 0


def test_reward_terms_of_bicubic_are_the_image_ones(batch):
    report = evaluate(half_way, batch, rewards=RewardMixture(RewardsConfig()))
    assert report.interval(BICUBIC, "reward_fidelity").num_images == 3
    assert report.interval(BICUBIC, "reward_format").num_images == 0
    assert report.interval("ours", "reward_degradation").mean == pytest.approx(0.8)
    assert "evaluate/bicubic/reward_format" not in report.summary()


def test_files_say_the_same_as_the_report(batch, tmp_path):
    report = evaluate({"before": half_way, "after": half_way}, batch)
    report.write(tmp_path / "report")
    rows = list(csv.DictReader((tmp_path / "report/metrics.csv").read_text().splitlines()))
    assert len(rows) == 9 and [row["method"] for row in rows[:3]] == [BICUBIC, "before", "after"]
    assert float(rows[1]["psnr_y"]) == report.values("before", "psnr_y")[0]
    text = (tmp_path / "report/metrics.md").read_text()
    assert "before 2, after 2" in text and "BT.601" in text and "no border left out" in text
    with Image.open(tmp_path / "report/grid.png") as grid:
        assert grid.width > 5 * 128


def test_without_truth_only_reference_free_metrics_remain(batch):
    blind = LQBatch(batch.lq, None, (None,) * 3, (None,) * 3, batch.keys, batch.index)
    report = evaluate(lambda _: half_way(batch), blind)
    assert "psnr_y" not in report.metrics and report.interval(BICUBIC, "niqe").num_images == 3
    assert report.interval("ours", "slot_accuracy").num_images == 0


def test_a_restorer_must_answer_for_every_image(batch):
    with pytest.raises(ValueError, match="returned 2 images for 3"):
        evaluate(lambda b: half_way(b)[:2], batch)


def test_bootstrap_interval_covers_the_normal_one():
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    interval = bootstrap(np.append(values, np.nan))
    half = 1.96 * values.std() / 20
    assert interval.num_images == 400 and interval.mean == pytest.approx(values.mean())
    np.testing.assert_allclose([interval.low, interval.high], [values.mean() - half, values.mean() + half], atol=0.06)
    assert bootstrap(np.array([np.nan])).num_images == 0
