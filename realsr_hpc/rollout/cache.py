"""Keys and values of rollouts during decoding, and attention over them.

A group shares its prompt: the prefix's keys and values are stored once per prompt, and all queries of the group are
multiplied with them in one product. The unconditional stream of guided rollouts has no prefix and does not see tokens
before its current image block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from realsr_hpc.parallel import backend


class Place:
    """Positions of a pass's tokens in the suffix: W consecutive ones in each of n rows."""

    def __init__(self, first: int | Tensor, width: int, length: int, starts: Tensor | None = None):
        """
        Args:
            first: position of each row's first token, int64 [n]; an int if all rows are at one position and W is 1.
            width: W, the number of tokens per row.
            length: number of cached positions that attention reads: at least up to the last token of all rows.
            starts: first position that each token of the unconditional stream sees, int64 [n, W].
        """
        self.first, self.width, self.length = first, width, length
        self.hidden: Tensor | None = None
        """bool [n, W, length]: positions that a token must not see, because they come after it; None: it sees all."""
        self.outside: Tensor | None = None
        """bool [n, W, length]: the same for the unconditional stream, which also hides earlier image blocks and
        texts."""
        self._biases: dict[bool, Tensor] = {}
        if isinstance(first, Tensor):
            self.rows = torch.arange(len(first), device=first.device)[:, None]
            self.positions = first[:, None] + torch.arange(width, device=first.device)
            self.hidden = torch.arange(length, device=first.device) > self.positions[..., None]
        if starts is not None:
            before = torch.arange(length, device=starts.device) < starts[..., None]
            self.outside = before if self.hidden is None else before | self.hidden

    def write(self, cache: Tensor, x: Tensor) -> None:
        """Write x [n W, kv, d] into cache [n, kv, T, d]."""
        if isinstance(self.first, int):  # W is 1: one column of all rows, [n, kv, d]
            cache[:, :, self.first] = x
        else:  # rows [n, 1] and positions [n, W] select [n, W, kv, d]
            cache[self.rows, :, self.positions] = x.unflatten(0, self.positions.shape)

    def bias(self, unconditional: bool, q: Tensor) -> Tensor | None:
        """The bias for the attention scores of q [n, kv, W h/kv, d]: 0 or -inf, [n, 1, W h/kv, length]; None: no bias.

        It is the same in every layer, so it is computed once per pass and stream.
        """
        hidden = self.outside if unconditional else self.hidden
        if hidden is not None and unconditional not in self._biases:
            # the h/kv queries of a token are neighbours in q: [n, W, length] -> [n, 1, W h/kv, length]
            repeated = hidden.repeat_interleave(q.shape[2] // self.width, 1)[:, None]
            self._biases[unconditional] = q.new_zeros(repeated.shape).masked_fill_(repeated, float("-inf"))
        return self._biases.get(unconditional)


class Stream:
    """Keys and values of one stream.

    Per layer: a prefix [P, kv, L, d] of P prompts of L tokens, shared by the rows of a prompt, and each row's own
    suffix [n, kv, T, d].
    """

    def __init__(self, num_layers: int, rows: int, kv_heads: int, max_tokens: int, head_dim: int, like: Tensor):
        shape = (num_layers, rows, kv_heads, max_tokens, head_dim)
        self.prefix: list[tuple[Tensor, Tensor]] = []
        # Unwritten positions are masked but still enter the products, so they must be finite.
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)

    def keep(self, rows: Tensor, prompts: Tensor, length: int) -> None:
        """Keep only these rows of these prompts; `length` suffix positions have been written."""
        for cache in (self.keys, self.values):
            for layer in cache:  # [n, kv, T, d]; layer by layer, so that only one layer is copied at a time
                layer[: len(rows), :, :length] = layer[rows, :, :length]
        self.keys, self.values = self.keys[:, : len(rows)], self.values[:, : len(rows)]
        if self.prefix and len(prompts) < len(self.prefix[0][0]):
            self.prefix = [(keys[prompts], values[prompts]) for keys, values in self.prefix]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, at: Place) -> Tensor:
        """Attention of W tokens per row: q [n W, kv, h/kv, d], k and v [n W, kv, d] -> [n W, kv, h/kv, d]."""
        at.write(self.keys[layer], k)
        at.write(self.values[layer], v)
        keys = self.keys[layer, :, :, : at.length]
        values = self.values[layer, :, :, : at.length]
        # put all queries that share a row's keys side by side, so that one product serves them:
        # [n W, kv, h/kv, d] -> [n, W, kv, h/kv, d] -> [n, kv, W h/kv, d]
        q = q.unflatten(0, (len(keys), at.width)).transpose(1, 2).flatten(2, 3)
        out, lse = backend.attention(q, keys, values, at.bias(not self.prefix, q))
        if self.prefix:
            out = self._with_prefix(layer, q, out, lse)
        # back to one row per token: [n, kv, W h/kv, d] -> [n W, kv, h/kv, d]
        return out.unflatten(2, (at.width, -1)).transpose(1, 2).flatten(0, 1)

    def _with_prefix(self, layer: int, q: Tensor, own: Tensor, own_lse: Tensor) -> Tensor:
        """Attention over prefix and suffix together, given `own` over the suffix alone and its log-sum-exp.

        Both are weighted by their shares of the common softmax's denominator (Flash-Decoding, Dao et al. 2023).
        """
        keys, values = self.prefix[layer]  # [P, kv, L, d]
        # one product per prompt for the queries of its whole group: [P, kv, G W h/kv, d] and [P, kv, G W h/kv]
        shared, lse = backend.attention(_by_prompt(q, len(keys)), keys, values)
        # share of the suffix in the joint softmax, exp(own) / (exp(own) + exp(prefix)): [n, kv, W h/kv]
        share = torch.sigmoid(own_lse - _by_row(lse[..., None], q)[..., 0])
        return torch.lerp(_by_row(shared, q), own, share[..., None].to(own.dtype))


@dataclass
class Cache:
    """The state of decoding a batch of rollouts: keys and values, and the rotary tables."""

    streams: list[Stream]
    """The conditional stream, and with guidance the unconditional one."""
    cos: Tensor
    """[L + T, d]; rotary tables of prompt and response positions."""
    sin: Tensor
    prompt_length: int

    def keep(self, rows: list[int], prompts: list[int], length: int) -> None:
        """Keep only these rows and prompts (indices into the current ones); `length` suffix positions are in use."""
        device = self.cos.device
        for stream in self.streams:
            stream.keep(torch.tensor(rows, device=device), torch.tensor(prompts, device=device), length)


def _by_prompt(x: Tensor, prompts: int) -> Tensor:
    """[n, kv, r, *] -> [P, kv, G r, *]: the queries of a prompt's whole group side by side."""
    n, kv, r, last = x.shape
    # [P G, kv, r, *] -> [P, G, kv, r, *] -> [P, kv, G, r, *] -> [P, kv, G r, *]
    return x.view(prompts, n // prompts, kv, r, last).transpose(1, 2).reshape(prompts, kv, -1, last)


def _by_row(x: Tensor, like: Tensor) -> Tensor:
    """Inverse of `_by_prompt` for rows like `like`."""
    n, kv, r, _ = like.shape
    prompts = x.shape[0]
    # [P, kv, G r, *] -> [P, kv, G, r, *] -> [P, G, kv, r, *] -> [n, kv, r, *]
    return x.view(prompts, kv, n // prompts, r, -1).transpose(1, 2).reshape(n, kv, r, -1)
