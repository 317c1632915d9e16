"""FP8 matrix products: switching them on and off, emulating their numerics without FP8 hardware, and FP8 rollouts.

Transformer Engine's layers need a GPU. The emulated layers are Megatron's own with rounded operands: input and weight
are rounded to FP8 values under the chosen recipe's scales and multiplied in the parameters' dtype; incoming gradients
are rounded the same way. So everything except speed can be tested on any machine: the effect of FP8 on
log-probabilities, the parity gate, the scales in checkpoints.

Scales: tensorwise, one per tensor from its own largest value; blockwise, powers of two, one for 128 inputs of a token
and for 128 x 128 of a weight; delayed, one per tensor from the largest value of the pass before (Megatron's default
history of one), which is state and is saved in checkpoints as Transformer Engine's does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any  # autograd's contexts, Megatron's layers and their arguments

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from realsr_hpc.config.schema import PrecisionConfig
from realsr_hpc.model.chunks import Policy
from realsr_hpc.model.precision import keeps_ends_in_bf16

BLOCK = 128
_INPUT, _WEIGHT, _GRADIENT = range(3)


@dataclass(frozen=True)
class Fp8Recipe:
    """How operands are rounded."""

    scaling: str
    """tensorwise, blockwise or delayed."""
    forward: torch.dtype
    backward: torch.dtype

    @classmethod
    def of(cls, precision: PrecisionConfig) -> Fp8Recipe:
        """From the recipe's precision section; `hybrid` rounds gradients to E5M2, whose range is wider."""
        backward = torch.float8_e5m2 if precision.fp8_format == "hybrid" else torch.float8_e4m3fn
        return cls(precision.fp8, torch.float8_e4m3fn, backward)


def rounded(x: Tensor, dtype: torch.dtype, largest: Tensor) -> Tensor:
    """`x` rounded to FP8 with `largest` scaled to the format's maximum; larger values saturate.

    largest: float32, one value or any shape that broadcasts with x.
    """
    top = torch.finfo(dtype).max
    scale = torch.where(largest > 0, top / largest.clamp(min=torch.finfo(torch.float32).tiny), 1.0)
    return ((x.float() * scale).clamp(-top, top).to(dtype).float() / scale).to(x.dtype)


def rounded_by_blocks(x: Tensor, dtype: torch.dtype, *, square: bool) -> Tensor:
    """`x` [..., K] rounded with power-of-two scales: one per 128 neighbours in a row, `square`: one per 128 x 128."""
    # [n, K], padded to whole blocks, then [n / block, block, K / 128, 128]: one scale per (dim 0, dim 2)
    rows = x.reshape(-1, x.shape[-1]).float()
    block = (BLOCK if square else 1, BLOCK)
    padding = [-size % side for size, side in zip(rows.shape, block, strict=True)]
    padded = F.pad(rows, (0, padding[1], 0, padding[0]))
    tiles = padded.view(padded.shape[0] // block[0], block[0], -1, BLOCK)
    top = torch.finfo(dtype).max
    # rounded up so that the scale is a power of two: multiplying by it is exact
    largest = top * torch.exp2(torch.ceil(torch.log2(tiles.abs().amax((1, 3), keepdim=True) / top)))
    whole = rounded(tiles, dtype, largest).view(padded.shape)
    return whole[: rows.shape[0], : rows.shape[1]].reshape(x.shape).to(x.dtype)


class _Rounded(torch.autograd.Function):
    """Straight-through rounding: returns `value`; the gradient passes to `x` unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _RoundedGradient(torch.autograd.Function):
    """Identity whose gradient is rounded by the layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Fp8Layer) -> Tensor:
        ctx.layer = layer
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.round(gradients[0], _GRADIENT), None


