"""Keys and values of rollouts while they are decoded, and attention over them.

A group shares its prompt: prefix keys and values are stored once a prompt and its queries meet them in one product. The
unconditional stream of guided rollouts has no prefix; what stands before the current image block is hidden from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where in the suffix a step stands, and how much of the cache it reads."""

    position: int | Tensor
    """Of the token that is fed; int64 [1] in a step of fixed shapes."""
    length: int
    """Positions read: up to the token's own, or more, which are then hidden."""

    def write(self, cache: Tensor, x: Tensor) -> None:
        """x [n, kv, d] into cache [n, kv, T, d]."""
        if isinstance(self.position, int):
            cache[:, :, self.position] = x
        else:
            cache.index_copy_(2, self.position, x[:, :, None])

    def hidden(self, starts: Tensor | None) -> Tensor | None:
        """bool [n or 1, length]: what a row does not see, before its start or after the token; None: it sees all."""
        if starts is None and isinstance(self.position, int):
            return None
        device = starts.device if starts is not None else self.position.device
        places = torch.arange(self.length, device=device)
        after = (places > self.position)[None]
        return after if starts is None else after | (places < starts[:, None])


class Stream:
    """Keys and values of one stream of rows: shared prefix [P, kv, L, d] and own suffix [n, kv, T, d] a layer."""

    def __init__(self, num_layers: int, rows: int, kv_heads: int, max_tokens: int, head_dim: int, like: Tensor):
        shape = (num_layers, rows, kv_heads, max_tokens, head_dim)
        self.prefix: list[tuple[Tensor, Tensor]] = []
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.starts: Tensor | None = None
        """First suffix position a row sees [n]; None: all, and the prefix."""

    def keep(self, rows: Tensor, prompts: Tensor, length: int) -> None:
        """Go on with these rows of these prompts; `length` suffix positions are written."""
        for cache in (self.keys, self.values):
            for layer in cache:  # one at a time: the copy is a layer's, not the cache's
                layer[: len(rows), :, :length] = layer[rows, :, :length]
        self.keys, self.values = self.keys[:, : len(rows)], self.values[:, : len(rows)]
        if self.prefix and len(prompts) < len(self.prefix[0][0]):
            self.prefix = [(keys[prompts], values[prompts]) for keys, values in self.prefix]
        self.starts = None if self.starts is None else self.starts[rows]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, at: Place) -> Tensor:
        """Attention of one token a row: q [n, kv, h/kv, d], k and v [n, kv, d] -> [n, kv, h/kv, d]."""
        at.write(self.keys[layer], k)
        at.write(self.values[layer], v)
        keys = self.keys[layer, :, :, : at.length]
        values = self.values[layer, :, :, : at.length]
        q = q * q.shape[-1] ** -0.5
        scores = (keys @ q.transpose(-1, -2)).transpose(-1, -2)
        hidden = at.hidden(self.starts)
        if hidden is not None:
            scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
        if self.starts is not None:
            return torch.softmax(scores.float(), -1).to(q.dtype) @ values
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
