"""The plan's arithmetic against published and hand-counted numbers."""

from __future__ import annotations

import math

import pytest

from realsr_hpc.config.checks import faults
from realsr_hpc.config.load import compose
from realsr_hpc.plan import knobs, parameter_count, plan, way_to_fit
from realsr_hpc.plan.memory import kv_cache_bytes
from realsr_hpc.plan.seconds import bubble
from realsr_hpc.plan.sizes import sequence_tokens

SMALL_GPU = ["recipe=grpo_7b", "cluster.gpu_memory_gib=24"]


def test_parameter_counts_are_the_published_ones():
    assert parameter_count(compose(["recipe=grpo_7b"])) == 7_013_158_912
    assert parameter_count(compose(["recipe=grpo_7b_paper"])) == 7_080_267_776


def test_a_plan_has_the_steps_of_any_task():
    steps = {
        "grpo_tiny": "grpo.num_steps",
        "sft_tiny": "sft.num_steps",
        "tokenizer_tiny": "tokenizer_training.num_steps",
    }
    assert [plan(compose([f"recipe={recipe}", f"{key}=77"])).steps for recipe, key in steps.items()] == [77, 77, 77]


def test_memory_of_weights_follows_from_their_number():
    config = compose(["recipe=grpo_7b", "parallel.tp=8", "parallel.pp=1"])
    estimate = plan(config)
    # one stage holds all: 7.01e9 parameters over 8 ranks, 2 bytes each (norms are not cut: below a thousandth)
    assert estimate.memory_gib["weights"] == pytest.approx(7_013_158_912 / 8 * 2 / 2**30, rel=1e-3)
    assert estimate.memory_gib["gradients (fp32)"] == pytest.approx(2 * estimate.memory_gib["weights"])
    assert estimate.memory_gib["optimizer"] == pytest.approx(6 * estimate.memory_gib["weights"])


def test_the_peak_is_what_stays_and_the_largest_phase_alone():
    estimate = plan(compose(["recipe=grpo_7b"]))
    phases = {name: sum(terms.values()) for name, terms in estimate.memory.phases.items()}
    assert set(phases) == {"rollout", "images", "rewards", "score", "update"}
    assert estimate.total_gib == pytest.approx(sum(estimate.memory.resident.values()) + max(phases.values()))
    assert estimate.total_gib == pytest.approx(sum(estimate.memory_gib.values()))


def test_optimizer_options_cost_what_they_hold():
    plain, lean, offloaded = (
        plan(compose(["recipe=grpo_7b", "cluster.nodes=4", *overrides]))
        for overrides in ([], ["optim.main_params=bf16"], ["optim.cpu_offload=true"])
    )
    weights = plain.memory_gib["weights"]
    one = plan(compose(["recipe=grpo_7b"]))
    assert plain.dp == 2 * one.dp
    assert plain.memory_gib["optimizer"] == pytest.approx(one.memory_gib["optimizer"] / 2)
    # bytes per parameter beside the 2 of its weight, over two data-parallel ranks
    assert plain.memory_gib["optimizer"] == pytest.approx(12 / 2 / 2 * weights)
    assert lean.memory_gib["optimizer"] == pytest.approx(6 / 2 / 2 * weights)
    assert offloaded.memory_gib["optimizer"] == pytest.approx(4 / 2 / 2 * weights)
    assert (plain.memory.host, offloaded.memory.host) == (0.0, pytest.approx(16 / 2 / 2 * weights))


def test_an_offloaded_reference_is_there_only_while_it_scores():
    kept, offloaded, none = (
        plan(compose(["recipe=grpo_7b", *overrides])).memory
        for overrides in ([], ["parallel.reference_offload=true"], ["grpo.kl_beta=0"])
    )
    weights = kept.resident["weights"]
    assert kept.resident["reference"] == offloaded.phases["score"]["reference"] == weights
    assert offloaded.resident["reference"] == 0.0 and "reference" not in kept.phases["score"]
    assert offloaded.host == pytest.approx(weights)
    assert none.resident["reference"] == 0.0 and "reference" not in none.phases["score"]


