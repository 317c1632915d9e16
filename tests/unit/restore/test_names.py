"""Every input has its own result, identified by the input's content, and no other file is overwritten."""

import io
import json
import os

import numpy as np
import pytest
from PIL import Image, ImageCms

from realsr_hpc.data.decoding import decode_image, shown_rgb
from realsr_hpc.gallery import read_restored
from realsr_hpc.restore import RestoreSettings, read_picture, restore_folder
from tests.unit.restore.test_restore import SETTINGS, nearest, noise


def restore(source, output, settings=SETTINGS):
    return restore_folder(nearest, source, output, settings, show_progress=False)


def save(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="PNG")
    return path


def test_twins_each_get_a_result_of_their_own(tmp_path):
    names = ["twin.jpg", "twin.png", "twin.jpg.png", "restore.png", "sub/twin.png", "x.steps.png", "x.png"]
    for seed, name in enumerate(names):
        save(tmp_path / "in" / name, seed)
    report = restore(tmp_path / "in", tmp_path / "out")
    results = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")}
    assert len(report.done) == len(names) == len(results) and report.failed == {}
    assert results >= {"restore.png.png", "sub/twin.png", "x.png", "x.steps.png"}
    inputs = [json.loads(path.with_suffix(".json").read_text())["input"] for path in (tmp_path / "out").rglob("*.png")]
    assert len(set(inputs)) == len(names)
    assert len(restore(tmp_path / "in", tmp_path / "out").skipped) == len(names)
    assert len(read_restored(tmp_path / "out")) == len(names)


def test_a_replaced_input_is_done_again_and_a_moved_one_is_not(tmp_path):
    save(tmp_path / "in/a.png", 1)
    save(tmp_path / "in/b.png", 2)
    restore(tmp_path / "in", tmp_path / "out")
    save(tmp_path / "in/a.png", 3)
    assert [name.rsplit("/", 1)[1] for name in restore(tmp_path / "in", tmp_path / "out").done] == ["a.png"]
    with Image.open(tmp_path / "out/a.png") as result, Image.open(tmp_path / "in/a.png") as lq:
        np.testing.assert_array_equal(np.asarray(result)[::4, ::4], lq)
    os.rename(tmp_path / "in", tmp_path / "moved")
    assert len(restore(tmp_path / "moved", tmp_path / "out").skipped) == 2
    (tmp_path / "out/a.json").write_text("{")
    assert len(restore(tmp_path / "moved", tmp_path / "out").done) == 1


def test_other_files_are_named_before_work_begins_and_stay(tmp_path):
    save(tmp_path / "in/a.png", 1)
    save(tmp_path / "other/a.png", 2)
    for output in (tmp_path / "in", tmp_path / "in/../in"):
        with pytest.raises(ValueError, match="is the folder of the input"):
            restore(tmp_path / "in", output)
    with pytest.raises(ValueError, match="is the folder of the input"):
        restore(tmp_path / "in/a.png", tmp_path / "in")
    save(tmp_path / "taken/a.png", 3)
    with pytest.raises(ValueError, match="taken/a.png was not written by realsr-hpc restore"):
        restore(tmp_path / "in", tmp_path / "taken")
    restore(tmp_path / "in", tmp_path / "out")
    before = (tmp_path / "out/a.png").read_bytes()
    with pytest.raises(ValueError, match="out/a.png is the result of .*in/a.png, not of .*other/a.png"):
        restore(tmp_path / "other", tmp_path / "out")
    assert (tmp_path / "out/a.png").read_bytes() == before
    assert not (tmp_path / "taken/restore.json").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="output=.*file/out cannot be written"):
        restore(tmp_path / "in", tmp_path / "file/out")
    save(tmp_path / "all/photos/a.png", 4)
    assert len(restore(tmp_path / "all/photos", tmp_path / "all").done) == 1


