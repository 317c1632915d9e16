"""Parts of `bench.py gpu` that compute with a policy: parity with the CPU, training steps, decoding.

Models have random weights in the 7B's shape; nothing is read from disk. Each part runs in a process of its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from realsr_hpc.config.learning import SFTConfig
from realsr_hpc.config.schema import (
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    VLCoTConfig,
)
from realsr_hpc.model.hf_mapping import local_to_hf
from realsr_hpc.model.policy import Policy, build_policy
from realsr_hpc.optim.step import Optimiser
from realsr_hpc.parallel import backend
from realsr_hpc.parallel.pipeline import LossFunction, Microbatch
from realsr_hpc.parallel.process_groups import initialise
from realsr_hpc.plan.seconds import H100, H200
from realsr_hpc.rollout.decoder import Decoder
from realsr_hpc.train.batches import collate, plain_sequence
from realsr_hpc.train.sft_loss import cross_entropy
from realsr_hpc.vlcot.vocabulary import Vocabulary, build_vocabulary


@dataclass(frozen=True)
class Size:
    """How much is computed."""

    hidden: int
    heads: int
    ffn: int
    text_tokens: int
    codes: int
    parity_layers: int
    train_layers: int
    train_rows: int
    train_tokens: int
    """Of a row."""
    decode_layers: int
    prompt_tokens: int
    decode_steps: int
    batches: tuple[int, ...]
    """Rollouts that are decoded together."""
    repeats: int
    copy_mib: int
    """Of the measured copy."""
    product: int
    """Side of the measured matrix product."""


SIZES = {
    # 7B: vocabulary 73,728; four of its layers train on 40 GB, all 32 decode in 20 GB
    "full": Size(4096, 32, 11008, 57_000, 16_384, 4, 4, 4, 2048, 32, 1024, 32, (1, 8, 64), 5, 2048, 8192),
    "parity": Size(256, 8, 384, 500, 256, 4, 0, 2, 96, 0, 0, 0, (), 0, 0, 0),
    "narrow": Size(64, 4, 96, 100, 64, 2, 2, 2, 48, 2, 24, 3, (1, 2), 2, 1, 64),
}


@dataclass(frozen=True)
class Figure:
    """One line of the report."""

    name: str
    value: float
    unit: str
    least: float | None = None
    """What it should reach; None: no such bound."""
    most: float | None = None
    """What it should not exceed."""

    @property
    def as_expected(self) -> bool:
        """Within its bounds."""
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)


def recipe(size: Size, layers: int, **sections: Any) -> RunConfig:
    """A policy of this size, sections as keywords."""
    longest = max(size.train_rows * size.train_tokens, size.prompt_tokens + size.decode_steps * (size.repeats + 2))
    return RunConfig(
        name="gpu",
        task="sft",
        vlcot=VLCoTConfig(),
        model=ModelConfig(
            num_layers=layers,
            hidden_size=size.hidden,
            num_heads=size.heads,
            ffn_hidden_size=size.ffn,
            max_sequence_tokens=longest,
        ),
        parallel=ParallelConfig(microbatch_tokens=longest, **sections.get("parallel", {})),
        precision=PrecisionConfig(**sections.get("precision", {"params": "bf16"})),
        optim=OptimConfig(epsilon=1e-3),
        seed=3,
    )


def vocabulary_of(size: Size) -> Vocabulary:
    """As large as the size says."""
    return build_vocabulary(VLCoTConfig(), size.codes, size.text_tokens)


def policy_of(config: RunConfig, size: Size, *, drawn: bool = False, trainable: bool = True) -> Policy:
    """On this process's device; drawn: weights of the seed, the same everywhere; else some made quickly."""
    groups = initialise(config.parallel, config.seed)
    policy = build_policy(config, groups, vocabulary_of(size).size, filled=drawn, trainable=trainable)
    if not drawn:
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.normal_(0.0, 0.02)
    return policy


