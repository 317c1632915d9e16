"""Lines that a test must defend: each is changed in a copy of the tree, and its test has to fail there.

    python -m tests.mutations [WORD ...]     only mutations whose file, name or test holds one of the words

Exit code 1 when a changed line survives. Add a row to `mutation_table.py` for every rule whose loss nobody would see in
the metrics.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest

from tests.mutation_table import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = "ignore::pytest.PytestAssertRewriteWarning"
"""The vendors are imported before pytest starts."""
<<<<<<< HEAD
=======
STEP = "tests/unit/train/test_step.py::test_"
EXPERIENCE, RUN, LOSS = "realsr_hpc/train/experience.py", "realsr_hpc/train/training_run.py", "realsr_hpc/grpo/loss.py"
REWARDING = "realsr_hpc/train/rewarding.py"
GRPO, BATCHES = "realsr_hpc/train/grpo.py", "realsr_hpc/train/batches.py"
REPLACED = f"{STEP}groups_that_teach_nothing_are_replaced_by_the_next_images"
HELD_OUT = f"{STEP}held_out_images_are_sampled_alike_at_every_step_and_unlike_training"
DEVICE = "tests/second_device/test_second_device.py::test_"
PARTS = "tests/second_device/test_parts.py::test_"
DECIDES = f"{DEVICE}a_step_decides_the_same"
WHOLE_RUN = f"{DEVICE}a_run_its_resumption_its_evaluation_and_what_it_restores_are_the_same"
OWN_CODES = "tests/distributed/test_own_codes.py::test_"
BEST = f"{STEP}the_best_steps_keep_their_checkpoints"


@dataclass(frozen=True)
class Mutation:
    """`old` stands once in the file; with `new` in its place `test` must fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS = (
    Mutation(
        "own codes: read one place too early",
        "realsr_hpc/train/own_codes.py",
        "loss.positions[_is_code(loss.targets, columns)] + 1",
        "loss.positions[_is_code(loss.targets, columns)]",
        f"{OWN_CODES}a_pass_draws_each_code_after_what_the_pass_before_has_drawn",
    ),
    Mutation(
        "own codes: other noise",
        "realsr_hpc/train/own_codes.py",
        "key[codes], first=columns.start",
        "key[codes].flip(0), first=columns.start",
        f"{OWN_CODES}a_pass_draws_each_code_after_what_the_pass_before_has_drawn",
    ),
    Mutation("resample: off", EXPERIENCE, '!= "resample"', '!= "never"', REPLACED),
    Mutation(
        "resample: keep the dull",
        EXPERIENCE,
        "groups if not teaches_nothing(group)]",
        "groups if teaches_nothing(group)]",
        REPLACED,
    ),
    Mutation("resample: too many groups", EXPERIENCE, "groups = groups[: len(batch)]", "groups = groups[:]", REPLACED),
    Mutation(
        "resample: never ends early",
        EXPERIENCE,
        "            break\n",
        "            pass\n",
        f"{STEP}resampling_ends_when_all_teach_or_the_rounds_are_spent",
    ),
    Mutation(
        "resample: each rank for itself",
        EXPERIENCE,
        'if not reduce_float(float(missing), parts.groups.dp, parts.groups.device, "max")',
        "if not missing",
        f"{STEP}all_ranks_take_as_many_rounds",
    ),
    Mutation("held-out: training's draws", EXPERIENCE, "FIRST_ID + index", "index", HELD_OUT),
    Mutation(
        "held-out: number of rollouts",
        EXPERIENCE,
        "parts.config.grpo.heldout_rollouts, ids",
        "parts.config.grpo.group_size, ids",
        HELD_OUT,
    ),
    Mutation("held-out: a group of one", REWARDING, "len(rewards.total) == 1", "len(rewards.total) == 0", HELD_OUT),
    Mutation(
        "ramp: weights never move",
        GRPO,
        "parts.rewards.at_step(number)",
        "parts.rewards.at_step(1)",
        f"{STEP}a_ramped_reward_has_the_weight_of_the_step",
    ),
    Mutation(
        "updates: old log-probs of the first",
        GRPO,
        "updates_per_step > 1",
        "updates_per_step > 99",
        f"{STEP}several_updates_begin_at_the_rollouts_policy",
    ),
    Mutation(
        "updates: rollouts of one group together",
        "realsr_hpc/train/updates.py",
        "% nth == first",
        "// nth == first",
        f"{STEP}updates_take_every_nth_rollout_of_all_groups",
    ),
    Mutation("best: direction", RUN, "sign = 1.0 if", "sign = -1.0 if", BEST),
    Mutation("best: not saved when measured", RUN, 'leaving or agreed["best"] > 0', "leaving", BEST),
    Mutation(
        "greedy text: trained on",
        "realsr_hpc/rollout/choice.py",
        "kept.sum(-1) == 1",
        "kept.sum(-1) == 0",
        f"{STEP}greedy_text_carries_no_loss",
    ),
    Mutation(
        "decode: bf16 logits",
        "realsr_hpc/behaviour/distribution.py",
        "else logits.float()",
        "else logits",
        f"{STEP}decoding_in_bf16_takes_log_probabilities_in_float32",
    ),
    Mutation(
        "look-ahead: draws behind a wrong guess kept",
        "realsr_hpc/rollout/ahead.py",
        "np.logical_and.accumulate(window.fed[:, 1:] == drawn[:, :-1], axis=1)",
        "window.fed[:, 1:] == drawn[:, :-1]",
        "tests/unit/rollout/test_ahead.py",
    ),
    Mutation(
        "batches: prompts of several lengths",
        BATCHES,
        "if len(lengths) > 1:",
        "if len(lengths) > 9:",
        "tests/unit/train/test_batches.py",
    ),
    Mutation(
        "batches: rollouts not numbered through",
        BATCHES,
        "part.rollout + first",
        "part.rollout",
        "tests/unit/train/test_batches.py",
    ),
    Mutation(
        "advantages: reward weights ignored",
        "realsr_hpc/grpo/advantages.py",
        "weights[name] * configured_advantages",
        "configured_advantages",
        "tests/unit/train/test_replay.py::test_the_rewards_contributions_are_the_advantage",
    ),
    Mutation(
        "cache: prefix and suffix weighted the wrong way round",
        "realsr_hpc/rollout/cache.py",
        "torch.lerp(_by_row(shared, q), own,",
        "torch.lerp(own, _by_row(shared, q),",
        f"{STEP}several_updates_begin_at_the_rollouts_policy",
    ),
    Mutation(
        "loss: ratio not clamped",
        LOSS,
        "log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()",
        "log_ratio.exp()",
        "tests/unit/grpo/test_loss.py",
    ),
    Mutation(
        "loss: KL not clamped",
        LOSS,
        "_k3(difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))",
        "_k3(difference)",
        "tests/unit/grpo/test_loss.py",
    ),
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
)
>>>>>>> 3575445 (Second device: experts computed where they are said to be, rollouts in host memory, delayed FP8, credit by parts; mutations; changelog)


