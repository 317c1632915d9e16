"""Unreadable photographs in training are named, counted and left out."""

from __future__ import annotations

import logging
import struct
import zlib

import pytest
import torch
from skimage import data

from realsr_hpc.config.load import compose_one
from realsr_hpc.data.manifest import ManifestEntry, write_manifest
from realsr_hpc.tokenizer.image import ImageTokenizer
from realsr_hpc.tokenizer.image_file import save_image_tokenizer
from realsr_hpc.tracking.spool import metrics_by_step
from realsr_hpc.train import grpo, sft
from tests.distributed.test_training import GRPO, SFT, SMALL

FAULTS = {
    "cut": "broken",
    "empty": "broken",
    "words": "broken",
    "gigantic": "huge",
    "gone": "missing",
    "folder": "broken",
}


def photographs(folder, names):
    """A manifest with `whole` readable photographs and one for each fault."""
    from PIL import Image

    (folder / "folder.png").mkdir()
    Image.fromarray(data.chelsea()[:200, :200]).save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "words.png").write_text("a text, whatever its ending says", encoding="utf-8")
    head = b"IHDR" + struct.pack(">IIBBBBB", 90000, 90000, 8, 2, 0, 0, 0)
    (folder / "gigantic.png").write_bytes(
        whole[:8] + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + whole[33:]
    )
    told = ("a cat", "a cat looks up", "a brown cat looks up")
    entries = [
        ManifestEntry(key, f"{key.partition('-')[0]}.png", split, 200, 200, "", *told)
        for split, keys in names.items()
        for key in keys
    ]
    write_manifest(folder / "manifest.parquet", entries)


def config_of(recipe, folder, monkeypatch, **names):
    """A run of two steps on these photographs."""
    monkeypatch.setattr("realsr_hpc.data.samples._logged", set())
    photographs(folder, names)
    words = [*recipe, *SMALL, "cluster.tasks_per_node=1", f"output_root={folder}", "data.train_split=train"]
    words += [f"data.manifest={folder / 'manifest.parquet'}", f"image_tokenizer.weights={folder / 'image.safetensors'}"]
    config = compose_one([*words, f"{recipe[0].partition('=')[2][:-5]}.num_steps=2"])
    torch.manual_seed(0)
    save_image_tokenizer(ImageTokenizer(config.image_tokenizer), folder / "image.safetensors")
    (folder / "run").mkdir()
    return config


@pytest.mark.parametrize(("recipe", "loop"), [(GRPO, grpo), (SFT, sft)], ids=["grpo", "sft"])
def test_training_goes_on_without_them(recipe, loop, tmp_path, monkeypatch, caplog):
    config = config_of(recipe, tmp_path, monkeypatch, train=["whole", *FAULTS], heldout=["cut-2", "whole-2"])
    with caplog.at_level(logging.WARNING):
        assert loop.main(config, tmp_path / "run") == 0
    assert metrics_by_step(tmp_path / "run")[2]["data/skipped/count"] == len(FAULTS)
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("left out: ")]
    assert sorted(line.split(": ")[1] for line in told) == sorted([*FAULTS, "cut-2"])
    assert all(f"left out: {key}: {why}" in caplog.text for key, why in FAULTS.items())
