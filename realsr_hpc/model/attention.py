"""Attention masks and patterns: causal rows, packed segments, and rows of one prompt with several responses.

Attention is torch's scaled_dot_product_attention everywhere: flash kernels on both CPU and CUDA, no dropout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from realsr_hpc.parallel.layout import Branches


class SdpaAttention(torch.nn.Module):
    """Megatron's core attention, computed with torch's scaled_dot_product_attention."""

    def __init__(self, config: TransformerConfig, **_: object) -> None:
        super().__init__()
        self.grouped = config.num_query_groups != config.num_attention_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attention_bias: BranchedRows | None = None,
        **_: object,
    ) -> Tensor:
        """query [S, b, heads/tp, d], key and value [S, b, kv_heads/tp, d] -> [S, b, heads/tp * d].

        attention_mask: bool [b, 1, S, S], true where a query (row) may attend to a key (column); None: causal.
        attention_bias: the layout of branched rows; Megatron passes this argument through unchanged.
        """
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [S, b, heads, d] -> [b, heads, S, d]
        if attention_bias is not None:
            out = attention_bias.attend(q, k, v)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=attention_mask, is_causal=attention_mask is None, enable_gqa=self.grouped
            )
        # [b, heads, S, d] -> [S, b, heads, d] -> [S, b, heads * d]
        return out.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)


def segment_mask(segment_ids: Tensor) -> Tensor:
    """Causal mask within segments: ids [b, S] -> bool [b, 1, S, S], true where a query may attend to a key."""
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return same.tril()


@dataclass(frozen=True)
class BranchedRows:
    """Rows of one prompt and several responses, each of which sees the prompt and itself.

    A group's prompt is computed once and not once per rollout. With guidance the second half of the rows are the
    unconditional twins, in which a token of a response sees only its own image block.
    """

    branches: Branches
    blocks: Tensor | None
    """Number of the image block of every token of the twins, [twins, S]; None: no guidance."""

    def positions(self, row_tokens: int, device: torch.device) -> Tensor:
        """Position of each token of a row within its own sequence, int64 [S].

        Every response continues the prompt, so all responses have the same positions; the rotary embedding uses them.
        """
        prompt, response = self.branches.prompt, self.branches.response
        places = torch.arange(row_tokens, device=device)
        return torch.where(places < prompt, places, prompt + (places - prompt) % response)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [b, heads, S, d], k and v [b, kv heads, S, d] -> [b, heads, S, d], zero on padding after the responses."""
        if self.blocks is None:
            return self._conditional(q, k, v)
        rows = len(q) - len(self.blocks)
        twins = self._unconditional(q[rows:], k[rows:], v[rows:])
        return torch.cat([self._conditional(q[:rows], k[:rows], v[:rows]), twins])

    def _conditional(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rows in which each response sees the prompt and itself: [b, heads, S, d] -> [b, heads, S, d]."""
        grouped, prompt = q.shape[1] != k.shape[1], self.branches.prompt
        if self.branches.count == 1:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        # [b, h, prompt, d]: causal, computed once for all responses of a row. The copies are contiguous, because the
        # backward pass keeps them and a view would keep the whole row in memory.
        begin = (x[:, :, :prompt].contiguous() for x in (q, k, v))
        of_prompt = F.scaled_dot_product_attention(*begin, is_causal=True, enable_gqa=grouped)  # pyright: ignore[reportArgumentType]
        # [b x count, kv, prompt + response, d]: each response is a separate batch entry after a copy of the prompt
        keys, values = self._with_prompt(k), self._with_prompt(v)
        # query i of a response [response] sees the whole prompt and the response up to i
        mask = causal_lower_right(self.branches.response, keys.shape[2])
        out = F.scaled_dot_product_attention(self._responses(q), keys, values, attn_mask=mask, enable_gqa=grouped)
        return self._rows(of_prompt, out, q)

    def _unconditional(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rows in which a token sees only its own image block; zero on the prompt, which carries no loss."""
        assert self.blocks is not None, "only guided batches have unconditional rows"
        # blocks [twins, S] -> [twins x count, response] -> causal within the same image block
        mask = segment_mask(self._responses(self.blocks[:, None, :, None])[:, 0, :, 0])
        parts = (self._responses(x) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return self._rows(torch.zeros_like(q[:, :, : self.branches.prompt]), out, q)

    def _responses(self, x: Tensor) -> Tensor:
        """[b, h, S, d] -> [b x count, h, response, d]."""
        responses = x[:, :, self.branches.prompt : self.branches.tokens]
        return responses.unflatten(2, (self.branches.count, -1)).transpose(1, 2).flatten(0, 1)

    def _with_prompt(self, x: Tensor) -> Tensor:
        """[b, h, S, d] -> [b x count, h, prompt + response, d]."""
        prompt = x[:, :, : self.branches.prompt].repeat_interleave(self.branches.count, 0)
        return torch.cat([prompt, self._responses(x)], 2)

    def _rows(self, prompt: Tensor, responses: Tensor, like: Tensor) -> Tensor:
        """Inverse of `_responses`; adds the prompt before and zeros for the padding after: [b, h, S, d]."""
        # [b x count, h, response, d] -> [b, count, h, response, d] -> [b, h, count x response, d]
        side_by_side = responses.unflatten(0, (-1, self.branches.count)).transpose(1, 2).flatten(2, 3)
        return torch.cat([prompt, side_by_side, torch.zeros_like(like[:, :, self.branches.tokens :])], 2)
