# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportOptionalOperand=false
"""KV-cached decoding on the live policy weights: no second copy, no refit, at any TP x PP.

Megatron's own inference path calls the training modules token by token; this one reads the same parameters and does
only what a decode step needs. A test compares it with the training forward pass, and `rollout/mismatch_kl` monitors it
in every run. Rows are ordered by prompt, with the same number of rollouts for each. A pass takes W tokens per row,
starting at each row's own position; the next pass overwrites tokens that the sampler did not keep.

Classifier-free guidance adds a second stream of the same rows that sees only the current image block (RealSR-R1); its
linear layers are batched with the first stream's. Rotary embeddings are relative, so that stream keeps its positions.

Steps can have fixed shapes (`FixedSteps`); a CUDA graph then replays them, so that a step is a single launch.

Under pipeline parallelism a forward pass is a generator that yields before it would wait for another stage, so that the
caller can interleave several batches and no stage idles.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any  # Megatron's and Transformer Engine's linear layers

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from realsr_hpc.behaviour.distribution import gathered_logits
from realsr_hpc.model.fp8 import Fp8Weight
from realsr_hpc.model.lora import Adapters, adapters_of
from realsr_hpc.model.policy import Policy
from realsr_hpc.model.spec import HEAD_NORM_EPSILON, SwinLayer
from realsr_hpc.parallel import backend
from realsr_hpc.parallel.layout import rounded_up
from realsr_hpc.rollout.cache import Cache, Place, Stream

# In shapes: n rows, W tokens per row, m = streams x n x W tokens, H hidden size, h query and kv key heads of this
# rank's tensor-parallel shard, d head dim, P prompts of L tokens, T response tokens.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [m, kv, h/kv, d], k [m, kv, d], v [m, kv, d]) of m tokens -> context [m, h, d]."""
Turns = Generator[None, None, Tensor | None]
"""A forward pass that yields before it waits for another stage; returns the last stage's result, else None."""


@dataclass(frozen=True)
class AdaptedWeight:
    """A matrix with its low-rank adapters beside it: the same function as in training."""

    base: Tensor | Fp8Weight
    adapters: Adapters
    inner: Tensor
    """Every A of the layer, [adapters x rank, in]."""

    def product(self, x: Tensor) -> Tensor:
        """x [n, in] -> [n, out]; like the base's product a partial sum where the sum over tp follows later."""
        return _product(x, self.base) + self.adapters.outputs(F.linear(x, self.inner))


Matrix = Tensor | Fp8Weight | AdaptedWeight
"""[out, in]."""


@dataclass(frozen=True)
class LayerWeights:
    """References to one Megatron layer's parameters (this rank's shards); only the head norms' are gathered."""

    attention_norm: Tensor
    qkv: Matrix
    qk_norm_weight: Tensor
    """[kv, h/kv + 1, d]: per key head the weights of its queries, then of its key, in the order of `qkv`'s rows."""
    qk_norm_bias: Tensor
    proj: Matrix
    mlp_norm: Tensor
    fc1: Matrix
    fc2: Matrix

    @classmethod
    def of(cls, layer: torch.nn.Module, fp8: bool = False) -> LayerWeights:
        """Works for the local spec and for Transformer Engine's, whose linears hold their norm's weight.

        fp8: convert the matrices to FP8; the copies do not follow later updates.
        """
        attention, mlp = layer.self_attention, layer.mlp
        fused = hasattr(attention.linear_qkv, "layer_norm_weight")
        q_norm, k_norm = attention.q_layernorm, attention.k_layernorm
        return cls(
            attention.linear_qkv.layer_norm_weight if fused else layer.input_layernorm.weight,
            _matrix(attention.linear_qkv, fp8),
            _beside(q_norm.weight.detach(), k_norm.weight.detach()),
            _beside(q_norm.bias.detach(), k_norm.bias.detach()),
            _matrix(attention.linear_proj, fp8),
            mlp.linear_fc1.layer_norm_weight if fused else layer.pre_mlp_layernorm.weight,
            _matrix(mlp.linear_fc1, fp8),
            _matrix(mlp.linear_fc2, fp8),
        )


def _matrix(linear: Any, fp8: bool) -> Matrix:
    base = Fp8Weight.of(linear.weight) if fp8 else linear.weight
    adapters = adapters_of(linear)
    return base if adapters is None else AdaptedWeight(base, adapters, adapters.inner())


