"""The data stream: the same bytes for every way of reading, exact resumption, the three modes, faults."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from realsr_hpc.config.schema import DataConfig, RunConfig, VLCoTConfig
from realsr_hpc.data.dali_pipeline import DegradationPipeline
from realsr_hpc.data.degradation import PRESETS, Stream, generator, sample_degradation
from realsr_hpc.data.loader import LQLoader
from realsr_hpc.data.manifest import read_manifest, write_manifest
from realsr_hpc.paths import project_root
from realsr_hpc.prepare.build_manifest import PrepareOptions, prepare
from realsr_hpc.records import ResizeTo

torch.set_num_threads(1)
ALL_TRAIN = PrepareOptions(heldout_fraction=0.0)
BUNDLED = str(project_root() / "recipes/assets/photographs/manifest.parquet")


def config(manifest=BUNDLED, seed=0, **data):
    return RunConfig(
        name="test",
        task="grpo",
        seed=seed,
        vlcot=VLCoTConfig(image_sizes_px=(32, 32, 64)),
        data=DataConfig(manifest=str(manifest), **data),
    )


@pytest.fixture
def opened():
    """Makes loaders and closes them."""
    loaders = []

    def make(cfg, *args, **kwargs):
        loaders.append(LQLoader(cfg, *args, **kwargs))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def final_modes(count):
    draws = [generator(0, index, Stream.DEGRADATION) for index in range(count)]
    return [sample_degradation(rng, PRESETS["realesrgan"], 64, 4).final_resize_mode for rng in draws]


def read(loader, num_batches):
    """{index: (key, label, lq bytes, gt bytes)} of some batches."""
    samples = {}
    for _ in range(num_batches):
        batch = loader.next()
        for i in range(len(batch)):
            gt = None if batch.gt is None else batch.gt[i].numpy().tobytes()
            samples[int(batch.index[i])] = (batch.keys[i], batch.labels[i], batch.lq[i].numpy().tobytes(), gt)
    return samples


@pytest.fixture(scope="module")
def stream():
    """The first 24 samples, read by one rank in one way."""
    loader = LQLoader(config(), "train", 8)
    samples = read(loader, 3)
    loader.close()
    return samples


def test_a_batch_is_what_the_record_says(opened):
    batch = opened(config(), "train", 3).next()
    assert batch.lq.shape == (3, 3, 16, 16) and batch.lq.dtype == torch.uint8
    assert batch.gt.shape == (3, 3, 64, 64) and batch.gt.dtype == torch.uint8
    assert batch.lq.is_contiguous() and batch.gt.is_contiguous()
    assert batch.index.tolist() == [0, 1, 2]
    assert len({*batch.keys}) == 3
    assert all(label is not None and label.phrase for label in batch.labels)
    assert all(ResizeTo(16, mode) in known for known, mode in zip(batch.operators, final_modes(3), strict=True))
    assert all(scene is not None and len(scene.tags) >= 3 for scene in batch.scenes)


def test_same_bytes_whatever_batch_size_threads_and_prefetch(opened, stream):
    assert read(opened(config(num_threads=2, prefetch=3), "train", 3), 8) == stream


def test_same_bytes_whatever_the_ranks(opened, stream):
    ranks = [opened(config(), "train", 4, dp_rank=rank, dp_size=2) for rank in range(2)]
    parts = [read(rank, 3) for rank in ranks]
    assert parts[0].keys() == {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19}
    assert parts[0] | parts[1] == stream


def test_another_seed_gives_other_samples(opened, stream):
    assert read(opened(config(seed=1), "train", 8), 1)[0] != stream[0]


def test_noise_is_drawn_by_seed_and_sample_number(opened, monkeypatch):
    run, seen = DegradationPipeline.run, []

    def watched(self, inputs):
        seen.extend(copy.deepcopy(item.noise_rng).random(3).tolist() for item in inputs)
        return run(self, inputs)

    monkeypatch.setattr(DegradationPipeline, "run", watched)
    opened(config(seed=7), "train", 2, dp_rank=1, dp_size=2).next()
    assert seen == [generator(7, number, Stream.NOISE).random(3).tolist() for number in (2, 3)]


def test_the_order_of_photographs_follows_the_seed(opened):
    orders = [opened(config(seed=seed, mode="lq_only"), "train", 8).next().keys for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_an_epoch_is_a_permutation_and_visits_differ(opened):
    loader = opened(config(mode="lq_only"), "train", len(read_manifest(BUNDLED).split("train")))
    first, second = loader.next(), loader.next()
    assert len(set(first.keys)) == len(first)
    assert set(first.keys) == set(second.keys)
    assert first.keys != second.keys
    place = second.keys.index(first.keys[0])
    assert not torch.equal(first.lq[0], second.lq[place])


@pytest.mark.parametrize("dp_size", [1, 2])
def test_resuming_is_exact_also_with_batches_made_ahead(opened, stream, dp_size):
    loader = opened(config(prefetch=3), "train", 8)
    for _ in range(2):
        loader.next()
    state = json.loads(json.dumps(loader.state_dict()))
    later = [opened(config(), "train", 8 // dp_size, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    found = {}
    for rank in later:
        rank.load_state_dict(state)
        found |= read(rank, 1)
    assert found == {index: stream[index] for index in range(16, 24)}


def test_loading_a_state_drops_what_was_made_ahead(opened, stream):
    loader = opened(config(prefetch=2), "train", 8)
    start = loader.state_dict()
    for _ in range(2):
        loader.next()
    loader.load_state_dict(start)
    assert read(loader, 3) == stream


def test_a_state_of_another_run_is_refused(opened):
    state = opened(config(), "train", 2).state_dict()
    with pytest.raises(ValueError, match="seed of the saved data position is 0, here it is 4"):
        opened(config(seed=4), "train", 2).load_state_dict(state)
    with pytest.raises(ValueError, match="split of the saved"):
        opened(config(), "heldout", 2).load_state_dict(state)
    with pytest.raises(ValueError, match="mode of the saved"):
        opened(config(mode="lq_only"), "train", 2).load_state_dict(state)
    with pytest.raises(ValueError, match="shuffle of the saved"):
        opened(config(), "train", 2, shuffle=False).load_state_dict(state)


def test_a_state_of_photographs_that_were_altered_since_is_refused(opened, tmp_path):
    first = prepare(folder(tmp_path), tmp_path, ALL_TRAIN)
    state = opened(config(first.manifest), "train", 2).state_dict()
    opened(config(first.manifest), "train", 2).load_state_dict(state)
    Image.fromarray(np.full((96, 96, 3), 9, np.uint8)).save(tmp_path / "photo2.png")
    again = prepare(tmp_path, tmp_path, ALL_TRAIN)
    with pytest.raises(ValueError, match="photographs of the saved data position"):
        opened(config(again.manifest), "train", 2).load_state_dict(state)


def test_heldout_images_are_the_same_each_time(opened):
    cfg = config()
    first, again = (opened(cfg, cfg.data.heldout_split, 4, shuffle=False).next() for _ in range(2))
    assert first.keys == tuple(entry.key for entry in read_manifest(BUNDLED).split("heldout").entries[:4])
    assert first.labels == again.labels
    assert torch.equal(first.lq, again.lq) and torch.equal(first.gt, again.gt)


def folder(path, num=4, side=96):
    """Photographs of noise, each with its own mean."""
    path.mkdir(parents=True, exist_ok=True)
    for i in range(num):
        pixels = np.random.default_rng(i).integers(0, 60, (side, side, 3), dtype=np.uint8) + 40 * i
        Image.fromarray(pixels.astype(np.uint8)).save(path / f"photo{i}.png")
    return path


def test_windows_are_as_large_and_as_often_mirrored_as_the_recipe_says(opened, tmp_path):
    report = prepare(folder(tmp_path, num=1), tmp_path, ALL_TRAIN)
    with Image.open(tmp_path / "photo0.png") as photograph:
        whole = np.asarray(photograph)
    for hflip, expected in ((0.0, whole), (1.0, whole[:, ::-1])):
        samples = opened(config(report.manifest, min_scene_fraction=1.0, hflip=hflip), "train", 1)._samples
        assert all(np.array_equal(samples[number].gt, expected) for number in range(4))
    samples = opened(config(report.manifest, min_scene_fraction=0.25), "train", 1)._samples
    sides = [len(samples[number].gt) for number in range(60)]
    assert 24 <= min(sides) < 40 and 88 < max(sides) <= 96


def test_a_broken_photograph_is_skipped_named_and_counted(opened, tmp_path):
    report = prepare(folder(tmp_path), tmp_path, ALL_TRAIN)
    whole = read(opened(config(report.manifest), "train", 4, shuffle=False), 1)
    (tmp_path / "photo1.png").write_bytes((tmp_path / "photo1.png").read_bytes()[:300])
    (tmp_path / "photo3.png").unlink()
    loader = opened(config(report.manifest, num_threads=2), "train", 4, shuffle=False)
    batch = loader.next()
    assert batch.keys == ("photo0", "photo2", "photo2", "photo0")
    assert set(loader.skipped) == {"photo1", "photo3"}
    assert loader.skipped["photo1"].startswith("broken") and loader.skipped["photo3"].startswith("missing")
    assert batch.lq[2].numpy().tobytes() == whole[2][2]


def test_nothing_usable_is_an_error(opened, tmp_path):
    report = prepare(folder(tmp_path, num=1), tmp_path, ALL_TRAIN)
    (tmp_path / "photo0.png").unlink()
    with pytest.raises(ValueError, match="data.manifest: none of the 1 photographs of .* can be used: photo0: missing"):
        opened(config(report.manifest), "train", 1).next()


def paired_folder(tmp_path, factor=4):
    folder(tmp_path / "gt", side=96)
    for path in (tmp_path / "gt").glob("*.png"):
        Image.open(path).resize((96 // factor,) * 2, Image.Resampling.BOX).save(tmp_path / "gt" / f"lq_{path.stem}.bmp")
    notes = [{"path": f"photo{i}.png", "lq_path": f"lq_photo{i}.bmp", "split": "train"} for i in range(4)]
    (tmp_path / "notes.jsonl").write_text("\n".join(map(json.dumps, notes)))
    return prepare(tmp_path / "gt", tmp_path, PrepareOptions(captions=tmp_path / "notes.jsonl"))


def test_paired_windows_lie_over_each_other_unresampled(opened, tmp_path):
    batch = opened(config(paired_folder(tmp_path).manifest, mode="paired"), "train", 4).next()
    assert batch.labels == (None,) * 4 and batch.scenes == (None,) * 4
    assert batch.lq.shape == (4, 3, 16, 16) and batch.gt.shape == (4, 3, 64, 64)
    means = torch.nn.functional.avg_pool2d(batch.gt.float(), 4)
    assert (means - batch.lq.float()).abs().max() <= 1


def test_a_partner_as_large_as_its_truth_is_averaged_down(opened, tmp_path):
    batch = opened(config(paired_folder(tmp_path, factor=1).manifest, mode="paired"), "train", 4).next()
    means = torch.nn.functional.avg_pool2d(batch.gt.float(), 4)
    assert batch.lq.shape == (4, 3, 16, 16) and (means - batch.lq.float()).abs().max() <= 1


def test_a_pair_of_wrong_sizes_is_skipped(opened, tmp_path):
    loader = opened(config(paired_folder(tmp_path, factor=3).manifest, mode="paired"), "train", 1)
    with pytest.raises(ValueError, match="pair: truth"):
        loader.next()


def test_an_entry_without_its_partner_is_skipped(opened, tmp_path):
    manifest = read_manifest(paired_folder(tmp_path).manifest)
    entries = [
        dataclasses.replace(entry, lq_path=entry.lq_path if entry.key == "photo2" else None)
        for entry in manifest.entries
    ]
    write_manifest(tmp_path / "mixed.parquet", entries)
    loader = opened(config(tmp_path / "mixed.parquet", mode="paired"), "train", 4, shuffle=False)
    assert loader.next().keys == ("photo2",) * 4
    assert (
        loader.skipped["photo0"]
        == "pair: lq_path of 'photo0' is empty: paired data needs it, or set data.mode=unpaired"
    )


def test_lq_only_has_no_truth(opened, tmp_path):
    report = prepare(folder(tmp_path, side=40), tmp_path, ALL_TRAIN)
    batch = opened(config(report.manifest, mode="lq_only"), "train", 2).next()
    assert batch.gt is None and batch.labels == (None, None) and batch.operators == (None, None)
    assert batch.lq.shape == (2, 3, 16, 16)


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="dp_rank is 2 with dp_size 2"):
        LQLoader(config(), "train", 1, dp_rank=2, dp_size=2)
    with pytest.raises(ValueError, match="batch_size is 0"):
        LQLoader(config(), "train", 0)
    with pytest.raises(ValueError, match="split='test': no photograph .* there are heldout, train: name one"):
        LQLoader(config(), "test", 1)
    write_manifest(tmp_path / "empty.parquet", [])
    with pytest.raises(ValueError, match="it is empty: make it with realsr-hpc prepare-data"):
        LQLoader(config(tmp_path / "empty.parquet"), "train", 1)
