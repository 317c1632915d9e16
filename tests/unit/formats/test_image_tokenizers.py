"""LlamaGen's and Meta's image tokenizers from their own files: codes, pixels, gradients, and malicious pickles."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from realsr_hpc.config.load import compose_one
from realsr_hpc.export import Sources, import_weights
from realsr_hpc.export.image_weights import image_shapes
from realsr_hpc.formats import open_source
from realsr_hpc.formats.llamagen import our_name
from realsr_hpc.paths import project_root
from realsr_hpc.tokenizer.image import ImageTokenizer
from realsr_hpc.tokenizer.image_file import load_image_tokenizer
from tests.unit.formats import reference_llamagen as reference
from tests.unit.formats.layouts import recipe

PUBLISHED = {"vq_ds8": ([1, 2, 2, 4], 299, 70_109_835), "vq_ds16": ([1, 1, 2, 2, 4], 343, 71_883_403)}
"""Multipliers; tensors and numbers of FoundationVision/LlamaGen's VQ_8() and VQ_16(), without the record of usage."""
LLAMAGEN = ["image_tokenizer.normalised_codes=true", "image_tokenizer.attention=lowest"]
MULTIPLIERS = [1, 2, 2]


def state_of() -> dict[str, torch.Tensor]:
    return reference.random_state(MULTIPLIERS, codes=40, width=32, latent=24, features=6, blocks=1)


def save(kind: str, path, state) -> None:
    with_usage = {**state, "quantize.codebook_used": torch.zeros(16)}
    match kind:
        case "published":
            torch.save({"model": with_usage}, path)
        case "trainer":
            options = argparse.Namespace(codebook_l2_norm=True, lr=1e-4, vq_model="VQ-8")
            other = {name: value + 1 for name, value in state.items()}
            kept = {"model": with_usage, "ema": other, "optimizer": {"state": {}}, "steps": 3}
            torch.save({**kept, "args": options}, path)
        case "state_dict":
            torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=False)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """LlamaGen's names and tensors, and our tokenizer as the import makes it from LlamaGen's file."""
    folder, state = tmp_path_factory.mktemp("llamagen"), state_of()
    save("published", folder / "vq_ds4.pt", state)
    done = import_weights(Sources(folder / "vq_ds4.pt"), folder / "out", recipe(*LLAMAGEN))
    return state, load_image_tokenizer(recipe(*LLAMAGEN, *done.overrides).image_tokenizer, "cpu")


@pytest.mark.parametrize("kind", ["published", "trainer", "state_dict"])
def test_every_tensor_of_llamagens_files_is_kept_bit_by_bit(kind, tmp_path):
    state = state_of()
    save(kind, tmp_path / "vq.pt", state)
    done = import_weights(Sources(tmp_path / "vq.pt"), tmp_path / "out", recipe(*LLAMAGEN))
    assert "LlamaGen" in done.recognised[0] and f"{sum(v.numel() for v in state.values()):,}" in done.recognised[0]
    assert (kind == "trainer") == any("ema (another state" in line for line in done.recognised)
    tokenizer = load_image_tokenizer(recipe(*LLAMAGEN, *done.overrides).image_tokenizer, "cpu")
    written = tokenizer.state_dict()
    assert len(written) == len(state)
    assert all(torch.equal(written[our_name(n, len(MULTIPLIERS))], value) for n, value in state.items())


def test_codes_and_pixels_are_those_of_llamagens_formulas(imported):
    state, tokenizer = imported
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = tokenizer.encode(images)
    assert torch.equal(codes, reference.encode(state, images)) and len(codes.unique()) > 8
    vectors = reference.unit_codes(state)[codes].movedim(-1, 1)
    torch.testing.assert_close(
        tokenizer.decode(codes), reference.decode(state, vectors).clamp(-1, 1), rtol=0, atol=1e-5
    )


