"""Advantages of single tokens: a reward teaches the part of the trace that it is read from (`grpo.credit`: part).

GRPO gives every token of a rollout the rollout's advantage. For a token that a reward does not depend on, this
advantage is noise: its mean is 0, but it is not small. The phrase that names the degradation, for example, is mostly
credited with how the image turned out. Here each reward's advantage goes to the tokens of the parts that it judges
(`Reward.judges`). A reward may also score every place of its part separately (each code of the final image, each slot
of the degradation's phrase); then the tokens of a place receive that place's advantage, which makes hundreds of
comparisons per group instead of one.

The price: a token receives no credit for its later consequences (a text for the image that it led to, a code for its
neighbours). The estimate is therefore biased, unlike GRPO's.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from realsr_hpc.grpo.advantages import contributions, place_advantages
from realsr_hpc.records import ScoredGroup
from realsr_hpc.train.parts import GRPOParts
from realsr_hpc.vlcot.sequence import FIELDS


def token_advantages(parts: GRPOParts, group: ScoredGroup) -> Float[Tensor, "G T"]:
    """Advantage of every response token of the group, aligned with `RolloutGroup.tokens`; 0 where nothing is taught.

    Rewards are the terms of the recipe. If a term could not score a rollout place by place, every token that the term
    judges has the rollout's advantage of that term.
    """
    rollouts, rewards, codec = group.rollouts, group.rewards, parts.tokens.codec
    shares = contributions(rewards.breakdown, rewards.weights, parts.config.grpo)
    epsilon = parts.config.grpo.advantage_epsilon
    places = {name: rewards.weights[name] * place_advantages(s, epsilon=epsilon) for name, s in rewards.places.items()}
    # shares: each term's advantages [G]; places: those of its places, [G, places]
    result = torch.zeros(rollouts.tokens.shape, dtype=torch.float64)
    for row, length in enumerate(rollouts.lengths.tolist()):
        tokens = rollouts.tokens[row, :length].tolist()
        # [length] each: the part (index in FIELDS) and the place that a token belongs to, -1: none
        part, free = torch.tensor(codec.parts_of(tokens)), ~rollouts.forced[row, :length]
        place = torch.tensor(codec.places_of(tokens))
        for name, share in shares.items():
            judged = _among(part, parts.rewards.rewards[name].judges)
            advantage = share[row].repeat(length)
            if name in places and places[name][row].isfinite().all():
                own, at = places[name][row].double(), judged & (place >= 0)
                # only if the trace has exactly the places that were scored
                if torch.equal(place[at].unique(), torch.arange(len(own))):
                    advantage[at] = own[place[at]]
            result[row, :length] += torch.where(free & judged, advantage, 0.0)
    return result.to(rewards.total.dtype)


def _among(part: Tensor, names: tuple[str, ...]) -> Tensor:
    """Which tokens belong to one of the named parts, bool [length]; every token, even outside all parts, if all are."""
    if names == FIELDS:
        return torch.ones_like(part, dtype=torch.bool)
    return torch.isin(part, torch.tensor([FIELDS.index(name) for name in names]))
