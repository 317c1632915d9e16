# pyright: strict, reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false
"""Log-probabilities of given tokens under the behaviour distribution, over vocabulary shards, tile by tile.

GRPO's loss needs one number per token, but Megatron's cross-entropy holds [tokens, vocabulary] in float32. Here the
forward pass keeps three numbers per token and the backward pass recomputes the logits. Both iterate over tiles of
chunk_tokens x block_columns logits, which alone decide the peak memory. A GPU takes all columns of its shard at once; a
CPU takes blocks that stay in its caches, and then recomputing costs little time.

Supervised fine-tuning is the same function with a mask table whose single row is all True and temperature 1; its z-loss
is the square of `logsumexp`, that of the logits before mask and temperature.

Under tensor parallelism the vocabulary is split over `tp_group` in rank order. Every rank must hold the same targets
and receive the same gradient of the result. The returned gradient of `hidden` is this shard's part, which the model
sums over the group; the gradient of the weight is local.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple  # Any: autograd's contexts

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from realsr_hpc.behaviour.distribution import guided, penalty_of, project, restricted, unpack_support
from realsr_hpc.config.derived import LOGIT_CHUNK_TOKENS
from realsr_hpc.parallel import backend


class TokenScores(NamedTuple):
    """Per token, at least float32; entropy and logsumexp are zeros if not requested."""

    logprobs: Float[Tensor, " n"]
    entropy: Float[Tensor, " n"]
    """Entropy of the behaviour distribution, in nats."""
    logsumexp: Float[Tensor, " n"]
    """Log-sum-exp of the guided logits before mask and temperature."""


@dataclass(frozen=True)
class _Options:
    """The arguments of `_Score` that are not tensors."""

    first_id: int
    """Vocabulary id of the shard's first row."""
    chunk_tokens: int
    block_columns: int
    with_entropy: bool
    with_logsumexp: bool
    group: dist.ProcessGroup | None


class _Inputs(NamedTuple):
    """The tensors of `_Score`, in the order of its arguments."""

    hidden: Tensor
    weight: Tensor
    unconditional: Tensor | None
    cfg_scale: Tensor | None
    targets: Tensor
    mask_table: Tensor
    mask_ids: Tensor
    temperature: Tensor
    support: Tensor | None

    def logits(self, rows: slice, columns: slice) -> Tensor:
        """Guided logits of a tile, [c, b]."""
        logits = project(self.hidden[rows], self.weight[columns])
        if self.unconditional is None or self.cfg_scale is None:
            return logits
        return guided(logits, project(self.unconditional[rows], self.weight[columns]), self.cfg_scale[rows])

    def masks(self, first_id: int, dtype: torch.dtype) -> Tensor:
        """The masks over this shard's tokens, [M, V/tp]; a single mask comes as a penalty, which is faster to add."""
        allowed = self.mask_table[:, first_id : first_id + len(self.weight)]
        return penalty_of(allowed, dtype) if len(allowed) == 1 else allowed

    def behaviour(
        self, logits: Tensor, rows: slice, columns: slice, masks: Tensor, first_id: int, *, overwrite: bool
    ) -> Tensor:
        """Restricted and tempered logits of a tile, [c, b]; overwrite: in the memory of `logits`."""
        support, allowed = None, masks[:, columns]  # [M, b]
        if self.support is not None:
            support = unpack_support(self.support[rows], first_id + columns.start, first_id + columns.stop)
        if len(masks) > 1:
            allowed = allowed[self.mask_ids[rows]]  # [c, b]
        return restricted(logits, allowed, self.temperature[rows], support, overwrite=overwrite)

    def local_targets(self, rows: slice, columns: slice, first_id: int) -> tuple[Tensor, Tensor]:
        """Column of the target within the tile, [c, 1] (0 if another tile has it); whether this tile has it, [c, 1]."""
        column = self.targets[rows, None] - (first_id + columns.start)
        is_local = (column >= 0) & (column < columns.stop - columns.start)
        return column.where(is_local, 0), is_local


