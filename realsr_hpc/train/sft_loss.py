"""The loss of supervised fine-tuning (cross-entropy plus z-loss), and its values for each part of a trace."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from realsr_hpc.behaviour.masks import everything_allowed
from realsr_hpc.config.learning import SFTConfig
from realsr_hpc.model.policy import Policy
from realsr_hpc.parallel.pipeline import LossFunction, Microbatch, Outputs
from realsr_hpc.train.scoring import nothing_to_score, score_tokens
from realsr_hpc.vlcot.vocabulary import IMAGE_NAMES, Vocabulary


def cross_entropy(policy: Policy, vocabulary: Vocabulary, num_tokens: int, sft: SFTConfig) -> LossFunction:
    """Loss function of the pipeline: this microbatch's part of the mean over `num_tokens`.

    Tokens before a trace's first image weigh `sft.perception_weight`.
    """
    allowed = everything_allowed(policy.vocab_size, policy.padded_vocab_size, policy.groups.device)

    def loss_fn(hidden: Tensor, output_weight: Tensor, microbatch: Microbatch) -> tuple[Tensor, Outputs]:
        if microbatch.loss is None:
            return nothing_to_score(hidden, output_weight), {}
        scores = score_tokens(hidden, output_weight, microbatch.loss, allowed, policy, with_logsumexp=True)
        logprobs = scores.logprobs
        if sft.perception_weight != 1.0:
            first = images_begun(microbatch.loss.targets, vocabulary) == 0
            logprobs = torch.where(first, sft.perception_weight * logprobs, logprobs)
        loss = -logprobs.sum() / num_tokens
        regulariser = sft.z_loss * scores.logsumexp.square().sum() / num_tokens
        return loss + regulariser, {"sft/loss/mean": loss.detach(), "sft/z_loss/mean": regulariser.detach()}

    return loss_fn


def heldout_cross_entropy(policy: Policy, vocabulary: Vocabulary) -> LossFunction:
    """Loss function for evaluation: its outputs are the sums and token counts of `loss_by_part`, unweighted."""
    allowed = everything_allowed(policy.vocab_size, policy.padded_vocab_size, policy.groups.device)

    def loss_fn(hidden: Tensor, output_weight: Tensor, microbatch: Microbatch) -> tuple[Tensor, Outputs]:
        if microbatch.loss is None:
            return nothing_to_score(hidden, output_weight), {}
        scores = score_tokens(hidden, output_weight, microbatch.loss, allowed, policy)
        parts = loss_by_part(scores.logprobs.detach(), microbatch.loss.targets, vocabulary)
        return -scores.logprobs.sum(), parts

    return loss_fn


def means_by_part(outputs: dict[str, float]) -> dict[str, float]:
    """Cross-entropy in nats per token of all tokens and of each part, from the sums over all microbatches and ranks."""
    names = ("all", *IMAGE_NAMES, "text")
    means = {name: outputs[f"sum/{name}"] / max(1.0, outputs[f"count/{name}"]) for name in names}
    return {"heldout/loss/mean": means.pop("all")} | {f"heldout/loss_{name}/mean": v for name, v in means.items()}


def loss_by_part(
    logprobs: Float[Tensor, " n"], targets: Int[Tensor, " n"], vocabulary: Vocabulary
) -> dict[str, Tensor]:
    """Sums of cross-entropy and numbers of tokens: of all, of texts, and of the codes of each of the three images.

    targets: complete responses, concatenated.
    """
    image = images_begun(targets, vocabulary)  # [n]: codes after the k-th begin token belong to image k
    is_code = (targets >= vocabulary.image_first) & (targets < vocabulary.image_end)
    is_text = (targets >= vocabulary.text_first) & (targets < vocabulary.text_first + vocabulary.num_text)
    parts = {name: is_code & (image == number) for number, name in enumerate(IMAGE_NAMES, 1)}
    parts |= {"text": is_text, "all": torch.ones_like(is_text)}
    sums = {f"sum/{name}": -logprobs[chosen].sum() for name, chosen in parts.items()}
    return sums | {f"count/{name}": chosen.sum().float() for name, chosen in parts.items()}


def images_begun(targets: Int[Tensor, " n"], vocabulary: Vocabulary) -> Int[Tensor, " n"]:
    """Number of images begun up to each token within its response; a response ends with the end-of-turn token."""
    begun, ended = (targets == vocabulary.image_begin).long(), (targets == vocabulary.end_turn).long()
    response = ended.cumsum(0) - ended  # index of the response that each token belongs to, [n]
    # images per response [responses]; their sum over the earlier responses is subtracted from the running count [n]
    each = torch.zeros(int(response[-1]) + 1, dtype=torch.long, device=begun.device).index_add_(0, response, begun)
    return begun.cumsum(0) - (each.cumsum(0) - each)[response]
