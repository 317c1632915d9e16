"""The planner's figures of the rewards' networks against what they allocate and compute; what a plan shows of them."""

from __future__ import annotations

import importlib.util

import pytest

from realsr_hpc.config.load import compose_one
from realsr_hpc.launch.console import plan_text
from realsr_hpc.plan import plan
from realsr_hpc.plan.experts import NIQE, PSNR, PYIQA, RANKER, SSIM, rewards_of

TERM = "rewards.terms.generation.options"
OURS = {
    "ranker": (RANKER, "generation", {"stripe_guard": False}),
    "niqe": (NIQE, "generation", {"expert": "niqe", "stripe_guard": False}),
    "psnr": (PSNR, "fidelity", {}),
    "ssim": (SSIM, "fidelity", {"metric": "ssim", "reference": "gt"}),
}


@pytest.mark.parametrize("name", OURS)
def test_an_expert_of_ours_is_as_large_as_planned(name):
    from torch.utils.flop_counter import FlopCounterMode

    from realsr_hpc.config.learning import RewardTerm
    from realsr_hpc.rewards.mixture import build_reward
    from tools.benchmarks._allocations import Allocations
    from tools.benchmarks.rewards import some_candidates

    expert, kind, options = OURS[name]
    with Allocations() as built:
        reward = build_reward(name, RewardTerm(kind=kind, options=options))
    assert expert.weight_bytes == pytest.approx(built.rise, rel=0.1, abs=50_000)
    for side in (128, 256):
        batch = some_candidates(2, side)
        reward.compute(batch)
        with Allocations() as seen:
            reward.compute(batch)
        with FlopCounterMode(display=False) as counted:
            reward.compute(batch)
        upper = 1.9 if name == "psnr" else 1.1  # of a batch less than of one image is allocated together
        assert seen.peak / 1.1 < 2 * expert.bytes_at_work(side**2) < upper * seen.peak
        if expert.px_flops > 100:  # the others compute next to nothing
            assert 2 * expert.flops(side**2) == pytest.approx(counted.get_total_flops(), rel=0.1)


@pytest.mark.skipif(importlib.util.find_spec("pyiqa") is None, reason="needs the extra `iqa` (pyiqa)")
@pytest.mark.filterwarnings("ignore")
def test_musiq_is_as_large_as_planned():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from realsr_hpc.quality.pyiqa_adapter import declare_torchvision_operators
    from tools.benchmarks._allocations import Allocations

    declare_torchvision_operators()
    from pyiqa.archs.musiq_arch import MUSIQ

    network, expert = MUSIQ(pretrained=False).eval(), PYIQA["musiq"]
    image = torch.rand(1, 3, 160, 160)
    with torch.no_grad(), FlopCounterMode(display=False) as counted, Allocations() as seen:
        network(image)
    sizes = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    assert expert.weight_bytes == pytest.approx(sizes, rel=0.05)
    assert expert.flops(160**2) == pytest.approx(counted.get_total_flops(), rel=0.1)
    assert expert.bytes_at_work(160**2) == pytest.approx(seen.peak, rel=0.15)


def test_every_reward_of_the_papers_is_counted_and_shown():
    recipe = compose_one(["recipe=grpo_7b_lora", "rewards=paper"])
    experts = rewards_of(recipe)
    assert not experts.unknown and len(experts.terms["generation"]) == 5 and experts.weight_bytes > 1e9
    shown = plan(recipe)
    assert shown.fits and shown.memory.resident["rewards' networks"] == pytest.approx(experts.weight_bytes / 2**30)
    assert shown.rewards_s > 1 and shown.step_s > shown.rollout_s + shown.training_s + shown.rewards_s - 1e-9
    assert f"{shown.rewards_s:.1f} s rewards" in plan_text(recipe) and "MiB of networks on the GPU" in plan_text(recipe)


def test_offloaded_networks_take_turns_and_wait_in_host_memory():
    words = ["recipe=grpo_7b_lora", "rewards=paper", "+rewards.terms.near={kind: fidelity, options: {metric: pyiqa, "]
    words[2] += "metrics: [topiq_fr], reference: gt}}"
    kept, offloaded, on_host = (
        plan(compose_one([*words, more])).memory
        for more in ("rewards.offload=false", "rewards.offload=true", "rewards.device=cpu")
    )
    weights = kept.resident["rewards' networks"]
    assert "rewards' networks" not in offloaded.resident and "rewards' networks" not in on_host.resident
    assert kept.host == 0 and offloaded.host == on_host.host == pytest.approx(weights)
    assert 0.5 * weights < offloaded.phases["rewards"]["networks"] < weights and not on_host.phases["rewards"]
    assert "networks" not in kept.phases["rewards"]


def test_time_and_memory_follow_batches_and_ranks():
    words = ["recipe=grpo_7b", "rewards=paper", "parallel.pp=1", "parallel.sequence_parallel=false", "cluster.nodes=1"]
    whole, tp4 = (plan(compose_one([*words, f"parallel.tp={tp}", f"cluster.tasks_per_node={tp}"])) for tp in (1, 4))
    assert whole.rewards_s == pytest.approx(4 * tp4.rewards_s)
    batched = plan(compose_one([*words, "parallel.tp=4", "cluster.tasks_per_node=4", "rewards.batch_size=32"]))
    assert batched.rewards_s == pytest.approx(2 * tp4.rewards_s)  # two batches for four ranks
    work = [one.memory.phases["rewards"]["networks at work"] for one in (tp4, batched)]
    assert work[1] == pytest.approx(32 * work[0])


def test_what_is_not_counted_is_said():
    other = plan_text(compose_one(["recipe=grpo_7b_lora", f"{TERM}.expert=pyiqa", f"+{TERM}.metrics=[qalign]"]))
    assert "NOT counted, size unknown: qalign" in " ".join(other.split())
    judged = compose_one(["recipe=grpo_7b_lora", f"{TERM}={{expert: http, url: 'http://[::1]:9/x'}}"])
    assert "another process computes generation" in " ".join(plan_text(judged).split())
    assert plan(judged).rewards_s < plan(compose_one(["recipe=grpo_7b_lora"])).rewards_s