def test_a_group_shares_its_prompt_in_the_cache():
    whole = ["parallel.tp=1", "parallel.pp=1", "parallel.sequence_parallel=false", "cluster.nodes=1"]
    config = compose(["recipe=grpo_7b", *whole, "rollout.batch_size=8", "grpo.group_size=8", "grpo.prompts_per_step=4"])
    prompt, _ = sequence_tokens(config)
    per_token = 2 * 4096 * 2 * 32  # k and v, hidden size, bf16, layers
    own = config.rollout.max_new_tokens + 32  # the widest look-ahead behind the last token
    assert kv_cache_bytes(config) == per_token * (prompt + 8 * own)


def test_looking_ahead_takes_less_time_the_fewer_rollouts_there_are():
    def rollout_s(*overrides: str) -> float:
        return plan(compose(["recipe=grpo_7b", *overrides])).rollout_s

    gains = []
    for rows in (8, 64):
        at_once = f"rollout.batch_size={rows}"
        gains.append(rollout_s(at_once, "rollout.lookahead=1") / rollout_s(at_once))
    assert gains[0] > gains[1] > 1
    assert rollout_s("rollout.lookahead=64") > rollout_s()  # limited by arithmetic


@pytest.mark.parametrize(("pp", "vpp", "microbatches", "share"), [(1, 1, 8, 0.0), (4, 1, 4, 3 / 7), (4, 2, 8, 3 / 19)])
def test_bubble_is_that_of_interleaved_1f1b(pp, vpp, microbatches, share):
    assert bubble(pp, vpp, microbatches) == pytest.approx(share)


def test_recomputation_trades_memory_for_time():
    plans = [plan(compose(["recipe=grpo_7b", f"parallel.recompute={kind}"])) for kind in ("none", "selective", "full")]
    activations = [estimate.memory.phases["update"]["activations"] for estimate in plans]
    assert activations == sorted(activations, reverse=True)
    assert activations[2] < activations[0] / 4
    seconds = [estimate.training_s for estimate in plans]
    assert seconds == sorted(seconds)
    # forward, backward (twice a forward) and the reference's forward; full recomputation adds a forward to the four
    assert seconds[2] == pytest.approx(seconds[0] * 5 / 4)


def test_traffic_by_hand():
    """One layer of 4096 in bf16: two sums forward and two backward, a ring sends 2 (tp - 1) / tp of each."""
    whole = ["recipe=sft_7b", "parallel.tp=8", "parallel.pp=1", "parallel.sequence_parallel=false"]
    sent = plan(compose([*whole, "parallel.recompute=none", "sft.batch_size=1", "sft.packing=false"])).traffic
    tokens = math.ceil(sum(sequence_tokens(compose(["recipe=sft_7b"]))) / 16) * 16
    assert sent.tp == pytest.approx(32 * 4 * 2 * 7 / 8 * tokens * 4096 * 2 / 1e9)
    assert (sent.pp, sent.dp) == (0.0, 0.0)
    two = plan(compose(["recipe=sft_7b", "cluster.nodes=4"]))
    # gradients in float32 scattered, weights in bf16 gathered: half of each on two ranks
    assert two.traffic.dp == pytest.approx(two.memory.resident["weights"] * 2**30 * (1 + 2) / 2 / 1e9)
    assert two.traffic.pp > 0.0


def test_a_gpu_too_small_is_said():
    assert plan(compose(["recipe=grpo_7b"])).fits is True
    assert plan(compose(SMALL_GPU)).fits is False
    assert plan(compose(["recipe=grpo_7b", "cluster.gpu_memory_gib=null"])).fits is None
    assert way_to_fit(compose(["recipe=grpo_7b"])) == []


def test_knobs_keep_the_recipe_sound_and_lower_its_peak():
    config = compose([*SMALL_GPU, "parallel.microbatch_tokens=16384"])
    found = knobs(config)
    wanted = {"parallel.recompute=full", "parallel.microbatch_tokens=4096", "optim.main_params=bf16"}
    assert wanted <= {part for knob in found for part in knob.overrides}
    for knob in found:
        assert faults(knob.config) == []
        assert knob.plan.total_gib < plan(config).total_gib


def test_the_way_to_fit_fits_when_typed_as_it_is_printed():
    way = way_to_fit(compose(SMALL_GPU))
    typed = [override for knob in way for override in knob.overrides]
    assert plan(compose([*SMALL_GPU, *typed])).fits is True
    assert plan(compose([*SMALL_GPU, *typed[:-1]])).fits is False
    assert way_to_fit(compose(["recipe=grpo_7b", "cluster=local_gpus", "cluster.gpu_memory_gib=1"])) == []