def _product(x: Tensor, matrix: Matrix) -> Tensor:
    """[n, in] -> [n, out]."""
    return F.linear(x, matrix) if isinstance(matrix, Tensor) else matrix.product(x)


def _beside(queries: Tensor, keys: Tensor) -> Tensor:
    """[h, d] and [kv, d] -> [kv, h/kv + 1, d]."""
    return torch.cat([queries.unflatten(0, (len(keys), -1)), keys[:, None]], 1)


class Decoder:
    """Runs prefill and decode steps through this rank's layers of a policy."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self.groups = policy.groups
        config = policy.config
        self.head_dim = config.kv_channels
        self.kv_heads = config.num_query_groups // self.groups.tp_size
        self.queries_per_kv = config.num_attention_heads // config.num_query_groups
        self.epsilon = config.layernorm_epsilon
        self.swin_norm = isinstance(policy.chunks[0].decoder.layers[0], SwinLayer)
        in_fp8 = policy.rollout_fp8_layers
        self.chunks = [
            [LayerWeights.of(layer, layer.layer_number in in_fp8) for layer in chunk.decoder.layers]
            for chunk in policy.chunks
        ]
        self.num_layers = sum(map(len, self.chunks))
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        self._fixed: FixedSteps | None = None

    def new_cache(self, prompts: Int[Tensor, "P L"], group_size: int, max_new_tokens: int, guided: bool) -> Cache:
        """An empty cache for `group_size` rollouts of each of these prompts."""
        size = (self.num_layers, prompts.shape[0] * group_size, self.kv_heads, max_new_tokens, self.head_dim)
        like = self.policy.chunks[0].decoder.layers[0].self_attention.linear_qkv.weight
        streams = [Stream(*size, like=like) for _ in range(2 if guided else 1)]
        length = prompts.shape[1]
        return Cache(streams, *self._rotary(length + max_new_tokens, like), length)

    @torch.no_grad()
    def prefill(self, cache: Cache, prompts: Int[Tensor, "P L"]) -> Turns:
        """Cache the prompts; returns the hidden states of their last tokens, [P, H]."""
        # [L, d] -> [P L, d]: one row per token
        cos, sin = (table[: cache.prompt_length].repeat(len(prompts), 1) for table in (cache.cos, cache.sin))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # [P L, heads, d] -> [P, heads, L, d]
            rows = [x.unflatten(0, prompts.shape).movedim(1, -2) for x in (q.flatten(1, 2), k, v)]
            q, k, v = rows[0], rows[1].contiguous(), rows[2].contiguous()
            cache.streams[0].prefix.append((k, v))
            repeated = [x.repeat_interleave(self.queries_per_kv, 1) for x in (k, v)]  # [P, h, L, d]
            out = F.scaled_dot_product_attention(q, *repeated, is_causal=True)
            return out.movedim(-2, 1).flatten(0, 1)  # [P, h, L, d] -> [P, L, h, d] -> [P L, h, d]

        hidden = yield from self._run(prompts.flatten(), attend, cos, sin)
        return None if hidden is None else hidden.view(*prompts.shape, -1)[:, -1]

    @torch.no_grad()
    def step(
        self,
        cache: Cache,
        tokens: Int[Tensor, "n W"],
        first: Int[np.ndarray, " n"],
        starts: Int[Tensor, "n W"] | None = None,
    ) -> Turns:
        """Feed W tokens per row, the first at response position `first`; returns hidden states [streams, n, W, H].

        starts: with guidance, the first response position that each token of the unconditional stream sees.
        """
        if self.policy.decode_graphs:
            if self._fixed is None or self._fixed.cache is not cache or self._fixed.rows != len(tokens):
                self._fixed = FixedSteps(self, cache, len(tokens))
            return self._fixed(tokens, first, starts)
        width, low, high = tokens.shape[1], int(first.min()), int(first.max())
        if width == 1 and low == high:
            return (yield from self.step_at(cache, tokens, Place(low, 1, low + 1, starts)))
        where = torch.from_numpy(first).to(tokens.device)
        return (yield from self.step_at(cache, tokens, Place(where, width, high + width, starts)))

    def step_at(self, cache: Cache, tokens: Tensor, at: Place) -> Turns:
        """`step` with the positions as a `Place`."""
        streams = cache.streams

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if len(streams) == 1:
                return streams[0].attend(layer, q, k, v, at).flatten(1, 2)
            # [2 n W, ...]: the conditional stream's tokens, then the unconditional one's; each has its own cache
            parts = zip(streams, *(x.chunk(len(streams)) for x in (q, k, v)), strict=True)
            return torch.cat([stream.attend(layer, *qkv, at) for stream, *qkv in parts]).flatten(1, 2)

        if isinstance(at.first, int):  # all rows at one position: [1, d], broadcast over tokens
            cos, sin = (table[cache.prompt_length + at.first].view(1, -1) for table in (cache.cos, cache.sin))
        else:
            places = (cache.prompt_length + at.positions).flatten().repeat(len(streams))
            cos, sin = cache.cos[places], cache.sin[places]  # [streams n W, d]
        hidden = yield from self._run(tokens.flatten().repeat(len(streams)), attend, cos, sin)
        return None if hidden is None else hidden.view(len(streams), *tokens.shape, -1)

    def finish(self) -> None:
        """Wait until the other stages have received what was sent to them, and release the last cache."""
        self._fixed = None
        while self._sent:
            self._sent.popleft()[0].wait()

    def _run(self, tokens: Tensor, attend: Attend, cos: Tensor, sin: Tensor) -> Turns:
        """Embedding, local layers in pipeline order, final norm: [m] -> [m, H]; None except on the last stage."""
        groups, x = self.groups, None
        offset = 0
        for index, layers in enumerate(self.chunks):
            if groups.is_first_stage and index == 0:
                x = self._embed(tokens)
            else:
                if index:  # an interleaved schedule: the chunk before this one is on another stage
                    yield
                x = self._receive(tokens.shape[0])
            for number, layer in enumerate(layers):
                x = self._layer(x, layer, offset + number, attend, cos, sin)
            offset += len(layers)
            if groups.is_last_stage and index == len(self.chunks) - 1:
                return self._norm(x, self.policy.chunks[-1].decoder.final_layernorm.weight)
            self._send(x)
        return None

    def _layer(self, x: Tensor, w: LayerWeights, number: int, attend: Attend, cos: Tensor, sin: Tensor) -> Tensor:
        """One layer, [m, H] -> [m, H]. Swin norm normalises the outputs of attention and MLP instead of the inputs."""
        y = x if self.swin_norm else self._norm(x, w.attention_norm)  # [m, H]
        # Megatron's fused layout: per key head its h/kv queries, then the key, then the value: [m, kv, h/kv + 2, d]
        qkv = _product(y, w.qkv).view(-1, self.kv_heads, self.queries_per_kv + 2, self.head_dim)
        # queries and key of each key head are normalised and rotated together: [m, kv, h/kv + 1, d]
        qk = F.layer_norm(qkv[:, :, :-1], (self.head_dim,), None, None, HEAD_NORM_EPSILON)
        qk = _rotate(qk * w.qk_norm_weight + w.qk_norm_bias, cos, sin)
        context = attend(number, qk[:, :, :-1], qk[:, :, -1], qkv[:, :, -1]).flatten(1)  # [m, h d]
        y = self._sum_tp(_product(context, w.proj))
        x = x + (self._norm(y, w.attention_norm) if self.swin_norm else y)
        y = x if self.swin_norm else self._norm(x, w.mlp_norm)
        gate, up = _product(y, w.fc1).chunk(2, -1)  # [m, ffn / tp] each
        y = self._sum_tp(_product(F.silu(gate) * up, w.fc2))
        return x + (self._norm(y, w.mlp_norm) if self.swin_norm else y)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.epsilon)

    def _embed(self, tokens: Tensor) -> Tensor:
        """Tokens [m] -> [m, H]. The table is split over tp by rows: each rank looks up its own, zeros elsewhere."""
        table = self.policy.chunks[0].embedding.word_embeddings.weight
        if self.groups.tp_size == 1:
            return F.embedding(tokens, table)
        local = tokens - self.groups.tp_rank * table.shape[0]
        outside = (local < 0) | (local >= table.shape[0])
        return self._sum_tp(F.embedding(local.masked_fill(outside, 0), table).masked_fill(outside[:, None], 0.0))

    @torch.no_grad()
    def logits(self, hidden: Float[Tensor, "m H"], columns: slice) -> Float[Tensor, "m V"]:
        """Logits of these vocabulary columns, at least float32, on the last stage."""
        return gathered_logits(hidden, self.policy.output_weight, columns, self.groups.tp)

    def _rotary(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [length, head_dim], computed in float32; the first half of sin is negated, see `_rotate`."""
        # exponents [d/2], angles [length, d/2]; both halves of a head have the same angles
        half = torch.arange(0, self.head_dim, 2, device=like.device, dtype=torch.float32) / self.head_dim
        positions = torch.arange(length, device=like.device, dtype=torch.float32)
        angles = torch.outer(positions, 1.0 / self.policy.chunks[0].rotary_base ** half)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], -1).to(like.dtype), torch.cat([-sin, sin], -1).to(like.dtype)

    def _sum_tp(self, x: Tensor) -> Tensor:
        if self.groups.tp_size > 1:
            dist.all_reduce(x, group=self.groups.tp)
        return x

    def _neighbour(self, step: int) -> int:
        return dist.get_global_rank(self.groups.pp, (self.groups.pp_rank + step) % self.groups.pp_size)

    def _receive(self, rows: int) -> Tensor:
        # hidden states [m, H] from the stage before, in the number format of the weights
        x = self.chunks[0][0].attention_norm.new_empty(rows, self.policy.config.hidden_size)
        dist.recv(x, self._neighbour(-1), group=self.groups.pp)
        return x

    def _send(self, x: Tensor) -> None:
        # A tensor that was sent two rounds of all batches ago has been received by now: waiting for it takes no time,
        # and memory stays bounded.
        if len(self._sent) > 2 * self.groups.pp_size * len(self.chunks):
            self._sent.popleft()[0].wait()
        x = x.contiguous()
        work = dist.isend(x, self._neighbour(1), group=self.groups.pp)
        assert work is not None, "isend on a rank outside its group"
        self._sent.append((work, x))


