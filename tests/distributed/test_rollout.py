"""Sampler against scorer, and every layout against one process: tokens, log-probabilities, loss and gradient norm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.distributed.launcher import run_ranks

TOLERANCE = 1e-5
PLAIN = {"grammar": "constrained", "max_new_tokens": 200}
TRUNCATED = PLAIN | {
    "cfg_scale": 0.8, "temperature": 0.9, "text_temperature": 1.1, "image_adaptive_top_k": True, "text_top_k": 50,
}  # fmt: skip
MODALITY = {"grammar": "modality", "max_new_tokens": 60, "top_p": 0.9}


def one_update(parallel: dict[str, Any], rollout: dict[str, Any], microbatch_tokens: int = 900) -> dict[str, Any]:
    """Roll out two prompts x four, score and take one update; numbers of this rank."""
    import torch

    from realsr_hpc.config.learning import GRPOConfig, RolloutConfig
    from realsr_hpc.config.schema import ModelConfig, OptimConfig, ParallelConfig, RunConfig, VLCoTConfig
    from realsr_hpc.model.policy import build_policy
    from realsr_hpc.optim.step import Optimiser
    from realsr_hpc.parallel.groups import initialise
    from realsr_hpc.parallel.layout import microbatch_multiple
    from realsr_hpc.parallel.reduce import broadcast_from_last_stage, reduce_floats
    from realsr_hpc.paths import resolve
    from realsr_hpc.records import GRPOBatch, ParsedTrace, ScoredGroup
    from realsr_hpc.rollout.sampler import Sampler
    from realsr_hpc.tokenizer.text import TextTokenizer
    from realsr_hpc.train.batches import collate_groups
    from realsr_hpc.train.experience import training_sequences
    from realsr_hpc.train.grpo import objective
    from realsr_hpc.train.scoring import add_logprobs
    from realsr_hpc.vlcot.grammar import Grammar
    from realsr_hpc.vlcot.sequence import TraceCodec
    from realsr_hpc.vlcot.vocabulary import build_vocabulary

    torch.set_num_threads(1)
    config = RunConfig(
        name="t",
        task="grpo",
        vlcot=VLCoTConfig(instruction="restore <|image|>", max_text_tokens=5),
        model=ModelConfig(num_layers=4, hidden_size=64, num_heads=4, num_kv_heads=2, ffn_hidden_size=96, init_std=0.15),
        parallel=ParallelConfig(**({"distributed_optimizer": False} | parallel), microbatch_tokens=microbatch_tokens),
        rollout=RolloutConfig(**rollout),
        grpo=GRPOConfig(group_size=4, kl_beta=0.0, aggregation="sequence"),
        optim=OptimConfig(lr=1e-3),
    )
    groups = initialise(config.parallel, seed=0)
    text = TextTokenizer(resolve(config.text_tokenizer.path))
    codec = TraceCodec(config.vlcot, build_vocabulary(config.vlcot, 64, text.vocab_size), text, 16)
    policy = build_policy(config, groups, codec.vocabulary.size)
    sampler = Sampler(policy, Grammar(codec, config.rollout.grammar), config.rollout, seed=5)

    mine = range(groups.dp_rank * 2 // groups.dp_size, (groups.dp_rank + 1) * 2 // groups.dp_size)
    lq = np.random.default_rng(1).integers(0, 64, (2, 4, 4))
    prompts = torch.tensor([codec.prompt(lq[row]) for row in mine])
    rollouts = sampler.generate(prompts, 4, [row * 4 + member for row in mine for member in range(4)])
    empty = tuple(ParsedTrace(None, (None,) * 3, (None,) * 3, ()) for _ in range(4))
    rewards = torch.tensor([0.1, 0.7, 0.3, 0.9])
    scored = [ScoredGroup(group, rewards, {"r": rewards}, {"r": 1.0}, empty, (None,) * 4) for group in rollouts]
    sequences = tuple(s for group in scored for s in training_sequences(group, sampler, config.grpo))
    local = {"tokens": float(sum(len(s.positions) for s in sequences)), "rollouts": float(len(sequences))}
    counts = {name: int(value) for name, value in reduce_floats(local, groups.dp, groups.device, "sum").items()}
    batch = GRPOBatch(sequences, counts["tokens"], counts["rollouts"])
    multiple = microbatch_multiple(config.parallel)
    microbatches = collate_groups(sequences, config.parallel, pad=1, device=groups.device)
    add_logprobs(policy, microbatches, sampler.masks, "scored")
    add_logprobs(policy, microbatches, sampler.masks, "joined", at_once=3, multiple=multiple)
    scored = [m.extras for m in microbatches if "scored" in m.extras]
    pairs = [(one["rollout_logprobs"], one[name]) for one in scored for name in ("scored", "joined")]
    worst = max((float((a - b).abs().max()) for a, b in pairs), default=0.0)
    result = Optimiser(policy, config, 1).step(microbatches, objective(config, policy, batch, sampler.masks))
    summed = {"loss": sum(float(o["grpo/loss/mean"]) for o in result.outputs if o), "worst": worst}
    summed = reduce_floats(broadcast_from_last_stage(summed, groups), groups.dp, groups.device, "sum")
    columns = [group.tokens[row, :length] for group in rollouts for row, length in enumerate(group.lengths)]
    return {
        **summed,
        "grad_norm": result.grad_norm,
        "tokens": {int(row): [c.tolist() for c in columns[4 * i : 4 * i + 4]] for i, row in enumerate(mine)},
        "rollouts_a_row": microbatches[0].branches.count,
        "num_loss_tokens": counts["tokens"],
    }


CASES = {"plain": PLAIN, "truncated": TRUNCATED, "modality": MODALITY}


@pytest.fixture(scope="module", params=list(CASES))
def case(request):
    """Rollout options and what one process makes of them."""
    options = CASES[request.param]
    return options, run_ranks(1, one_update, {}, options)[0]


def check(case, parallel: dict[str, Any], ranks: int, **arguments: Any) -> list[dict[str, Any]]:
    options, single = case
    results = run_ranks(ranks, one_update, parallel, options, *arguments.values())
    tokens = {row: rollouts for result in results for row, rollouts in result["tokens"].items()}
    assert tokens == single["tokens"]
    for result in results:
        assert result["worst"] <= 1e-4
        assert result["num_loss_tokens"] == single["num_loss_tokens"]
        assert result["loss"] == pytest.approx(single["loss"], abs=TOLERANCE)
        assert result["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-4)
    return results


def test_sampler_and_scorer_agree_on_one_process(case):
    _, single = case
    assert single["num_loss_tokens"] > 200
    assert single["worst"] <= 1e-5
    assert single["grad_norm"] > 1e-3


LAYOUTS = {
    "tp2": ({"tp": 2}, 2),
    "pp2": ({"pp": 2}, 2),
    "dp2": ({}, 2),
    "tp2_sp": ({"tp": 2, "sequence_parallel": True}, 2),
    "pp2_vpp2": ({"pp": 2, "virtual_pp": 2}, 2),
    "tp2_pp2": ({"tp": 2, "pp": 2}, 4),
}
# Every layout under the hardest options, the others where they differ: each world costs seconds.
PAIRS = [("truncated", layout) for layout in LAYOUTS] + [("plain", "tp2_sp"), ("plain", "pp2"), ("modality", "tp2_pp2")]


@pytest.mark.parametrize(("case", "layout"), PAIRS, indirect=["case"])
def test_layouts_equal_one_process(case, layout):
    check(case, *LAYOUTS[layout])


BUDGETS = [("plain", 1, 1), ("plain", 400, 2), ("truncated", 1, 1), ("truncated", 10_000, 4)]


@pytest.mark.parametrize(("case", "microbatch_tokens", "rollouts_a_row"), BUDGETS, indirect=["case"])
def test_sharing_prompts_and_microbatches_change_nothing(case, microbatch_tokens, rollouts_a_row):
    """Compared with four rollouts a row, or two of the guided ones."""
    results = check(case, {}, 1, microbatch_tokens=microbatch_tokens)
    assert results[0]["rollouts_a_row"] == rollouts_a_row


@pytest.mark.parametrize(("case", "parallel"), [("plain", {}), ("truncated", {"tp": 2})], indirect=["case"])
def test_steps_of_fixed_shapes_sample_the_same(case, parallel):
    """What a GPU replays from graphs; here the same steps run without one."""
    check(case, parallel | {"decode_graphs": True}, parallel.get("tp", 1))
