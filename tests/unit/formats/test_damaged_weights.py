"""Every reader names a weight file that is truncated, holds NaN or differs from its SHA256SUMS."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from realsr_hpc.config.load import compose
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.config.whole_files import file_fault
from realsr_hpc.files import write_sums
from realsr_hpc.formats.pickles import read_pickle
from realsr_hpc.formats.tensor_files import safetensors_specs
from realsr_hpc.launch.refusals import refuse_what_is_missing
from realsr_hpc.paths import resolve
from realsr_hpc.quality.niqe import NIQEModel
from realsr_hpc.quality.ranker import Ranker
from realsr_hpc.tokenizer.image_file import load_image_tokenizer, save_image_tokenizer
from realsr_hpc.tokenizer.text import TextTokenizer
from realsr_hpc.tokenizer.whole_file import read_tree

TINY = resolve("recipes/assets/tiny")


def config(folder: Path) -> RunConfig:
    named = {"image_tokenizer.weights": "image_tokenizer.safetensors", "text_tokenizer.path": "text_tokenizer.json"}
    composed = compose(["recipe=sft_tiny", "data=bundled", *(f"{key}={folder / name}" for key, name in named.items())])
    assert isinstance(composed, RunConfig)
    return composed


READERS = {
    "image_tokenizer.safetensors": lambda path: load_image_tokenizer(config(path.parent).image_tokenizer, "cpu"),
    "text_tokenizer.json": TextTokenizer,
    "ranker.safetensors": Ranker.load,
    "niqe_pristine.npz": NIQEModel.load,
}


@pytest.fixture
def folder(tmp_path):
    for name in READERS:
        shutil.copy(TINY / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("damage", ["empty", "cut", "zeros", "other"])
def test_a_damaged_file_is_named(folder, name, damage):
    path, content = folder / name, (folder / name).read_bytes()
    changed = {"empty": b"", "cut": content[: len(content) // 2], "zeros": bytes(100), "other": b"[1]"}[damage]
    READERS[name](path)
    path.write_bytes(changed)
    with pytest.raises(ValueError) as caught:
        READERS[name](path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    if name.endswith("tokenizer.safetensors") or name.endswith(".json"):  # launching reads no numbers, but headers
        said = f"(image_tokenizer.weights|text_tokenizer.path): {path} is (truncated|empty)"
        with pytest.raises(ValueError, match=said):
            refuse_what_is_missing([config(folder)])


IN_PLACE_OF_IT = {
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "web page": b"<!DOCTYPE html>\n<html><body>Log in to continue</body></html>\n",
}


@pytest.mark.parametrize("kind", IN_PLACE_OF_IT)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin", ".ckpt", "tokenizer.json"])
def test_what_was_downloaded_in_place_of_a_file_is_said(tmp_path, kind, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(IN_PLACE_OF_IT[kind])
    readers = {".safetensors": safetensors_specs, "tokenizer.json": read_tree}
    with pytest.raises(ValueError, match=f"{path} is a {kind}, not the file"):
        readers.get(suffix, read_pickle)(path)
    assert f"is a {kind}" in file_fault(path)


def test_a_file_of_weights_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "other").touch()
    save_image_tokenizer(load_image_tokenizer(config(TINY).image_tokenizer, "cpu"), tmp_path / "image.safetensors")
    Ranker().save(tmp_path / "ranker.safetensors")
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "other").stat().st_mode}


@pytest.mark.parametrize("name", ["image_tokenizer.safetensors", "ranker.safetensors"])
def test_numbers_that_are_none_are_named(folder, name):
    weights = load_file(folder / name)
    first = next(key for key, value in weights.items() if value.is_floating_point())
    weights[first].view(-1)[0] = torch.nan
    save_file(weights, folder / name)
    with pytest.raises(ValueError, match=f"{first} holds NaN"):
        READERS[name](folder / name)


@pytest.mark.parametrize("name", ["image_tokenizer.safetensors", "text_tokenizer.json", "ranker.safetensors"])
def test_a_file_that_differs_from_the_sums_beside_it_is_refused_also_at_launch(folder, name):
    write_sums(folder)
    READERS[name](folder / name)
    refuse_what_is_missing([config(folder)])
    with (folder / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(ValueError, match="differs from SHA256SUMS; copy it again"):
        READERS[name](folder / name)
    if not name.startswith("ranker"):
        with pytest.raises(
            ValueError, match=rf"(image_tokenizer.weights|text_tokenizer.path): {folder / name} is damaged"
        ):
            refuse_what_is_missing([config(folder)])


def test_a_shard_of_start_weights_that_is_listed_and_not_there_is_refused_at_launch(tmp_path):
    shutil.copytree(TINY / "policy_sft", policy := tmp_path / "policy")
    write_sums(policy)
    composed = compose(["recipe=grpo_tiny", f"model.weights={policy}"])
    assert isinstance(composed, RunConfig)
    refuse_what_is_missing([composed])
    (policy / "config.json").unlink()
    with pytest.raises(ValueError, match="model.weights: .*config.json is missing, which SHA256SUMS lists"):
        refuse_what_is_missing([composed])
    (policy / "SHA256SUMS").unlink()
    (policy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')
    with pytest.raises(ValueError, match=r"model.weights: .* names model-00002-of-00002.safetensors, not there"):
        refuse_what_is_missing([composed])
