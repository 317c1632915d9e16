"""Start weights: any policy that `formats` recognises, checked against the recipe before a tensor is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from realsr_hpc.config.schema import RunConfig
from realsr_hpc.files import check_sums
from realsr_hpc.formats import open_source
from realsr_hpc.formats.fitting import policy_faults, refuse
from realsr_hpc.model.chunks import Policy
from realsr_hpc.model.hf_mapping import hf_shapes, hf_to_local
from realsr_hpc.vlcot.vocabulary import build_vocabulary


def load_start_weights(policy: Policy, folder: Path, config: RunConfig) -> None:
    """Fill the local chunks from `folder`, one tensor at a time.

    ValueError naming every setting, tensor and size that is not the recipe's, a tensor that is not finite, or a file
    that differs from the folder's `SHA256SUMS`.
    """
    try:
        if policy.groups.is_main:  # the others read the same files
            check_sums(folder)
        found = open_source(folder).policy
    except ValueError as error:
        raise ValueError(f"model.weights = {folder}: {error}") from None
    if found is None:
        raise ValueError(f"model.weights = {folder}: it holds no policy; name a folder of realsr-hpc import-weights")
    # The number of text tokens is not known here; the ids of codes and control tokens do not depend on it.
    layout = build_vocabulary(config.vlcot, config.image_tokenizer.codebook_size, 0)
    vocabulary = replace(layout, size=policy.vocab_size, num_text=policy.vocab_size - layout.text_first)
    refuse(folder, "model.weights =", config, policy_faults(found, config, vocabulary, hf_shapes(policy.shapes)))
    hf_to_local(found.read, policy)
