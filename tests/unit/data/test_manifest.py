"""Decoding rules, the table, and its verification."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from realsr_hpc.data.decoding import BrokenImage, decode_image
from realsr_hpc.data.manifest import ManifestEntry, read_manifest, write_manifest
from realsr_hpc.paths import project_root
from realsr_hpc.prepare.build_manifest import prepare
from realsr_hpc.prepare.duplicates import difference_hash, near_duplicates
from tests.manifests import verify

PHOTOGRAPHS = project_root() / "recipes/assets/photographs"


def pixels(seed=0, height=40, width=60):
    """A smooth picture: JPEG keeps it within a few levels."""
    y, x = np.mgrid[0:height, 0:width]
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    return (128 + 90 * np.sin(x[..., None] / 9 + phase) * np.cos(y[..., None] / 7 + 2 * phase)).astype(np.uint8)


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def test_grey_palette_and_cmyk_become_rgb(tmp_path):
    picture = Image.fromarray(pixels())
    grey = decode_image(saved(tmp_path / "grey.png", picture.convert("L")))
    assert grey.shape == (40, 60, 3) and np.all(grey[..., 0] == grey[..., 2])
    assert decode_image(saved(tmp_path / "palette.png", picture.quantize(64))).shape == (40, 60, 3)
    cmyk = decode_image(saved(tmp_path / "cmyk.jpg", picture.convert("CMYK"), quality=98))
    assert np.abs(cmyk.astype(int) - pixels()).mean() < 6


def test_alpha_is_laid_over_white(tmp_path):
    rgba = np.dstack([pixels(), np.full((40, 60), 255, np.uint8)])
    rgba[:20, :, 3] = 0
    found = decode_image(saved(tmp_path / "alpha.png", Image.fromarray(rgba)))
    assert np.all(found[:20] == 255) and np.array_equal(found[20:], pixels()[20:])


def test_sixteen_bits_are_scaled(tmp_path):
    deep = np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16)
    found = decode_image(saved(tmp_path / "deep.png", Image.fromarray(deep)))
    assert found.dtype == np.uint8
    assert np.abs(found[..., 1] - deep / 257).max() <= 0.5


def test_exif_rotation_is_undone(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # shown turned by 90 degrees clockwise
    found = decode_image(saved(tmp_path / "turned.png", Image.fromarray(pixels()), exif=exif))
    assert np.array_equal(found, np.rot90(pixels(), -1))


@pytest.mark.parametrize("kind", ["missing", "broken", "frames", "depth"])
def test_what_cannot_be_used_is_named(tmp_path, kind):
    path = tmp_path / "file.tif"
    picture = Image.fromarray(pixels())
    if kind == "broken":
        path.write_bytes(b"\x89PNG not a picture")
    elif kind == "frames":
        picture.save(path, save_all=True, append_images=[picture])
    elif kind == "depth":
        Image.fromarray(pixels()[..., 0].astype(np.float32)).save(path)
    with pytest.raises(BrokenImage, match=f"^{kind}: "):
        decode_image(path)


def test_a_bomb_is_huge(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 60 // 2 - 1)
    with pytest.raises(BrokenImage, match="^huge: "):
        decode_image(saved(tmp_path / "bomb.png", Image.fromarray(pixels())))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 60 - 1)
    assert decode_image(tmp_path / "bomb.png").shape == (40, 60, 3)


def test_a_truncated_file_is_broken(tmp_path):
    path = saved(tmp_path / "cut.jpg", Image.fromarray(pixels()))
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(BrokenImage, match="^broken: "):
        decode_image(path)


def test_reading_returns_what_was_written(tmp_path):
    entries = [
        ManifestEntry(
            "a", "a.png", "train", 3, 2, "00", "rough a", "middle", "final", ("x", "y"), "b.png", "somewhere"
        ),
        ManifestEntry("b", "b.png", "heldout", 5, 4, "11"),
    ]
    write_manifest(tmp_path / "m.parquet", entries)
    manifest = read_manifest(tmp_path / "m.parquet")
    assert list(manifest.entries) == entries
    assert manifest.entries[0].scene.captions == ("rough a", "middle", "final")
    assert manifest.entries[1].scene is None
    assert manifest.path(entries[0]) == tmp_path / "a.png"
    with pytest.raises(ValueError, match="lq_path of 'b' is empty"):
        manifest.lq_path(entries[1])


def test_a_wrong_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist; make one with"):
        read_manifest(tmp_path / "none.parquet")
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "few.parquet")
    with pytest.raises(ValueError, match="lacks the columns \\['path'"):
        read_manifest(tmp_path / "few.parquet")
    twice = [ManifestEntry("a", "a.png", "train", 1, 1, "")] * 2
    with pytest.raises(ValueError, match="keys \\['a'\\] occur more than once"):
        write_manifest(tmp_path / "twice.parquet", twice)


def test_verification_counts_each_fault(tmp_path):
    for i in range(4):
        saved(tmp_path / f"{i}.png", Image.fromarray(pixels(i)))
    manifest = read_manifest(prepare(tmp_path, tmp_path).manifest)
    (tmp_path / "0.png").unlink()
    saved(tmp_path / "1.png", Image.fromarray(pixels(9)))
    report = verify(manifest)
    assert report.counts == {"missing": 1, "checksum": 1}
    assert [entry.key for entry in report.good.entries] == ["2", "3"]


def test_the_bundled_photographs_are_whole_and_described():
    manifest = read_manifest(PHOTOGRAPHS / "manifest.parquet")
    assert verify(manifest).faults == {}
    notes = [json.loads(line) for line in (PHOTOGRAPHS / "photographs.jsonl").read_text().splitlines()]
    assert sorted(note["key"] for note in notes) == sorted(entry.key for entry in manifest.entries)
    told = {note["key"]: note for note in notes}
    for entry in manifest.entries:
        assert entry.caption_final == told[entry.key]["caption_final"]
        assert len(entry.caption_final.split()) <= 25
        assert 3 <= len(entry.tags) <= 6
        text = " ".join(entry.scene.captions)
        assert text == text.lower() and "<" not in text and ">" not in text
        assert all(tag in text for tag in entry.tags), entry.key
        assert sum(tag in entry.caption_rough for tag in entry.tags) >= 2, entry.key


def test_no_photograph_is_on_both_sides_of_the_split():
    splits = {}
    entries = read_manifest(PHOTOGRAPHS / "manifest.parquet").entries
    for entry in entries:
        splits.setdefault(entry.source.split(",")[1], set()).add(entry.split)
    assert all(len(found) == 1 for found in splits.values())
    heldout = {name.split("/")[-1] for name, found in splits.items() if found == {"heldout"}}
    assert {"coffee.png", "rocket.jpg", "flower.jpg", "grace_hopper.jpg"} <= heldout
    looks = [difference_hash(decode_image(PHOTOGRAPHS / entry.path)) for entry in entries]
    twins = [{entries[i].split for i in group} for group in near_duplicates(looks)]
    assert all(len(found) == 1 for found in twins)
    assert Counter(entry.split for entry in entries) == {"train": 225, "heldout": 36}


def test_every_folder_of_bundled_photographs_has_its_licence_told():
    told = (PHOTOGRAPHS / "SOURCES.md").read_text()
    folders = {str(Path(entry.path).parent) for entry in read_manifest(PHOTOGRAPHS / "manifest.parquet").entries}
    assert {f"`{folder}/`" in told for folder in folders - {"."}} == {True}
    assert "CC BY-SA 4.0" in told and "Unsplash License" in told and "CC0" in told
