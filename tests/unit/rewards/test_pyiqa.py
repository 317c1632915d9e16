"""pyiqa itself behind the adapter: what it computes without a download, and what it must not read."""

import hashlib
import importlib.util

import numpy as np
import pytest
import scipy.io
import torch

from realsr_hpc.config.reward_options import FidelityOptions, GenerationOptions
from realsr_hpc.quality.ladder import blur
from realsr_hpc.quality.niqe import NIQEModel, fit_pristine, luminance, niqe
from realsr_hpc.quality.psnr_ssim import psnr_y, ssim_y
from realsr_hpc.rewards.fidelity import FidelityReward
from realsr_hpc.rewards.generation import GenerationReward

from .conftest import make_candidate

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("pyiqa") is None, reason="needs the extra `iqa` (pyiqa)"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def pair():
    """A truth of 384 px with a flat part, and a blurred version."""
    from skimage import data

    truth = np.ascontiguousarray(data.astronaut()[:384, :384])
    truth[:120, :120] = 200
    return blur(truth, 0.4, np.random.default_rng(0)), truth


@pytest.fixture(scope="module")
def staged(pair, tmp_path_factory):
    """A weights folder with a NIQE model that we fitted, in pyiqa's format."""
    folder = tmp_path_factory.mktemp("weights")
    path = folder / "hub/pyiqa/niqe_modelparameters.mat"
    path.parent.mkdir(parents=True)
    model = fit_pristine([luminance(pair[1][None])[0]], 96, 48, sharp_share=0.2)
    scipy.io.savemat(path, {"mu_prisparam": model.mean[None], "cov_prisparam": model.covariance})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  hub/pyiqa/niqe_modelparameters.mat\n")
    return folder, NIQEModel(model.mean, model.covariance, 96, 96)


def test_our_psnr_ssim_and_niqe_are_pyiqas(pair, staged):
    """Luma as in MATLAB (`color_space="ycbcr"`), which pyiqa rounds to 8 bits; its `psnry` takes another luma."""
    from realsr_hpc.quality.pyiqa_scores import PyiqaScore

    soft, truth = pair
    folder, model = staged
    assert PyiqaScore("niqe", str(folder))(soft) == pytest.approx(niqe([soft], model)[0], rel=2e-3)
    import pyiqa

    planes = [torch.from_numpy(x.copy()).permute(2, 0, 1)[None].float() / 255 for x in pair]
    of_pyiqa = {
        name: float(pyiqa.create_metric(name, test_y_channel=True, color_space="ycbcr")(*planes))
        for name in ("psnr", "ssim")
    }
    assert psnr_y(soft[None], truth[None])[0] == pytest.approx(of_pyiqa["psnr"], abs=0.01)
    assert ssim_y(soft[None], truth[None])[0] == pytest.approx(of_pyiqa["ssim"], abs=2e-3)


def test_rewards_take_its_range_and_direction(pair, staged):
    soft, truth = pair
    items = [make_candidate(image, gt=truth) for image in (truth, soft)]
    options = GenerationOptions(
        expert="pyiqa", metrics=["niqe", "piqe"], weights_dir=str(staged[0]), stripe_guard=False
    )
    scores, broken = GenerationReward(options).score_counted(items)
    assert 1 > scores[0] > scores[1] > 0 and not broken.any()
    options = FidelityOptions(metric="pyiqa", metrics=["ms_ssim", "gmsd"], reference="gt")
    scores, broken = FidelityReward(options).score_counted(items)
    assert scores[0] == pytest.approx(1.0, abs=1e-4) and 0 < scores[1] < 1 and not broken.any()


def test_a_metric_without_its_weights_is_named_and_nothing_is_fetched(staged):
    from realsr_hpc.quality.pyiqa_scores import open_scores

    there, missing = open_scores(["niqe", "musiq", "clipiqa", "lpips", "topiq_nr"], str(staged[0]))
    assert [score.name for score in there] == ["niqe"]
    for name, said in {"musiq": "musiq_koniq_ckpt-e95806b9.pth", "clipiqa": "RN50.pt", "lpips": "alexnet",
                       "topiq_nr": "resnet50.a1_in1k"}.items():  # fmt: skip
        assert said in missing[name] and str(staged[0]) in missing[name] or "weights folder" in missing[name]


def test_only_listed_files_are_read(staged):
    from realsr_hpc.quality.pyiqa_scores import PyiqaScore

    folder, _ = staged
    stranger = folder / "hub/pyiqa/musiq_koniq_ckpt-e95806b9.pth"
    stranger.write_bytes(b"a pickle")
    with pytest.raises(ValueError, match="musiq_koniq_ckpt-e95806b9.pth is not listed in SHA256SUMS"):
        PyiqaScore("musiq", str(folder))
    stranger.unlink()
    listing = (folder / "SHA256SUMS").read_text()
    (folder / "SHA256SUMS").write_text(listing.replace(listing[:8], "00000000"))
    with pytest.raises(ValueError, match="has SHA-256"):
        PyiqaScore("niqe", str(folder))
    (folder / "SHA256SUMS").write_text(listing)