class _Partial(NamedTuple):
    """The part of a chunk's softmax that one tile or shard holds: its maximum [c], and sums [c] relative to it."""

    shift: Tensor
    """Largest value of each row."""
    total: Tensor
    """Sum of exp(value - shift)."""
    weighted: Tensor
    """Sum of exp(value - shift) x value, for the entropy; 0 if not requested."""


def _partial_softmax(values: Tensor, *, with_weighted: bool = False, overwrite: bool = False) -> _Partial:
    shift = values.amax(-1)
    # A shard with nothing allowed has shift -inf; its exponentials must be 0, not NaN.
    finite = shift.clamp_min(torch.finfo(values.dtype).min)[:, None]
    exponential = (values.sub_(finite) if overwrite else values - finite).exp_()
    weighted = torch.zeros_like(shift)
    if with_weighted:
        weighted = (exponential * values.masked_fill(values == -torch.inf, 0.0)).sum(-1)
    return _Partial(shift, exponential.sum(-1), weighted)


def _merged(blocks: Sequence[_Partial]) -> _Partial:
    """Merge the blocks of columns of one chunk, as in an online softmax."""
    if len(blocks) == 1:
        return blocks[0]
    shifts, totals, weighted = (torch.stack(column) for column in zip(*blocks, strict=True))  # [blocks, c] each
    shift = shifts.amax(0)
    scale = (shifts - shift.clamp_min(torch.finfo(shift.dtype).min)).exp()  # 0 for a block with nothing allowed
    return _Partial(shift, (totals * scale).sum(0), (weighted * scale).sum(0))


