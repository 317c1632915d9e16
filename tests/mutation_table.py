"""The lines that a test must defend (see `mutations.py`): file, line, changed line, and the test that has to fail."""

from __future__ import annotations

from dataclasses import dataclass

STEP = "tests/unit/train/test_step.py::test_"
EXPERIENCE, RUN, LOSS = "realsr_hpc/train/experience.py", "realsr_hpc/train/training_run.py", "realsr_hpc/grpo/loss.py"
REWARDING = "realsr_hpc/train/rewarding.py"
GRPO, BATCHES = "realsr_hpc/train/grpo.py", "realsr_hpc/train/batches.py"
REPLACED = f"{STEP}groups_that_teach_nothing_are_replaced_by_the_next_images"
HELD_OUT = f"{STEP}held_out_images_are_sampled_alike_at_every_step_and_unlike_training"
OWN_CODES = "tests/distributed/test_own_codes.py::test_"
BEST = f"{STEP}the_best_steps_keep_their_checkpoints"
GUIDED = f"{STEP}guided_rollouts_are_scored_as_they_were_sampled"
ONE_GRADIENT = "tests/unit/grpo/test_loss.py::test_only_the_policy_gets_a_gradient"
LOGPROBS = "realsr_hpc/behaviour/logprobs.py"
PLAIN_SOFTMAX = "tests/unit/behaviour/test_logprobs.py::test_values_and_gradients_equal_plain_softmax"
AHEAD, CACHE, IDENTITY = "realsr_hpc/rollout/ahead.py", "realsr_hpc/rollout/cache.py", "realsr_hpc/config/identity.py"
IDENTITIES, MANIFESTS = "tests/unit/config/test_identity.py", "tests/unit/checkpoint/test_manifest.py"


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
        f"{STEP}all_ranks_take_as_many_rounds_and_count_the_updates_of_all",
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
        "tests/unit/train/test_updates.py::test_updates_take_every_nth_rollout_of_all_groups",
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
        "look-ahead: the unconditional stream begins a token late",
        AHEAD,
        "start, count + step - 1)",
        "start, count + step)",
        GUIDED,
    ),
    Mutation(
        "look-ahead: where the unconditional stream begins is forgotten",
        AHEAD,
        "self._start[rows[some]] = window.starts[some, last]",
        "pass",
        GUIDED,
    ),
    Mutation(
        "cache: the unconditional stream sees what is not final",
        CACHE,
        "before if self.hidden is None else before | self.hidden",
        "before",
        GUIDED,
    ),
    Mutation(
        "cache: the unconditional stream misses its first token",
        CACHE,
        "< starts[..., None]",
        "<= starts[..., None]",
        GUIDED,
    ),
    Mutation(
        "scores: blocks of columns weighed alike",
        LOGPROBS,
        "(totals * scale).sum(0)",
        "totals.sum(0)",
        PLAIN_SOFTMAX,
    ),
    Mutation(
        "scores: a block's targets counted from the shard's first column",
        LOGPROBS,
        "- (first_id + columns.start)",
        "- first_id",
        PLAIN_SOFTMAX,
    ),
    Mutation(
        "loss: gradient through the policy before the updates",
        LOSS,
        "_masked(old_logprobs, mask).detach()",
        "_masked(old_logprobs, mask)",
        ONE_GRADIENT,
    ),
    Mutation(
        "loss: gradient through the reference",
        LOSS,
        "reference = _masked(reference_logprobs, mask).detach()",
        "reference = _masked(reference_logprobs, mask)",
        ONE_GRADIENT,
    ),
    Mutation(
        "loss: gradient through the mismatch weight",
        LOSS,
        "k = (old_logprobs - rollout_logprobs).detach().exp()",
        "k = (old_logprobs - rollout_logprobs).exp()",
        ONE_GRADIENT,
    ),
    Mutation(
        "loss: metrics keep the graph",
        LOSS,
        "(value.detach() * mask).sum() / counts.num_tokens",
        "(value * mask).sum() / counts.num_tokens",
        ONE_GRADIENT,
    ),
    Mutation(
        "advantages: in float32",
        "realsr_hpc/grpo/advantages.py",
        "exact = rewards.double()",
        "exact = rewards",
        "tests/unit/grpo/test_advantages.py",
    ),
    Mutation(
        "advantages: rounding is a signal",
        "realsr_hpc/grpo/advantages.py",
        "centred = centred.masked_fill(zero_variance(rewards)[..., None], 0.0)",
        "pass",
        "tests/unit/grpo/test_advantages.py",
    ),
    Mutation(
        "signature: a field's own mark is ignored",
        IDENTITY,
        "own.tasks or section.mark.tasks)",
        "section.mark.tasks)",
        IDENTITIES,
    ),
    Mutation(
        "signature: the layout is left out",
        IDENTITY,
        'if mark.role != "operation" and task in (mark.tasks or ()) and path not in WORLD',
        'if mark.role == "decides" and task in (mark.tasks or ()) and path not in WORLD',
        IDENTITIES,
    ),
    Mutation(
        "signature: the scheme does not follow the tasks",
        IDENTITY,
        "[mark.role, sorted(mark.tasks or ())]",
        "[mark.role]",
        IDENTITIES,
    ),
    Mutation(
        "differences: another number of processes",
        IDENTITY,
        "return found if sizes[0] == sizes[1] else",
        "return found if True else",
        IDENTITIES,
    ),
    Mutation(
        "differences: another name",
        IDENTITY,
        'key in ("name", "task") or any',
        "any",
        IDENTITIES,
    ),
    Mutation(
        "checkpoints: one more than asked for",
        "realsr_hpc/checkpoint/integrity.py",
        "[-keep.last :]",
        "[-keep.last - 1 :]",
        MANIFESTS,
    ),
    Mutation(
        "checkpoints: a share is not verified",
        "realsr_hpc/checkpoint/integrity.py",
        "largest_first[number::num_shares]",
        "largest_first[number + 1 :: num_shares]",
        MANIFESTS,
    ),
    Mutation(
        "rewards: every reward is gated",
        "realsr_hpc/rewards/mixture.py",
        "if reward.needs_image and self.config.gate_malformed",
        "if self.config.gate_malformed",
        "tests/unit/rewards/test_mixture.py",
    ),
    Mutation(
        "look-ahead: guessed from the wrong code",
        "realsr_hpc/vlcot/grammar.py",
        "copies = side + 1 if row",
        "copies = side if row",
        "tests/unit/vlcot/test_vlcot.py",
    ),
)
