"""Folders and tars to a manifest: layouts, captions, tags, resuming, shards, and the command."""

import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from realsr_hpc.commands import prepare_data
from realsr_hpc.data.decoding import decode_image
from realsr_hpc.data.manifest import read_manifest
from realsr_hpc.paths import project_root
from realsr_hpc.prepare.build_manifest import PrepareOptions, prepare
from realsr_hpc.prepare.describe import Captioner, ClassTagger, tags_of_captions
from realsr_hpc.prepare.duplicates import difference_hash, near_duplicates
from realsr_hpc.prepare.scan import find_items, folder_splits
from tests.manifests import verify

TEXTS = dict(caption_rough="r", caption_middle="m", caption_final="f", tags=["t"])


def pixels(seed=0, height=40, width=60):
    """A smooth picture: JPEG keeps it within a few levels."""
    y, x = np.mgrid[0:height, 0:width]
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    return (128 + 90 * np.sin(x[..., None] / 9 + phase) * np.cos(y[..., None] / 7 + 2 * phase)).astype(np.uint8)


def save(path: Path, seed=0, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed)).save(path, **options)
    return path


def test_broken_and_tiny_are_reported_and_twins_kept_together(tmp_path):
    source = tmp_path / "photos" / "deep"
    for i in range(30):
        save(source / f"{i:02}.png", i)
        save(source / f"{i:02}_again.jpg", i, quality=95)
    (source / "bad.png").write_bytes(b"nothing")
    Image.fromarray(pixels(0, 20, 20)).save(source / "tiny.png")
    (source / "notes.txt").write_text("not a photograph")
    report = prepare(tmp_path / "photos", tmp_path / "out", PrepareOptions(heldout_fraction=0.4, num_threads=2))
    assert report.fault_counts == {"broken": 1, "small": 1}
    assert len(report.duplicates) >= 29 and report.without_captions == 60
    split = {entry.key: entry.split for entry in report.entries}
    assert all(len({split[key] for key in group}) == 1 for group in report.duplicates)
    assert set(report.splits) == {"train", "heldout"}
    assert verify(read_manifest(report.manifest)).faults == {}
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert told["photographs"] == 60 and told["faults"].keys() == {"deep/bad.png", "deep/tiny.png"}


def test_hash_groups_are_those_of_all_pairs():
    rng = np.random.default_rng(0)
    hashes = [int(x) for x in rng.integers(0, 2**63, 200)]
    hashes += [hashes[i] ^ (1 << 5) ^ (1 << 40) ^ (1 << 63) for i in range(20)]
    hashes += [hashes[i] ^ 0b1111 for i in range(50, 60)]
    hashes += [hashes[0], hashes[100]]
    assert sorted(near_duplicates(hashes)) == [(0, 200, 230), *((i, 200 + i) for i in range(1, 20)), (100, 231)]
    assert difference_hash(pixels(1)) != difference_hash(pixels(2))


def names(root: Path, *files: str):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    items, left_out = find_items(root)
    return {item.name: item.lq_path and item.lq_path.name for item in items}, set(left_out), folder_splits(items)


def test_known_layouts(tmp_path):
    found = names(tmp_path / "lsdir", "HR/train/01/1.png", "HR/val/2.png", "X4/train/01/1x4.png", "X2/val/2x2.png")
    assert found == (
        {"HR/train/01/1.png": None, "HR/val/2.png": None},
        {"X4/train/01/1x4.png", "X2/val/2x2.png"},
        ["train", "heldout"],
    )
    found = names(tmp_path / "ffhq", "images1024x1024/00/0.png", "thumbnails128x128/00/0.png")
    assert found == ({"images1024x1024/00/0.png": None}, {"thumbnails128x128/00/0.png"}, [""])
    found = names(tmp_path / "ost", "OutdoorSceneTest300/a.png", "OutdoorSceneTrain_v2/sky/b.png")
    assert found[2] == ["heldout", "train"]
    found = names(
        tmp_path / "realsr", "Canon/Train/4/C_001_HR.png", "Canon/Train/4/C_001_LR4.png", "Canon/Test/4/C_9_LR4.png"
    )
    assert found == ({"Canon/Train/4/C_001_HR.png": "C_001_LR4.png"}, {"Canon/Test/4/C_9_LR4.png"}, [""])
    found = names(tmp_path / "pairs", "test_HR/a.png", "test_HR/b.png", "test_LR/a.jpg")
    assert found[0] == {"test_HR/a.png": "a.jpg", "test_HR/b.png": None}
    assert names(tmp_path / "low", "LR/a.png")[0] == {"LR/a.png": None}
    with pytest.raises(ValueError, match="holds no photograph; endings"):
        names(tmp_path / "none", "a.doc")


