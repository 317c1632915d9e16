"""The plan's arithmetic against published and hand-counted numbers."""

from __future__ import annotations

import pytest

from realsr_hpc.config.load import compose
from realsr_hpc.plan import parameter_count, plan
from realsr_hpc.plan.estimate import bubble, kv_cache_bytes, sequence_tokens


def test_parameter_counts_are_the_published_ones():
    assert parameter_count(compose(["recipe=grpo_7b"])) == 7_013_158_912
    assert parameter_count(compose(["recipe=grpo_7b_paper"])) == 7_080_267_776


def test_memory_of_weights_follows_from_their_number():
    config = compose(["recipe=grpo_7b", "parallel.tp=8", "parallel.pp=1"])
    estimate = plan(config)
    # one stage holds all: 7.01e9 parameters over 8 ranks, 2 bytes each (norms are not cut: below a thousandth)
    assert estimate.memory_gib["weights"] == pytest.approx(7_013_158_912 / 8 * 2 / 2**30, rel=1e-3)
    assert estimate.memory_gib["gradients (fp32)"] == pytest.approx(2 * estimate.memory_gib["weights"])
    assert estimate.memory_gib["optimizer"] == pytest.approx(6 * estimate.memory_gib["weights"])
    assert estimate.total_gib == pytest.approx(sum(estimate.memory_gib.values()))


def test_the_optimizer_is_shared_by_data_parallel_ranks():
    one = plan(compose(["recipe=grpo_7b"]))
    two = plan(compose(["recipe=grpo_7b", "cluster.nodes=4"]))
    assert two.dp == 2 * one.dp
    assert two.memory_gib["optimizer"] == pytest.approx(one.memory_gib["optimizer"] / 2)


def test_the_reference_costs_memory_only_where_it_is_used_and_kept():
    kept = plan(compose(["recipe=grpo_7b"])).memory_gib
    assert kept["reference"] == kept["weights"]
    for override in ("grpo.kl_beta=0", "parallel.reference_offload=true"):
        assert plan(compose(["recipe=grpo_7b", override])).memory_gib["reference"] == 0


def test_a_group_shares_its_prompt_in_the_cache():
    whole = ["parallel.tp=1", "parallel.pp=1", "parallel.sequence_parallel=false"]
    config = compose(["recipe=grpo_7b", *whole, "rollout.batch_size=8", "grpo.group_size=8"])
    prompt, response = sequence_tokens(config)
    per_token = 2 * 4096 * 2 * 32  # k and v, hidden size, bf16, layers
    assert kv_cache_bytes(config) == per_token * (prompt + 8 * response)


@pytest.mark.parametrize(("pp", "vpp", "microbatches", "share"), [(1, 1, 8, 0.0), (4, 1, 4, 3 / 7), (4, 2, 8, 3 / 19)])
def test_bubble_is_that_of_interleaved_1f1b(pp, vpp, microbatches, share):
    assert bubble(pp, vpp, microbatches) == pytest.approx(share)


def test_recomputation_trades_memory_for_time():
    none, full = (plan(compose(["recipe=grpo_7b", f"parallel.recompute={kind}"])) for kind in ("none", "full"))
    assert full.memory_gib["activations"] < none.memory_gib["activations"] / 2
    assert full.training_s > none.training_s


def test_a_gpu_too_small_is_said():
    assert plan(compose(["recipe=grpo_7b"])).fits is True
    assert plan(compose(["recipe=grpo_7b", "cluster.gpu_memory_gib=16"])).fits is False
    assert plan(compose(["recipe=grpo_7b", "cluster.gpu_memory_gib=null"])).fits is None
