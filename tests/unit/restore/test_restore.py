import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from realsr_hpc.config.schema import RunConfig
from realsr_hpc.records import Case, ParsedTrace, RestoredImage
from realsr_hpc.restore import (
    RestoreSettings,
    find_model,
    image_folder,
    read_picture,
    restore_cases,
    restore_folder,
    restore_images,
    tile_starts,
    with_sampling,
)
from realsr_hpc.restore.candidates import build_chooser
from realsr_hpc.restore.tiles import count_tiles

torch.set_num_threads(1)
SETTINGS = RestoreSettings("here", tile_px=32, model_upscale=4, overlap_px=8, batch_size=3)
TRACE = ParsedTrace("light blur", ("a", "b", "c"), (None,) * 3, ())


def nearest(cases: list[Case]) -> list[RestoredImage]:
    """Depends only on the tile, so blended tiles must equal the upscaled whole image."""
    lqs = [case.lq for case in cases]
    images = [lq.repeat(4, axis=0).repeat(4, axis=1) for lq in lqs]
    return [RestoredImage(TRACE, (lq, None, image)) for lq, image in zip(lqs, images, strict=True)]


def silent(cases: list[Case]) -> list[RestoredImage]:
    return [RestoredImage(TRACE, (None,) * 3) for _ in cases]


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("size", [(32, 32), (5, 70), (33, 32), (100, 57), (1, 1)])
def test_tiles_blend_to_the_whole_image_whatever_its_size(size):
    rgb = noise(*size)
    result, small = restore_images(nearest, [rgb, rgb[:1, :1]], SETTINGS)
    np.testing.assert_array_equal(result.image, rgb.repeat(4, axis=0).repeat(4, axis=1))
    np.testing.assert_array_equal(small.image, rgb[:1, :1].repeat(4, axis=0).repeat(4, axis=1))
    np.testing.assert_array_equal(result.steps["rough"], rgb)
    corners = [(tile.top, tile.left) for tile in result.tiles]
    assert corners == sorted(corners) and len(set(corners)) == len(corners) == count_tiles(*size, SETTINGS)
    assert result.tiles[0].texts == ("a", "b", "c") and "middle" not in result.steps


def test_workers_restore_the_same_and_share_the_tiles_evenly():
    threads, sizes = set(), []

    def seen(batch):
        threads.add(threading.get_ident())
        sizes.append(len(batch))
        time.sleep(0.02)  # so that one thread cannot take all
        return nearest(batch)

    images = [noise(100, 57), noise(33, 32)]
    alone = restore_images(nearest, images, SETTINGS)
    told: list[int] = []
    shared = restore_images(seen, images, replace(SETTINGS, workers=2), told.append)
    for one, other in zip(alone, shared, strict=True):
        np.testing.assert_array_equal(one.image, other.image)
        assert one.tiles == other.tiles
    assert len(threads) == 2 and threading.get_ident() not in threads
    assert len(sizes) == 6 and max(sizes) - min(sizes) <= 1 and max(sizes) <= SETTINGS.batch_size
    assert sorted(told) == sorted(sizes) and min(told) > 1
    sizes.clear()
    cases = [Case(str(n), noise(32, 32) + n, index=n) for n in range(7)]
    for case, item in zip(cases, restore_cases(seen, cases, replace(SETTINGS, workers=2)), strict=True):
        np.testing.assert_array_equal(item.images[0], case.lq)
    assert sorted(sizes) == [1, 2, 2, 2]
    sizes.clear()
    told.clear()
    restore_images(seen, images[1:], replace(SETTINGS, workers=5), told.append)
    assert sizes == told == [1, 1]  # no batch is empty


def test_without_steps_there_is_the_image_and_its_reasoning(tmp_path):
    Image.fromarray(noise(20, 40)).save(tmp_path / "x.png")
    restore_folder(nearest, tmp_path / "x.png", tmp_path / "out", SETTINGS, steps=False, show_progress=False)
    assert {path.name for path in (tmp_path / "out").glob("x.*")} == {"x.png", "x.json"}


@pytest.mark.parametrize("size", range(32, 200, 7))
def test_tiles_cover_a_side_with_their_overlap(size):
    starts = tile_starts(size, 32, 8)
    assert starts[0] == 0 and starts[-1] == size - 32
    gaps = [b - a for a, b in zip(starts, starts[1:], strict=False)] or [24]
    assert 0 < min(gaps) and max(gaps) <= 24 and max(gaps) - min(gaps) <= 1
    assert (len(starts) - 2) * 24 + 32 < size  # one tile fewer would not do