def write_tar(path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in {
            "a.jpg": save(path.parent / "a.jpg", 1).read_bytes(),
            "a.json": json.dumps({"caption": "a <red> house", "url": "x", "tags": ["house"]}).encode(),
            "deep/b.png": save(path.parent / "b.png", 2).read_bytes(),
            "deep/b.txt": b"two dogs\n",
            "c.png": b"nothing",
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    for name in ("a.jpg", "b.png"):
        (path.parent / name).unlink()
    return path


def test_a_webdataset_tar_is_read_in_place(tmp_path):
    (tmp_path / "set").mkdir()
    tar = write_tar(tmp_path / "set" / "shard-0.tar")
    report = prepare(tmp_path / "set", tmp_path / "out")
    manifest = read_manifest(report.manifest)
    assert [entry.key for entry in manifest.entries] == ["shard-0.tar/a", "shard-0.tar/deep/b"]
    assert [entry.scene.captions[0] for entry in manifest.entries] == ["a red house", "two dogs"]
    assert manifest.entries[0].tags == ("house",) and report.fault_counts == {"broken": 1}
    np.testing.assert_array_equal(decode_image(manifest.path(manifest.entries[1])), pixels(2))
    assert verify(manifest).faults == {}
    assert len(prepare(tar, tmp_path / "alone").entries) == 2
    tar.unlink()
    assert verify(manifest).counts == {"missing": 2}
    (tmp_path / "set" / "x.tar").write_bytes(b"\x1f\x8b" + b"0" * 600)
    with pytest.raises(ValueError, match="x.tar is not a plain tar"):
        prepare(tmp_path / "set", tmp_path / "out")
    save(tmp_path / "set" / "d.png", 3)
    report = prepare(tmp_path / "set", tmp_path / "out")
    assert [entry.key for entry in report.entries] == ["d"] and "not a plain tar" in report.faults["x.tar"]


def test_notes_are_read_and_checked(tmp_path):
    save(tmp_path / "a.png", 1)
    save(tmp_path / "b.png", 2)
    (tmp_path / "a.png.json").write_text(json.dumps(TEXTS))
    lines = tmp_path / "lines.jsonl"
    options = PrepareOptions(captions=lines)
    lines.write_text(json.dumps({"path": "b.png", "split": "mine", **TEXTS, "caption_rough": "r2"}) + "\n\n")
    a, b = prepare(tmp_path, tmp_path, options).entries
    assert (a.scene.rough, b.scene.rough, b.split) == ("r", "r2", "mine")
    for wrong, message in (
        ({"path": "b.png", "caption": "x"}, "unknown fields \\['caption'\\]"),
        ({"path": "b.png", "caption_final": "x"}, "some of the three captions"),
        ({"path": "b.png", **TEXTS, "caption_final": "<x>"}, "leave it out"),
        ({"path": "c.png", **TEXTS}, "captions describe \\['c.png'\\]"),
        ({**TEXTS}, "neither path nor key"),
    ):
        lines.write_text(json.dumps(wrong))
        if "captions describe" in message:
            with pytest.raises(ValueError, match=message):
                prepare(tmp_path, tmp_path, options)
            continue
        report = prepare(tmp_path, tmp_path, options)
        (told,) = [told for told in (report.faults | report.passed_over).items()]
        assert not report.is_clean and re.search(message, told[1]) and f"{lines}:1" in "".join(told)
        assert [entry.key for entry in report.entries] == (["a"] if told[0] == "b.png" else ["a", "b"])


def test_a_killed_run_goes_on_and_shards_share_their_work(tmp_path):
    for i in range(7):
        save(tmp_path / "photos" / f"{i}.png", i)
    whole = prepare(tmp_path / "photos", tmp_path / "whole")
    for number in (1, 2, 3):
        part = prepare(tmp_path / "photos", tmp_path / "out", PrepareOptions(shard=(number, 3)))
        assert part.manifest is None and part.reused == 0 and len(part.entries) == (3, 2, 2)[number - 1]
    torn = tmp_path / "out" / ".prepare" / "examined-2-of-3.jsonl"
    torn.write_text(torn.read_text()[:-20])
    save(tmp_path / "photos" / "3.png", 30)
    joined = prepare(tmp_path / "photos", tmp_path / "out")
    assert joined.reused == 5  # all but the one cut short and the one written anew
    again = prepare(tmp_path / "photos", tmp_path / "out")
    assert again.reused == 7 and again.entries == joined.entries
    assert [e.sha256 for e in joined.entries if e.key != "3"] == [e.sha256 for e in whole.entries if e.key != "3"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A captioner and a tagger with drawn weights, as transformers saves them."""
    import torch
    import transformers as tf

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    vit = tf.ViTConfig(image_size=32, patch_size=16, id2label={0: "tabby, tabby cat", 1: "sea_shore"}, **sizes)
    tokens = tf.PreTrainedTokenizerFast(tokenizer_file=str(project_root() / "recipes/assets/tiny/text_tokenizer.json"))
    gpt = tf.GPT2Config(
        vocab_size=len(tokens), n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
    )
    tf.ViTForImageClassification(vit).save_pretrained(root / "tagger")
    both = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, gpt)
    model = tf.VisionEncoderDecoderModel(both)
    model.generation_config.update(decoder_start_token_id=1, pad_token_id=1, eos_token_id=1)
    model.save_pretrained(root / "captioner")
    tokens.save_pretrained(root / "captioner")
    for name in ("tagger", "captioner"):
        tf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / name)
    return root


@pytest.mark.filterwarnings("default")
def test_models_describe_what_has_no_captions_once(tmp_path, models):
    for i in range(3):
        save(tmp_path / "photos" / f"{i}.png", i)
    (tmp_path / "photos" / "0.png.json").write_text(json.dumps(TEXTS))
    options = PrepareOptions(captioner=Captioner(models / "captioner"), tagger=ClassTagger(models / "tagger"))
    first = prepare(tmp_path / "photos", tmp_path / "out", options)
    assert first.entries[0].scene.captions == ("r", "m", "f") and first.entries[0].tags == ("t",)
    assert first.without_captions == 0
    for entry in first.entries[1:]:
        assert set(entry.tags) <= {"tabby", "sea shore"} and entry.tags
        assert not any(mark in text for text in entry.scene.captions for mark in "<>\n")
    [journal] = (tmp_path / "out" / ".prepare").glob("captions-captioner-*.jsonl")
    rows = journal.read_text().split("\n")
    assert sum(bool(row) for row in rows) == 2
    assert prepare(tmp_path / "photos", tmp_path / "out", options).entries == first.entries
    assert len(journal.read_text().split()) == len(" ".join(rows).split())
    other = shutil.copytree(models / "captioner", tmp_path / "other" / "captioner")
    assert Captioner(other).name == options.captioner.name  # the same model, wherever it lies
    (other / "generation_config.json").write_text((other / "generation_config.json").read_text() + " ")
    assert Captioner(other).name != options.captioner.name  # what one said is never taken for another's
    with pytest.raises(ValueError, match="captioner=.* holds no config.json"):
        Captioner(tmp_path)


def test_tags_from_captions_and_folders(tmp_path):
    captions = ("lion, rock", "two lions on a rock.", "two lions rest on a large rock under clouds.")
    assert tags_of_captions(captions)[:2] == ("rock", "lions")
    save(tmp_path / "photos" / "sky" / "0.png")
    assert prepare(tmp_path / "photos", tmp_path, PrepareOptions(tagger="folder")).entries[0].tags == ("sky",)
    with pytest.raises(ValueError, match="tagger is 'ram'"):
        prepare(tmp_path, tmp_path, PrepareOptions(tagger="ram"))


def test_the_command_writes_a_manifest_and_names_wrong_arguments(tmp_path, capsys):
    save(tmp_path / "a.png", 1)
    right = [f"source={tmp_path}", f"output={tmp_path / 'out'}"]
    assert prepare_data.main([*right, "shard=1/1"]) == 0 and not (tmp_path / "out" / "manifest.parquet").exists()
    assert prepare_data.main([*right, "heldout_fraction=0"]) == 0
    assert "no photograph is in split heldout: give another heldout_fraction" in capsys.readouterr().out
    assert len(read_manifest(tmp_path / "out" / "manifest.parquet")) == 1
    for wrong, message in (
        (["ouput=out"], "did you mean 'output'"),
        (["source=."], "output is missing"),
        ([*right, "shard=3"], "shard='3': give k/n"),
        ([*right, "shard=3/2"], "shard='3/2': give k/n"),
        ([*right, "heldout_fraction=x"], "give a share such as 0.1"),
    ):
        assert prepare_data.main(wrong) == 2
        assert message in capsys.readouterr().out
