"""The planner's memory against what small runs allocate, byte by byte (tools/benchmarks/memory.py)."""

from __future__ import annotations

import pytest

from tests.distributed.launcher import run_ranks

Terms = dict[str, tuple[float, float]]
"""Bytes planned and measured, by term."""
CUT = ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.recompute=selective", "cluster.tasks_per_node=2"]
STAGES = ["parallel.pp=2", "parallel.recompute=full", "cluster.tasks_per_node=2"]


def terms(variants: list[str], more: list[str]) -> list[Terms]:
    """What one rank sees of each variant."""
    from realsr_hpc.config.load import compose_one
    from tools.benchmarks.memory import VARIANTS, compare

    seen = [compare(compose_one([*VARIANTS[variant], *more])) for variant in variants]
    return [{name: (term.planned, term.measured) for name, term in one.items()} for one in seen]


def test_each_term_is_what_one_process_allocates() -> None:
    variants = {"GRPO, bf16": 11, "GRPO, guided, adaptive top-k": 10}
    variants |= {"SFT, all recomputed": 6}
    [seen] = run_ranks(1, terms, list(variants), [])
    for (variant, count), one in zip(variants.items(), seen, strict=True):
        assert len(one) == count
        for name, (planned, measured) in one.items():
            assert planned == pytest.approx(measured, rel=0.1), (variant, name)


@pytest.mark.parametrize(
    "variants",
    [
        {"GRPO, LoRA, bf16": 11, "GRPO, LoRA, all recomputed, bf16": 11},
        {"GRPO, LoRA, guided, bf16": 11, "SFT, LoRA, bf16": 6},
    ],
    ids=["GRPO", "guided and SFT"],
)
def test_adapters_are_within_5_percent(variants: dict[str, int]) -> None:
    [seen] = run_ranks(1, terms, list(variants), [])
    for (variant, count), one in zip(variants.items(), seen, strict=True):
        assert len(one) == count
        for name, (planned, measured) in one.items():
            assert planned == pytest.approx(measured, rel=0.05), (variant, name)


@pytest.mark.parametrize(("layout", "count"), [(CUT, 11), (STAGES, 8)], ids=["TP 2", "PP 2"])
def test_the_plan_is_that_of_the_fullest_of_two_ranks(layout: list[str], count: int) -> None:
    ranks = [seen[0] for seen in run_ranks(2, terms, ["GRPO, float32"], layout)]
    assert len(ranks[0]) == count
    for name, (planned, _) in ranks[0].items():
        # gloo's threads release what was sent a moment later than it was last needed
        assert planned == pytest.approx(max(rank[name][1] for rank in ranks), rel=0.15), name
