"""Each rule across sections of a recipe reports a violation and names the field."""

from __future__ import annotations

import re

import pytest

from realsr_hpc.config.checks import RULES, faults
from realsr_hpc.config.derived import image_tokens
from realsr_hpc.config.load import RecipeError, compose

BASE = ["recipe=grpo_tiny", "cluster.tasks_per_node=1"]
BREACHES = {
    "an_output_root_can_be_written_anywhere": ["output_root=/tmp/a:b"],
    "slurm_options_are_single_lines": ["cluster.extra_sbatch={signal: x}"],
    "adapters_begin_at_the_reference": ["model.lora={rank: 4, weights: x}"],
    "the_instruction_shows_the_image_once": ["vlcot.instruction=restore it"],
    "a_name_is_one_folder_name": ["name=a/b"],
    "image_sizes_are_multiples_of_32": ["vlcot.lq_size_px=72"],
    "image_sizes_are_multiples_of_the_tokenizer_stride": [
        "image_tokenizer.downsample=64",
        "image_tokenizer.channel_multiplier=[1,1,1,1,1,1,1]",
    ],
    "image_sizes_grow_from_rough_to_final": ["vlcot.image_sizes_px=[64,32,128]"],
    "the_truth_is_a_multiple_of_the_upscale": ["vlcot.upscale=3"],
    "tokenizer_strides_match_its_levels": ["image_tokenizer.downsample=4"],
    "the_tokenizer_starts_with_a_feature_per_code": [
        "task=tokenizer",
        "tokenizer_training.start_batches=2",
        "tokenizer_training.batch_size=2",
        "tokenizer_training.crop_px=40",
    ],
    "a_trained_tokenizer_starts_from_principal_components": ["task=tokenizer", "image_tokenizer.base_channels=64"],
    "vocabulary_fits_the_image_tokenizer": ["vlcot.vocabulary=chameleon_f16"],
    "heads_divide_the_hidden_size": ["model.num_heads=7"],
    "layers_divide_over_pipeline_stages": ["parallel.pp=3", "cluster.tasks_per_node=3"],
    "tensor_parallel_divides_the_model": ["parallel.tp=3", "cluster.tasks_per_node=3"],
    "sequence_parallel_needs_tensor_parallel": ["parallel.sequence_parallel=true"],
    "world_size_divides_by_the_layout": ["parallel.tp=2"],
    "data_parallel_ranks_share_the_batch_evenly": ["cluster.tasks_per_node=3"],
    "a_trace_fits_the_rollout": ["rollout.max_new_tokens=100"],
    "text_slots_fit_the_grammar": ["vlcot.text_slots=[16,24,60]"],
    "prompt_and_trace_fit_the_model": ["model.max_sequence_tokens=300"],
    "a_microbatch_holds_one_sequence": ["parallel.microbatch_tokens=100"],
    "fp8_needs_bf16_gpus_and_aligned_dimensions": ["precision.fp8=tensorwise"],
    "lean_optimizers_need_gpus": ["optim.cpu_offload=true"],
    "graphs_hold_whole_decode_steps": ["parallel.decode_graphs=true", "parallel.pp=2"],
    "one_task_per_gpu": ["cluster.gpus_per_node=1", "cluster.tasks_per_node=2"],
    "a_local_run_has_one_node": ["cluster.nodes=2"],
    "clipping_has_both_bounds": ["grpo.clip_low=null"],
    "mismatch_bounds_hold_one": ["grpo.mismatch_bounds=[2,5]"],
    "grpo_has_rewards_to_learn_from": [
        f"rewards.terms.{name}.weight=0" for name in compose(["recipe=grpo_tiny"]).rewards.terms
    ],
    "a_ramp_has_both_ends": ["rewards.terms.fidelity.final_weight=1"],
    "severity_edges_are_known_and_ascend": ["degradation.severity_edges={jpeg_quality_first: [1,2], blur_px: [2,1]}"],
    "reward_options_are_those_of_their_kind": ["rewards.terms.format.options={nothing: 1}"],
    "image_top_k_is_fixed_or_adaptive": ["rollout.image_adaptive_top_k=true", "rollout.image_top_k=5"],
    "a_checkpoint_can_be_taken_before_time_is_up": ["cluster.time_min=1", "cluster.signal_delay_s=60"],
    "sft_learns_from_degraded_photographs": ["task=sft", "data.mode=paired"],
    "warm_up_ends_before_the_run": ["optim.warmup_steps=100000"],
    "the_best_checkpoint_is_measured": ["checkpoint.keep_best=1", "grpo.heldout_every_steps=0"],
    "a_tracking_uri_is_an_address": ["tracking.uri=sqlite:///mlflow.db"],
    "a_tracking_uri_holds_no_password": ["tracking.uri='postgresql://me:secret@db/mlflow'"],
}


def test_every_rule_has_a_breach_here():
    assert {rule.__name__ for rule in RULES} == set(BREACHES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_breach_is_found(rule):
    overrides = BREACHES[rule.__name__]
    with pytest.raises(RecipeError) as error:
        compose([*BASE, *overrides])
    # The rule itself must yield the fault: another rule's message would hide that it is blind.
    config = _unchecked(overrides)
    lines = list(rule(config))
    assert lines and all(line in str(error.value) for line in lines)
    assert all(":" in line for line in lines)


def test_a_sound_recipe_has_no_fault():
    assert faults(compose(["recipe=grpo_tiny"])) == []


def test_image_tokens_are_those_of_the_paper():
    assert [image_tokens(size, 16) for size in (128, 256, 512)] == [76, 276, 1060]
    assert [image_tokens(size, 8) for size in (128, 256, 512)] == [276, 1060, 4164]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["precision.params=fp32", "precision.fp8=tensorwise"], "precision.params: fp32"),
        (["precision.fp8=blockwise", "model.ffn_hidden_size=11016"], "model.ffn_hidden_size: 2754 per tensor-parallel"),
        (["precision.rollout_fp8=true", "model.ffn_hidden_size=11016"], "model.ffn_hidden_size: 2754"),
        (["optim.main_params=bf16", "parallel.distributed_optimizer=false"], "needs parallel.distributed_optimizer"),
        (["optim.main_params=bf16", "precision.params=fp32"], "and precision.params=bf16"),
    ],
)
def test_large_recipes_are_told_what_fp8_and_lean_optimizers_need(overrides, said):
    with pytest.raises(RecipeError, match=re.escape(said)):
        compose(["recipe=grpo_7b", *overrides])
    fp8 = ["precision.fp8=tensorwise", "precision.rollout_fp8=true"]
    sound = [*fp8, "optim.main_params=bf16", "optim.cpu_offload=true"]
    assert faults(compose(["recipe=grpo_7b", *sound])) == []


def _unchecked(overrides):
    from realsr_hpc.config import load
    from realsr_hpc.config.schema import RunConfig

    recipe, rest = load._split_recipe([*BASE, *overrides])
    return RunConfig.model_validate(load._Composer().tree(recipe, rest))
