"""A run is opened for restoring: its checkpoint's weights, one process, exact products, and the options' settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from realsr_hpc.config.derived import widest_lookahead
from realsr_hpc.config.learning import RestoreConfig, RolloutConfig
from realsr_hpc.config.restoring import RESTORING
from realsr_hpc.config.schema import (
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
)
from realsr_hpc.model.policy import Policy
from realsr_hpc.parallel import backend
from realsr_hpc.parallel.process_groups import shutdown
from realsr_hpc.records import Case
from realsr_hpc.restore import BestOf, RestoreSettings, open_restorer, open_with_options, with_sampling
from realsr_hpc.rollout.decoder import Decoder
from realsr_hpc.rollout.policy_restorer import FIRST_ID, PolicyRestorer, sampling
from tests.random_run import LAYER, random_checkpoint, random_recipe

torch.set_num_threads(1)
Opened = tuple[RunConfig, Path, PolicyRestorer, Policy]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The recipe of a run, its checkpoint, the restorer opened from both, and the policy that the checkpoint holds."""
    folder = tmp_path_factory.mktemp("run")
    sections = {
        "model": ModelConfig(**{**LAYER, "num_heads": 4, "num_kv_heads": 2}),
        "rollout": RolloutConfig(cfg_scale=1.5, grammar="modality", max_new_tokens=600),
    }
    config = random_recipe(folder, **sections)
    trained = random_checkpoint(folder, config, 3, scale=1.1)
    elsewhere = config.model_copy(
        update={
            "parallel": ParallelConfig(tp=2),
            "precision": PrecisionConfig(fp8="tensorwise", fp8_backend="emulated", rollout_fp8=True),
            "model": config.model.model_copy(update={"weights": str(folder / "no longer there")}),
        }
    )
    path = folder / "checkpoints" / "step-000003"
    yield config, path, open_restorer(elsewhere, path), trained
    shutdown()


def test_the_checkpoints_weights_restore_in_one_process_and_with_exact_products(opened):
    """Start weights are not read and may be missing; without weights and checkpoint nothing can be opened."""
    config, _, restorer, trained = opened
    pairs = zip(restorer.policy.parameters(), trained.parameters(), strict=True)
    assert all(torch.equal(ours, saved) and not ours.requires_grad for ours, saved in pairs)
    assert restorer.policy.groups.tp_size == 1 and restorer.policy.rollout_fp8_layers == ()
    with pytest.raises(ValueError, match="model.weights is not set and there is no checkpoint"):
        open_restorer(config, None)


def test_options_become_settings(opened, monkeypatch):
    config, path, restorer, _ = opened
    given = RESTORING | {"candidates": "3", "choose": "mean", "overlap_px": "5", "colour": "adain"}
    monkeypatch.setattr(backend, "workers", lambda where: 2)
    monkeypatch.setattr(backend, "free_bytes", lambda where: 48 * restorer.image_bytes())
    config = with_sampling(config, {"temperature": "0.5", "colour": "adain"})
    assert config.restore.temperature == 0.5
    best, settings = open_with_options(given, config, path, str(path), upscale=2.0, steps=False)
    assert isinstance(best, BestOf) and best.count == 3 and best.expert is None and not best.restorer.with_steps
    assert "step-000003/sha256:" in settings.source and settings.source.endswith(" best of 3 by mean")
    assert "'temperature': 0.5" in settings.source
    # half of the free memory holds 24 images: 12 for each worker, which are 4 tiles of 3 candidates
    expected = RestoreSettings(settings.source, 32, 4, 2.0, 5, "adain", batch_size=4, workers=2)
    assert settings == expected
    monkeypatch.setattr(backend, "free_bytes", lambda where: 0)
    assert open_with_options(given, config, path)[1].batch_size == 1
    monkeypatch.setattr(backend, "free_bytes", lambda where: 1 << 60)
    assert open_with_options(given, config, path)[1].batch_size == backend.rows_at_once(torch.device("cpu")) // 3
    plain, settings = open_with_options(RESTORING, config, path, batch_size=7)
    assert isinstance(plain, PolicyRestorer) and plain.with_steps and settings.batch_size == 7
    assert settings.overlap_px == 4 and "best of" not in settings.source


def test_each_candidate_of_each_image_draws_by_a_number_of_its_own(opened):
    _, _, restorer, _ = opened
    generate, numbers = restorer.sampler.generate, []

    def told(prompts, count, ids):
        numbers.extend(ids)
        return generate(prompts, count, ids)

    restorer.sampler.generate = told
    lqs = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    cases = [Case("a", lqs[0], index=5), Case("b", lqs[1], index=6)]
    restorer.with_steps = False
    found = restorer.candidates(cases, 2)
    assert numbers == [FIRST_ID + number for number in (10, 11, 12, 13)]
    assert [len(candidates) for candidates in found] == [2, 2]
    results = [result for candidates in found for result in candidates]
    assert len({result.image.tobytes() for result in results}) == 4
    assert all(result.trace.well_formed and result.images[:2] == (None, None) for result in results)
    restorer.with_steps = True
    [alone] = restorer([cases[0]])
    assert [image.shape[0] for image in alone.images] == list(restorer.tokens.codec.config.image_sizes_px)


def test_the_memory_of_an_image_is_that_of_its_keys_and_values(opened):
    config, _, restorer, _ = opened
    prompts = restorer.tokens.prompts(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    room = config.rollout.max_new_tokens + widest_lookahead(config.rollout)
    cache = Decoder(restorer.policy).new_cache(prompts, 1, room, True)
    own = sum(stream.keys.nbytes + stream.values.nbytes for stream in cache.streams)
    prefix = own // 2 // room * prompts.shape[1]  # of the conditional stream alone
    assert len(cache.streams) == 2 and restorer.image_bytes() == own + prefix


def test_restoring_samples_as_its_section_says():
    """All truncation except the adaptive one comes from the section; guidance is that of rollouts unless it is set."""
    config = RunConfig(
        name="t", task="grpo", rollout=RolloutConfig(cfg_scale=3.0, image_adaptive_top_k=True, temperature=1.3)
    )
    chosen = sampling(config)
    assert (chosen.cfg_scale, chosen.image_adaptive_top_k) == (3.0, False)
    assert chosen.temperature == config.restore.temperature
    assert sampling(config.model_copy(update={"restore": RestoreConfig(cfg_scale=2.0)})).cfg_scale == 2.0
    assert replace(RestoreSettings("x", 32, 4), upscale=2.0).factor == 2.0
