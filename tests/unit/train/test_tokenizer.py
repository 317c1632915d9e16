"""Tokenizer training: computed start weights, exact resume, and the files that a run writes."""

import numpy as np
import pytest
import torch
from PIL import Image

from realsr_hpc.config.schema import DataConfig, ImageTokenizerConfig, RunConfig, TokenizerTrainingConfig
from realsr_hpc.data.shapes import dead_leaves
from realsr_hpc.tokenizer.image_file import load_image_tokenizer
from realsr_hpc.tokenizer.text import TextTokenizer
from realsr_hpc.tracking.spool import metrics_by_step
from realsr_hpc.train.tokenizer import TokenizerTraining, main
from realsr_hpc.train.tokenizer_images import Photographs, TokenizerImages
from realsr_hpc.train.tokenizer_measures import psnr_db

IMAGE = ImageTokenizerConfig(codebook_size=64, latent_channels=32, decoder_base_channels=32)


def recipe(num_steps: int, batch_size: int = 1) -> RunConfig:
    """A small tokenizer on the bundled photographs."""
    torch.set_num_threads(1)
    training = TokenizerTrainingConfig(
        num_steps=num_steps, batch_size=batch_size, crop_px=32, lr=1e-4, warmup_steps=1, log_every_steps=2
    )
    return RunConfig(name="t", task="tokenizer", image_tokenizer=IMAGE, tokenizer_training=training, data=DataConfig())


def photographs() -> list[np.ndarray]:
    """Two smooth pictures."""
    rows, columns = np.mgrid[0:96, 0:120] / 120
    return [np.stack([rows, columns, 1 - rows], -1), np.stack([columns, rows * columns, rows], -1)]


def images_of(config: RunConfig) -> TokenizerImages:
    """The training images of these pictures."""
    pictures = [Image.fromarray((255 * picture).astype(np.uint8)) for picture in photographs()]
    return TokenizerImages(pictures, config.tokenizer_training, config.seed)


def test_start_weights_already_reconstruct() -> None:
    """Computed, not learned: far better than the best constant image, and codes differ between patches."""
    config = recipe(10, batch_size=4)
    images = images_of(config)
    training = TokenizerTraining(config)
    training.start([images.batch(step) for step in range(100, 130)])
    batch = torch.cat([images.batch(step) for step in range(60) if images.batch(step).shape[-1] == 32])
    reconstruction = training.average.decode(training.average.encode(batch))
    constant = batch.mean((2, 3), keepdim=True).expand_as(batch)
    assert psnr_db(reconstruction, batch) > psnr_db(constant, batch) + 1.0


def test_images_depend_on_seed_and_step_alone() -> None:
    """Two objects agree; steps differ; values stay in range."""
    config = recipe(10)
    first, second = images_of(config), images_of(config)
    threads = TokenizerImages(first.photographs, config.tokenizer_training, config.seed, num_threads=3)
    assert torch.equal(first.batch(7), second.batch(7)) and torch.equal(first.batch(7), threads.batch(7))
    assert first.batch(3).abs().max() <= 1
    others = [first.batch(step) for step in range(8, 20)]
    assert not any(other.shape == first.batch(7).shape and torch.equal(other, first.batch(7)) for other in others)
    leaves = np.asarray(dead_leaves(np.random.default_rng(0), 64))
    assert leaves.shape == (64, 64, 3)
    assert leaves.std() > 10


def test_photographs_are_decoded_when_needed_and_a_broken_one_is_passed_over(tmp_path, caplog) -> None:
    """Each is named once; if no photograph can be read, there is one error."""
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, picture in zip(paths[::2], photographs(), strict=True):
        Image.fromarray((255 * picture).astype(np.uint8)).save(path)
    paths[1].write_bytes(b"no image")
    found = Photographs(paths)
    assert np.array_equal(found[1], found[2]) and np.array_equal(found[1], Image.open(paths[2]))
    assert [record.message.count("1.png") for record in caplog.records] == [1]
    with pytest.raises(ValueError, match=r"none of 1 photographs can be read, first .*1\.png"):
        Photographs(paths[1:2])[0]


def test_a_stopped_run_goes_on_as_if_never_stopped(tmp_path) -> None:
    """Bitwise the same weights, codebook and averages after a stop in between."""
    config = recipe(4)
    images = images_of(config)
    whole = TokenizerTraining(config)
    whole.start([images.batch(step) for step in range(100, 130)])
    for step in range(2):
        whole.update(images.batch(step))
    whole.save(tmp_path / "checkpoint.pt")
    resumed = TokenizerTraining(config)
    assert resumed.resume(tmp_path / "checkpoint.pt")
    for step in range(2, 4):
        whole.update(images.batch(step))
        resumed.update(images.batch(step))
    for part in ("tokenizer", "average"):
        expected, found = getattr(whole, part).state_dict(), getattr(resumed, part).state_dict()
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert torch.equal(whole.codebook_averages.sums, resumed.codebook_averages.sums)


def test_a_run_leaves_weights_text_tokenizer_and_metrics(tmp_path) -> None:
    """On the bundled photographs; a second call has nothing to do."""
    config = recipe(2).model_copy(update={"output_root": str(tmp_path)})
    assert main(config, tmp_path) == 0
    tokenizer = load_image_tokenizer(
        IMAGE.model_copy(update={"weights": str(tmp_path / "image_tokenizer.safetensors")}), "cpu"
    )
    assert tokenizer.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 4, 4)
    text = TextTokenizer(tmp_path / "text_tokenizer.json")
    assert text.vocab_size == config.tokenizer_training.text_vocab_size
    assert len(text.encode("<degradation></degradation>")) == 2
    logged = metrics_by_step(tmp_path)
    assert list(logged) == [2]
    assert (tmp_path / "grid_000002.png").is_file()
    assert main(config, tmp_path) == 0
    assert metrics_by_step(tmp_path) == logged


def test_start_weights_need_their_architecture() -> None:
    """The message names the fields."""
    config = recipe(1)
    other = config.model_copy(update={"image_tokenizer": IMAGE.model_copy(update={"base_channels": 64})})
    with pytest.raises(ValueError, match="base_channels is 64.*needs 128"):
        TokenizerTraining(other).start([torch.zeros(1, 3, 32, 32)])