def test_seams_fade_over_the_overlap():
    def tinted(cases):
        values = [40 if case.index % 2 else 200 for case in cases]
        return [RestoredImage(TRACE, (None, None, np.full((128, 128, 3), v, np.uint8))) for v in values]

    restored = restore_images(tinted, [noise(32, 56)], SETTINGS)[0].image
    share = np.arange(1, 33) / 33  # of the second tile, over the overlap of 8 px
    across = np.concatenate([np.full(96, 200.0), 200 - 160 * share, np.full(96, 40.0)]).round()
    np.testing.assert_array_equal(restored, np.broadcast_to(across[None, :, None], (128, 224, 3)))


def test_images_on_the_way_are_blended_at_their_own_size_and_small_inputs_are_mirrored():
    """Twice the tile's size is kept; a tile without a step is grey; a small tile is padded by mirroring."""
    shown = []

    def with_middle(cases):
        shown.extend(cases)
        large = [case.lq.repeat(2, axis=0).repeat(2, axis=1) for case in cases]
        finals = [restored.image for restored in nearest(cases)]
        faulty = replace(TRACE, faults=("no end of turn",))
        rows = zip(cases, large, finals, strict=True)
        return [
            RestoredImage(faulty if case.index else TRACE, (None, None if case.index else middle, final))
            for case, middle, final in rows
        ]

    rgb = noise(20, 56)
    result = restore_images(with_middle, [rgb], SETTINGS)[0]
    np.testing.assert_array_equal(shown[0].lq[:20], rgb[:, :32])
    np.testing.assert_array_equal(shown[0].lq[20:], rgb[:7:-1, :32])
    middle = result.steps["middle"]
    assert middle.shape == (40, 112, 3) and (middle[:, 64:] == 128).all()
    np.testing.assert_array_equal(middle[:, :64], rgb[:, :32].repeat(2, axis=0).repeat(2, axis=1))
    assert [(tile.well_formed, tile.faults) for tile in result.tiles] == [(True, ()), (False, ("no end of turn",))]


