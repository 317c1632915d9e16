"""Sampler against scorer, and every layout against one process: tokens, log-probabilities, loss and gradient norm."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.launcher import run_ranks

TOLERANCE = 1e-5
# One process decodes one by one, the layouts look ahead.
PLAIN = {"grammar": "constrained", "max_new_tokens": 200, "lookahead": 1}
TRUNCATED = PLAIN | {
    "cfg_scale": 0.8, "temperature": 0.9, "text_temperature": 1.1, "image_adaptive_top_k": True, "text_top_k": 50,
}  # fmt: skip
MODALITY = {"grammar": "modality", "max_new_tokens": 60, "top_p": 0.9, "lookahead": 1}


def one_update(
    parallel: dict[str, Any],
    rollout: dict[str, Any],
    microbatch_tokens: int = 900,
    adapted: bool = False,
    swin_norm: bool = False,
) -> dict[str, Any]:
    """A whole step of two prompts x four rollouts; numbers of this rank."""
    import torch

    from realsr_hpc.model import whole_adapters
    from realsr_hpc.parallel.layout import microbatch_multiple
    from realsr_hpc.parallel.reduce import broadcast_from_last_stage, reduce_floats
    from realsr_hpc.train.grpo import step
    from realsr_hpc.train.scoring import logprobs_of
    from realsr_hpc.train.updates import grpo_batches
    from tests.distributed.worlds import DrawnAdapters
    from tests.steps import Images, small_parts

    torch.set_num_threads(1)
    credit = "part" if "text_top_k" in rollout else "rollout"  # advantages of tokens, or of rollouts
    parts = small_parts(
        vlcot={"max_text_tokens": 5},
        model={"num_layers": 4, "hidden_size": 64, "num_kv_heads": 2, "ffn_hidden_size": 96, "swin_norm": swin_norm}
        | ({"lora": {"rank": 3, "alpha": 6.0}} if adapted else {}),
        parallel={"distributed_optimizer": False, "microbatch_tokens": microbatch_tokens} | parallel,
        rollout=rollout,
        grpo={"aggregation": "sequence", "kl_beta": 0.0 if adapted else 1e-9, "credit": credit},
        optim={"lr": 1e-30} if adapted else {},
    )
    parts.rewards.rewards["told"].judges = ("degradation", "final_image")
    groups, reference = parts.groups, parts.reference
    if adapted:  # as if trained: no reference has its weights, so the policy that does not move is asked again
        whole_adapters.load(parts.policy, DrawnAdapters(parts.policy))
        reference = parts.policy
    assert reference is not None
    share = 2 // groups.dp_size
    mine = range(groups.dp_rank * share, (groups.dp_rank + 1) * share)
    report = step(parts, Images(mine), 1)

    # the reference has the weights that the rollouts were sampled from
    [batch] = grpo_batches(parts, report.groups, parts.sampler.masks)
    microbatches, masks = parts.group_microbatches(batch.groups), parts.sampler.masks.allowed
    alone = logprobs_of(reference, microbatches, masks)
    together = logprobs_of(
        reference, microbatches, masks, at_once=3, multiple=microbatch_multiple(parts.config.parallel)
    )
    sampled = [m.loss.rollouts.rollout_logprobs if m.loss and m.loss.rollouts else None for m in microbatches]
    pairs = [(a, b) for scored in (alone, together) for a, b in zip(sampled, scored, strict=True) if b is not None]
    worst = max((float((a - b).abs().max()) for a, b in pairs), default=0.0)
    found = broadcast_from_last_stage({"worst": worst, "compared": float(len(pairs))}, groups)
    rollouts = [group.rollouts for group in report.groups]
    return {
        **reduce_floats(found, groups.dp, groups.device, "sum"),
        "loss": report.metrics["grpo/loss/mean"],
        "grad_norm": report.metrics["optim/grad_norm/step"],
        "tokens": {
            row: [one.tokens[member, :length].tolist() for member, length in enumerate(one.lengths)]
            for row, one in zip(mine, rollouts, strict=True)
        },
        "rollouts_a_row": microbatches[0].branches.count,
        "num_loss_tokens": batch.num_tokens_global,
    }


CASES = {"plain": PLAIN, "truncated": TRUNCATED, "modality": MODALITY}


@pytest.fixture(scope="module", params=list(CASES))
def case(request):
    """Rollout options and what one process makes of them."""
    options = CASES[request.param]
    return options, run_ranks(1, one_update, {}, options)[0]


def check(
    case, parallel: dict[str, Any], ranks: int, lookahead: int | str = "auto", **arguments: Any
) -> list[dict[str, Any]]:
    options, single = case
    results = run_ranks(ranks, one_update, parallel, options | {"lookahead": lookahead}, *arguments.values())
    tokens = {row: rollouts for result in results for row, rollouts in result["tokens"].items()}
    assert tokens == single["tokens"]
    for result in results:
        assert result["compared"] and result["worst"] <= 1e-4
        assert result["num_loss_tokens"] == single["num_loss_tokens"]
        assert result["loss"] == pytest.approx(single["loss"], abs=TOLERANCE)
        assert result["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-4)
    return results


def test_sampler_and_scorer_agree_on_one_process(case):
    _, single = case
    assert single["num_loss_tokens"] > 200
    assert single["worst"] <= 1e-5
    assert single["grad_norm"] > 1e-3


def test_sampler_and_scorer_agree_where_norms_stand_after_attention_and_mlp():
    results = run_ranks(2, one_update, {"tp": 2}, TRUNCATED | {"lookahead": 3}, 900, False, True)
    assert all(result["compared"] and result["worst"] <= 1e-5 for result in results)


LAYOUTS = {
    "tp2": ({"tp": 2}, 2, "auto"),
    "pp2": ({"pp": 2}, 2, 16),
    "dp2": ({}, 2, 3),
    "tp2_sp": ({"tp": 2, "sequence_parallel": True}, 2, 3),
    "pp2_vpp2": ({"pp": 2, "virtual_pp": 2}, 2, 5),
    "tp2_pp2": ({"tp": 2, "pp": 2}, 4, "auto"),
}
# Every layout under the hardest options, the others where they differ: each world costs seconds.
PAIRS = [("truncated", layout) for layout in LAYOUTS] + [("plain", "tp2_sp"), ("plain", "pp2"), ("modality", "tp2_pp2")]


@pytest.mark.parametrize(("case", "layout"), PAIRS, indirect=["case"])
def test_layouts_equal_one_process(case, layout):
    check(case, *LAYOUTS[layout])


BUDGETS = [("plain", 1, 1), ("plain", 400, 2), ("truncated", 1, 1), ("truncated", 10_000, 4)]


@pytest.mark.parametrize(("case", "microbatch_tokens", "rollouts_a_row"), BUDGETS, indirect=["case"])
def test_sharing_prompts_and_microbatches_change_nothing(case, microbatch_tokens, rollouts_a_row):
    """Compared with four rollouts per row, or two of the guided ones."""
    results = check(case, {}, 1, microbatch_tokens=microbatch_tokens)
    assert results[0]["rollouts_a_row"] == rollouts_a_row


@pytest.mark.parametrize(("case", "parallel"), [("plain", {}), ("truncated", {"tp": 2})], indirect=["case"])
def test_steps_of_fixed_shapes_sample_the_same(case, parallel):
    """What a GPU replays from graphs; here the same steps run without one."""
    check(case, parallel | {"decode_graphs": True}, parallel.get("tp", 1))


@pytest.fixture(scope="module")
def adapted():
    """One process with low-rank adapters that are not zero."""
    return TRUNCATED, run_ranks(1, one_update, {}, TRUNCATED, 900, True)[0]


def test_adapters_sample_what_they_score(adapted):
    _, single = adapted
    assert single["worst"] <= 1e-5 and single["grad_norm"] > 1e-3
    assert single["tokens"] != run_ranks(1, one_update, {}, TRUNCATED)[0]["tokens"]


WITH_ADAPTERS = {
    **{name: LAYOUTS[name] for name in ("tp2_sp", "pp2_vpp2", "tp2_pp2")},
    "dp2_tp2": ({"tp": 2, "distributed_optimizer": True}, 4, 3),
}


@pytest.mark.parametrize("layout", WITH_ADAPTERS)
def test_adapters_at_any_layout_equal_one_process(adapted, layout):
    check(adapted, *WITH_ADAPTERS[layout], microbatch_tokens=900, adapted=True)