def test_gradients_are_those_of_llamagens_formulas(imported):
    """Straight-through gradients of the quantiser, over unit vectors; in float64, so that rounding hides no fault."""
    state, tokenizer = imported
    ours = ImageTokenizer(tokenizer.config).double()
    ours.load_state_dict({name: value.double() for name, value in tokenizer.state_dict().items()})
    theirs = {name: value.double().requires_grad_() for name, value in state.items()}
    images = torch.rand(1, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = reference.features(theirs, images)
    entries = reference.unit_codes(theirs)[reference.encode(theirs, images)].movedim(-1, 1)
    reference.decode(theirs, found + (entries - found).detach()).square().mean().backward()
    ours(images)[0].square().mean().backward()
    gradients = {name: value.grad for name, value in ours.named_parameters()}
    for name, value in theirs.items():
        if name != "quantize.embedding.weight":
            torch.testing.assert_close(gradients[our_name(name, len(MULTIPLIERS))], value.grad, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("which", PUBLISHED)
def test_the_published_sizes_are_represented(which):
    multipliers, tensors, numbers = PUBLISHED[which]
    levels = f"image_tokenizer.channel_multiplier={multipliers}"
    stride = f"image_tokenizer.downsample={2 ** (len(multipliers) - 1)}"
    own = compose_one(["recipe=sft_7b", "model=chameleon_7b_f8"]).image_tokenizer
    assert own.attention == "lowest"
    config = own.model_copy(
        update={"channel_multiplier": tuple(multipliers), "downsample": 2 ** (len(multipliers) - 1)}
    )
    shapes = image_shapes(config)
    assert (len(shapes), sum(torch.Size(shape).numel() for shape in shapes.values())) == (tensors, numbers)
    narrow = reference.random_state(multipliers, 16384, 32, 256, 8, 2)
    assert {our_name(name, len(multipliers)) for name in narrow} == shapes.keys(), (levels, stride)


def test_vqgan_ckpt_with_its_yaml_is_ours_bit_by_bit(tmp_path):
    tokenizer = ImageTokenizer(recipe().image_tokenizer)
    state = {**tokenizer.state_dict(), "loss.discriminator.main.0.weight": torch.zeros(2)}
    torch.save({"state_dict": state}, tmp_path / "vqgan.ckpt")
    (tmp_path / "vqgan.yaml").write_text("model:\n  params:\n    embed_dim: 6\n    ddconfig: {double_z: false}\n")
    done = import_weights(Sources(tmp_path / "vqgan.ckpt"), tmp_path / "out", recipe())
    assert "not read: loss.discriminator.main.0.weight (used in training only)" in done.recognised
    loaded = load_image_tokenizer(recipe(*done.overrides).image_tokenizer, "cpu").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in tokenizer.state_dict().items())
    with pytest.raises(ValueError, match=r"tensors where the recipe's image_tokenizer section has \d+, .* first"):
        import_weights(Sources(tmp_path / "vqgan.ckpt"), tmp_path / "no", recipe("image_tokenizer.embed_dim=8"))
    with pytest.raises(ValueError, match=r"normalised_codes False \(recipe: True\)"):
        wrong = recipe("image_tokenizer.normalised_codes=true")
        import_weights(Sources(tmp_path / "vqgan.ckpt"), tmp_path / "no", wrong)
    for wrong in ("", "[1, 2]", "model: {params: {embed_dim: 6}}"):
        (tmp_path / "vqgan.yaml").write_text(wrong)
        with pytest.raises(ValueError, match=r"vqgan.yaml holds no model.params.ddconfig; copy it again"):
            open_source(tmp_path / "vqgan.ckpt")
    (tmp_path / "vqgan.yaml").write_text("model:\n  params:\n    ddconfig: {double_z: true, norm: batch}\n")
    with pytest.raises(ValueError, match=r"vqgan.yaml: ddconfig.norm 'batch' .*vqgan.yaml: double_z True"):
        import_weights(Sources(tmp_path / "vqgan.ckpt"), tmp_path / "no", recipe())


class Evil:
    """Executes a command when an unrestricted unpickler reads it."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


class Unknown:
    """A class that is not on the allow-list."""


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["beside", "instead"])
def test_a_pickle_that_runs_something_is_refused_by_the_name_of_what_it_would_run(zipped, where, tmp_path):
    evil = Evil(tmp_path / "ran")
    content = evil if where == "instead" else {"state_dict": {"a": torch.zeros(2)}, "hooks": evil}
    torch.save(content, tmp_path / "vqgan.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"posix.system|os.system"):
        open_source(tmp_path / "vqgan.ckpt")
    assert not (tmp_path / "ran").exists()


def test_unknown_classes_damaged_files_and_nan_are_named(tmp_path):
    for zipped in (True, False):
        content = {"state_dict": state_of(), "extra": Unknown()}
        torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"refers to [\w.]+\.Unknown"):
            open_source(tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(b"no weights at all")
    with pytest.raises(ValueError, match=r"y\.pt is damaged, or no file of torch.save"):
        open_source(tmp_path / "y.pt")
    state = state_of()
    state["encoder.conv_out.weight"][0, 0] = float("inf")
    save_file(state, tmp_path / "z.safetensors")
    with pytest.raises(ValueError, match=r"encoder\.conv_out\.weight holds NaN or infinite"):
        import_weights(Sources(tmp_path / "z.safetensors"), tmp_path / "out", recipe(*LLAMAGEN))
    assert not list(tmp_path.glob("*out*"))


def test_the_command_says_what_it_found_and_the_old_one_where_it_went(tmp_path):
    save("published", tmp_path / "vq_ds4.pt", state_of())
    from tests.unit.formats.layouts import overrides

    words = [f"source={tmp_path / 'vq_ds4.pt'}", f"output={tmp_path / 'out'}", *overrides(*LLAMAGEN)]
    answer = {}
    for name in ("import_weights", "import_hf"):
        command = [sys.executable, str(project_root() / "tools" / f"{name}.py"), *words]
        answer[name] = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert answer["import_weights"].returncode == 0, answer["import_weights"].stderr
    written = tmp_path / "out" / "image_tokenizer.safetensors"
    assert f"recipe=NAME image_tokenizer.weights={written}" in answer["import_weights"].stdout
    assert answer["import_hf"].returncode == 2
    assert "import-weights source=" in answer["import_hf"].stderr
