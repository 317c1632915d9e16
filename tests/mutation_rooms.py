"""More lines that a test must defend (see `mutations.py`), by file and test: name, line, changed line."""

from __future__ import annotations

from tests.mutation_table import Mutation
from tests.mutation_training import ROWS as TRAINING_ROWS

RESTORE = "tests/unit/restore/test_restore.py::test_"
OPENED = "tests/unit/restore/test_model.py::test_"
CANDIDATES = "tests/unit/restore/test_candidates.py::test_"
COLOUR = "tests/unit/restore/test_colour.py::test_"
RESTORE_FOLDER = "restore/image_folder.py"
DEGRADED = "tests/unit/data/test_degradation.py::test_"
LOADED = "tests/unit/data/test_loader.py::test_"
NIQE = "tests/unit/quality/test_niqe.py::test_"
DRAWS = "tests/unit/evaluate/test_draws.py::test_"
SUMMARY = "tests/unit/compare/test_summary.py::test_"
EVALUATED = "tests/unit/evaluate/test_evaluate.py::test_"
REPETITIONS = "tests/unit/compare/test_repetitions.py::test_"
DAMAGED = "tests/unit/vlcot/test_damaged_traces.py::test_"
UNDERSTOOD = "tests/unit/rewards/test_understanding.py::test_"

