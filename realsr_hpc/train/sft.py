"""Cold start: supervised fine-tuning on true VLCoT traces (RealSR-R1).

A step reads: batch of degraded images with labels and captions -> prompts and traces -> microbatches -> cross-entropy
of the response tokens plus z-loss -> optimizer -> report. With `sft.traces`, prompts and traces are read
as tokens that were made in advance. The cross-entropy uses the scorer of the GRPO loss with a mask that allows every
token. There is no loss on the prompt, and no dropout.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from realsr_hpc import runfolder
from realsr_hpc.config.exit_codes import DONE, STOPPED
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.data.loader import LQLoader
from realsr_hpc.data.traces import TraceLoader
from realsr_hpc.parallel.pipeline import Microbatch, run_pipeline
from realsr_hpc.paths import resolve
from realsr_hpc.records import LQBatch, StepReport, TrainingSequence
from realsr_hpc.rollout.policy_restorer import PolicyRestorer
from realsr_hpc.tokenizer.trace import TraceTokenizer
from realsr_hpc.tracking.drawing import image_grid
from realsr_hpc.train.batches import plain_sequence
from realsr_hpc.train.own_codes import with_own_codes
from realsr_hpc.train.parts import Parts, build_parts
from realsr_hpc.train.sft_loss import cross_entropy, heldout_cross_entropy, means_by_part
from realsr_hpc.train.training_run import Stop, TrainingRun
from realsr_hpc.vlcot.vocabulary import IMAGE_NAMES


def main(config: RunConfig, run_dir: Path, stop: Stop = lambda: False) -> int:
    """Run the recipe; returns the exit code (see config/exit_codes.py)."""
    sft = config.sft
    parts = build_parts(config, sft.num_steps)
    run = TrainingRun(parts, run_dir, stop, sft.num_steps)
    loader = training_source(parts)
    heldout = LQLoader(config, config.data.heldout_split, sft.heldout_traces, shuffle=False).next()
    for step in range(run.resume(loader) + 1, sft.num_steps + 1):
        microbatches, num_tokens = _next_microbatches(parts, loader)
        microbatches = with_own_codes(parts, microbatches, step)
        loss = cross_entropy(parts.policy, parts.vocabulary, num_tokens, sft)
        result = parts.optimiser.step(microbatches, loss)
        metrics = {**parts.total(result.outputs), "optim/grad_norm/step": result.grad_norm, "optim/lr/step": result.lr}
        metrics["sft/shortened_texts/total"] = parts.count(parts.tokens.codec.shortened_texts)
        if step % sft.heldout_every_steps == 0 or step == sft.num_steps:
            metrics |= heldout_loss(parts, heldout)
        if sft.sample_every_steps and step % sft.sample_every_steps == 0:
            _log_samples(run, heldout, step)
        run.report(StepReport(step, metrics), _text(metrics))
        if run.must_stop(step, loader):
            run.tracker.close("KILLED")
            return STOPPED
    run.tracker.close("FINISHED")
    return DONE


def training_source(parts: Parts) -> LQLoader | TraceLoader:
    """This rank's share of `sft.batch_size` traces per step: frozen ones, or images that are tokenized as they load."""
    config, rank, size = parts.config, parts.groups.dp_rank, parts.groups.dp_size
    share = parts.per_rank(config.sft.batch_size, "sft.batch_size")
    if config.sft.traces is not None:
        return TraceLoader(config, resolve(config.sft.traces), share, dp_rank=rank, dp_size=size)
    return LQLoader(config, config.data.train_split, share, dp_rank=rank, dp_size=size)


def _next_microbatches(parts: Parts, loader: LQLoader | TraceLoader) -> tuple[list[Microbatch], int]:
    """Microbatches of the next batch that has a trace on any rank; photographs without captions have none."""
    for _ in range(len(loader) + 1):
        microbatches, num_tokens = _microbatches(parts, next_sequences(parts.tokens, loader))
        if num_tokens:
            return microbatches, num_tokens
    raise ValueError(
        f"data.train_split: {parts.config.data.train_split!r}: no readable photograph has captions; write "
        "them with realsr-hpc prepare-data captions=FILE or captioner=DIR"
    )


def next_sequences(tokens: TraceTokenizer, loader: LQLoader | TraceLoader) -> list[TrainingSequence]:
    """This rank's next batch as sequences: frozen traces, or images that are tokenized now."""
    if isinstance(loader, TraceLoader):
        return [_sequence(prompt, response) for prompt, response in loader.next()]
    return trace_sequences(tokens, loader.next())


def trace_sequences(tokens: TraceTokenizer, batch: LQBatch) -> list[TrainingSequence]:
    """Prompt and true response of each image that has one; every response token carries loss."""
    rows = zip(tokens.prompts(batch.lq), tokens.responses(batch), strict=True)
    return [_sequence(prompt, response) for prompt, response in rows if response is not None]


def _sequence(prompt: Tensor, response: list[int]) -> TrainingSequence:
    # [prompt | response]; only response tokens carry loss
    return plain_sequence(torch.cat([prompt, torch.tensor(response)]), first=len(prompt))


def _microbatches(parts: Parts, sequences: list[TrainingSequence]) -> tuple[list[Microbatch], int]:
    """Microbatches of this rank, and the loss tokens of all ranks."""
    microbatches = parts.microbatches(sequences, packing=parts.config.sft.packing)
    return microbatches, parts.count(sum(len(sequence.loss.positions) for sequence in sequences))


def heldout_loss(parts: Parts, batch: LQBatch) -> dict[str, float]:
    """Cross-entropy of the held-out traces in nats per token: over all tokens, and over each part of the trace.

    The mean over texts and images can fall while images get worse, because the short texts are memorised. Every
    data-parallel rank scores the same traces. Empty if no held-out photograph has captions.
    """
    microbatches, total = _microbatches(parts, trace_sequences(parts.tokens, batch))
    if not total:
        return {}
    parts.policy.eval()
    loss = heldout_cross_entropy(parts.policy, parts.vocabulary)
    return means_by_part(parts.total(run_pipeline(parts.policy, microbatches, loss, forward_only=True)))


def _log_samples(run: TrainingRun, batch: LQBatch, step: int) -> None:
    """Log a grid of the held-out images as the current policy restores them."""
    parts = run.parts
    cases = batch.cases()
    restored = PolicyRestorer(parts.policy, parts.tokens, parts.config)(cases)
    if parts.groups.is_main:
        path = runfolder.samples(run.run_dir, step)
        path.parent.mkdir(exist_ok=True)
        rows = [[case.lq, *item.images, case.gt] for case, item in zip(cases, restored, strict=True)]
        image_grid(rows, ("input", *IMAGE_NAMES, "truth")).save(path)
        run.tracker.log_artifact(path, "samples")


def _text(metrics: dict[str, float]) -> str:
    text = f"loss {metrics['sft/loss/mean']:.4f}"
    if "heldout/loss/mean" not in metrics:
        return text
    parts = "  ".join(f"{name} {metrics[f'heldout/loss_{name}/mean']:.3f}" for name in (*IMAGE_NAMES, "text"))
    return f"{text}  held-out {metrics['heldout/loss/mean']:.4f}  {parts}"
