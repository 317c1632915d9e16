"""pyiqa's networks behind the adapter, from staged files of their own format; the weights in them are random.

Shows that each file is read from where docs/rewards.md puts it, nothing is fetched, batches are scored as single images
are, and the value is the network's own. What real weights would say, it does not show.
"""

import hashlib
import importlib.util

import numpy as np
import pytest
import torch

from realsr_hpc.config.weights import PYIQA_FILES

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("pyiqa") is None, reason="needs the extra `iqa` (pyiqa)"),
    pytest.mark.filterwarnings("ignore"),
]

SIDE_PX = 256
BACKBONES = {"resnet50": "resnet50.a1_in1k", "vit_base_patch8_224": "vit_base_patch8_224.augreg2_in21k_ft_in1k"}


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8) for _ in range(2)]


def stage_backbones(folder):
    """As timm's files lie in the hub's cache."""
    import timm
    from safetensors.torch import save_file

    for name, hub_name in BACKBONES.items():
        torch.manual_seed(1)
        model = folder / f"huggingface/hub/models--timm--{hub_name}"
        snapshot = model / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (model / "refs").mkdir()
        (model / "refs/main").write_text("0" * 40)
        save_file(timm.create_model(name, pretrained=False).state_dict(), snapshot / "model.safetensors")


def stage_clip(folder, monkeypatch):
    """A CLIP of RN50's shape, a TorchScript as released; the address it would be fetched from names its checksum.

    Returns its weights.
    """
    from clip.model import CLIP
    from pyiqa.archs import clip_model

    torch.manual_seed(2)
    network = CLIP(1024, 224, (3, 4, 6, 3), 64, None, 77, 49408, 512, 8, 12)
    path = folder / PYIQA_FILES["clipiqa"][0][0]
    path.parent.mkdir(parents=True)
    torch.jit.trace(network, (torch.zeros(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.int64))).save(str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(clip_model._MODELS, "RN50", f"https://example.org/{digest}/RN50.pt")
    return network.state_dict()


def network_of(name):
    """pyiqa's own, with the weights it was made with, and the form of its file."""
    from pyiqa.archs.maniqa_arch import MANIQA
    from pyiqa.archs.musiq_arch import MUSIQ
    from pyiqa.archs.topiq_arch import CFANet

    torch.manual_seed(3)
    if name == "musiq":
        return MUSIQ(pretrained=False), lambda state: state
    if name == "maniqa":
        return MANIQA(pretrained=False, train_dataset="koniq", scale=0.8), lambda state: state
    use_ref = name == "topiq_fr"
    return CFANet("resnet50", use_ref=use_ref, pretrained=False), lambda state: {"params": state}


def list_files(folder):
    files = [path for path in folder.rglob("*") if path.suffix in {".pt", ".pth", ".safetensors"}]
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(lines))


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    from realsr_hpc.quality.pyiqa_adapter import declare_torchvision_operators, load_pyiqa

    declare_torchvision_operators()
    folder = tmp_path_factory.mktemp("weights")
    stage_backbones(folder)
    list_files(folder)
    load_pyiqa(str(folder))
    return folder


