"""The lower bound of a decoding step's cost on this machine, and its actual cost, on one core.

    python tools/bench.py floor [prompts=2] [position=260] [rounds=30] [section.field=value]

Steps of 16 and of 64 rows, one token per row, `position` tokens after the recipe's own prompt. A step must read the
layers' weights, the output layer's image columns and the cached keys and values once, and do their multiplications. Two
probes measure how fast this core reads (a sum over 256 MiB) and multiplies (1024 x 1024 matrices); the larger of the
two times is the floor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from realsr_hpc.behaviour.draws import stream_keys
from realsr_hpc.config.arguments import read_counts, read_with_overrides
from realsr_hpc.model.policy import Policy
from realsr_hpc.rollout.decoder import Decoder
from realsr_hpc.rollout.sampler import Sampler
from realsr_hpc.vlcot.grammar import Grammar
from tools.benchmarks._measure import alternately, show
from tools.benchmarks._policy import compose_or_none, our_policy, some_prompts

ROWS = (16, 64)
PROBE_BYTES, PROBE_SIDE = 256 * 2**20, 1024


@dataclass(frozen=True)
class Work:
    """Of one step: numbers read once, and multiply-adds."""

    numbers: int
    multiplications: int


def main(arguments: list[str]) -> int:
    """Exit code 2 for wrong arguments."""
    given, overrides = read_with_overrides(arguments, {"prompts": "2", "position": "260", "rounds": "30"}, __doc__)
    options = read_counts(given, given)
    config = compose_or_none(overrides, 2 * options["position"])
    if config is None:
        return 2
    _, tokens, policy = our_policy(config)
    policy.eval()
    sampler = Sampler(policy, Grammar(tokens.codec, "constrained"), config.rollout, config.seed)
    prompts = some_prompts(tokens, options["prompts"])
    ways = {}
    for rows in ROWS:
        ways |= parts_of_a_step(sampler, prompts, rows, options["position"])
    memory, square = torch.ones(PROBE_BYTES // 4), torch.ones(PROBE_SIDE, PROBE_SIDE)
    ways |= {"read": memory.sum, "multiply": lambda: square @ square}
    for way in ways.values():
        way()
    timings = alternately(ways, options["rounds"])
    read_s = timings["read"].median_cpu_s / (PROBE_BYTES // 4)
    multiply_s = timings["multiply"].median_cpu_s / PROBE_SIDE**3
    table = []
    for rows in ROWS:
        work = work_of_a_step(policy, sampler, rows, len(prompts), prompts.shape[1], options["position"])
        passed, drawn = (timings[f"{part} {rows}"].median_cpu_s for part in ("pass", "draw"))
        by_reading, by_multiplying = work.numbers * read_s, work.multiplications * multiply_s
        floor = max(by_reading, by_multiplying)
        times = (passed, drawn, by_reading, by_multiplying)
        table.append([f"{rows}", *(f"{1e3 * seconds:.2f}" for seconds in times), f"{(passed + drawn) / floor:.1f}x"])
    show(
        f"{options['prompts']} prompts of {prompts.shape[1]} tokens, position {options['position']}; this core reads "
        f"{4e-9 / read_s:.1f} GB/s and multiplies {2e-9 / multiply_s:.0f} GFLOP/s in float32",
        ["rows", "pass, ms", "draw, ms", "least by reading, ms", "by multiplying, ms", "cost / floor"],
        table,
    )
    return 0


def parts_of_a_step(sampler: Sampler, prompts: torch.Tensor, rows: int, position: int):
    """A pass over one token of each row, and the draw of the next tokens, by name."""
    decoder, device = Decoder(sampler.policy), prompts.device
    cache = decoder.new_cache(prompts, rows // len(prompts), position + 1, False)
    _finish(decoder.prefill(cache, prompts))
    fed, first = torch.zeros(rows, 1, dtype=torch.int64, device=device), np.full(rows, position)
    step = lambda: _finish(decoder.step(cache, fed, first))  # noqa: E731
    hidden = step().flatten(1, 2)
    image = int(np.flatnonzero(sampler.masks.image.cpu().numpy() & ~sampler.masks.forced.cpu().numpy())[0])
    keys = torch.from_numpy(np.stack([stream_keys(0, row, 1)[0] for row in range(rows)]))
    draw = lambda: sampler.choice(decoder, hidden, np.full(rows, image), np.ones(rows, bool), keys)  # noqa: E731
    return {f"pass {rows}": step, f"draw {rows}": draw}


def work_of_a_step(policy: Policy, sampler: Sampler, rows: int, prompts: int, length: int, position: int) -> Work:
    """Weights of the layers and the output layer's image columns, keys and values of prompts and responses."""
    layers = policy.chunks[0].decoder.layers
    matrices = sum(parameter.numel() for parameter in layers.parameters() if parameter.ndim == 2)
    columns = sampler.masks.image_columns
    matrices += (columns.stop - columns.start) * policy.config.hidden_size
    per_token = 2 * policy.config.num_layers * policy.shapes.kv_heads * policy.shapes.head_dim
    cached = per_token * (prompts * length + rows * (position + 1))
    queries = policy.config.num_attention_heads // policy.shapes.kv_heads
    return Work(matrices + cached, rows * (matrices + queries * per_token * (length + position + 1)))


def _finish(turns) -> torch.Tensor:
    """The result of a pass without other pipeline stages."""
    try:
        next(turns)
    except StopIteration as end:
        return end.value
    raise AssertionError("one process has no stages to wait for")
