"""A GRPO step of ours and of TRL's GRPOTrainer: same weights, prompts, group and lengths, one update, one core.

    python tools/bench.py step [group=8] [prompts=2] [tokens=256] [rounds=3] [section.field=value ...]

Needs the extra `bench`. A step is: sample prompts x group rollouts of `tokens` tokens, score them with the frozen
reference, one AdamW update with a KL term, float32; the rewards are the same cheap numbers on both sides. TRL samples
with transformers and trains on every token; ours samples under the grammar, keeps the log-probabilities and trains on
the tokens that were free. TRL runs one more step before the measured ones; then the two take turns.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from realsr_hpc.config.arguments import read_counts, read_with_overrides
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.grpo.advantages import configured_advantages
from realsr_hpc.model.policy import Policy, build_policy
from realsr_hpc.optim.step import Optimiser
from realsr_hpc.records import Case, GroupRewards, ParsedTrace, ScoredGroup
from realsr_hpc.rewards.mixture import RewardMixture
from realsr_hpc.rollout.sampler import Sampler
from realsr_hpc.tokenizer.trace import TraceTokenizer
from realsr_hpc.train.grpo import score_before_updates
from realsr_hpc.train.objective import objective
from realsr_hpc.train.parts import GRPOParts
from realsr_hpc.train.updates import grpo_batches
from realsr_hpc.vlcot.grammar import Grammar
from tools.benchmarks._measure import Timing, show
from tools.benchmarks._policy import compose_or_none, our_policy, some_prompts, transformers_copy

Clock = tuple[float, float]
"""Wall and CPU seconds."""


def main(arguments: list[str]) -> int:
    """Exit code 2 for wrong arguments or without the extra."""
    if importlib.util.find_spec("trl") is None:
        print("step compares with TRL: pip install -c constraints.txt -e '.[bench]'", file=sys.stderr)
        return 2
    given, overrides = read_with_overrides(
        arguments, {"group": "8", "prompts": "2", "tokens": "256", "rounds": "3"}, __doc__
    )
    options = read_counts(given, given)
    config = compose_or_none([f"grpo.group_size={options['group']}", *overrides], options["tokens"])
    if config is None:
        return 2
    _, tokens, policy = our_policy(config)
    prompts = some_prompts(tokens, options["prompts"])
    with tempfile.TemporaryDirectory() as folder:
        model = transformers_copy(policy, config, tokens, Path(folder) / "export")
        step = our_step(config, policy, tokens, prompts)
        step()
        ours, theirs = in_turns_with_trl(model, prompts, config, options["rounds"], step, Path(folder))
    show(
        f"GRPO step: {options['prompts']} prompts of {prompts.shape[1]} tokens x {options['group']} rollouts of "
        f"{options['tokens']}, one update, median of {options['rounds']}",
        ["", "wall s", "CPU s", "realsr_hpc is faster by (wall)", "(CPU)"],
        [
            [
                name,
                f"{timing.median_wall_s:.2f}",
                f"{timing.median_cpu_s:.2f}",
                f"{timing.median_wall_s / ours.median_wall_s:.2f}x",
                f"{timing.median_cpu_s / ours.median_cpu_s:.2f}x",
            ]
            for name, timing in (("realsr_hpc", ours), ("TRL GRPOTrainer", theirs))
        ],
    )
    return 0


def rewards_of(count: int) -> list[float]:
    """Rewards that differ within every group, whatever was sampled."""
    return [float(number % 7) for number in range(count)]


def our_step(config: RunConfig, policy: Policy, tokens: TraceTokenizer, prompts: Tensor) -> Callable[[], None]:
    """`train.grpo.step` without what comes before and after it: no data, images, rewards and metrics."""
    # before the policy is trained: the reference has the same weights
    reference = build_policy(config, policy.groups, tokens.codec.vocabulary.size, trainable=False)
    sampler = Sampler(policy, Grammar(tokens.codec, "constrained"), config.rollout, config.seed)
    optimiser, rewards = Optimiser(policy, config, total_steps=100), RewardMixture(config.rewards)
    parts = GRPOParts(config, policy.groups, tokens, policy, optimiser, reference, sampler, rewards)
    size = config.grpo.group_size
    nothing = ParsedTrace(None, (None, None, None), (None, None, None), ())
    total = torch.tensor(rewards_of(size))
    earned = GroupRewards(total, {"r": total}, {"r": 1.0})
    advantages = configured_advantages(earned.breakdown, earned.weights, config.grpo)
    source = Case("", np.zeros((1, 1, 3), np.uint8))

    def step() -> None:
        policy.eval()
        groups = sampler.generate(prompts, size, list(range(len(prompts) * size)))
        scored = [ScoredGroup(source, g, (nothing,) * size, (None,) * size, earned, advantages) for g in groups]
        for batch in grpo_batches(parts, scored, sampler.masks):
            microbatches = score_before_updates(parts, parts.group_microbatches(batch.groups))
            optimiser.step(microbatches, objective(config, policy, batch, sampler.masks))

    return step


def in_turns_with_trl(
    model: Any, prompts: Tensor, config: RunConfig, rounds: int, step: Callable[[], None], folder: Path
) -> tuple[Timing, Timing]:
    """Ours and TRL's timings; ours runs between TRL's steps, outside their time."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    class Turns(TrainerCallback):
        """Times TRL from the end of one step to that of the next, generation included, and ours in between."""

        def __init__(self) -> None:
            self.ours: list[Clock] = []
            self.theirs: list[Clock] = []
            self.started = now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.theirs.append(since(self.started))
            started = now()
            step()
            self.ours.append(since(started))
            self.started = now()

    tokenizer = AutoTokenizer.from_pretrained(folder / "export", padding_side="left")
    texts = [tokenizer.decode(row) for row in prompts]
    lengths = {len(tokenizer(text)["input_ids"]) for text in texts}
    assert lengths == {prompts.shape[1]}, f"the export's tokenizer reads prompts of {lengths}, not {prompts.shape[1]}"
    turns = Turns()
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: rewards_of(len(completions)),
        args=trl_settings(config, len(texts), rounds + 1, folder / "trl"),
        train_dataset=Dataset.from_dict({"prompt": texts * (rounds + 1)}),
        processing_class=tokenizer,
        callbacks=[turns],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return as_timing(turns.ours[1:]), as_timing(turns.theirs[1:])


def trl_settings(config: RunConfig, num_prompts: int, num_steps: int, output: Path) -> Any:
    """TRL's GRPOConfig for the recipe's step: the same prompts, rollouts, lengths, KL weight and learning rate."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=str(output),
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=num_prompts * config.grpo.group_size,
        num_generations=config.grpo.group_size,
        max_completion_length=config.rollout.max_new_tokens,
        generation_kwargs={"min_new_tokens": config.rollout.max_new_tokens},
        num_iterations=1,
        beta=config.grpo.kl_beta,
        learning_rate=config.optim.lr,
        max_steps=num_steps,
        save_strategy="no",
        report_to=[],
        logging_steps=1000,
        disable_tqdm=True,
        trust_remote_code=True,
    )


def now() -> Clock:
    """Wall and CPU clocks, seconds."""
    return time.perf_counter(), time.process_time()


def since(start: Clock) -> Clock:
    """Seconds on both clocks since `start`."""
    wall, cpu = now()
    return wall - start[0], cpu - start[1]


def as_timing(clocks: list[Clock]) -> Timing:
    """Repeated measurements of one way."""
    return Timing(tuple(wall for wall, _ in clocks), tuple(cpu for _, cpu in clocks))