class FixedSteps:
    """Decode steps whose shapes and memory do not change while the same rows continue, so that they can be replayed.

    A step reads the cache up to the next multiple of `BUCKET` and masks the positions after its tokens. So there is one
    graph per bucket and width, for all positions in the bucket. Not for pipeline stages.
    """

    BUCKET = 128

    def __init__(self, decoder: Decoder, cache: Cache, rows: int):
        self.decoder, self.cache, self.rows = decoder, cache, rows
        device = cache.cos.device
        self.first = torch.zeros(rows, dtype=torch.long, device=device)
        self._inputs: dict[int, tuple[Tensor, Tensor | None]] = {}
        """Input buffers by width: tokens and starts, [n, W] each."""
        self._steps: dict[tuple[int, int], Callable[[], Tensor]] = {}

    def __call__(self, tokens: Tensor, first: np.ndarray, starts: Tensor | None) -> Tensor:
        """Hidden states [streams, n, W, H], in memory that the next call overwrites."""
        width = tokens.shape[1]
        if width not in self._inputs:
            self._inputs[width] = (tokens.clone(), None if starts is None else starts.clone())
        # a graph reads the memory that it was captured with, so inputs are copied there
        kept_tokens, kept_starts = self._inputs[width]
        kept_tokens.copy_(tokens)
        self.first.copy_(torch.from_numpy(first))
        if kept_starts is not None and starts is not None:
            kept_starts.copy_(starts)
        length = min(rounded_up(int(first.max()) + width, self.BUCKET), self.cache.streams[0].keys.shape[3])
        if (width, length) not in self._steps:
            self._steps[width, length] = backend.captured(lambda: self._step(width, length), tokens.device)
        return self._steps[width, length]()

    def _step(self, width: int, length: int) -> Tensor:
        tokens, starts = self._inputs[width]
        turns = self.decoder.step_at(self.cache, tokens, Place(self.first, width, length, starts))
        try:
            next(turns)
        except StopIteration as end:
            return end.value
        raise AssertionError("a step of fixed shapes waits for another pipeline stage")


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (rotate-half) of [n, kv, heads, d] with cos, signed sin [n or 1, d]."""
    return x * cos[:, None, None] + x.roll(x.shape[-1] // 2, -1) * sin[:, None, None]