ROWS: dict[tuple[str, str], tuple[tuple[str, str, str], ...]] = {
    ("restore/model.py", f"{OPENED}the_checkpoints_weights_restore_in_one_process_and_with_exact_products"): (
        ("start weights", "        checkpoint.load(checkpoint_path, policy, None, groups)\n", "        pass\n"),
        ("rollouts' FP8", '"fp8": "none", "rollout_fp8": False', '"fp8": "none"'),
    ),
    ("restore/options.py", f"{OPENED}options_become_settings"): (
        ("the rough image's size", "image_sizes_px[-1] // factor", "image_sizes_px[0] // factor"),
        ("each worker has all the memory", "/ workers / tile_bytes", "/ tile_bytes"),
        ("candidates without memory", "count * restorer.image_bytes()", "restorer.image_bytes()"),
    ),
    (
        "restore/candidates.py",
        f"{CANDIDATES}what_an_expert_cannot_rate_is_not_chosen_and_the_mean_has_the_nearest_texts",
    ): (
        ("NaN is best", "nan=-np.inf", "nan=np.inf"),
        ("the first's texts", "item.trace, item.images, best", "found[0].trace, item.images, best"),
        ("the farthest's texts", "distances.argmin()", "distances.argmax()"),
    ),
    ("restore/candidates.py", f"{CANDIDATES}the_nearest_to_the_mean_is_so_over_all_pixels_and_not_at_its_worst"): (
        ("the nearest at its worst pixel", "finals.mean(0)).mean((1, 2, 3))", "finals.mean(0)).max((1, 2, 3))"),
    ),
    ("restore/candidates.py", f"{CANDIDATES}pyiqas_metric_and_the_folder_of_its_weights_reach_the_expert"): (
        ("pyiqa's default folder", "weights_dir=weights_dir)", "weights_dir=None)"),
    ),
    ("restore/options.py", f"{CANDIDATES}pyiqas_metric_and_the_folder_of_its_weights_reach_the_expert"): (
        ("pyiqa's folder not passed on", 'build_chooser(choice, given["weights_dir"])', "build_chooser(choice)"),
    ),
    ("restore/tiles.py", f"{CANDIDATES}a_tiles_record_has_the_number_that_was_chosen_and_its_scores_to_four_digits"): (
        ("always the first candidate", "chosen=restored.chosen", "chosen=0"),
        ("two digits of the scores", "round(score, 4)", "round(score, 2)"),
    ),
    ("restore/tiles.py", f"{CANDIDATES}tiles_overlap_by_what_the_command_says_if_no_one_does"): (
        ("another overlap from Python", "overlap_px: int = 4", "overlap_px: int = 8"),
    ),
    ("restore/tiles.py", f"{RESTORE}workers_restore_the_same_and_share_the_tiles_evenly"): (
        ("a batch counts as a tile", "on_tiles(len(part))", "on_tiles(1)"),
    ),
    ("restore/colour.py", f"{COLOUR}low_frequencies_are_five_dilated_filters"): (
        ("four levels", "_LEVELS = 5", "_LEVELS = 4"),
        ("dark borders", 'mode="replicate"), kernel', 'mode="constant"), kernel'),
    ),
    ("restore/colour.py", f"{COLOUR}back_projection_makes_the_average_agree_with_the_input_and_keeps_finer_detail"): (
        ("noise enters", "square() / 2)", "square() * 2)"),
        ("dark borders in the error", 'mode="replicate"), taps', 'mode="constant"), taps'),
        ("the error away", "return ours + interpolate", "return ours - interpolate"),
    ),
    ("restore/tiles.py", f"{COLOUR}each_case_is_corrected_by_its_own_input_and_only_its_final_image"): (
        ("cases are left as they are", "fix_colour(item.image, case.lq, how)", "item.image"),
    ),
    ("restore/tiles.py", f"{RESTORE}seams_fade_over_the_overlap"): (
        ("every tile draws alike", "index=n)", "index=0)"),
        ("the overlap in LQ pixels", "settings.overlap_px * scale + 1.0", "settings.overlap_px + 1.0"),
        ("not rounded", "np.round(self.total, out=self.total)", "self.total"),
    ),
    ("restore/tiles.py", f"{RESTORE}images_on_the_way_are_blended_at_their_own_size_and_small_inputs_are_mirrored"): (
        ("filled up with black", 'mode="symmetric"', 'mode="constant"'),
        ("steps at the input's size", "max(1, step.shape[0] // self.settings.tile_px)", "1"),
    ),
    (RESTORE_FOLDER, f"{RESTORE}a_result_that_cannot_be_written_leaves_no_older_image_beside_its_new_record"): (
        ("the older image stays", "work.target.unlink(missing_ok=True)", "pass"),
    ),
    (RESTORE_FOLDER, f"{RESTORE}results_of_other_settings_are_not_mixed"): (
        ("colours mixed", 'not in ("batch_size", "workers")', 'not in ("batch_size", "workers", "colour")'),
    ),
    ("restore/reasoning.py", "tests/unit/restore/test_reasoning.py"): (
        ("the input as the result", 'columns["final"] = result.image', 'columns["final"] = lq'),
        ("small images enlarged", "min(1.0, MAX_SIDE_PX / max(height, width))", "MAX_SIDE_PX / max(height, width)"),
    ),
    ("restore/image_files.py", "tests/unit/restore/test_names.py::test_a_profile_stays_where_the_colours_stay"): (
        ("a CMYK profile on RGB", "icc_profile if keeps_profile else None", "icc_profile"),
    ),
    ("rewards/base.py", "tests/unit/rewards/test_mixture.py"): (
        ("infinity is no failure", "broken[chosen] = ~np.isfinite(raw)", "broken[chosen] = np.isnan(raw)"),
        (
            "broken places stop the run",
            "            return None\n\n    def compute_p",
            "            raise\n\n    def compute_p",
        ),
    ),
    ("rewards/mixture.py", "tests/unit/rewards/test_mixture.py"): (
        ("places of malformed traces", "malformed[:, None] & reward.needs_image", "malformed[:, None] & False"),
        ("a gated reward is 0", "np.where(malformed, reward.range[0],", "np.where(malformed, 0.0,"),
        ("no places of their phrases", "malformed[:, None] & reward.needs_image", "malformed[:, None]"),
    ),
    ("vlcot/sequence.py", f"{DAMAGED}an_image_block_with_one_wrong_token_is_no_image"): (
        ("two sizes", " or body[1] != body[0]", ""),
        ("rows without a newline", "any(row[-1] != vocabulary.newline for row in rows) or ", ""),
        ("no end of the image", " or body[-1] != vocabulary.image_end", ""),
        ("a code that is none", " or any(code is None for row in codes for code in row)", ""),
        ("a row more", "len(body) != 2 + side * (side + 1) + 1 or ", ""),
    ),
    ("vlcot/sequence.py", f"{DAMAGED}a_text_that_is_empty_or_holds_a_bracket_is_none"): (
        ("brackets are text", ' or "<" in body:', ":"),
        ("blanks are text", "not body.strip() or ", ""),
    ),
    ("vlcot/sequence.py", f"{DAMAGED}no_text_imitates_an_image"): (
        ("private characters stay", 'text.replace(_OPEN, "").replace(_CLOSE, "")', "text"),
    ),
    ("vlcot/vocabulary.py", f"{DAMAGED}only_ids_of_the_tokenizer_are_text_and_only_size_tokens_declare_pixels"): (
        ("0 px are a size", "0 < units < 128", "0 <= units < 128"),
        ("padding is text", " < self.text_first + self.num_text", ""),
        ("any number of px", "if size_px % SIZE_UNIT_PX:", "if False:"),
    ),
    ("vlcot/vocabulary.py", f"{DAMAGED}more_text_than_chameleons_layout_holds_is_refused"): (
        ("text over the layout's end", "if num_text > room:", "if False:"),
    ),
    ("rewards/understanding.py", f"{UNDERSTOOD}the_word_has_its_share_on_signs_and_none_elsewhere"): (
        ("exact words by letters", 'word_credit == "exact"', 'word_credit != "exact"'),
    ),
    ("rewards/wordnet.py", f"{UNDERSTOOD}synonyms_of_wordnet_name_a_tag"): (
        ("rare senses", "_SENSES = 2", "_SENSES = 3"),
        ("the number of words is decimal", "int(fields[3], 16)", "int(fields[3])"),
    ),
    ("data/degradation.py", f"{DEGRADED}crop_is_inside_and_as_large_as_said"): (
        ("always the largest crop", "rng.uniform(min_fraction, 1.0)", "1.0"),
        (
            "never at the right edge",
            "int(rng.integers(width - side + 1)), int",
            "int(rng.integers(width - side or 1)), int",
        ),
    ),
    ("data/degradation.py", f"{DEGRADED}ranges_are_the_published_ones"): (
        ("round kernels", "sigma_y, rotation = rng.uniform(*preset.blur_sigma)", "sigma_y, rotation = sigma_x"),
        ("half of the rotations", "rng.uniform(-math.pi, math.pi)", "rng.uniform(0, math.pi)"),
    ),
    ("data/degradation.py", f"{DEGRADED}a_kernel_of_13_px_holds_lower_cut_offs"): (
        ("from 15 px on", "size_px < 13", "size_px <= 13"),
        ("no lower cut-offs", "math.pi / 5", "math.pi / 3"),
    ),
    ("data/degradation.py", f"{DEGRADED}the_end_is_the_published_one"): (
        ("one size of the last filter", "int(rng.choice(preset.final_sinc_sizes_px))", "7"),
    ),
    ("data/loader.py", f"{LOADED}noise_is_drawn_by_seed_and_sample_number"): (
        (
            "one noise for all",
            "generator(self._config.seed, s.index, Stream.NOISE)",
            "generator(self._config.seed, 0, Stream.NOISE)",
        ),
        (
            "one noise for all seeds",
            "generator(self._config.seed, s.index, Stream.NOISE)",
            "generator(0, s.index, Stream.NOISE)",
        ),
    ),
    ("data/loader.py", f"{LOADED}a_state_of_photographs_that_were_altered_since_is_refused"): (
        ("altered photographs are the same", "{entry.key} {entry.sha256}", "{entry.key}"),
    ),
    ("data/loader.py", f"{LOADED}a_state_of_another_run_is_refused"): (
        ("another mode goes on", '            "mode": self._config.data.mode,\n', ""),
        ("another order goes on", '            "shuffle": self._samples.shuffle,\n', ""),
    ),
    ("data/samples.py", f"{LOADED}the_order_of_photographs_follows_the_seed"): (
        ("one order for all seeds", "generator(self.seed, epoch, Stream.ORDER)", "generator(0, epoch, Stream.ORDER)"),
    ),
    ("evaluate/report.py", f"{EVALUATED}the_worst_are_without_an_image_then_of_lowest_psnr_or_highest_niqe"): (
        ("the best by NIQE", "else -values, nan", "else values, nan"),
        ("the worst of bicubic", 'self.values(self.methods[-1], "psnr_y"', 'self.values(self.methods[0], "psnr_y"'),
    ),
    ("evaluate/words.py", f"{EVALUATED}chance_is_the_share_of_the_commonest_true_word"): (
        ("the commonest answer", "self.counts.sum(1).max()", "self.counts.sum(0).max()"),
    ),
    ("evaluate/methods.py", f"{EVALUATED}bicubic_has_the_truths_size_or_enlarges_by_the_factor"): (
        (
            "width for height",
            "(round(shape[1] * factor), round(shape[0] * factor))",
            "(round(shape[0] * factor), round(shape[1] * factor))",
        ),
        ("the truth enlarged", "if case.gt is None else 1.0", "if case.gt is None else self.upscale"),
    ),
    ("compare/repetitions.py", f"{REPETITIONS}differences_are_of_runs_of_one_seed_whatever_their_order"): (
        (
            "paired in their order",
            'theirs.get(run.params.get("seed")))',
            "other.runs[self.runs.index(run)].metrics.get(metric))",
        ),
    ),
    ("compare/repetitions.py", f"{REPETITIONS}a_curve_has_the_steps_of_all_runs_between_their_lowest_and_highest"): (
        ("highest for lowest", "values.min(0), values.max(0)", "values.max(0), values.min(0)"),
        ("last for the difference", "points[-1][1] - points[0][1]", "points[-1][1]"),
    ),
    ("compare/repetitions.py", f"{REPETITIONS}costs_are_of_all_processes_and_tokens_of_the_data_parallel_ones"): (
        ("every rank counts its tokens", "run.num_processes / model_parallel", "run.num_processes"),
    ),
    ("compare/runs.py", f"{REPETITIONS}costs_are_of_all_processes_and_tokens_of_the_data_parallel_ones"): (
        ("one node", 'int(self.params.get("cluster.nodes", 1)) * ', ""),
    ),
    (
        "rewards/generation.py",
        "tests/unit/rewards/test_stripes.py::test_a_place_has_the_score_and_its_own_share_by_the_chain_rule",
    ): (("without the logistic's derivative", "score + score * (1.0 - score) * shares", "score + shares"),),
    ("rewards/generation.py", "tests/unit/rewards/test_stripes.py::test_niqes_distance_of_6_scores_a_half"): (
        ("another half", "NIQE_HALF = 6.0", "NIQE_HALF = 5.0"),
    ),
    (
        "quality/niqe.py",
        f"{NIQE}finite_features_of_a_partly_flat_patch_count_for_the_mean_and_not_for_the_covariance",
    ): (("partly flat patches are left out", "patches.nanmean(dim=0) - mean", "rows.mean(dim=0) - mean"),),
    ("data/samples.py", f"{LOADED}windows_are_as_large_and_as_often_mirrored_as_the_recipe_says"): (
        ("half of the shorter side", "geometry.min_scene_fraction, geometry.hflip)", "0.5, geometry.hflip)"),
        ("never mirrored", "geometry.min_scene_fraction, geometry.hflip)", "geometry.min_scene_fraction, 0.0)"),
    ),
    ("data/shapes.py", "tests/unit/data/test_shapes.py::test_of_four_colours_the_three_commonest_are_named"): (
        ("two colours", 'kind="stable")[:3]', 'kind="stable")[:2]'),
    ),
    ("evaluate/cases.py", f"{EVALUATED}a_photograph_that_stands_in_a_batch_twice_is_numbered"): (
        ("one file for both", "if uses[case.key] > 1 else", "if uses[case.key] > 9 else"),
    ),
    ("evaluate/words.py", f"{EVALUATED}texts_are_scored_against_the_truth_that_there_is"): (
        ("a missing text is right", "if text else 0.0 for", "if text else 1.0 for"),
        ("the word of the middle text", "word_right(trace.texts[0], scene)", "word_right(trace.texts[1], scene)"),
    ),
    ("evaluate/report.py", f"{EVALUATED}files_say_the_same_as_the_report"): (
        ("arrows the wrong way round", '"↓" if', '"↑" if not'),
    ),
    ("evaluate/intervals.py", f"{EVALUATED}bootstrap_interval_covers_the_normal_one"): (
        ("an interval of 90 %", 'method="percentile"', 'method="percentile", confidence_level=0.9'),
    ),
    ("evaluate/draws.py", f"{DRAWS}each_images_best_mean_and_worst_are_averaged_over_images"): (
        ("the median of the draws", "np.nanmean(values, axis=1) if", "np.nanmedian(values, axis=1) if"),
    ),
    ("compare/summary.py", f"{SUMMARY}the_best_is_told_by_its_difference_from_the_first"): (
        ("the first less the best", "best.less(rated[0], metric)", "rated[0].less(best, metric)"),
        ("chance the wrong way round", 'if gain.excludes_zero else "not', 'if not gain.excludes_zero else "not'),
    ),
    ("compare/summary.py", f"{SUMMARY}what_training_changed_stands_beside_its_difference_from_the_first"): (
        ("less itself", "item.less(base, column)", "item.less(item, column)"),
    ),
    ("compare/figures.py", "tests/unit/compare/test_figures.py"): (
        ("the oldest rollouts", "in reversed(runfolder.all_rollouts", "in (runfolder.all_rollouts"),
        ("the oldest evaluation", "in reversed([folder for", "in ([folder for"),
        ("the last rollout", "group.rollouts[0].files", "group.rollouts[-1].files"),
        ("rollouts before evaluations", "(_evaluated, _kept)", "(_kept, _evaluated)"),
    ),
    ("checkpoint/loading.py", "tests/unit/checkpoint/test_loading.py"): (
        ("adapters of any weights", "if facts.base != policy.base:", "if False:"),
        ("an optimizer without its state", "if optimiser is not None and own.optimiser is None:", "if False:"),
        ("lacking parts stay as they are", "    if lacking:\n", "    if False:\n"),
    ),
    ("checkpoint/saving.py", "tests/unit/checkpoint/test_loading.py::test_halves_of_a_layer_are_written_once"): (
        ("views with all their memory", "((item, _compact(tensor)) for", "((item, tensor) for"),
    ),
    (
        "data/labels.py",
        "tests/unit/data/test_visible.py::test_edges_of_the_recipe_win_and_brightness_moves_poisson_noise_alone",
    ): (("every photograph alike", "photograph[::BRIGHTNESS_STRIDE, ::BRIGHTNESS_STRIDE].mean()", "115"),),
    ("rewards/fidelity.py", "tests/unit/rewards/test_fidelity.py"): (
        ("the LQ image unsmoothed", "truth = smooth(truth, self.options.smooth_px)", "pass"),
        ("a narrow filter", "round(3 * sigma_px)", "round(sigma_px)"),
    ),
}
ROOM_MUTATIONS = tuple(
    Mutation(f"{file.removesuffix('.py')}: {name}", f"realsr_hpc/{file}", old, new, test)
    for (file, test), changes in (*TRAINING_ROWS.items(), *ROWS.items())
    for name, old, new in changes
)