def _combine(partial: _Partial, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the shards: global shift, log of the total relative to it, and mean value under the softmax; all [n]."""
    if group is None:
        return partial.shift, partial.total.log(), partial.weighted / partial.total
    shift = partial.shift.clone()
    dist.all_reduce(shift, dist.ReduceOp.MAX, group=group)
    sums = torch.stack([partial.total, partial.weighted]) * (partial.shift - shift).exp()
    dist.all_reduce(sums, group=group)
    return shift, sums[0].log(), sums[1] / sums[0]


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _joined(parts: list[_Partial]) -> _Partial:
    return _Partial(*(torch.cat(column) for column in zip(*parts, strict=True)))


class _Score(torch.autograd.Function):
    """(logprobs, entropy, logsumexp) of targets; logits are computed once forward and once backward."""

    @staticmethod
    def forward(ctx: Any, options: _Options, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        inputs = _Inputs(*tensors)  # type: ignore[arg-type]
        behaviour, raw, chosen = [], [], []  # of each chunk
        masks = inputs.masks(options.first_id, torch.promote_types(inputs.weight.dtype, torch.float32))
        for rows in _slices(len(inputs.hidden), options.chunk_tokens):
            of_chunk = [_scored_tile(inputs, options, rows, columns, masks) for columns in _blocks(inputs, options)]
            targets, parts, raw_parts = zip(*of_chunk, strict=True)
            chosen.append(torch.stack(targets).amax(0))
            behaviour.append(_merged(parts))
            if options.with_logsumexp:
                raw.append(_merged(raw_parts))
        shift, log_total, mean = _combine(_joined(behaviour), options.group)  # [n] each, over the whole vocabulary
        target = torch.cat(chosen)
        if options.group is not None:
            dist.all_reduce(target, dist.ReduceOp.MAX, group=options.group)
        entropy = shift + log_total - mean if options.with_entropy else torch.zeros_like(shift)
        logsumexp = torch.zeros_like(shift)
        if options.with_logsumexp:
            raw_shift, raw_log_total, _ = _combine(_joined(raw), options.group)
            logsumexp = raw_shift + raw_log_total
        ctx.options = options
        ctx.save_for_backward(*tensors, masks, shift + log_total, entropy, logsumexp)
        # Difference first: a row with one allowed token has target = shift and log_total = 0, hence exactly 0.
        return (target - shift) - log_total, entropy, logsumexp

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, masks, normaliser, entropy, logsumexp = ctx.saved_tensors
        inputs, options = _Inputs(*tensors), ctx.options
        grad_hidden = torch.empty_like(inputs.hidden)  # [n, H], this shard's part
        # Chunks are summed in at least float32: bf16 would lose all but the first.
        grad_weight = torch.zeros_like(inputs.weight, dtype=normaliser.dtype) if ctx.needs_input_grad[2] else None
        grad_unconditional = None if inputs.unconditional is None else torch.empty_like(inputs.unconditional)
        for rows in _slices(len(inputs.hidden), options.chunk_tokens):
            grads = [grad[rows, None] for grad in grad_outputs]
            saved = [column[rows, None] for column in (normaliser, entropy, logsumexp)]
            to_hidden = torch.zeros_like(inputs.hidden[rows], dtype=normaliser.dtype)  # [c, H]
            to_unconditional = None if grad_unconditional is None else torch.zeros_like(to_hidden)
            for columns in _blocks(inputs, options):
                weight = inputs.weight[columns]  # [b, H]
                to_weight = None if grad_weight is None else grad_weight[columns]
                conditional = grad_logits = _grad_logits(inputs, options, rows, columns, masks, grads, saved)  # [c, b]
                if inputs.unconditional is not None and inputs.cfg_scale is not None:
                    # guided = u + s (c - u): s of the gradient goes to c, 1 - s to u
                    conditional = grad_logits * inputs.cfg_scale[rows, None].to(grad_logits.dtype)
                    of_unconditional = (grad_logits - conditional).to(weight.dtype)
                    _add_product(to_unconditional, of_unconditional, weight)
                    _add_product(to_weight, of_unconditional.t(), inputs.unconditional[rows])
                conditional = conditional.to(weight.dtype)
                _add_product(to_hidden, conditional, weight)
                _add_product(to_weight, conditional.t(), inputs.hidden[rows])
            grad_hidden[rows] = to_hidden
            if grad_unconditional is not None and to_unconditional is not None:
                grad_unconditional[rows] = to_unconditional
        grad_weight = None if grad_weight is None else grad_weight.to(inputs.weight.dtype)
        return None, grad_hidden, grad_weight, grad_unconditional, *(None,) * 6


def _blocks(inputs: _Inputs, options: _Options) -> list[slice]:
    """Columns of this shard, block by block."""
    return _slices(len(inputs.weight), options.block_columns)


def _scored_tile(
    inputs: _Inputs, options: _Options, rows: slice, columns: slice, masks: Tensor
) -> tuple[Tensor, _Partial, _Partial | None]:
    """The targets' values [c] in a tile, and its part of the softmax of behaviour logits and, on request, raw ones."""
    logits = inputs.logits(rows, columns)  # [c, b], the largest tensor; only sums over it [c] outlive this call
    raw = _partial_softmax(logits) if options.with_logsumexp else None
    values = inputs.behaviour(logits, rows, columns, masks, options.first_id, overwrite=True)
    column, is_local = inputs.local_targets(rows, columns, options.first_id)
    # The target's tile gives its value, all others -inf: a maximum over tiles and shards keeps -inf (not allowed) too.
    chosen = values.gather(-1, column).masked_fill(~is_local, -torch.inf)[:, 0]
    weighted = options.with_entropy
    return chosen, _partial_softmax(values, with_weighted=weighted, overwrite=not weighted), raw


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> None:
    """total += left right; in place if the dtypes agree, so that no second result is allocated."""
    if total is None:
        return
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _grad_logits(
    inputs: _Inputs,
    options: _Options,
    rows: slice,
    columns: slice,
    masks: Tensor,
    grads: list[Tensor],
    saved: list[Tensor],
) -> Tensor:
    """Gradient of a tile's guided logits, [c, b].

    grads: columns [c, 1] of the gradients of log-probability, entropy and logsumexp; saved: of the softmax's
    normaliser, and of entropy and logsumexp. With x = logits / T where allowed and p = softmax(x):
    d logprob / dx_j = [j = target] - p_j and d entropy / dx_j = -p_j (log p_j + entropy);
    d logsumexp / d logits = softmax(logits).
    """
    grad_logprob, grad_entropy, grad_logsumexp = grads
    normaliser, entropy, logsumexp = saved
    logits, kept = inputs.logits(rows, columns), options.with_logsumexp
    # each tensor [c, b] is overwritten as soon as it is no longer needed: a tile is the peak memory
    values = inputs.behaviour(logits, rows, columns, masks, options.first_id, overwrite=not kept)
    log_probability = values.sub_(normaliser)
    probability = log_probability.exp() if options.with_entropy else log_probability.exp_()
    grad = probability * -grad_logprob if options.with_entropy else probability.mul_(-grad_logprob)
    column, is_local = inputs.local_targets(rows, columns, options.first_id)
    grad.scatter_add_(-1, column, grad_logprob * is_local)
    if options.with_entropy:
        # masked tokens: p log p is 0, but 0 x -inf would be NaN
        finite = log_probability.masked_fill_(log_probability == -torch.inf, 0.0)
        grad -= grad_entropy * probability * (finite + entropy)
    # chain rule through x = logits / T
    grad /= inputs.temperature[rows, None].to(grad.dtype)
    if kept:
        grad += logits.sub_(logsumexp).exp_().mul_(grad_logsumexp)
    return grad


def _check(inputs: _Inputs, group_size: int) -> None:
    num_tokens, vocabulary = len(inputs.hidden), len(inputs.weight) * group_size
    if inputs.mask_table.shape[-1] != vocabulary:
        raise ValueError(
            f"mask_table has {inputs.mask_table.shape[-1]} columns, output_weight has {len(inputs.weight)} rows on "
            f"each of {group_size} shards; build the table for a vocabulary of {vocabulary}"
        )
    if (inputs.unconditional is None) != (inputs.cfg_scale is None):
        raise ValueError("unconditional_hidden and cfg_scale belong together; pass both or neither")
    for name in ("targets", "mask_ids", "temperature", "support", "unconditional", "cfg_scale"):
        value = getattr(inputs, name)
        if value is not None and len(value) != num_tokens:
            raise ValueError(f"{name} has {len(value)} rows, hidden has {num_tokens}; pass one per token")


def behaviour_scores(
    hidden: Float[Tensor, "n H"],
    output_weight: Float[Tensor, "Vlocal H"],
    targets: Int[Tensor, " n"],
    mask_table: Bool[Tensor, "M V"],
    mask_ids: Int[Tensor, " n"],
    temperature: Float[Tensor, " n"],
    *,
    support: UInt8[Tensor, "n K"] | None = None,
    unconditional_hidden: Float[Tensor, "n H"] | None = None,
    cfg_scale: Float[Tensor, " n"] | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_tokens: int = LOGIT_CHUNK_TOKENS,
    block_columns: int = 0,
    with_entropy: bool = False,
    with_logsumexp: bool = False,
) -> TokenScores:
    """Log-probability, and on request entropy and logsumexp, of each target; differentiable in hidden and weight.

    `hidden` is the output layer's input, whole on every rank of `tp_group`; `output_weight` is its vocabulary shard. A
    target that its mask or support excludes has log-probability -inf. Computes in float32 or better for any input.

    chunk_tokens, block_columns: tokens and vocabulary columns of the largest logits tile; 0 columns: as many
    as suit the device (`backend.logit_columns`).
    """
    parts = 1 if tp_group is None else dist.get_world_size(tp_group)
    rank = 0 if tp_group is None else dist.get_rank(tp_group)
    inputs = _Inputs(
        hidden, output_weight, unconditional_hidden, cfg_scale, targets, mask_table, mask_ids, temperature, support
    )
    _check(inputs, parts)
    block_columns = block_columns or backend.logit_columns(hidden.device, len(output_weight))
    group = tp_group if parts > 1 else None
    options = _Options(rank * len(output_weight), chunk_tokens, block_columns, with_entropy, with_logsumexp, group)
    if not len(hidden):
        # Keeps the graph (gradients of zero) for a rank that holds no loss token of this microbatch.
        nothing = (hidden @ output_weight.t()).sum(-1).to(torch.promote_types(hidden.dtype, torch.float32))
        return TokenScores(nothing, nothing.detach(), nothing.detach())
    return TokenScores(*_Score.apply(options, *inputs))
