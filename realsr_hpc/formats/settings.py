"""Checks that our forward pass implements the settings in a config.json.

There are three lists: keys that are compared with the recipe (`SIZES`), keys whose value must match our forward pass
(`FIXED`), and keys without effect here (`WITHOUT_EFFECT`). Any other key with a meaningful value is refused, because
its effect is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping

from realsr_hpc.config.downloads import MODEL_TYPES
from realsr_hpc.files import Json

SIZES: dict[str, float | None] = {
    "vocab_size": None,
    "hidden_size": None,
    "intermediate_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "swin_norm": False,
}
"""Keys that are compared with the recipe, each with the value for a missing key (the default of transformers'
`ChameleonConfig`); None: the key must be there."""
FIXED: dict[str, tuple[Json, ...]] = {
    "model_type": MODEL_TYPES,
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "tie_word_embeddings": (False, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
    "partial_rotary_factor": (1.0, None),
    **dict.fromkeys(("rope_interleave", "rope_interleaved", "rotary_interleaved"), (False, None)),
    **dict.fromkeys(("qk_norm", "use_qk_norm", "qk_layernorm", "qk_normalization"), (True, None)),
    **dict.fromkeys(("use_rope", "is_causal", "causal"), (True, None)),
}
"""The values that our forward pass supports, by key."""
WITHOUT_EFFECT = frozenset(
    """_name_or_path _attn_implementation architectures auto_map transformers_version torch_dtype dtype use_cache
    cache_implementation bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id cls_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id image_token_id boi_token_id eoi_token_id
    initializer_range max_position_embeddings attention_dropout dropout hidden_dropout mask_image_logits
    z_loss_weight model_parallel_size pretraining_tp vq_config vocabulary_map rope_scaling rope_parameters
    head_dim max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores output_attentions
    output_hidden_states return_dict return_dict_in_generate remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens chunk_size_feed_forward is_decoder
    cross_attention_hidden_size tie_encoder_decoder torchscript use_bfloat16 finetuning_task id2label label2id
    num_labels problem_type tokenizer_class prefix task_specific_params tf_legacy_loss gradient_checkpointing""".split()
)
"""Names, training options and generation options; rope_*, head_dim and vq_config are checked separately."""


def setting_faults(settings: Mapping[str, Json]) -> list[str]:
    """Settings of a config.json that our forward pass does not support; [] if it supports all."""
    faults = [*_rotary_faults(settings)]
    for key, allowed in FIXED.items():
        value = settings.get(key, allowed[0])
        if value not in allowed:
            faults.append(f"{key} {value!r} (ours: {allowed[0]!r})")
    sizes, width = sizes_of(settings), settings.get("head_dim")
    heads, hidden = sizes.get("num_attention_heads"), sizes.get("hidden_size")
    if width is not None and heads and hidden and width != hidden // heads:
        faults.append(f"head_dim {width} (ours: hidden_size / num_attention_heads = {hidden // heads})")
    known = SIZES.keys() | FIXED.keys() | WITHOUT_EFFECT
    for key in sorted(settings.keys() - known):
        value = settings[key]
        if not (value is None or value is False or value in ({}, [])):  # 0 can be meaningful: a scale, a limit
            faults.append(f"{key} {settings[key]!r} (unknown here; take it out of config.json if it changes nothing)")
    return faults


def mapping_of(settings: Mapping[str, Json], key: str) -> Mapping[str, Json]:
    """The mapping under a key; {} for null or a missing key. ValueError for anything else."""
    value = settings.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"config.json: {key} is {value!r:.60}, no mapping; copy the folder again")
    return value or {}


def token_ids(settings: Mapping[str, Json]) -> Mapping[str, int]:
    """Ids by token name; empty if the file has no map. ValueError if the map is invalid or an id is not a number."""
    ids: dict[str, int] = {}
    for name, token in mapping_of(settings, "vocabulary_map").items():
        if not isinstance(token, int) or isinstance(token, bool):
            raise ValueError(
                f"config.json: vocabulary_map: {name!r} has id {token!r}, no number; copy the folder again"
            )
        ids[name] = token
    return ids


def _rotary_faults(settings: Mapping[str, Json]) -> list[str]:
    faults: list[str] = []
    for key in ("rope_scaling", "rope_parameters"):
        given = settings.get(key)
        if given is None:
            continue
        if not isinstance(given, dict):
            faults.append(f"{key} {given!r} (ours: none)")
            continue
        kind = given.get("rope_type", given.get("type", "default"))
        others = {name: value for name, value in given.items() if name not in ("rope_type", "type", "rope_theta")}
        # a partial rotary factor of 1 is the whole head, which we compute
        others = {name: value for name, value in others.items() if (name, value) != ("partial_rotary_factor", 1.0)}
        if kind != "default" or any(value is not None for value in others.values()):
            faults.append(f"{key} {given!r} (ours: plain rotary embeddings, not scaled)")
    thetas = _thetas(settings)
    if any(theta != thetas[0] for theta in thetas):
        faults.append(f"rope_theta {' and '.join(map(str, thetas))} (given twice; it is not known which one applies)")
    return faults


def _thetas(settings: Mapping[str, Json]) -> list[Json]:
    """All values of `rope_theta` in the file; transformers 5 and later write it into `rope_parameters`."""
    nested = (settings.get(key) for key in ("rope_parameters", "rope_scaling"))
    places = [settings, *(place for place in nested if isinstance(place, dict))]
    return [theta for place in places if (theta := place.get("rope_theta")) is not None]


def sizes_of(settings: Mapping[str, Json]) -> dict[str, float]:
    """Sizes under config.json's names. A missing key gets its default; one without a default is omitted.

    ValueError for a size that is not a number.
    """
    given = {**settings, "rope_theta": next(iter(_thetas(settings)), None)}
    sizes: dict[str, float] = {}
    for key, default in SIZES.items():
        value = default if given.get(key) is None else given[key]
        if value is not None and not isinstance(value, int | float):
            raise ValueError(f"config.json: {key} is {value!r}, no number; copy the folder again")
        if value is not None:
            sizes[key] = value
    return sizes
