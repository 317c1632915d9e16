"""Advantages of single tokens: a reward teaches the part of the trace that it is read from (`grpo.credit`: part).

GRPO gives every token of a rollout the rollout's advantage. For a token that a reward does not depend on this is noise,
with mean 0 but not small: the phrase that names the degradation hears mostly of how the image turned out. Here each
reward's advantage goes to the tokens of the parts it judges (`Reward.judges`). A reward that also scores every place of
its part by itself (each code of the final image, each slot of the degradation's phrase) gives the tokens of a place
that place's advantage: hundreds of comparisons in place of one.

What is given up: a token is no longer told of its later consequences, such as a text of the image it led to, and a code
of its neighbours. The estimate is therefore biased, unlike GRPO's.
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

    Rewards are the terms of the recipe. A rollout that a term could not score place by place has the term's whole
    advantage at every token.
    """
    rollouts, rewards, codec = group.rollouts, group.rewards, parts.tokens.codec
    shares = contributions(rewards.breakdown, rewards.weights, parts.config.grpo)
    epsilon = parts.config.grpo.advantage_epsilon
    places = {name: rewards.weights[name] * place_advantages(s, epsilon=epsilon) for name, s in rewards.places.items()}
    result = torch.zeros(rollouts.tokens.shape, dtype=torch.float64)
    for row, length in enumerate(rollouts.lengths.tolist()):
        tokens = rollouts.tokens[row, :length].tolist()
        part, free = torch.tensor(codec.parts_of(tokens)), ~rollouts.forced[row, :length]
        place = torch.tensor(codec.places_of(tokens))
        for name, share in shares.items():
            judged = _among(part, parts.rewards.rewards[name].judges)
            advantage = share[row].repeat(length)
            if name in places and places[name][row].isfinite().all():
                own, at = places[name][row].double(), judged & (place >= 0)
                if torch.equal(place[at].unique(), torch.arange(len(own))):
                    advantage[at] = own[place[at]]
            result[row, :length] += torch.where(free & judged, advantage, 0.0)
    return result.to(rewards.total.dtype)


def _among(part: Tensor, names: tuple[str, ...]) -> Tensor:
    """Where tokens belong to one of the parts; everywhere, also outside all parts, if all are named."""
    if names == FIELDS:
        return torch.ones_like(part, dtype=torch.bool)
    return torch.isin(part, torch.tensor([FIELDS.index(name) for name in names]))
