"""Names that nearly agree, RealSR as released, images too small for a metric: each is itself, each gap is named."""

import json
import os

import numpy as np
import pytest
from PIL import Image
from skimage import data

from realsr_hpc.evaluate import BICUBIC, Bicubic, FinishedImages, Metrics, evaluate, open_set

PHOTOGRAPH = data.astronaut()[:128, :128]


def save(path, image=PHOTOGRAPH, size=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(image)
    (picture.resize(size) if size else picture).save(path)


def test_box1_to_box4_stay_four_images_in_every_layout(tmp_path):
    for number in range(1, 5):
        save(tmp_path / f"pairs/lq/box{number}.png", PHOTOGRAPH + number, (32, 32))
        save(tmp_path / f"pairs/gt/box{number}.png", PHOTOGRAPH + number)
        save(tmp_path / f"tags/lq/box{number}x4.png", PHOTOGRAPH + number, (32, 32))
        save(tmp_path / f"tags/gt/box{number}.png", PHOTOGRAPH + number)
    keys = [f"box{number}" for number in range(1, 5)]
    assert open_set("paired", tmp_path / "pairs", 4)[0].keys() == keys
    assert open_set("paired", tmp_path / "tags", 4)[0].keys() == keys
    cases = open_set("unpaired", tmp_path / "pairs", 4)[0]
    assert cases.keys() == keys
    (tmp_path / "pairs/gt/box1.png").unlink()
    finished = FinishedImages(tmp_path / "pairs/gt")
    finished.expect(keys)
    assert [item.image is not None for item in finished([cases[place] for place in range(4)])] == [
        False,
        True,
        True,
        True,
    ]


def realsr(root):
    """Version 3's names: Train and Test, two cameras and three factors number alike; all files as large as truths."""
    for camera in ("Canon", "Nikon"):
        for part in ("Train", "Test"):
            for factor in (2, 3, 4):
                save(root / camera / part / str(factor) / f"{camera}_001_HR.png")
                save(root / camera / part / str(factor) / f"{camera}_001_LR{factor}.png", PHOTOGRAPH // factor)
    return root


def test_realsr_as_released_is_its_test_part_at_the_models_factor(tmp_path):
    cases, remarks = open_set("realsr", realsr(tmp_path / "RealSR(V3)"), 4)
    assert cases.keys() == ["Canon_001", "Nikon_001"]
    assert cases[0].gt.shape == (128, 128, 3) and cases[0].lq.shape == (32, 32, 3)
    mean = (PHOTOGRAPH // 4).reshape(32, 4, 32, 4, 3).mean((1, 3))
    assert np.abs(cases[0].lq - mean).max() <= 0.5
    told = "; ".join(remarks)
    assert "2 pairs of the set's training part" in told and "8 low-quality images of another factor" in told
    assert open_set("paired", tmp_path / "RealSR(V3)", 4)[0].keys() == [
        "Test_4_Canon_001", "Train_4_Canon_001", "Test_4_Nikon_001", "Train_4_Nikon_001",
    ]  # fmt: skip
    report = evaluate({BICUBIC: Bicubic(4)}, cases, tmp_path / "out", metrics=Metrics(), set_name="realsr")
    assert report.skipped == {} and len(report.images) == 2


def test_a_factor_may_have_two_digits(tmp_path):
    for name in ("a_LR16.png", "a_LR4.png", "a_HR.png"):
        save(tmp_path / name)
    for upscale in (16, 4):
        cases, remarks = open_set("paired", tmp_path, upscale)
        assert cases.keys() == ["a"]
        assert remarks == [
            f"left out: 1 low-quality images of another factor than {upscale}, first a_LR{20 - upscale}.png"
        ]


def test_what_belongs_together_is_asked_before_work_begins(tmp_path):
    for name in ("a_LR4.png", "a_LQ.png", "a_HR.png"):
        save(tmp_path / name)
    with pytest.raises(ValueError, match="which of a_HR.png, a_LQ.png, a_LR4.png belong together"):
        open_set("paired", tmp_path, 4)
    for name in ("results/a_LR4.png", "results/a_HR.png"):
        save(tmp_path / name)
    with pytest.raises(ValueError, match="could all be a; keep only one"):
        FinishedImages(tmp_path / "results").expect(["a"])


def test_an_image_too_small_for_a_window_has_no_such_number_and_the_rest_is_measured(tmp_path):
    for name, size in (("small", 8), ("usual", 128)):
        save(tmp_path / f"set/lq/{name}.png", size=(size // 4, size // 4))
        save(tmp_path / f"set/gt/{name}.png", size=(size, size))
    cases, _ = open_set("paired", tmp_path / "set", 4)
    report = evaluate({BICUBIC: Bicubic(4)}, cases, tmp_path / "out", metrics=Metrics(), set_name="mine")
    assert np.isfinite(report.values(BICUBIC, "psnr_y")).all()
    assert np.isnan(report.values(BICUBIC, "ssim_y")).tolist() == [True, False]
    assert report.interval(BICUBIC, "ssim_y").num_images == 1
    assert "- ssim_y of bicubic is without 1 of 2 images, first small (a side below 11 px)" in report.markdown()


def test_a_flat_image_has_no_niqe_and_the_reason_is_not_its_size(tmp_path):
    save(tmp_path / "set/usual.png", size=(32, 32))
    Image.new("RGB", (32, 32), (9, 99, 199)).save(tmp_path / "set/flat.png")
    cases, _ = open_set("unpaired", tmp_path / "set", 4)
    report = evaluate({BICUBIC: Bicubic(4)}, cases, tmp_path / "out", metrics=Metrics(), set_name="mine")
    assert report.interval(BICUBIC, "niqe").num_images == 1
    assert "niqe of bicubic is without 1 of 2 images, first flat (too flat: its patches" in report.markdown()


def test_names_of_any_bytes_are_evaluated(tmp_path):
    save(tmp_path / "in/x.png", size=(32, 32))
    os.rename(tmp_path / "in/x.png", tmp_path / "in" / os.fsdecode(b"k\xfc.png"))
    cases, _ = open_set("unpaired", tmp_path / "in", 4)
    report = evaluate({BICUBIC: Bicubic(4)}, cases, tmp_path / "out", metrics=Metrics(), set_name="mine")
    (record,) = json.loads((tmp_path / "out/images.json").read_bytes())["images"]
    assert record["key"] == "k\\xfc" and report.markdown().encode("utf-8")
