"""The same code on a device that is not the host: the same numbers, and no tensor on the wrong side.

What a GPU would refuse is refused here (tests/second_device/far.py), so these tests fail for a tensor that is made
without its device. Kernels are the CPU's: floats agree to rounding, whole numbers are equal. Adam's epsilon is large,
so that it does not blow rounding up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.distributed.launcher import run_ranks
from tests.second_device.cases import apart, drawn_codes, on_both, one_step, train_and_use

TOLERANCE, OF_BF16 = 1e-5, 0.1
SMOOTH = {"epsilon": 0.01}

GUIDED = {
    "grammar": "constrained", "cfg_scale": 0.8, "temperature": 0.9, "text_temperature": 1.1,
    "image_adaptive_top_k": True, "text_top_k": 50, "lookahead": 4,
}  # fmt: skip
STEPS: dict[str, dict[str, Any]] = {
    "look-ahead, adapters, two updates": {
        "rollout": {"lookahead": 4},
        "model": {"lora": {"rank": 3, "alpha": 6.0}},
        "grpo": {"kl_beta": 0.01, "updates_per_step": 2},
    },
    "guided, truncated, fixed shapes": {
        "rollout": GUIDED,
        "parallel": {"decode_graphs": True, "microbatch_tokens": 400},
    },
    "bf16, emulated FP8, one by one": {
        "precision": {"params": "bf16", "fp8": "tensorwise", "fp8_backend": "emulated", "rollout_fp8": True},
        "rollout": {"grammar": "modality", "max_new_tokens": 40, "top_p": 0.9, "lookahead": 1},
        "parallel": {"distributed_optimizer": True, "recompute": "full"},
        "grpo": {"mismatch_kl_gate": 1.0},
    },
    "delayed FP8, credit by parts, bounded mismatch": {
        "precision": {"params": "bf16", "fp8": "delayed", "fp8_backend": "emulated"},
        "rollout": {"grammar": "modality", "max_new_tokens": 40, "lookahead": 1},
        "grpo": {"mismatch_kl_gate": 1.0, "mismatch_bounds": (0.01, 100.0), "credit": "part"},
    },
}
SMALL = [
    "vlcot.image_sizes_px=[32,64,96]",
    "vlcot.lq_size_px=32",
    "vlcot.max_text_tokens=4",
    "vlcot.text_slots=null",
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.ffn_hidden_size=48",
    "model.weights=null",
    "rollout.grammar=constrained",
    "rollout.max_new_tokens=540",
    "rollout.lookahead=4",
    "checkpoint.every_steps=1",
    "optim.warmup_steps=0",
    "optim.epsilon=0.01",
    "cluster.tasks_per_node=1",
]
GRPO = [
    "recipe=grpo_tiny",
    "grpo.num_steps=2",
    "grpo.prompts_per_step=1",
    "grpo.group_size=3",
    "grpo.kl_beta=0.01",
    "grpo.heldout_every_steps=2",
    "grpo.heldout_prompts=1",
    "parallel.reference_offload=true",
    "tracking.replay_every_steps=1",
]
SFT = [
    "recipe=sft_tiny",
    "sft.num_steps=2",
    "sft.batch_size=2",
    "sft.heldout_every_steps=2",
    "sft.heldout_traces=1",
    "sft.sample_every_steps=2",
    "optim.lr=0.00001",
    "optim.min_lr=0.000001",
]


@pytest.mark.parametrize("case", list(STEPS))
def test_a_step_decides_the_same(case):
    """Tokens, log-probabilities of sampler and scorer, images, losses and the weights after the update."""
    [near], [far] = on_both(one_step, {"optim": SMOOTH} | STEPS[case])
    assert np.ptp([value for row in near["scored"] if row for value in row]) > 0
    assert apart(far, near) <= (OF_BF16 if "FP8" in case else TOLERANCE)


def test_tensor_parallel_ranks_decide_the_same():
    """Two ranks; gloo carries what lies on the second device."""
    sections = {"rollout": GUIDED, "parallel": {"tp": 2, "sequence_parallel": True}, "optim": SMOOTH}
    near, far = on_both(one_step, sections, ranks=2)
    assert apart(far, near) <= TOLERANCE and far[0]["tokens"] == far[1]["tokens"]


def test_a_run_its_resumption_its_evaluation_and_what_it_restores_are_the_same(tmp_path):
    """From photographs through DALI, tokenizers, the recipe's rewards and checkpoints to PNG files."""
    [near], [far] = on_both(train_and_use, [*GRPO, *SMALL], tmp_path, True)
    assert set(near["metrics"]) >= {1, 2} and near["metrics"][2]["rewards/total/mean"] > 0
    assert len(near["images"]) > 6 and apart(far, near) <= TOLERANCE


def niqe_on_both() -> tuple[list[float], list[float]]:
    """NIQE of two images, here and on the second device."""
    from realsr_hpc.paths import project_root
    from realsr_hpc.quality.niqe import NIQEModel, niqe
    from tests.second_device.far import FarTensor, far_device

    model = NIQEModel.load(project_root() / "recipes" / "assets" / "tiny" / "niqe_pristine.npz")
    images = list(np.random.default_rng(0).integers(0, 256, (2, 96, 128, 3), dtype=np.uint8))
    with far_device() as device:
        near, made = niqe(images, model).tolist(), FarTensor.made
        far = niqe(images, model, device).tolist()
        assert FarTensor.made > made + 50, "nothing was computed on the second device"
        return near, far


def test_niqe_is_the_same():
    [(near, far)] = run_ranks(1, niqe_on_both)
    assert far == near and near[0] != near[1]


def test_supervised_training_and_its_resumption_are_the_same(tmp_path):
    [near], [far] = on_both(train_and_use, [*SFT, *SMALL, "sft.packing=true"], tmp_path, False)
    assert near["metrics"][2]["sft/loss/mean"] > 1
    assert apart(far, near) <= 10 * TOLERANCE  # two updates blow rounding up


def test_the_policy_draws_the_same_codes_to_train_on(tmp_path):
    [near], [far] = on_both(drawn_codes, [*SFT, *SMALL], tmp_path)
    assert far == near and near["before"] != near["after"]