def test_the_colour_fix_is_applied_to_the_whole_image():
    def brighter(cases):
        return [RestoredImage(TRACE, (None, None, 55 + image.image // 2)) for image in nearest(cases)]

    rgb = noise(40, 50)
    off, fixed = (restore_images(brighter, [rgb], replace(SETTINGS, colour=how))[0].image for how in ("none", "adain"))
    wanted = Image.fromarray(rgb).resize((200, 160), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(fixed.mean((0, 1)), np.asarray(wanted).mean((0, 1)), atol=1)
    assert abs(off.mean() - fixed.mean()) > 5 and fixed.std() > off.std() * 1.3


@pytest.fixture
def pictures(tmp_path):
    """One file of each unusual kind, with the size and mode that its restored image must have."""
    folder = tmp_path / "in"
    (folder / "deeper").mkdir(parents=True)
    Image.fromarray(noise(20, 40)).save(folder / "plain.jpg")
    Image.fromarray(noise(20, 40)).save(folder / "plain.png")
    Image.fromarray(noise(20, 40, 4), "RGBA").save(folder / "alpha.png")
    Image.fromarray(noise(20, 40, 2), "LA").save(folder / "both.PNG")
    Image.fromarray(noise(20, 40)[..., 0] > 99).save(folder / "bits.png")
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
        "both.png": (wide, "LA"),
        "bits.png": (wide, "L"),
        "deeper/grey.png": (wide, "L"),
        "sixteen.png": (wide, "L"),
        "palette.png": (wide, "RGB"),
        "print.png": (wide, "RGB"),
        "turned.png": ((80, 160), "RGB"),
    }
    reasoning = json.loads((tmp_path / "out/alpha.json").read_text())
    assert reasoning["tiles"][0]["degradation"] == "light blur" and not reasoning["tiles"][0]["bicubic"]
    assert reasoning["output"] == "alpha.png"
    alpha = Image.fromarray(noise(20, 40, 4)[..., 3]).resize(wide, Image.Resampling.BICUBIC)
    with Image.open(tmp_path / "out/alpha.png") as image:
        np.testing.assert_array_equal(np.asarray(image)[..., 3], alpha)


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
    assert len(first.done) == 10 and [name.rsplit("/", 1)[1] for name in second.done] == ["alpha.png"]
    assert len(second.skipped) == 9


def test_results_of_other_settings_are_not_mixed(pictures, tmp_path):
    restore_folder(nearest, pictures, tmp_path / "out", SETTINGS, show_progress=False)
    for changed, told in (({"source": "elsewhere"}, "source=here"), ({"colour": "adain"}, "colour=none")):
        with pytest.raises(ValueError, match=rf"other settings \({told}\); choose an empty folder"):
            restore_folder(nearest, pictures, tmp_path / "out", replace(SETTINGS, **changed), show_progress=False)
    faster = replace(SETTINGS, batch_size=9, workers=2)  # decides no pixel
    assert not restore_folder(nearest, pictures, tmp_path / "out", faster, show_progress=False).done


def test_small_files_share_batches(tmp_path):
    for number in range(6):
        Image.fromarray(noise(20, 20)).save(tmp_path / f"{number}.png")
    sizes: list[int] = []
    restore_folder(
        lambda cases: sizes.append(len(cases)) or nearest(cases), tmp_path, tmp_path / "out", SETTINGS,
        show_progress=False,
    )  # fmt: skip
    assert sizes == [3, 3]


def test_a_result_that_cannot_be_written_leaves_no_older_image_beside_its_new_record(tmp_path, monkeypatch):
    """Otherwise the old image would count as the result of the new input."""
    Image.fromarray(noise(20, 20)).save(tmp_path / "x.png")
    restore_folder(nearest, tmp_path / "x.png", tmp_path / "out", SETTINGS, show_progress=False)
    Image.fromarray(noise(24, 20)).save(tmp_path / "x.png")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(image_folder, "write_picture", full)
        report = restore_folder(nearest, tmp_path / "x.png", tmp_path / "out", SETTINGS, show_progress=False)
    assert "No space left" in report.failed[str(tmp_path / "x.png")] and not (tmp_path / "out/x.png").exists()
    report = restore_folder(nearest, tmp_path / "x.png", tmp_path / "out", SETTINGS, show_progress=False)
    assert report.done == [str(tmp_path / "x.png")]


def test_tiles_without_an_image_are_bicubic_and_said_so(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(noise(32, 32)).save(tmp_path / "in/x.png")
    Image.fromarray(noise(32, 40)).save(tmp_path / "in/y.png")
    report = restore_folder(silent, tmp_path / "in", tmp_path / "out", SETTINGS, show_progress=False)
    assert (report.num_tiles, report.num_tiles_bicubic) == (3, 3) and "3 of 3 tiles are bicubic" in str(report)
    with Image.open(tmp_path / "in/x.png") as lq, Image.open(tmp_path / "out/x.png") as restored:
        np.testing.assert_array_equal(restored, lq.resize((128, 128), Image.Resampling.BICUBIC))


def test_nothing_to_do_and_wrong_settings_are_said(tmp_path):
    with pytest.raises(ValueError, match="no images found"):
        restore_folder(nearest, tmp_path, tmp_path / "out", SETTINGS)
    with pytest.raises(ValueError, match="overlap_px=20"):
        RestoreSettings("x", tile_px=32, model_upscale=4, overlap_px=20)
    for upscale in (0.5, 5):
        with pytest.raises(ValueError, match=rf"upscale={upscale} must be in 1\.\.4"):
            RestoreSettings("x", tile_px=32, model_upscale=4, upscale=upscale)
    with pytest.raises(ValueError, match="one of run="):
        find_model({"run": "a", "export": "b"})
    with pytest.raises(ValueError, match="temperature=0: "):
        with_sampling(RunConfig(name="x", task="grpo"), {"temperature": "0"})
    with pytest.raises(ValueError, match="choose='pretty' is not one of ranker"):
        build_chooser("pretty")


@pytest.mark.parametrize(("upscale", "size"), [(1, (48, 20)), (1.33, (64, 27)), (4, (192, 80))])
def test_the_result_has_the_size_asked_for(upscale, size, tmp_path):
    Image.fromarray(noise(20, 48)).save(tmp_path / "x.png")
    settings = RestoreSettings("x", tile_px=32, model_upscale=4, upscale=upscale)
    restore_folder(nearest, tmp_path / "x.png", tmp_path / "out", settings, show_progress=False)
    with Image.open(tmp_path / "out/x.png") as restored, Image.open(tmp_path / "out/x.steps.jpg") as steps:
        assert restored.size == size and steps.height > size[1]
