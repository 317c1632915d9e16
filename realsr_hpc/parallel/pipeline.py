"""Runs forward and backward passes over the pipeline stages, with Megatron's schedules.

Losses are summed: over microbatches, and (by the optimizer's reduction) over data-parallel ranks. The caller's loss
function divides by the global token count beforehand; nothing here divides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from realsr_hpc.parallel import backend
from realsr_hpc.parallel.layout import Branches
from realsr_hpc.parallel.process_groups import ProcessGroups
from realsr_hpc.records import LossTokens

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule


@dataclass(frozen=True)
class Microbatch:
    """The input of one pipeline pass: b rows of S tokens. All microbatches of a call share b and S."""

    tokens: Tensor
    """int64 [b, S]."""
    segment_ids: Tensor | None = None
    """Packed rows, int64 [b, S]: attention stays within equal ids.

    None: each row is one causal sequence, or branched.
    """
    branches: Branches | None = None
    """How rows of one prompt and several responses are laid out; the same for all microbatches of a call."""
    image_blocks: Tensor | None = None
    """Branched rows with guidance, int64 [b / 2, S]: number of the image block of each token.

    It limits the context of the unconditional twins, which are the second half of the rows. None: there are no twins.
    """
    loss: LossTokens | None = None
    """Inputs of the loss function; None: no token of these rows carries loss."""


Outputs = dict[str, Tensor]
LossFunction = Callable[[Tensor, Tensor, Microbatch], tuple[Tensor, Outputs]]
"""(hidden [b, S, H], output_weight [V/tp, H], microbatch) -> (loss, a sum in fp32; outputs, detached)."""


class Pipelined(Protocol):
    """The model that a schedule runs: a policy, or the optimizer's wrapped chunks of one."""

    @property
    def chunks(self) -> Sequence[MegatronModule]:
        """The model chunks of this stage."""
        ...

    @property
    def groups(self) -> ProcessGroups:
        """The process groups of this rank."""
        ...


def run_pipeline(
    model: Pipelined, microbatches: list[Microbatch], loss_fn: LossFunction, *, forward_only: bool
) -> list[Outputs]:
    """Run all microbatches; returns the loss function's outputs in order on the last stage, [] on the others.

    forward_only: no gradients. Otherwise gradients are accumulated and, if the chunks are wrapped for data parallelism,
    reduced. ValueError if the microbatches do not fit the layout.
    """
    _check(model, microbatches)
    shape = microbatches[0].tokens.shape
    # Megatron sends hidden states [S/sp, b, H] between stages (sp = tp under sequence parallelism, else 1) and derives
    # this shape from seq_length and micro_batch_size.
    arguments = {
        "forward_step_func": _forward_step(loss_fn),
        "data_iterator": [iter(microbatches) for _ in model.chunks],
        "model": list(model.chunks),
        "num_microbatches": len(microbatches),
        "seq_length": shape[1],
        "micro_batch_size": shape[0],
        "forward_only": forward_only,
    }
    with backend.vendor_calls(), torch.no_grad() if forward_only else nullcontext():
        return _schedule(model)(**arguments)


def _schedule(model: Pipelined) -> Callable[..., list[Outputs]]:
    from megatron.core.pipeline_parallel import schedules

    if model.groups.pp_size == 1:
        return schedules.forward_backward_no_pipelining
    if len(model.chunks) > 1:  # several chunks per stage: interleaved 1F1B, with a smaller bubble
        return schedules.forward_backward_pipelining_with_interleaving
    return schedules.forward_backward_pipelining_without_interleaving


def _forward_step(loss_fn: LossFunction) -> Callable[..., object]:
    from megatron.core.utils import unwrap_model

    # the number of tokens by which Megatron would divide gradients; the loss is already divided
    one_token = torch.ones((), dtype=torch.int)

    def step(
        batches: Iterator[Microbatch], chunk: MegatronModule
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Outputs]]]:
        """Run one microbatch through a chunk; returns its output and the loss function that the last stage calls."""
        microbatch = next(batches)
        output = chunk(microbatch.tokens, microbatch.segment_ids, microbatch.branches, microbatch.image_blocks)

        def loss(hidden: Tensor) -> tuple[Tensor, Tensor, Outputs]:
            value, outputs = loss_fn(hidden, unwrap_model(chunk).output_layer.weight, microbatch)  # pyright: ignore[reportAttributeAccessIssue]
            # With three return values and calculate_per_token_loss, Megatron's schedule does not rescale the loss.
            return value, one_token.to(value.device), outputs

        return output, loss

    return step


def _check(model: Pipelined, microbatches: list[Microbatch]) -> None:
    if not microbatches:
        raise ValueError("microbatches is empty: every data-parallel rank passes at least one")
    shapes = {tuple(m.tokens.shape) for m in microbatches}
    if len(shapes) > 1:
        raise ValueError(f"microbatches have several shapes {sorted(shapes)}: pad them to one [b, S]")
    length = microbatches[0].tokens.shape[1]
    if model.chunks[0].config.sequence_parallel and length % model.groups.tp_size:
        raise ValueError(
            f"length {length} is not divisible by tp = {model.groups.tp_size} under sequence parallelism: "
            "pad to layout.row_multiple"
        )
    if len(model.chunks) > 1 and len(microbatches) % model.groups.pp_size:
        raise ValueError(
            f"{len(microbatches)} microbatches cannot be interleaved over pp = {model.groups.pp_size} stages: "
            "make their number a multiple of layout.microbatch_multiple"
        )
