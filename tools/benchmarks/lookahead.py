"""Look-ahead: tokens per pass and tokens per second at several widths, on held-out pictures, one core.

    python tools/bench.py lookahead [prompts=2] [group=8] [tokens=520] [rounds=1] [section.field=value]

The recipe's own policy restores held-out pictures at `rollout.lookahead` 1, 2, 4, 8, 16 and auto. Every width must
sample the same tokens: exit code 1 where one does not.
"""

from __future__ import annotations

import torch

from realsr_hpc.config.arguments import read_counts, read_with_overrides
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.data.loader import LQLoader
from realsr_hpc.rollout.sampler import Sampler
from realsr_hpc.vlcot.grammar import Grammar
from tools.benchmarks._measure import alternately, show
from tools.benchmarks._policy import compose_or_none, our_policy

WIDTHS: tuple[int | str, ...] = (1, 2, 4, 8, 16, "auto")


def main(arguments: list[str]) -> int:
    """Exit code 2 for wrong arguments, 1 when a width changes a token."""
    given, overrides = read_with_overrides(
        arguments, {"prompts": "2", "group": "8", "tokens": "520", "rounds": "1"}, __doc__
    )
    options = read_counts(given, given)
    config = compose_or_none(overrides, options["tokens"])
    if config is None:
        return 2
    _, tokens, policy = our_policy(config)
    policy.eval()
    loader = LQLoader(config, config.data.heldout_split, options["prompts"], dp_rank=0, dp_size=1, shuffle=False)
    prompts = tokens.prompts(loader.next().lq)
    rows = options["prompts"] * options["group"]
    grammar = Grammar(tokens.codec, config.rollout.grammar)
    samplers = {f"{width}": Sampler(policy, grammar, _with(config, width).rollout, config.seed) for width in WIDTHS}
    seen: dict[str, list[torch.Tensor]] = {}

    def run(name: str) -> None:
        groups = samplers[name].generate(prompts, options["group"], list(range(rows)))
        seen[name] = [group.tokens for group in groups]

    timings = alternately({name: (lambda name=name: run(name)) for name in samplers}, options["rounds"])
    sampled = sum(int((group != tokens.codec.vocabulary.pad).sum()) for group in seen["1"])
    base = timings["1"].median_cpu_s
    show(
        f"look-ahead: {options['prompts']} held-out pictures x {options['group']} rollouts, {sampled} tokens",
        ["tokens fed a row", "kept a pass", "tokens / CPU s", "of one by one"],
        [
            [
                name,
                f"{samplers[name].counts.read()['rollout/tokens_per_pass/mean']:.2f}",
                f"{sampled / timing.median_cpu_s:.0f}",
                f"{base / timing.median_cpu_s:.2f}x",
            ]
            for name, timing in timings.items()
        ],
    )
    same = all(all(map(torch.equal, found, seen["1"])) for found in seen.values())
    print("every width sampled the same tokens" if same else "a width sampled other tokens")
    return 0 if same else 1


def _with(config: RunConfig, width: int | str) -> RunConfig:
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"lookahead": width})})
