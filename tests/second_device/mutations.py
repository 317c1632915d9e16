"""Tensors that are made without their device, or left on it: the tests here must fail for each (tests/mutations.py)."""

from __future__ import annotations

from tests.mutation_table import Mutation

DEVICE, PARTS = "tests/second_device/test_second_device.py::test_", "tests/second_device/test_parts.py::test_"
DECIDES = f"{DEVICE}a_step_decides_the_same"
WHOLE_RUN = f"{DEVICE}a_run_its_resumption_its_evaluation_and_what_it_restores_are_the_same"

DEVICE_MUTATIONS = (
    Mutation(
        "device: places in the sampler's cache",
        "realsr_hpc/rollout/cache.py",
        "torch.arange(width, device=first.device)",
        "torch.arange(width)",
        DECIDES,
    ),
    Mutation(
        "device: what a token does not see yet",
        "realsr_hpc/rollout/cache.py",
        "torch.arange(length, device=first.device)",
        "torch.arange(length)",
        DECIDES,
    ),
    Mutation(
        "device: ranks of truncated logits",
        "realsr_hpc/behaviour/distribution.py",
        "torch.arange(values.shape[-1], device=values.device)",
        "torch.arange(values.shape[-1])",
        DECIDES,
    ),
    Mutation(
        "device: codes that become rewarded and restored pixels",
        "realsr_hpc/tokenizer/trace.py",
        "self.image.decode(part.to(self.device))",
        "self.image.decode(part)",
        WHOLE_RUN,
    ),
    Mutation(
        "device: restored pixels that NumPy reads",
        "realsr_hpc/tokenizer/trace.py",
        ".movedim(1, -1).cpu()",
        ".movedim(1, -1)",
        WHOLE_RUN,
    ),
    Mutation(
        "device: borders in NIQE's filter",
        "realsr_hpc/quality/niqe.py",
        "torch.arange(-pad, size + pad, device=field.device)",
        "torch.arange(-pad, size + pad)",
        f"{DEVICE}niqe_is_the_same",
    ),
    Mutation(
        "device: pixels that NIQE is computed from",
        "realsr_hpc/quality/niqe.py",
        "luminance(stack).to(device)",
        "luminance(stack)",
        f"{DEVICE}niqe_is_the_same",
    ),
    Mutation(
        "device: a ranker that stays in host memory",
        "realsr_hpc/rewards/generation.py",
        "RANKER_PATH)).to(device)",
        "RANKER_PATH))",
        f"{PARTS}rewards_that_stay_or_rest_in_host_memory_score_the_same",
    ),
    Mutation(
        "device: an expert that is left where it rests",
        "realsr_hpc/rewards/mixture.py",
        "        reward.to(self.device)",
        "        pass",
        f"{PARTS}rewards_that_stay_or_rest_in_host_memory_score_the_same",
    ),
    Mutation(
        "device: lengths of rollouts",
        "realsr_hpc/rollout/sampled.py",
        "self.lengths.cpu()",
        "self.lengths",
        DECIDES,
    ),
    Mutation(
        "device: images that start a tokenizer",
        "realsr_hpc/train/tokenizer.py",
        "[batch.to(self.device) for batch in batches]",
        "list(batches)",
        f"{PARTS}an_image_tokenizer_is_trained_the_same",
    ),
    Mutation(
        "device: adapters of another pipeline stage",
        "realsr_hpc/model/whole_adapters.py",
        "first.new_empty(whole_shape(name, policy))",
        "torch.empty(whole_shape(name, policy))",
        f"{PARTS}ranks_export_the_same",
    ),
    Mutation(
        "device: prompts of the exported processor",
        "realsr_hpc/export/shipped/processing_realsr.py",
        "tokens.tolist()], device=parameter.device)",
        "tokens.tolist()])",
        f"{PARTS}the_exported_processor_restores_the_same",
    ),
    Mutation(
        "device: a reference that stays in host memory",
        "realsr_hpc/model/chunks.py",
        'torch.device("cpu") if to_host else self.groups.device',
        'torch.device("cpu")',
        WHOLE_RUN,
    ),
    Mutation(
        "device: responses of supervised training",
        "realsr_hpc/train/sft_loss.py",
        "dtype=torch.long, device=begun.device)",
        "dtype=torch.long)",
        f"{DEVICE}supervised_training_and_its_resumption_are_the_same",
    ),
    Mutation(
        "device: sequences of a packed row",
        "realsr_hpc/train/batches.py",
        "segments.to(device)",
        "segments",
        f"{DEVICE}supervised_training_and_its_resumption_are_the_same",
    ),
)
