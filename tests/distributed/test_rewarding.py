"""The ranks of a replica share its rollouts' decoding and scoring: each rollout once, the same bits on every layout."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.distributed.launcher import run_ranks
from tests.judge import judge

GROUPS = (5, 3, 2)
"""Rollouts of each prompt: 10, which 4 ranks cannot share evenly."""
BREAKS = (1, 2)
"""Prompt and rollout on which one term breaks."""


def scored(layout: dict[str, int], batch_size: int, url: str) -> dict[str, Any]:
    """Rollouts written by hand, some cut off, scored by real terms, one that counts and breaks once, and a judge."""
    import torch

    from realsr_hpc.config.learning import RewardsConfig, RewardTerm
    from realsr_hpc.rewards.mixture import RewardMixture
    from realsr_hpc.train.rewarding import rewarded
    from tests.steps import Images, Told, number_of, small_parts

    calls: list[tuple[int, int]] = []

    def counting(candidates: Any) -> list[float]:
        seen = [(number_of(item), item.member) for item in candidates]
        if BREAKS in seen:
            raise ValueError("this rollout breaks the term")
        calls.extend(seen)
        return [0.5 if item.image is None else float(item.image.mean()) / 255 for item in candidates]

    parts = small_parts(counting, parallel=layout, model={"num_layers": 4})
    config = RewardsConfig(
        terms={
            "told": RewardTerm(kind="format"),
            "niqe": RewardTerm(kind="generation", options={"expert": "niqe"}),
            "ranker": RewardTerm(kind="generation"),
            "judge": RewardTerm(kind="format", options={"expert": "http", "url": url, "retries": 0}),
            "fidelity": RewardTerm(kind="fidelity", weight=1.0, final_weight=3.0, ramp_steps=(1, 3)),
        },
        batch_size=batch_size,
        offload=batch_size > 1,
    )
    mixture, decoded, decode = RewardMixture(config), [0], parts.tokens.decode
    mixture.rewards["told"] = Told(counting)
    mixture.at_step(2)

    def counted(grids: Any) -> Any:
        decoded[0] += len(grids)
        return decode(grids)

    object.__setattr__(parts, "rewards", mixture)
    object.__setattr__(parts, "config", parts.config.model_copy(update={"rewards": config}))
    object.__setattr__(parts.tokens, "decode", counted)
    torch.manual_seed(3)
    groups = [group_of(parts.tokens.codec, size, number) for number, size in enumerate(GROUPS)]
    result = rewarded(parts, Images([0, 1, 2]).next(), groups)
    return {
        "calls": calls,
        "decoded": decoded[0],
        "totals": [group.rewards.total.numpy() for group in result],
        "terms": [{name: column.numpy() for name, column in group.rewards.breakdown.items()} for group in result],
        "advantages": [group.advantages.numpy() for group in result if group.advantages is not None],
        "failures": [group.rewards.failures for group in result],
        "weights": result[0].rewards.weights,
        "images": [group.images for group in result],
    }


def group_of(codec: Any, size: int, number: int) -> Any:
    """Traces of random codes; the second of each group is cut off in the middle."""
    import torch

    from realsr_hpc.records import DegradationLabel, RolloutGroup
    from realsr_hpc.vlcot.sequence import Trace

    label = DegradationLabel("light", "downsample", "medium", "light", "upsample")
    responses = []
    for member in range(size):
        rng = np.random.default_rng(100 * number + member)
        rough, middle, final = (rng.integers(0, 64, (side, side)) for side in (2, 4, 6))
        tokens = codec.build(Trace(label.phrase, ("a", "b", "c"), (rough, middle, final)))
        responses.append(tokens[: len(tokens) // 2] if member == 1 else tokens)
    longest = max(map(len, responses))
    padded = torch.tensor([row + [codec.vocabulary.pad] * (longest - len(row)) for row in responses])
    nothing = torch.zeros(padded.shape)
    lengths = torch.tensor([len(row) for row in responses])
    return RolloutGroup(torch.tensor([1]), padded, lengths, nothing, nothing.bool(), nothing.long())


def answered(rollouts: list[dict[str, Any]]) -> tuple[int, bytes]:
    """A score of every rollout's own; the judge fails on one."""
    seen = [(int(item["key"]), item["member"]) for item in rollouts]
    if BREAKS in seen:
        return 500, b"this rollout breaks the judge"
    return 200, json.dumps({"scores": [(0.1 + 3 * number + member) / 10 for number, member in seen]}).encode()


@pytest.mark.parametrize(
    ("layout", "batch_size"),
    [({"tp": 2, "pp": 2}, 1), ({"pp": 4}, 3)],
    ids=["TP 2 x PP 2", "PP 4, batches, offloaded"],
)
def test_each_rollout_is_decoded_and_scored_once_and_all_ranks_know(layout: dict[str, int], batch_size: int) -> None:
    with judge(answered) as (url, asked):
        [alone] = run_ranks(1, scored, {}, batch_size, url)
        asked_alone = list(asked)
        ranks = run_ranks(4, scored, layout, batch_size, url)
    again = 0 if batch_size == 1 else batch_size  # of a batch that is refused each rollout is asked for by itself
    assert len(asked_alone) == sum(GROUPS) + again and sorted(asked[len(asked_alone) :]) == sorted(asked_alone)
    assert [failed["judge"] for failed in alone["failures"]] == [0, 1, 0]
    rollouts = [(prompt, member) for prompt, size in enumerate(GROUPS) for member in range(size)]
    called = sorted(call for rank in ranks for call in rank["calls"])
    assert called == sorted(alone["calls"]) == [rollout for rollout in rollouts if rollout != BREAKS]
    assert sum(rank["decoded"] for rank in ranks) == alone["decoded"] == len(rollouts)
    if batch_size == 1:
        assert sorted(rank["decoded"] for rank in ranks) == [2, 2, 3, 3]
    assert [failed["told"] for failed in alone["failures"]] == [0, 1, 0]
    assert alone["weights"]["fidelity"] == 2.0
    assert alone["images"][0][1] is None and alone["terms"][0]["ranker"][1] == 0.0
    assert len({float(value) for total in alone["totals"] for value in total}) > 5
    for rank in ranks:
        for name in ("totals", "terms", "advantages", "failures", "weights", "images"):
            np.testing.assert_equal(rank[name], alone[name])