def test_names_of_any_bytes_and_relative_inputs_reach_the_gallery(tmp_path, monkeypatch):
    raw = os.fsdecode(b"k\xfc")
    save(tmp_path / "in" / f"{raw}.png")
    monkeypatch.chdir(tmp_path)
    report = restore(type(tmp_path)("in"), type(tmp_path)("out"))
    assert len(report.done) == 1 and str(report).encode("utf-8")
    monkeypatch.chdir("/")
    (entry,) = read_restored(tmp_path / "out")
    assert entry.images["input"] == tmp_path / "in" / f"{raw}.png" and entry.key == "k\\xfc"
    assert restore(tmp_path / "in", tmp_path / "out").skipped


def test_linked_folders_and_formats_that_are_not_read_are_said(tmp_path):
    save(tmp_path / "elsewhere/a.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/raw.heic").touch()
    report = restore(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out/link/a.png").is_file() and len(report.done) == 1
    assert [(name.rsplit("/")[-1], why.split(":")[0]) for name, why in report.failed.items()] == [
        ("raw.heic", "format")
    ]


def test_another_programs_or_a_damaged_note_ends_no_gallery(tmp_path, caplog):
    save(tmp_path / "in/a.png", 1)
    save(tmp_path / "in/b.png", 2)
    restore(tmp_path / "in", tmp_path / "out")
    for name, content in (("b.json", "{"), ("list.json", "[1]"), ("other.json", '{"tiles": 3}')):
        (tmp_path / "out" / name).write_text(content)
        save((tmp_path / "out" / name).with_suffix(".png"))
    assert [entry.key for entry in read_restored(tmp_path / "out")] == ["a"]
    assert "left out: " in caplog.text and "b.json: " in caplog.text and "other.json: " in caplog.text


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bits_stay_grey_for_every_reader(tmp_path, order):
    grey = noise(40, 40)[..., 0]
    path = tmp_path / "x.tif"
    Image.frombytes(
        "I;16" if order == "<u2" else "I;16B", (40, 40), (grey.astype(order) * 257).astype(order).tobytes()
    ).save(path)
    for pixels in (read_picture(path).rgb, shown_rgb(path), decode_image(path)):
        np.testing.assert_array_equal(pixels[..., 0], grey)


def test_a_float_image_with_a_nan_keeps_its_range(tmp_path):
    values = np.linspace(0, 1, 40 * 40, dtype=np.float32).reshape(40, 40)
    values[3, 3], values[5, 5] = np.nan, np.inf
    Image.fromarray(values).save(tmp_path / "x.tif")
    rgb = read_picture(tmp_path / "x.tif").rgb[..., 0]
    assert rgb[3, 3] == 0 and rgb[5, 5] == 255 and rgb[-1, -1] == 255 and abs(int(rgb[20, 0]) - 128) <= 1


@pytest.mark.parametrize(
    ("mode", "name", "stays"), [("P", "x.png", True), ("L", "x.png", True), ("CMYK", "x.jpg", False)]
)
def test_a_profile_stays_where_the_colours_stay(tmp_path, mode, name, stays):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(noise(20, 24)).convert(mode).save(tmp_path / name, icc_profile=profile)
    restore(tmp_path / name, tmp_path / "out", RestoreSettings("x", tile_px=32, model_upscale=4))
    with Image.open(tmp_path / "out/x.png") as result:
        assert result.info.get("icc_profile") == (profile if stays else None)


def test_damaged_files_of_every_format_are_named_or_read(tmp_path, capfd):
    random, picture = np.random.default_rng(0), Image.fromarray(noise(40, 60))
    for kind in ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "AVIF", "JPEG2000", "PPM"):
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        for number in range(12):
            content = bytearray(buffer.getvalue())
            if number % 2:
                content = content[: random.integers(len(content))]
            for place in random.integers(0, max(1, min(len(content), 400)), 5):
                content[place : place + 1] = bytes([random.integers(256)])
            (tmp_path / "in").mkdir(exist_ok=True)
            (tmp_path / "in" / f"{kind}{number}.png").write_bytes(content)
    report = restore(tmp_path / "in", tmp_path / "out")
    assert len(report.done) + len(report.failed) == 9 * 12 and len(report.failed) > 30
    assert capfd.readouterr() == ("", "")
