"""Restore images with a policy: build prompts, sample one or several traces for each, decode their images."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from realsr_hpc.config.derived import widest_lookahead
from realsr_hpc.config.learning import RolloutConfig
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.model.policy import Policy
from realsr_hpc.records import Case, RestoredImage, lq_pixels
from realsr_hpc.rollout.sampler import Sampler
from realsr_hpc.tokenizer.trace import TraceTokenizer
from realsr_hpc.vlcot.grammar import Grammar

FIRST_ID = 1 << 40
"""Smallest rollout number used for restoring: training's are below, so that the two never share random draws."""


class PolicyRestorer:
    """Calls a policy on LQ images of one size; the same images and seed give the same result.

    Several threads may call it at once.
    """

    def __init__(
        self,
        policy: Policy,
        tokens: TraceTokenizer,
        config: RunConfig,
        *,
        constrained: bool = True,
        with_steps: bool = True,
    ):
        """constrained: force a well-formed trace, even if the recipe trains with another grammar.

        with_steps: also decode the rough and middle images.
        """
        self.policy, self.tokens, self.seed = policy, tokens, config.seed
        self.with_steps = with_steps
        self._grammar = Grammar(tokens.codec, "constrained" if constrained else config.rollout.grammar)
        self._options = sampling(config)
        self._of_thread = threading.local()

    @property
    def sampler(self) -> Sampler:
        """The current thread's sampler; threads do not share one, because a sampler counts and measures passes."""
        if not hasattr(self._of_thread, "sampler"):
            self._of_thread.sampler = Sampler(self.policy, self._grammar, self._options, self.seed)
        return self._of_thread.sampler

    def image_bytes(self) -> int:
        """Bytes of keys and values that restoring one image needs."""
        config, options, codec = self.policy.config, self._options, self.tokens.codec
        prompt = len(codec.prompt(np.zeros([codec.side(codec.config.lq_size_px)] * 2, dtype=np.int64)))
        streams = 2 if options.cfg_scale != 1.0 else 1
        own = streams * (options.max_new_tokens + widest_lookahead(options))
        head_dim = self.policy.shapes.head_dim
        numbers = 2 * config.num_layers * self.policy.shapes.kv_heads * head_dim
        return (prompt + own) * numbers * config.params_dtype.itemsize

    def __call__(self, cases: Sequence[Case]) -> list[RestoredImage]:
        """One restored image per case."""
        return [candidates[0] for candidates in self.candidates(cases, 1)]

    def candidates(self, cases: Sequence[Case], count: int) -> list[list[RestoredImage]]:
        """`count` restored images per case, which share the prompt's keys and values."""
        ids = [FIRST_ID + case.index * count + member for case in cases for member in range(count)]
        self.policy.eval()
        groups = self.sampler.generate(self.tokens.prompts(lq_pixels(cases)), count, ids)
        traces = [trace for group in groups for trace in self.tokens.codec.parse_group(group)]
        none = [None] * len(traces)
        decoded = [
            self.tokens.decode([trace.images[number] for trace in traces]) if is_wanted else none
            for number, is_wanted in enumerate((self.with_steps, self.with_steps, True))  # rough, middle, final
        ]
        images = zip(*decoded, strict=True)  # [3][traces] -> three of each trace
        restored = [RestoredImage(trace, three) for trace, three in zip(traces, images, strict=True)]
        return [restored[start : start + count] for start in range(0, len(restored), count)]


def sampling(config: RunConfig) -> RolloutConfig:
    """The recipe's section `rollout` with the sampling settings of its section `restore`."""
    chosen = config.restore
    cfg_scale = config.rollout.cfg_scale if chosen.cfg_scale is None else chosen.cfg_scale
    return config.rollout.model_copy(
        update={**chosen.model_dump(), "image_adaptive_top_k": False, "cfg_scale": cfg_scale}
    )
