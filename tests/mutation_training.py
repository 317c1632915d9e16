"""More lines of training, sampling and scoring that a test must defend, in the form of `mutation_rooms.py`."""

from __future__ import annotations

TRAIN = "tests/unit/train/"
UPDATES = "tests/unit/train/test_updates.py::test_"
STEP = "tests/unit/train/test_step.py::test_"
RUN = f"{TRAIN}test_training_run.py::test_"
SAMPLED = "tests/unit/rollout/test_sampler.py::test_"
SFT = "tests/unit/train/test_sft.py::test_"
OPENED = "tests/unit/restore/test_model.py::test_"
DRAWN = "tests/unit/behaviour/test_distribution.py::test_"
AHEAD = "tests/unit/rollout/test_ahead.py::test_"
WIDTH = "tests/unit/rollout/test_width.py::test_"

ROWS: dict[tuple[str, str], tuple[tuple[str, str, str], ...]] = {
    ("train/batches.py", f"{TRAIN}test_batches.py"): (
        ("a token predicts itself", "torch.arange(first - 1, len(tokens) - 1)", "torch.arange(first, len(tokens))"),
        ("packed sequences see each other", "segments[row, places] = number", "segments[row, places] = 0"),
        ("packed from the shortest", "key=lambda n: -len", "key=lambda n: len"),
        ("responses overlap", "number * shared.response", "number * (shared.response - 1)"),
        ("twins not counted", "_parts(rows, parallel, row_tokens * streams)", "_parts(rows, parallel, row_tokens)"),
        ("branches forgotten in joining", "branches=first.branches", "branches=None"),
        ("positions of the first in joining", "part.loss.positions + number * stream_tokens", "part.loss.positions"),
        ("advantages of tokens lost", "_cat([part.token_advantages for part in parts], device)", "None"),
        ("one image block", "places] = sequence.image_blocks", "places] = sequence.image_blocks * 0"),
    ),
    ("train/updates.py", f"{UPDATES}a_rollouts_loss_tokens_carry_what_they_were_drawn_under"): (
        ("rollouts without a choice", "enumerate(free) if len(places))", "enumerate(free))"),
        ("padding is read", "rollouts.tokens[row, : rollouts.lengths[row]]", "rollouts.tokens[row]"),
        ("masks of the first rollout", "rollouts.mask_ids[row, free]", "rollouts.mask_ids[0, free]"),
        ("support of the first rollout", "rollouts.support[row, free]", "rollouts.support[0, free]"),
        ("every token begins an image block", "(~masks.continues_block", "(masks.continues_block"),
    ),
    ("train/updates.py", f"{STEP}all_ranks_take_as_many_rounds_and_count_the_updates_of_all"): (
        ("rollouts of this rank alone", "parts.count(len(sequences))", "len(sequences)"),
    ),
    ("train/updates.py", f"{STEP}a_step_that_can_learn_nothing_makes_no_update"): (
        ("an update of zeros", "        if num_tokens:\n", "        if True:\n"),
    ),
    ("train/parts.py", f"{STEP}all_ranks_take_as_many_rounds_and_count_the_updates_of_all"): (
        ("the last microbatch's metrics", "local.get(name, 0.0) + float(value)", "float(value)"),
        ("the mean of the times", 'self.groups.device, "max")', "self.groups.device)"),
    ),
    ("train/objective.py", f"{UPDATES}the_loss_is_that_of_the_whole_update"): (
        (
            "tokens for rollouts",
            "batch.num_tokens_global, batch.num_rollouts_global",
            "batch.num_rollouts_global, batch.num_tokens_global",
        ),
        ("no constant length", "config.rollout.max_new_tokens)", "1)"),
        ("the sampler against the moved policy", "logprobs if old is None else old", "logprobs"),
        ("sums for means", "name: value / counts.num_tokens for", "name: value for"),
        ("no entropy", "rollouts.rows(scores.entropy)", "rollouts.rows(scores.entropy * 0)"),
    ),
    ("train/objective.py", f"{TRAIN}test_grpo.py"): (
        ("a drift of NaN passes", "not drift <= gate", "drift > gate"),
        ("KL of any step", "step == 1 and config", "config"),
        ("FP8 without a limit", "return 1e-2", "return 1e9"),
    ),
    ("train/scoring.py", f"{UPDATES}microbatches_are_scored_together_as_alone"): (
        ("not filled up", "(passes * together - len(microbatches))", "0"),
        (
            "one by one",
            "even_parts(len(microbatches), at_once, multiple)",
            "even_parts(len(microbatches), 1, multiple)",
        ),
    ),
    ("train/scoring.py", f"{STEP}guided_rollouts_are_scored_as_they_were_sampled"): (
        ("guided by itself", "rows[1] if guided else", "rows[0] if guided else"),
    ),
    ("train/grpo.py", f"{STEP}the_policy_is_held_to_its_reference_and_not_to_itself"): (
        ("the policy as its reference", "logprobs_of(reference, scored", "logprobs_of(parts.policy, scored"),
    ),
    ("train/grpo.py", f"{STEP}a_sampler_that_tells_other_log_probabilities_stops_the_step"): (
        ("exactness unchecked", "check_exactness(parts.config, number, totals)", "pass"),
    ),
    ("train/grpo.py", f"{STEP}held_out_images_are_the_first_of_their_split_whenever_they_are_due"): (
        ("held-out images shuffled", "shuffle=False)", "shuffle=True)"),
    ),
    ("train/experience.py", f"{STEP}every_rollout_has_a_number_of_its_own_for_its_draws"): (
        ("images share draws", "sample * group_size + member", "sample + member"),
        ("held-out rollouts counted", "        parts.sampler.counts.read()", "        pass"),
    ),
    ("train/sft.py", f"{SFT}responses_are_learnt_and_prompts_and_images_without_captions_are_not"): (
        ("loss on the prompt", "first=len(prompt)", "first=1"),
    ),
    ("train/sft.py", f"{STEP}each_rank_reads_images_of_its_own"): (
        ("all ranks read the same", "data.train_split, share, dp_rank=rank", "data.train_split, share, dp_rank=0"),
    ),
    ("train/sft_loss.py", f"{SFT}the_loss_is_weighted_cross_entropy_over_the_global_count_plus_z_loss"): (
        ("the rough image's codes are perception", "vocabulary) == 0", "vocabulary) <= 1"),
        ("the microbatch's mean", "-logprobs.sum() / num_tokens", "-logprobs.mean()"),
        ("z-loss not squared", "scores.logsumexp.square().sum()", "scores.logsumexp.sum()"),
    ),
    ("train/own_codes.py", f"{SFT}a_share_of_the_updates_reads_own_codes"): (
        ("every update alike", "default_rng([seed, step])", "default_rng([seed, 1])"),
        (
            "one noise for all microbatches",
            "keys_of(microbatch, seed, first + number)",
            "keys_of(microbatch, seed, first)",
        ),
    ),
    ("train/kept_rollouts.py", f"{TRAIN}test_kept_rollouts.py"): (
        ("rough for middle", "for number in range(2))", "for number in (1, 0))"),
        ("all have the first's advantage", "float(advantages[member])", "float(advantages[0])"),
    ),
    ("train/training_run.py", f"{RUN}a_run_saves_where_it_is_due_and_stops_where_it_is_told"): (
        ("told to stop in vain", "self._stop() or step == self.config.checkpoint.stop_at_step", "self._stop()"),
        ("the end is a stop", 'return agreed["stop"] > 0 and step < self.num_steps', 'return agreed["stop"] > 0'),
        (
            "nothing saved at the end",
            'leaving = agreed["stop"] > 0 or step == self.num_steps',
            'leaving = agreed["stop"] > 0',
        ),
        ("saved at the end alone", " or step % self.config.checkpoint.every_steps == 0", ""),
    ),
    ("train/training_run.py", f"{RUN}training_goes_on_after_a_checkpoint_that_failed_until_too_many_fail_in_a_row"): (
        ("failures are not added", "self._not_saved += 1", "self._not_saved = 1"),
        (
            "failures are never forgotten",
            "self._saver.complete()\n        self._not_saved = 0",
            "self._saver.complete()",
        ),
        ("one failure more", "self._not_saved >= limit", "self._not_saved > limit"),
    ),
    ("train/training_run.py", f"{RUN}the_last_checkpoint_must_be_written"): (
        ("without the last checkpoint", "if must or self._not_saved", "if self._not_saved"),
    ),
    ("train/training_run.py", f"{RUN}a_run_without_an_update_goes_on_with_its_counters_place_and_a_fresh_optimizer"): (
        ("counters begin anew", "self.counters.update(state.counters)", "pass"),
        ("the data begin anew", "loader.load_state_dict(state.data)", "pass"),
        ("skipped updates unseen", '{"optim/skipped_updates/count": float(self.parts.optimiser.num_skipped)}', "{}"),
    ),
    ("checkpoint/loading.py", f"{RUN}a_run_without_an_update_goes_on_with_its_counters_place_and_a_fresh_optimizer"): (
        (
            "skipped for tried",
            "own.optimiser.updates, own.optimiser.skipped",
            "own.optimiser.skipped, own.optimiser.updates",
        ),
        (
            "a second first update",
            'of_parameters["common_step"] = torch.zeros(())',
            'of_parameters["common_step"] = torch.ones(())',
        ),
        ("no states of torch's Adam", "elif vendor.init_state_fn is not None:", "elif False:"),
        ("the dummy update counts", 'state["step"].zero_()', "pass"),
    ),
    (
        "train/skipped.py",
        f"{RUN}batches_of_skipped_updates_are_kept_up_to_a_number_and_too_many_in_a_row_end_the_run",
    ): (
        ("one batch less", "optimiser.num_skipped <= MAX_KEPT", "optimiser.num_skipped < MAX_KEPT"),
        (
            "one skipped update more",
            "optimiser.skipped_in_a_row >= limit",
            "optimiser.skipped_in_a_row > limit",
        ),
        ("the first microbatch alone", "enumerate(microbatches)", "enumerate(microbatches[:1])"),
    ),
    ("train/kept_steps.py", f"{RUN}a_kept_step_is_shared_by_any_number_of_ranks"): (
        ("ranks read the same groups", "groups[len(groups) * dp_rank // dp_size :", "groups[dp_rank :"),
    ),
    ("train/kept_steps.py", f"{RUN}each_rank_of_the_first_layout_has_its_own_groups"): (
        ("always equal shares", "if dp_size == len(self.ranks):", "if False:"),
    ),
    ("rollout/decoder.py", f"{STEP}rollouts_are_scored_as_they_were_sampled"): (
        ("the heads' epsilon", "weight, self.epsilon)", "weight, HEAD_NORM_EPSILON)"),
    ),
    ("rollout/decoder.py", f"{STEP}in_bf16_positions_are_rotated_by_angles_of_float32"): (
        (
            "positions in bf16",
            "torch.arange(length, device=like.device, dtype=torch.float32)",
            "torch.arange(length, device=like.device, dtype=like.dtype)",
        ),
    ),
    ("rollout/decoder.py", f"{SAMPLED}leaving_changes_no_rollout"): (
        ("steps of rows that left", " or self._fixed.rows != len(tokens)", ""),
    ),
    ("rollout/sampler.py", f"{SAMPLED}tokens_a_pass_are_of_rows_that_still_had_some_to_come"): (
        ("finished rows have passes", "int(final.any(1).sum())", "len(final)"),
    ),
    ("rollout/sampler.py", f"{SAMPLED}a_prompt_that_stays_is_counted_among_those_still_present"): (
        ("prompts of the first batch", "[present.index(prompt) for prompt in left]", "left"),
    ),
    ("train/experience.py", f"{STEP}the_metrics_of_a_step_are_of_its_groups"): (
        ("failures elsewhere unseen", "float(sum(group.rewards.failures[name] for group in groups))", "0.0"),
        (
            "the spread of all groups",
            "torch.stack([group.rewards.total.std() for group in groups])",
            "torch.cat([group.rewards.total for group in groups]).std()",
        ),
    ),
    ("train/parts.py", f"{STEP}each_rank_reads_images_of_its_own"): (
        ("a share is rounded down", "if count % self.groups.dp_size:", "if False:"),
    ),
    ("rollout/choice.py", f"{SAMPLED}rows_are_in_images_if_more_than_half_of_them_choose_a_code"): (
        ("half is most", "self._image[mask_ids].sum() > len(mask_ids)", "self._image[mask_ids].sum() >= len(mask_ids)"),
    ),
    ("rollout/choice.py", f"{STEP}rollouts_are_scored_as_they_were_sampled"): (
        ("drawn from all", "keys, support, first=columns.start", "keys, None, first=columns.start"),
        ("survivors not told", "(positions, kept, columns.start)", "(positions, allowed, columns.start)"),
    ),
    ("rollout/choice.py", f"{AHEAD}top_p_is_of_the_tempered_distribution"): (
        ("top-p before the temperature", "truncation, temperature) if", "truncation) if"),
    ),
    ("rollout/sampler.py", f"{AHEAD}tokens_do_not_depend_on_batches_and_follow_from_seed_and_number"): (
        ("every seed alike", "stream_keys(self.seed, number, limit)", "stream_keys(0, number, limit)"),
        ("a later batch has the first's numbers", "rollout_ids[first * group_size", "rollout_ids[0 * group_size"),
    ),
    ("rollout/sampled.py", "tests/unit/rollout/test_sampler.py::test_leaving_changes_no_rollout"): (
        ("padding carries loss", "torch.ones(shape, dtype=torch.bool", "torch.zeros(shape, dtype=torch.bool"),
    ),
    (
        "rollout/ahead.py",
        f"{AHEAD}discarded_draws_are_the_next_guesses_and_an_unknown_token_is_guessed_like_the_last",
    ): (
        (
            "discarded draws are forgotten",
            "self._guessed[rows] = count + width",
            "self._guessed[rows] = count + number",
        ),
    ),
    ("rollout/ahead.py", f"{AHEAD}a_code_is_guessed_like_the_one_above_and_a_forced_token_as_itself"): (
        ("guessed from the left", "position - np.maximum(back, 1)", "position - 1"),
        (
            "guesses that cannot be drawn",
            "np.where(self._table[masks, guess], guess, self._first_allowed[masks])",
            "guess",
        ),
    ),
    ("rollout/width.py", f"{WIDTH}widths_are_tried_thrice_until_one_is_far_worse_and_neighbours_are_measured_again"): (
        ("one trial", "TRIALS = 3", "TRIALS = 1"),
        ("all widths are tried", "< WORSE * best", "< 0.0 * best"),
        ("always the wider neighbour", "% 2 else -1", "% 2 else 1"),
    ),
    ("rollout/width.py", f"{WIDTH}each_kind_of_tokens_and_each_doubling_of_rows_is_measured_by_itself"): (
        ("text measured as images", "setdefault((rows.bit_length(), images)", "setdefault((rows.bit_length(), True)"),
        ("every number of rows alike", "setdefault((rows.bit_length(), images)", "setdefault((1, images)"),
    ),
    ("rollout/width.py", f"{WIDTH}a_rate_is_the_mean_of_recent_passes_over_the_time_without_other_load"): (
        ("the last time counts", "min(seconds, 1.02 * self.seconds)", "seconds"),
        ("the first passes weigh a tenth", "max(1 / self.passes, 0.1)", "0.1"),
        ("old passes weigh alike", "max(1 / self.passes, 0.1)", "1 / self.passes"),
    ),
    ("rollout/policy_restorer.py", f"{OPENED}each_candidate_of_each_image_draws_by_a_number_of_its_own"): (
        ("candidates alike", "FIRST_ID + case.index * count + member", "FIRST_ID + case.index * count"),
        ("training's draws", "FIRST_ID + case.index * count + member", "case.index * count + member"),
    ),
    ("rollout/policy_restorer.py", f"{OPENED}the_memory_of_an_image_is_that_of_its_keys_and_values"): (
        ("one stream's memory", "2 if options.cfg_scale != 1.0 else 1", "1"),
    ),
    ("behaviour/draws.py", "tests/unit/behaviour/test_distribution.py"): (
        ("noise of -inf", "clamp_(max=1 - 2.0**-24)", "clamp_(max=1)"),
        ("noise of inf", ".add_(0.5)", ""),
    ),
    ("behaviour/draws.py", f"{DRAWN}streams_differ_by_seed_and_rollout_and_positions_do_not_depend_on_the_length"): (
        ("another stream for each seed", "key=[seed, rollout_id]", "key=[rollout_id, seed]"),
    ),
    ("behaviour/draws.py", f"{DRAWN}the_noise_of_a_token_is_its_key_hashed_with_its_id"): (
        ("another hash", "((17, 0xED5AD4BB", "((16, 0xED5AD4BB"),
        ("half of the key", "if number == 0:", "if number == 9:"),
    ),
    ("behaviour/distribution.py", f"{DRAWN}logits_are_the_product_in_its_own_format_and_at_least_float32"): (
        ("float64 is rounded", "in (torch.float32, torch.float64) else", "in (torch.float32,) else"),
        (
            "the product in float32",
            "logits = hidden @ output_weight.t()",
            "logits = hidden.float() @ output_weight.float().t()",
        ),
    ),
    ("behaviour/distribution.py", f"{DRAWN}adaptive_support_follows_the_entropy_of_the_masked_row"): (
        ("top-p of what top-k dropped", "tempered.masked_fill(~keep, -torch.inf).softmax", "tempered.softmax"),
    ),
    ("grpo/advantages.py", "tests/unit/grpo/test_advantages.py"): (
        ("always the unbiased std", "unbiased_std=config.unbiased_std,", "unbiased_std=True,"),
        ("always the same epsilon", "epsilon=config.advantage_epsilon,", "epsilon=1e-4,"),
        ("places without epsilon", ".sqrt() + epsilon)).to(scores.dtype)", ".sqrt())).to(scores.dtype)"),
        ("a place known once is NaN", "(count - 1).clamp_min(1)", "(count - 1)"),
        ("places in float32", "exact = scores.double()", "exact = scores"),
        ("a tie contributes", "factor.masked_fill(zero_variance(whole)[..., None], 0.0)", "factor"),
    ),
    ("optim/step.py", "tests/unit/optim/test_step.py"): (
        ("a skipped update stops the clock", "self.num_updates += 1", "self.num_updates += applied"),
        ("gradients pile up", "                chunk.zero_grad_buffer()\n", "                pass\n"),
        ("one beta for both", '"adam_beta1": optim.beta1', '"adam_beta1": optim.beta2'),
        (
            "the rate falls on",
            "min(1.0, (step - optim.warmup_steps) / decay_steps)",
            "(step - optim.warmup_steps) / decay_steps",
        ),
    ),
}
