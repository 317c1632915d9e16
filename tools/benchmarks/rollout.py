"""Rollouts: tokens per second of our sampler and of transformers' generate, same weights, same batch, one core.

    python tools/bench.py rollout [group=8] [prompts=2] [prompt_tokens=0] [tokens=400] [rounds=3] [section.field=value]

transformers samples from the export of the very same weights with its cache on (SDPA, float32). It decodes once plainly
and once with the logits processor that comes with the export and, as our grammar, keeps image blocks well formed. Ours
samples under the grammar and keeps each token's log-probability as well. Every rollout is stopped at `tokens`; prompts
are the recipe's own, or stretched to `prompt_tokens`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from realsr_hpc.behaviour.distribution import restricted
from realsr_hpc.config.arguments import read_count, read_with_overrides
from realsr_hpc.records import RolloutGroup
from realsr_hpc.rollout.sampler import Sampler
from realsr_hpc.vlcot.grammar import Grammar
from tools.benchmarks._measure import Timing, alternately, show
from tools.benchmarks._policy import compose_or_none, our_policy, some_prompts, transformers_copy


def main(arguments: list[str]) -> int:
    """Exit code 2 for wrong arguments, 1 when the two disagree on the weights' log-probabilities."""
    defaults = {"group": "8", "prompts": "2", "prompt_tokens": "0", "tokens": "400", "rounds": "3"}
    given, overrides = read_with_overrides(arguments, defaults, __doc__)
    options = {key: read_count(given, key, 0 if key == "prompt_tokens" else 1) for key in defaults}
    longest = options["prompt_tokens"] + options["tokens"]
    room = [f"model.max_sequence_tokens={longest}", f"parallel.microbatch_tokens={longest}"]
    config = compose_or_none([*(room if options["prompt_tokens"] else []), *overrides], options["tokens"])
    if config is None:
        return 2
    _, tokens, policy = our_policy(config)
    policy.eval()
    sampler = Sampler(policy, Grammar(tokens.codec, "constrained"), config.rollout, config.seed)
    prompts = some_prompts(tokens, options["prompts"], options["prompt_tokens"])
    rows = options["prompts"] * options["group"]
    with tempfile.TemporaryDirectory() as folder:
        model = transformers_copy(policy, config, tokens, Path(folder) / "export")
        # constrained grammar: no rollout ends before `tokens`, so that both sides sample rows x tokens
        ours = lambda: sampler.generate(prompts, options["group"], list(range(rows)))  # noqa: E731
        groups = ours()
        worst = largest_difference(model, sampler, groups[0])
        if any(int(group.lengths.min()) < options["tokens"] for group in groups):
            print(f"a rollout ended before tokens={options['tokens']}; lower it", file=sys.stderr)
            return 2
        ways = {
            "realsr_hpc": ours,
            "transformers": generate(model, prompts, options, None),
            "transformers, image blocks well formed": generate(model, prompts, options, processor(model, prompts)),
        }
        for way in list(ways.values())[1:]:
            way()
        timings = alternately(ways, options["rounds"])
    title = (
        f"rollout: {options['prompts']} prompts of {prompts.shape[1]} tokens x {options['group']} rollouts of "
        f"{options['tokens']}, median of {options['rounds']}; log-probs of the two differ by at most {worst:.1e}"
    )
    show_speeds(title, timings, rows * options["tokens"])
    return 0 if worst < 1e-3 else 1


def show_speeds(title: str, timings: Mapping[str, Timing], sampled: int) -> None:
    """Print tokens per second of each way, which sampled so many tokens, and how much faster ours is."""
    base = timings["realsr_hpc"]
    show(
        title,
        ["", "tokens / s", "tokens / CPU s", "realsr_hpc is faster by (wall)", "(CPU)"],
        [
            [
                name,
                f"{sampled / timing.median_wall_s:.0f}",
                f"{sampled / timing.median_cpu_s:.0f}",
                f"{timing.median_wall_s / base.median_wall_s:.2f}x",
                f"{timing.median_cpu_s / base.median_cpu_s:.2f}x",
            ]
            for name, timing in timings.items()
        ],
    )


def generate(model, prompts: Tensor, options: dict[str, int], constraint) -> Callable[[], Tensor]:
    """transformers' way: every prompt `group` times, plain sampling, nothing ends early."""

    @torch.no_grad()
    def run() -> Tensor:
        return model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            num_return_sequences=options["group"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            use_cache=True,
            max_new_tokens=options["tokens"],
            min_new_tokens=options["tokens"],
            logits_processor=None if constraint is None else [constraint],
        )

    return run


def processor(model, prompts: Tensor):
    """The export's own logits processor."""
    import json

    trace = json.loads((Path(model.config._name_or_path) / "realsr.json").read_text(encoding="utf-8"))
    return sys.modules[type(model).__module__].ImageBlockGrammar(trace, prompts.shape[1])


@torch.no_grad()
def largest_difference(model, sampler: Sampler, group: RolloutGroup) -> float:
    """Between our log-probabilities of one group's free tokens and those of transformers' logits."""
    rows = torch.cat([group.prompt.expand(len(group.tokens), -1), group.tokens], 1)
    logits = model(input_ids=rows).logits[:, len(group.prompt) - 1 : -1]
    masks, free = sampler.masks, ~group.forced
    mask_ids = group.mask_ids[free]
    allowed = masks.allowed[mask_ids][:, : logits.shape[-1]]
    theirs = restricted(logits[free], allowed, masks.temperature[mask_ids]).log_softmax(-1)
    chosen = theirs.gather(-1, group.tokens[free][:, None])[:, 0]
    return float((chosen - group.rollout_logprobs[free]).abs().max())
