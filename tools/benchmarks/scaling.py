"""How rollouts scale: tokens per second over group size 1..32 and over sequences of 256..4096 tokens, as a plot.

    python tools/bench.py scaling [tokens=64] [rounds=2] [section.field=value ...]

Ours and transformers' generate sample `tokens` tokens per rollout from the same weights on one core; the rest of a
sequence is prompt. Group sizes are measured behind the recipe's own prompt, lengths at group 8. Writes
docs/pictures/rollout_scaling.png.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from realsr_hpc.config.arguments import read_counts, read_with_overrides
from realsr_hpc.rollout.sampler import Sampler
from realsr_hpc.vlcot.grammar import Grammar
from tools.benchmarks._measure import Timing, alternately, show
from tools.benchmarks._policy import compose_or_none, our_policy, some_prompts, transformers_copy
from tools.benchmarks.rollout import generate

GROUP_SIZES = (1, 2, 4, 8, 16, 32)
LENGTHS = (256, 512, 1024, 2048, 4096)
FIGURE = Path(__file__).resolve().parents[2] / "docs" / "pictures" / "rollout_scaling.png"
Series = dict[int, tuple[float, float]]
"""Tokens a CPU second of ours and of transformers, by size."""


def main(arguments: list[str]) -> int:
    """Exit code 2 for wrong arguments."""
    given, overrides = read_with_overrides(arguments, {"tokens": "64", "rounds": "2"}, __doc__)
    options = read_counts(given, given)
    longest = max(LENGTHS)
    sizes = [f"model.max_sequence_tokens={longest}", f"parallel.microbatch_tokens={longest}"]
    config = compose_or_none([*sizes, *overrides], options["tokens"])
    if config is None:
        return 2
    _, tokens, policy = our_policy(config)
    policy.eval()
    sampler = Sampler(policy, Grammar(tokens.codec, "constrained"), config.rollout, config.seed)
    prompt = some_prompts(tokens, 1)
    with tempfile.TemporaryDirectory() as folder:
        model = transformers_copy(policy, config, tokens, Path(folder) / "export")
        by_group = {size: compare(sampler, model, prompt, size, options) for size in GROUP_SIZES}
        by_length = {}
        for length in LENGTHS:
            stretched = some_prompts(tokens, 1, length - options["tokens"])
            by_length[length] = compare(sampler, model, stretched, 8, options)
    for title, series in (("group size", by_group), ("tokens of a sequence, group 8", by_length)):
        rows = [[str(x), f"{a:.0f}", f"{b:.0f}", f"{a / b:.2f}x"] for x, (a, b) in series.items()]
        show(
            f"tokens / CPU s over {title}; {options['tokens']} tokens sampled, prefill included",
            [title, "realsr_hpc", "transformers", "ratio"],
            rows,
        )
    plot(by_group, by_length)
    print(f"plot: {FIGURE}")
    return 0


def compare(sampler: Sampler, model, prompt: Tensor, group: int, options: dict[str, int]) -> tuple[float, float]:
    """Tokens a CPU second of both, prefill included."""
    ways = {
        "ours": lambda: sampler.generate(prompt, group, list(range(group))),
        "theirs": generate(model, prompt, options | {"group": group}, None),
    }
    torch.manual_seed(0)
    timings: dict[str, Timing] = alternately(ways, options["rounds"])
    ours, theirs = (group * options["tokens"] / timings[name].median_cpu_s for name in ways)
    return ours, theirs


def plot(by_group: Series, by_length: Series) -> None:
    """Two panels: tokens a CPU second, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    titles = ("rollouts of one prompt (group size)", "tokens of a sequence, group 8")
    for panel, series, title in zip(panels, (by_group, by_length), titles, strict=True):
        for index, name in enumerate(("realsr_hpc", "transformers generate")):
            panel.loglog(list(series), [values[index] for values in series.values()], marker="o", label=name)
        panel.set(xlabel=title, ylabel="tokens / CPU second")
        panel.set_xticks(list(series), [str(x) for x in series])
        seen = [value for values in series.values() for value in values]
        ticks = [
            y for y in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000) if min(seen) <= 1.5 * y < 2 * max(seen)
        ]
        panel.set_yticks(ticks, [str(y) for y in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(FIGURE, dpi=110)
    plt.close(figure)
