"""A run whose numbers contradict the method is stopped."""

import pytest

from realsr_hpc.config.schema import PrecisionConfig, RunConfig
from realsr_hpc.train.objective import InexactStep, check_exactness

CONFIG = RunConfig(name="t", task="grpo")
EXACT = {"grpo/ratio/mean": 1.0, "grpo/kl_reference/mean": 0.0, "rollout/mismatch_kl": 1e-9}


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_first_update_passes_and_one_without_its_numbers_does_not(name):
    check_exactness(CONFIG, 1, EXACT)
    with pytest.raises(KeyError, match=name):
        check_exactness(CONFIG, 1, {key: value for key, value in EXACT.items() if key != name})


def test_without_a_reference_there_is_no_kl_to_check():
    without = CONFIG.model_copy(update={"grpo": CONFIG.grpo.model_copy(update={"kl_beta": 0.0})})
    check_exactness(without, 1, {"grpo/ratio/mean": 1.0, "rollout/mismatch_kl": 0.0})


@pytest.mark.parametrize("broken", [1.001, float("nan")])
def test_the_first_update_of_any_step_starts_at_ratio_one(broken):
    with pytest.raises(InexactStep, match="mean ratio"):
        check_exactness(CONFIG, 7, EXACT | {"grpo/ratio/mean": broken})


def test_a_fresh_run_starts_at_its_reference():
    moved = EXACT | {"grpo/kl_reference/mean": 5e-4}
    check_exactness(CONFIG, 2, moved)
    check_exactness(CONFIG.model_copy(update={"precision": PrecisionConfig(params="bf16")}), 1, moved)
    with pytest.raises(InexactStep, match="reference"):
        check_exactness(CONFIG, 1, moved)


def test_products_in_fp8_may_differ_by_more_and_not_by_anything():
    config = CONFIG.model_copy(update={"precision": PrecisionConfig(fp8="tensorwise", fp8_backend="emulated")})
    check_exactness(config, 1, EXACT | {"grpo/kl_reference/mean": 5e-3})
    with pytest.raises(InexactStep, match="reference"):
        check_exactness(config, 1, EXACT | {"grpo/kl_reference/mean": 2e-2})


@pytest.mark.parametrize("drift", [2e-3, float("nan")])
def test_a_drifting_sampler_meets_the_gate(drift):
    with pytest.raises(InexactStep, match="mismatch_kl_gate=0.001"):
        check_exactness(CONFIG, 9, EXACT | {"rollout/mismatch_kl": drift})