def batch_of(config: RunConfig, policy: Policy, size: Size) -> tuple[list[Microbatch], LossFunction]:
    """Random rows, every token with loss, and the loss over all of them."""
    vocabulary = vocabulary_of(size)
    rows = np.random.default_rng(1).integers(0, vocabulary.size, (size.train_rows, size.train_tokens))
    sequences = [plain_sequence(torch.from_numpy(row), 1) for row in rows]
    microbatches = collate(sequences, config.parallel, packing=False, pad=vocabulary.pad, device=policy.groups.device)
    return microbatches, cross_entropy(policy, vocabulary, rows[:, 1:].size, SFTConfig())


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    """Median wall time, after two unmeasured calls; waits for the device."""
    where, times = backend.device(), []
    for number in range(repeats + 2):
        backend.synchronise(where)
        started = time.perf_counter()
        work()
        backend.synchronise(where)
        times += [time.perf_counter() - started] if number > 1 else []
    return statistics.median(times)


def bandwidth_gb_s(size: Size) -> float:
    """Read plus written, of a copy on the device."""
    source = torch.zeros(size.copy_mib << 20, dtype=torch.uint8, device=backend.device())
    into = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: into.copy_(source), size.repeats) / 1e9


def product_tflops(size: Size) -> float:
    """Of a square matrix product in bf16."""
    left = torch.ones(size.product, size.product, dtype=torch.bfloat16, device=backend.device())
    return 2 * size.product**3 / seconds_of(lambda: left @ left, size.repeats) / 1e12


def numbers(size: Size, target: Path) -> None:
    """Log-probabilities, loss and gradient of a float32 policy on this device, into an .npz file."""
    from realsr_hpc.behaviour.masks import everything_allowed
    from realsr_hpc.train.scoring import logprobs_of

    config = recipe(size, size.parity_layers, precision={"params": "fp32"})
    policy = policy_of(config, size, drawn=True)
    microbatches, loss_fn = batch_of(config, policy, size)
    allowed = everything_allowed(policy.vocab_size, policy.padded_vocab_size, policy.groups.device)
    scored = [values for values in logprobs_of(policy, microbatches, allowed) if values is not None]
    optimiser = Optimiser(policy, config, total_steps=1)
    optimiser.backward(microbatches, loss_fn, outputs := [])
    part: Any = lambda parameter: parameter.main_grad  # noqa: E731  (Megatron's attribute)
    gradients = local_to_hf(policy, part)
    arrays = {f"gradient/{name}": grad.float().cpu().numpy() for name, grad in gradients.items() if grad is not None}
    arrays["logprobs"] = torch.cat(scored).cpu().numpy()
    arrays["loss"] = np.array(sum(float(output["sft/loss/mean"]) for output in outputs))
    np.savez(target, **arrays)  # pyright: ignore[reportArgumentType]


def parity(size: Size, folder: Path, on_cpu: Callable[[], None]) -> list[Figure]:
    """The same weights and rows on this device and on the CPU, whose numbers `on_cpu` writes to `folder`/cpu.npz."""
    numbers(size, folder / "device.npz")
    on_cpu()
    with np.load(folder / "device.npz") as device, np.load(folder / "cpu.npz") as cpu:
        ours, theirs = dict(device), dict(cpu)
    gradients = [name for name in theirs if name.startswith("gradient/")]
    worst = max(
        float(np.linalg.norm(ours[name] - theirs[name]) / max(1e-12, np.linalg.norm(theirs[name])))
        for name in gradients
    )
    for name in ("device.npz", "cpu.npz"):
        (folder / name).unlink()
    return [
        Figure("log-probabilities: largest difference", apart(ours, theirs, "logprobs"), "nats", most=1e-3),
        Figure("loss: difference", apart(ours, theirs, "loss"), "nats", most=1e-4),
        Figure("gradient: largest relative difference of a tensor", worst, "", most=1e-3),
    ]


def apart(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], name: str) -> float:
    """Largest absolute difference."""
    return float(np.abs(ours[name] - theirs[name]).max())