@pytest.mark.parametrize("name", ["musiq", "maniqa", "topiq_nr", "topiq_fr"])
def test_a_staged_network_gives_its_own_value(name, staged, images, monkeypatch):
    from pyiqa.archs import maniqa_arch

    from realsr_hpc.quality.pyiqa_adapter import PyiqaMetrics, normalisation
    from realsr_hpc.quality.pyiqa_scores import PyiqaScore

    crops = maniqa_arch.uniform_crop  # 20 crops an image take a CPU most of a minute
    monkeypatch.setattr(maniqa_arch, "uniform_crop", lambda x, crop_size, crop_num: crops(x, crop_size, 2))
    network, as_stored = network_of(name)
    head = staged / PYIQA_FILES[name][0][0]
    head.parent.mkdir(parents=True, exist_ok=True)
    torch.save(as_stored(network.state_dict()), head)
    list_files(staged)

    planes = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    inputs = [planes, planes.flip(0)] if name == "topiq_fr" else [planes]
    truths = images[::-1] if name == "topiq_fr" else [None, None]
    with torch.no_grad():
        raw = network.eval()(*inputs).double().reshape(-1).numpy()
    scores = PyiqaScore(name, str(staged))
    alone = [scores(image, truth) for image, truth in zip(images, truths, strict=True)]
    np.testing.assert_allclose(alone, raw, rtol=1e-4, atol=1e-5)
    mode = "FR" if name == "topiq_fr" else "NR"
    low, high, lower_better = normalisation(name, mode)
    unit = np.clip((raw - low) / (high - low), 0, 1)
    together = PyiqaMetrics([name], str(staged), mode=mode)(images, images[::-1] if mode == "FR" else None)
    np.testing.assert_allclose(together, 1 - unit if lower_better else unit, atol=1e-5)
    head.unlink()
    list_files(staged)


def test_clip_iqa_gives_the_value_of_the_staged_clip(staged, images, monkeypatch):
    from pyiqa.archs.clip_model import build_model
    from pyiqa.archs.clipiqa_arch import CLIPIQA

    from realsr_hpc.quality.pyiqa_adapter import PyiqaMetrics

    weights = stage_clip(staged, monkeypatch)
    list_files(staged)
    metrics = PyiqaMetrics(["clipiqa"], str(staged))
    network = CLIPIQA()
    network.clip_model = [build_model(weights).float()]
    with torch.no_grad():
        raw = network.eval()(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255).reshape(-1).numpy()
    np.testing.assert_allclose(metrics(images), raw, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([metrics([image]) for image in images]), raw, atol=1e-5)


def stage_vit(folder, monkeypatch):
    """A CLIP of ViT-B/32's form, narrow; returns its weights."""
    from clip.model import CLIP
    from pyiqa.archs import clip_model

    torch.manual_seed(2)
    network = CLIP(32, 224, 1, 64, 32, 77, 49408, 64, 1, 1)
    path = folder / PYIQA_FILES["liqe"][1][0]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.jit.trace(network, (torch.zeros(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.int64))).save(str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(clip_model._MODELS, "ViT-B/32", f"https://example.org/{digest}/ViT-B-32.pt")
    return network.state_dict()


@pytest.mark.parametrize("name", ["liqe", "qualiclip"])
def test_newer_metrics_on_clip_read_the_folder_alone_and_write_nothing_into_it(name, tmp_path, images, monkeypatch):
    from realsr_hpc.quality.pyiqa_adapter import PyiqaMetrics, declare_torchvision_operators

    declare_torchvision_operators()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # no cache of the user's is asked
    folder = tmp_path / "weights"
    weights = (stage_vit if name == "liqe" else stage_clip)(folder, monkeypatch)

    def with_head(change):
        """Scores with a head that differs from the staged CLIP by `change`."""
        head = folder / PYIQA_FILES[name][0][0]
        head.parent.mkdir(parents=True, exist_ok=True)
        stored = {f"clip_model.{key}": value + change * value.float().abs().mean() for key, value in weights.items()}
        features = torch.randn(14, 1024, generator=torch.Generator().manual_seed(4))
        torch.save({"params": stored} if name == "liqe" else stored | {"prompts_features": features}, head)
        list_files(folder)
        return PyiqaMetrics([name], str(folder))

    metrics = with_head(0.0)
    before = sorted(folder.rglob("*"))
    scores = metrics(images)
    np.testing.assert_allclose(np.concatenate([metrics([image]) for image in images]), scores, atol=1e-5)
    assert sorted(folder.rglob("*")) == before and np.isfinite(scores).all()
    assert np.abs(with_head(0.5)(images) - scores).max() > 1e-4


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_metric_that_needs_a_gpu_says_so(staged):
    from realsr_hpc.quality.pyiqa_adapter import PyiqaMetrics

    with pytest.raises(ValueError, match="maclip.* only on a GPU"):
        PyiqaMetrics(["maclip"], str(staged))