@contextmanager
def copied() -> Iterator[Path]:
    """What the tests need of the tree, in a folder that goes."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("realsr_hpc", "tests", "recipes"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "photographs"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        photographs = Path("recipes/assets/photographs")  # large, and nothing of it is changed
        (copy / photographs).symlink_to(ROOT / photographs)
        yield copy


def survives(mutation: Mutation) -> bool:
    """Whether the test passes on the changed copy; ValueError when the line is not there, or not once."""
    with copied() as copy:
        text = (copy / mutation.file).read_text(encoding="utf-8")
        if text.count(mutation.old) != 1:
            raise ValueError(
                f"{mutation.name}: {mutation.old!r} stands {text.count(mutation.old)} times in {mutation.file}"
            )
        (copy / mutation.file).write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        code = _tested(copy, mutation.test)
        if code not in (0, 1):
            raise ValueError(f"{mutation.name}: pytest ended with {code} on {mutation.test}, see above")
        return code == 0


def _tested(copy: Path, test: str) -> int:
    """pytest's exit code on the copy, in a fork that has the vendors' modules and none of ours."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        for name in [name for name in sys.modules if name.split(".")[0] in ("realsr_hpc", "tests")]:
            del sys.modules[name]
        os.chdir(copy)
        os.environ["PYTHONPATH"] = str(copy)
        sys.path.insert(0, str(copy))
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            code = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-W", IMPORTED, test]))
    except BaseException:
        traceback.print_exc()
        code = 70
    os._exit(code)


def main(words: list[str]) -> int:
    """Run the chosen mutations one after another, after their tests on the unchanged tree."""
    chosen = [m for m in MUTATIONS if not words or any(w in f"{m.name} {m.file} {m.test}" for w in words)]
    sys.path.insert(0, str(ROOT))
    for module in ("realsr_hpc.train.grpo", "tests.steps"):
        importlib.import_module(module)  # for the vendors they import
    alive = []
    for test in sorted({mutation.test for mutation in chosen}):
        with copied() as copy:
            if _tested(copy, test):
                raise ValueError(f"{test} fails on the unchanged tree: it cannot judge a mutation")
    for mutation in chosen:
        lives = survives(mutation)
        alive += [mutation.name] if lives else []
        print(f"{'SURVIVES' if lives else 'killed  '}  {mutation.name}  ({mutation.file})", flush=True)
    return 1 if alive or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
