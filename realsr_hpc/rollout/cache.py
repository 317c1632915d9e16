"""Keys and values of rollouts while they are decoded, and attention over them.

A group shares its prompt: prefix keys and values are stored once a prompt and its queries meet them in one product. The
unconditional stream of guided rollouts has no prefix; what stands before the current image block is hidden from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class Place:
    """Where in the suffix the tokens of a pass stand: W of each of n rows, side by side."""

    def __init__(self, first: int | Tensor, width: int, length: int, seen: int = 0, starts: Tensor | None = None):
        """
        Args:
            first: position of each row's first token, int64 [n]; a number where all rows stand alike and W is 1.
            width: W.
            length: positions read: up to the last token of all rows, or more.
            seen: leading positions that every token sees.
            starts: first position that each token of the unconditional stream sees, int64 [n, W].
        """
        self.first, self.width, self.length, self.seen = first, width, length, seen
        self.hidden: Tensor | None = None
        """bool [n, W, length - seen]: what a token does not see, because it stands behind it; None: it sees all."""
        self.outside: Tensor | None = None
        """bool [n, W, length]: the same of the unconditional stream."""
        after = None
        if isinstance(first, Tensor):
            self.rows = torch.arange(len(first), device=first.device)[:, None]
            self.positions = first[:, None] + torch.arange(width, device=first.device)
            columns = torch.arange(length, device=first.device)
            after = columns > self.positions[..., None]
            self.hidden = after[..., seen:]
        if starts is not None:
            before = torch.arange(length, device=starts.device) < starts[..., None]
            self.outside = before if after is None else before | after

    def write(self, cache: Tensor, x: Tensor) -> None:
        """x [n W, kv, d] into cache [n, kv, T, d]."""
        if isinstance(self.first, int):
            cache[:, :, self.first] = x
        else:
            cache[self.rows, :, self.positions] = x.unflatten(0, self.positions.shape)


class Stream:
    """Keys and values of one stream of rows: shared prefix [P, kv, L, d] and own suffix [n, kv, T, d] a layer."""

    def __init__(self, num_layers: int, rows: int, kv_heads: int, max_tokens: int, head_dim: int, like: Tensor):
        shape = (num_layers, rows, kv_heads, max_tokens, head_dim)
        self.prefix: list[tuple[Tensor, Tensor]] = []
        self.keys = like.new_empty(shape)
        self.values = like.new_zeros(shape)  # what is not written yet is multiplied with zero: it must be finite

    def keep(self, rows: Tensor, prompts: Tensor, length: int) -> None:
        """Go on with these rows of these prompts; `length` suffix positions are written."""
        for cache in (self.keys, self.values):
            for layer in cache:  # one at a time: the copy is a layer's, not the cache's
                layer[: len(rows), :, :length] = layer[rows, :, :length]
        self.keys, self.values = self.keys[:, : len(rows)], self.values[:, : len(rows)]
        if self.prefix and len(prompts) < len(self.prefix[0][0]):
            self.prefix = [(keys[prompts], values[prompts]) for keys, values in self.prefix]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, at: Place) -> Tensor:
        """Attention of W tokens a row: q [n W, kv, h/kv, d], k and v [n W, kv, d] -> [n W, kv, h/kv, d]."""
        at.write(self.keys[layer], k)
        at.write(self.values[layer], v)
        keys = self.keys[layer, :, :, : at.length]
        values = self.values[layer, :, :, : at.length]
        shape = (len(keys), at.width, *q.shape[1:])
        q = (q * q.shape[-1] ** -0.5).view(shape).transpose(1, 2).flatten(2, 3)  # [n, kv, W h/kv, d]
        scores = (keys @ q.transpose(-1, -2)).transpose(-1, -2)
        hidden = at.hidden if self.prefix else at.outside
        if hidden is not None:
            # [n, kv, W, h/kv, length]
            part = scores.unflatten(2, (at.width, -1))[..., at.length - hidden.shape[-1] :]
            part.masked_fill_(hidden[:, None, :, None], float("-inf"))
        if not self.prefix:
            out = torch.softmax(scores.float(), -1).to(q.dtype) @ values
        else:
            out = self._with_prefix(layer, q, scores, values)
        return out.unflatten(2, (at.width, -1)).transpose(1, 2).flatten(0, 1)

    def _with_prefix(self, layer: int, q: Tensor, scores: Tensor, values: Tensor) -> Tensor:
        """Softmax over prefix and suffix together."""
        prefix_keys, prefix_values = self.prefix[layer]
        by_prompt = _by_prompt(q, prefix_keys.shape[0])
        prefix_scores = _by_row(by_prompt @ prefix_keys.transpose(-1, -2), q)
        weights = torch.softmax(torch.cat([prefix_scores, scores], -1).float(), -1).to(q.dtype)
        split = prefix_scores.shape[-1]
        from_prefix = _by_prompt(weights[..., :split], prefix_keys.shape[0]) @ prefix_values
        return _by_row(from_prefix, q).add_(weights[..., split:] @ values)


@dataclass
class Cache:
    """What decoding a batch of rollouts keeps between its steps."""

    streams: list[Stream]
    """The rollouts', and with guidance the unconditional one."""
    cos: Tensor
    """[L + T, d]; rotary tables of prompt and response positions."""
    sin: Tensor
    prompt_length: int

    def keep(self, rows: list[int], prompts: list[int], length: int) -> None:
        """Go on with these rows and prompts (indices among the present ones) after `length` response tokens."""
        device = self.cos.device
        for stream in self.streams:
            stream.keep(torch.tensor(rows, device=device), torch.tensor(prompts, device=device), length)


def _by_prompt(x: Tensor, prompts: int) -> Tensor:
    """[n, kv, r, *] -> [P, kv, G r, *]: the group's queries side by side."""
    n, kv, r, last = x.shape
    return x.view(prompts, n // prompts, kv, r, last).transpose(1, 2).reshape(prompts, kv, -1, last)


def _by_row(x: Tensor, like: Tensor) -> Tensor:
    """Inverse of `_by_prompt` for rows like `like`."""
    n, kv, r, _ = like.shape
    prompts = x.shape[0]
    return x.view(prompts, kv, n // prompts, r, -1).transpose(1, 2).reshape(n, kv, r, -1)