class _Fp8Layer:
    """Rounds the operands of Megatron's product; base of both linear layers."""

    fp8: Fp8Recipe | None = None
    """None: the layer multiplies without FP8."""
    fp8_on = True

    def start_fp8(self, recipe: Fp8Recipe, groups: Sequence[dist.ProcessGroup]) -> None:
        """Multiply in FP8 from now on; maxima for scaling are reduced over `groups`."""
        self.fp8, self._groups = recipe, groups
        self.largest = torch.zeros(3)
        """Delayed scaling: largest input, weight and gradient of the pass before; 0: none yet."""

    def round(self, x: Tensor, operand: int) -> Tensor:
        """Round one operand (`_INPUT`, `_WEIGHT` or `_GRADIENT`) as the recipe says."""
        recipe, updates_scale = self.fp8, operand == _GRADIENT or torch.is_grad_enabled()
        assert recipe is not None, "call start_fp8 before the first product"
        dtype = recipe.backward if operand == _GRADIENT else recipe.forward
        with torch.no_grad():
            if recipe.scaling == "blockwise":
                return rounded_by_blocks(x, dtype, square=operand == _WEIGHT)
            # tensorwise: this tensor's own maximum; delayed: the previous pass's, and this one is kept for the next
            largest = x.abs().max().float()
            if recipe.scaling == "tensorwise":
                return rounded(x, dtype, largest)
            known = self.largest[operand].to(x.device)
            # scoring must not change the scales; recomputed layers update them in their second run only
            if updates_scale:
                for group in self._groups:
                    dist.all_reduce(agreed := largest.clone(), dist.ReduceOp.MAX, group=group)
                    largest = agreed
                self.largest[operand] = largest.cpu()
            return rounded(x, dtype, torch.where(known > 0, known, largest))

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **named: Any) -> Any:
        product: Any = super()._forward_impl  # type: ignore[misc]
        if self.fp8 is None or not self.fp8_on:
            return product(input, weight, *args, **named)
        values = [_Rounded.apply(x, self.round(x, operand)) for operand, x in enumerate((input, weight))]
        return _RoundedGradient.apply(product(*values, *args, **named), self)

    def get_extra_state(self) -> Tensor | None:
        """The state of delayed scaling, under the key that Transformer Engine uses; None for the other recipes."""
        delayed = self.fp8 is not None and self.fp8.scaling == "delayed"
        return self.largest.clone() if delayed else None

    def set_extra_state(self, state: object) -> None:
        """Load the state of delayed scaling; a checkpoint written without FP8 has none."""
        if isinstance(state, Tensor) and self.fp8 is not None:
            self.largest = state.clone()


class Fp8ColumnParallelLinear(_Fp8Layer, ColumnParallelLinear):
    """Megatron's column-parallel layer with rounded operands."""


class Fp8RowParallelLinear(_Fp8Layer, RowParallelLinear):
    """Megatron's row-parallel layer with rounded operands."""


@dataclass(frozen=True)
class Fp8Weight:
    """A matrix in E4M3 with a scale per row, for rollouts: half the bytes that a decode step reads."""

    values: Tensor
    """float8_e4m3fn [out, in]."""
    scales: Tensor
    """float32 [out, 1]."""

    @classmethod
    def of(cls, weight: Tensor) -> Fp8Weight:
        """A rounded copy of a weight [out, in] of any number format."""
        return cls(*_by_rows(weight.detach()))

    def product(self, x: Tensor) -> Tensor:
        """x [n, in] -> [n, out] in x's number format; x is also rounded, per row. in and out are multiples of 16."""
        values, scales = _by_rows(x)
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            values, self.values.t(), scale_a=scales, scale_b=self.scales.t().contiguous(), out_dtype=x.dtype
        )


def _by_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, k] as float8_e4m3fn [n, k] and float32 scales [n, 1], whose product is x rounded."""
    top = torch.finfo(torch.float8_e4m3fn).max
    scales = (x.abs().amax(-1, keepdim=True).float() / top).clamp(min=torch.finfo(torch.float32).tiny)
    return (x.float() / scales).to(torch.float8_e4m3fn), scales


def start_emulation(policy: Policy, precision: PrecisionConfig) -> None:
    """Emulate FP8 in every layer that is not kept in bf16."""
    recipe, num_layers = Fp8Recipe.of(precision), policy.shapes.num_layers
    ends = (1, num_layers) if keeps_ends_in_bf16(precision, num_layers) else ()
    groups = [group for group in (policy.groups.tp, policy.groups.dp) if group.size() > 1]
    for chunk in policy.chunks:
        for layer in chunk.decoder.layers:
            if layer.layer_number not in ends:
                for module in _fp8_layers(layer):
                    module.start_fp8(recipe, groups)


def _fp8_layers(root: torch.nn.Module) -> list[_Fp8Layer]:
    return [module for module in root.modules() if isinstance(module, _Fp8Layer)]


@contextmanager
def without_fp8(policy: Policy) -> Iterator[None]:
    """Context in which the same weights multiply in bf16."""
    configs = {id(module.config): module.config for module in _configured(policy)}
    formats = {key: config.fp8 for key, config in configs.items()}
    states = [(module, module.fp8_on) for chunk in policy.chunks for module in _fp8_layers(chunk)]
    stop_fp8(policy)
    try:
        yield
    finally:
        for key, config in configs.items():
            config.fp8 = formats[key]
        for module, state in states:
            module.fp8_on = state


def stop_fp8(policy: Policy) -> None:
    """Multiply in bf16 from now on; weights, optimizer and checkpoints do not change."""
    for module in _configured(policy):
        module.config.fp8 = None  # Megatron's blocks read this in every pass
    for chunk in policy.chunks:
        for layer in _fp8_layers(chunk):
            layer.fp8_on = False


def _configured(policy: Policy) -> list[Any]:
    modules: list[Any] = [module for chunk in policy.chunks for module in chunk.modules()]
    return [module for module in modules if isinstance(getattr(module, "config", None), TransformerConfig)]
