import json

import numpy as np
import pytest
import torch
from PIL import Image

from realsr_hpc.records import LQBatch, ParsedTrace, RestoredImage
from realsr_hpc.restore import RestoreSettings, find_run, read_picture, restore_folder, restore_image, tile_starts

torch.set_num_threads(1)
SETTINGS = RestoreSettings("here", tile_px=32, upscale=4, overlap_px=8, batch_size=3)
TRACE = ParsedTrace("light blur", ("a", "b", "c"), (None,) * 3, ())


def nearest(batch: LQBatch) -> list[RestoredImage]:
    """Knows nothing of the tile's surroundings, so blending tiles must give the whole image's own upscale."""
    images = batch.lq.permute(0, 2, 3, 1).numpy().repeat(4, axis=1).repeat(4, axis=2)
    return [RestoredImage(image, TRACE, (None, None, image)) for image in images]


def silent(batch: LQBatch) -> list[RestoredImage]:
    return [RestoredImage(None, TRACE, (None,) * 3) for _ in range(len(batch))]


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("size", [(32, 32), (5, 70), (33, 32), (100, 57), (1, 1)])
def test_tiles_blend_to_the_whole_image_whatever_its_size(size):
    rgb = noise(*size)
    restored, records = restore_image(nearest, rgb, SETTINGS)
    np.testing.assert_array_equal(restored, rgb.repeat(4, axis=0).repeat(4, axis=1))
    assert len(records) >= 1 and records[0]["texts"] == ["a", "b", "c"]


@pytest.mark.parametrize("size", range(32, 200, 7))
def test_tiles_cover_a_side_with_their_overlap(size):
    starts = tile_starts(size, 32, 8)
    assert starts[0] == 0 and starts[-1] == size - 32
    assert all(0 < b - a <= 24 for a, b in zip(starts, starts[1:], strict=False))


def test_seams_fade_over_the_overlap():
    def tinted(batch):
        values = [40 if int(number) % 2 else 200 for number in batch.index]
        return [RestoredImage(np.full((128, 128, 3), v, np.uint8), TRACE, (None,) * 3) for v in values]

    restored, _ = restore_image(tinted, noise(32, 56), SETTINGS)
    steps = np.abs(np.diff(restored[64, :, 0].astype(int)))
    assert restored[0, 0, 0] == 200 and restored[0, -1, 0] == 40 and steps.max() <= 160 / 8


@pytest.fixture
def pictures(tmp_path):
    """One file of each awkward kind, with the size and mode its restored image must have."""
    folder = tmp_path / "in"
    (folder / "deeper").mkdir(parents=True)
    Image.fromarray(noise(20, 40)).save(folder / "plain.jpg")
    Image.fromarray(noise(20, 40)).save(folder / "plain.png")
    Image.fromarray(noise(20, 40, 4), "RGBA").save(folder / "alpha.png")
    Image.fromarray(noise(20, 40)[..., 0]).save(folder / "deeper/grey.png")
    Image.fromarray(noise(20, 40)[..., 0].astype(np.uint16) * 257).save(folder / "sixteen.png")
    Image.fromarray(noise(20, 40)).convert("P").save(folder / "palette.gif")
    Image.fromarray(noise(20, 40)).convert("CMYK").save(folder / "print.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    Image.fromarray(noise(20, 40)).save(folder / "turned.jpg", exif=exif)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nonsense")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_every_format_comes_out_as_it_went_in(pictures, tmp_path):
    report = restore_folder(nearest, pictures, tmp_path / "out", SETTINGS, show_progress=False)
    assert [name.rsplit("/", 1)[1] for name in report.failed] == ["broken.png"]
    kinds = {}
    for path in (tmp_path / "out").rglob("*.png"):
        with Image.open(path) as image:
            kinds[path.relative_to(tmp_path / "out").as_posix()] = (image.size, image.mode)
    wide = (160, 80)
    assert kinds == {
        "plain.jpg.png": (wide, "RGB"),
        "plain.png.png": (wide, "RGB"),
        "alpha.png": (wide, "RGBA"),
        "deeper/grey.png": (wide, "L"),
        "sixteen.png": (wide, "L"),
        "palette.png": (wide, "RGB"),
        "print.png": (wide, "RGB"),
        "turned.png": ((80, 160), "RGB"),
    }
    reasoning = json.loads((tmp_path / "out/alpha.json").read_text())
    assert reasoning["tiles"][0]["degradation"] == "light blur" and not reasoning["tiles"][0]["bicubic"]


def test_sixteen_bits_keep_their_values(tmp_path):
    grey = noise(20, 40)[..., 0]
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "x.png")
    picture = read_picture(tmp_path / "x.png")
    np.testing.assert_array_equal(picture.rgb[..., 0], grey)
    assert picture.is_grey and picture.alpha is None


def test_a_second_call_does_only_what_is_missing(pictures, tmp_path):
    output = pictures / "out"  # inside the input: must not be read as input
    first = restore_folder(nearest, pictures, output, SETTINGS, show_progress=False)
    (output / "alpha.png").unlink()
    second = restore_folder(nearest, pictures, output, SETTINGS, show_progress=False)
    assert len(first.done) == 8 and [name.rsplit("/", 1)[1] for name in second.done] == ["alpha.png"]
    assert len(second.skipped) == 7


def test_results_of_other_settings_are_not_mixed(pictures, tmp_path):
    restore_folder(nearest, pictures, tmp_path / "out", SETTINGS, show_progress=False)
    other = RestoreSettings("elsewhere", tile_px=32, upscale=4)
    with pytest.raises(ValueError, match="other settings.*choose an empty folder"):
        restore_folder(nearest, pictures, tmp_path / "out", other, show_progress=False)


def test_tiles_without_an_image_are_bicubic_and_said_so(tmp_path):
    Image.fromarray(noise(32, 32)).save(tmp_path / "x.png")
    report = restore_folder(silent, tmp_path / "x.png", tmp_path / "out", SETTINGS, show_progress=False)
    assert (report.num_tiles, report.num_tiles_bicubic) == (1, 1) and "1 of 1 tiles are bicubic" in str(report)
    with Image.open(tmp_path / "x.png") as lq, Image.open(tmp_path / "out/x.png") as restored:
        np.testing.assert_array_equal(restored, lq.resize((128, 128), Image.Resampling.BICUBIC))


def test_nothing_to_do_and_wrong_settings_are_said(tmp_path):
    with pytest.raises(ValueError, match="no images there"):
        restore_folder(nearest, tmp_path, tmp_path / "out", SETTINGS)
    with pytest.raises(ValueError, match="overlap_px=20"):
        RestoreSettings("x", tile_px=32, upscale=4, overlap_px=20)
    with pytest.raises(ValueError, match="either run="):
        find_run(None, None)
