"""Log-probabilities: peak memory and time of ours and of the plain way over the whole [tokens, vocabulary].

    python tools/bench.py logprobs [tokens=1024] [vocabulary=65536] [hidden=512] [rounds=3]

Forward and backward in float32 on one core. The plain way projects all tokens, takes log_softmax and gathers; ours
walks over tiles that fit the caches and computes their logits again in the backward pass. Peak is what resident memory
rises by (Linux only: the kernel's own high-water mark).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from realsr_hpc.behaviour.logprobs import behaviour_scores
from realsr_hpc.config.arguments import read_arguments, read_counts
from tools.benchmarks._measure import alternately, show

MIB = 1024.0


def main(arguments: list[str]) -> int:
    """Exit code 2 for wrong arguments, 1 when the two ways disagree."""
    defaults = {"tokens": "1024", "vocabulary": "65536", "hidden": "512", "rounds": "3"}
    options = read_counts(read_arguments(arguments, defaults, __doc__), defaults)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden = torch.randn(options["tokens"], options["hidden"], requires_grad=True)
    weight = (0.02 * torch.randn(options["vocabulary"], options["hidden"])).requires_grad_()
    targets = torch.randint(0, options["vocabulary"], (options["tokens"],))
    everything = torch.ones(1, options["vocabulary"], dtype=torch.bool)
    zeros, ones = torch.zeros_like(targets), torch.ones(options["tokens"])

    def plain() -> torch.Tensor:
        return torch.log_softmax(hidden @ weight.t(), -1).gather(-1, targets[:, None])[:, 0]

    def ours() -> torch.Tensor:
        return behaviour_scores(hidden, weight, targets, everything, zeros, ones).logprobs

    def run(way: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        logprobs = way()
        return logprobs.detach(), *torch.autograd.grad(logprobs.sum(), (hidden, weight))

    ways = {"realsr_hpc": lambda: run(ours), "plain": lambda: run(plain)}
    peaks = {name: peak_mib(way) for name, way in ways.items()}
    timings = alternately(ways, options["rounds"])
    worst = max(float((a - b).abs().max()) for a, b in zip(run(ours), run(plain), strict=True))
    whole = options["tokens"] * options["vocabulary"] * 4 / MIB**2
    show(
        f"log-probs of {options['tokens']} tokens over {options['vocabulary']} (whole logits: {whole:.0f} MiB); "
        f"values and gradients differ by at most {worst:.1e}",
        ["", "peak MiB", "of plain", "CPU s", "of plain"],
        [
            [
                name,
                f"{peaks[name]:.0f}",
                f"{peaks[name] / peaks['plain']:.2f}",
                f"{timing.median_cpu_s:.2f}",
                f"{timing.median_cpu_s / timings['plain'].median_cpu_s:.2f}",
            ]
            for name, timing in timings.items()
        ],
    )
    return 0 if worst < 1e-4 else 1


def peak_mib(way: Callable[[], object]) -> float:
    """Rise of resident memory while `way` runs, MiB."""
    way()  # what a first call allocates for good is not part of it
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark starts anew
    before = status_kib("VmRSS")
    way()
    return (status_kib("VmHWM") - before) / MIB


def status_kib(name: str) -> float:
    """A line of the kernel's account of this process, KiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[1])