def training(size: Size, fp8: bool) -> list[Figure]:
    """A step (forward, backward, AdamW) of some of the 7B's layers, and its share of the device's peak."""
    precision: dict[str, Any] = {"params": "bf16"}
    if fp8:
        precision |= {"fp8": "tensorwise"} | ({} if backend.on_cuda() else {"fp8_backend": "emulated"})
    config = recipe(size, size.train_layers, precision=precision)
    policy = policy_of(config, size)
    microbatches, loss_fn = batch_of(config, policy, size)
    optimiser = Optimiser(policy, config, total_steps=size.repeats + 2)
    each = seconds_of(lambda: optimiser.step(microbatches, loss_fn), size.repeats)
    tokens = size.train_rows * size.train_tokens
    matrices = sum(p.numel() for p in policy.parameters()) - policy.padded_vocab_size * size.hidden
    attention = 2 * size.train_layers * size.hidden * size.train_tokens * tokens  # causal: half of all pairs
    tflops = 3 * (2 * matrices * tokens + attention) / each / 1e12
    peak, name = product_tflops(size), backend.name_of(backend.device())
    rated = next((device.bf16_tflops for device in (H100, H200) if device.name in name), None)
    figures = [
        Figure("step", each, "s"),
        Figure("tokens", tokens / each, "/s"),
        Figure("matrix product reached", peak, "TFLOP/s"),
        Figure("step, of the matrix product reached", tflops / peak, ""),
        Figure("memory at its highest", backend.peak_bytes(backend.device()) / 2**30, "GiB"),
    ]
    if rated is not None:
        figures.append(Figure("MFU (of the data sheet's bf16)", tflops / rated, "", least=None if fp8 else 0.45))
    return figures


def decoding(size: Size) -> list[Figure]:
    """Steps of one token per rollout, logits included, against the bytes that each must read."""
    config = recipe(size, size.decode_layers)
    policy = policy_of(config, size, trainable=False)
    reached, figures = bandwidth_gb_s(size), []
    figures.append(Figure("copy, read and written", reached, "GB/s"))
    for rows in size.batches:
        hidden = {}
        for graphs in (False, True):
            policy.decode_graphs = graphs
            each, must_read, hidden[graphs] = _steps(policy, size, rows)
            share, name = must_read / each / 1e9 / reached, f"batch {rows}, {'graphs' if graphs else 'no graphs'}"
            bound = {1: 0.6, 64: 0.4}.get(rows) if graphs and backend.on_cuda() else None
            figures.append(Figure(f"{name}: tokens", rows / each, "/s"))
            figures.append(Figure(f"{name}: of the bandwidth", share, "", least=bound))
        worst = float((hidden[True] - hidden[False]).abs().max() / hidden[False].abs().max())
        figures.append(Figure(f"batch {rows}: graphs change hidden states by", worst, "", most=0.02))
    return figures


@torch.no_grad()
def _steps(policy: Policy, size: Size, rows: int) -> tuple[float, float, Tensor]:
    """Seconds of a step, bytes it must read, the last hidden states."""
    where, decoder = policy.groups.device, Decoder(policy)
    room = size.decode_steps * (size.repeats + 2)
    prompts = torch.from_numpy(np.random.default_rng(2).integers(0, policy.vocab_size, (1, size.prompt_tokens)))
    cache = decoder.new_cache(prompts.to(where), rows, room, guided=False)
    _finished(decoder.prefill(cache, prompts.to(where)))
    tokens = torch.from_numpy(np.random.default_rng(3).integers(0, policy.vocab_size, (room, rows, 1))).to(where)
    position, hidden = iter(range(room)), torch.empty(0)

    def some() -> None:
        nonlocal hidden
        for place in (next(position) for _ in range(size.decode_steps)):
            hidden = _finished(decoder.step(cache, tokens[place], np.full(rows, place)))
            decoder.logits(hidden[0, :, 0], slice(0, policy.vocab_size))

    each = seconds_of(some, size.repeats) / size.decode_steps
    width = policy.output_weight.element_size()
    read = sum(p.numel() for p in policy.parameters()) - policy.padded_vocab_size * size.hidden
    cached = 2 * size.decode_layers * size.hidden * (size.prompt_tokens + rows * room / 2)
    return each, width * (read + cached), hidden.float().clone()


def _finished(turns: Any) -> Tensor:
    """The result of a pass on one stage, which waits for nobody."""
    try:
        next(turns)
    except StopIteration as end:
        return end.value
    raise AssertionError("one pipeline stage has nobody to wait for")
