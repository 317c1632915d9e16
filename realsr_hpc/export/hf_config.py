"""The configuration files that transformers reads: config.json, generation_config.json and the vocabulary map.

The map names every id as Chameleon's does: `IMGIMG...Z` for image codes (digits written as A-J), `<reservedN>` with
N = id - 4 for the ids between codes and text. transformers finds the image codes by these names.
"""

from __future__ import annotations

from typing import Any  # keywords of transformers' configurations, which have no type

from realsr_hpc.config.schema import ImageTokenizerConfig, ModelConfig, RunConfig
from realsr_hpc.parallel.layout import kv_heads
from realsr_hpc.vlcot.token_names import code_name
from realsr_hpc.vlcot.vocabulary import Vocabulary

STOCK_CLASS = "ChameleonForConditionalGeneration"
MODELING_FILE = "modeling_realsr.py"
PROCESSING_FILE = "processing_realsr.py"
CODE_FILES = (MODELING_FILE, PROCESSING_FILE, "images_realsr.py")
"""Code that every export contains; the processing file imports the last one."""
SHIPPED_CLASS = "RealSRForConditionalGeneration"
SHIPPED_PROCESSOR = "RealSRProcessor"


def special_tokens(vocabulary: Vocabulary) -> dict[str, int]:
    """Name -> id of every id that is not text: control tokens, image codes, reserved and unused ids."""
    names = {vocabulary.code_to_id(code): code_name(code) for code in range(vocabulary.num_codes)}
    names |= {
        vocabulary.bos: "<s>",
        vocabulary.pad: "<pad>",
        vocabulary.eos: "</s>",
        vocabulary.image_end: "<eoss>",
        vocabulary.image_begin: "<racm3:break>",
        vocabulary.image_end + 515: "<image>",
    }
    for token in range(vocabulary.size):
        if token not in names and not vocabulary.is_text(token):
            names[token] = "<unk>" if token == 3 else f"<reserved{token - 4:05d}>"
    return {name: token for token, name in sorted(names.items())}


def vq_config(config: ImageTokenizerConfig) -> dict[str, Any]:
    """Arguments of `ChameleonVQVAEConfig` for the image tokenizer. The config states the level of attention as a
    resolution, here that of a 512 px image."""
    lowest = config.attention == "lowest"
    return {
        "embed_dim": config.embed_dim,
        "num_embeddings": config.codebook_size,
        "latent_channels": config.latent_channels,
        "base_channels": config.base_channels,
        "channel_multiplier": list(config.channel_multiplier),
        "num_res_blocks": config.num_res_blocks,
        "double_latent": False,
        "resolution": 512,
        "attn_resolutions": [512 // config.downsample] if lowest else None,
        "attn_type": "vanilla",
        "dropout": 0.0,
    }


def model_config(config: RunConfig, vocabulary: Vocabulary, names: dict[str, int], dtype: str) -> dict[str, Any]:
    """Arguments of transformers' `ChameleonConfig`.

    names: the vocabulary map, name -> id. dtype: name of the torch dtype, such as `bfloat16`.
    """
    model: ModelConfig = config.model
    return {
        "architectures": [STOCK_CLASS],
        "auto_map": {
            **dict.fromkeys(
                ("AutoModelForCausalLM", "AutoModelForImageTextToText"), f"{MODELING_FILE[:-3]}.{SHIPPED_CLASS}"
            ),
            "AutoProcessor": f"{PROCESSING_FILE[:-3]}.{SHIPPED_PROCESSOR}",
        },
        "vocab_size": vocabulary.size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": kv_heads(model),
        "max_position_embeddings": model.max_sequence_tokens,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "initializer_range": model.init_std,
        "bos_token_id": vocabulary.bos,
        "pad_token_id": vocabulary.pad,
        "eos_token_id": vocabulary.end_turn,
        "tie_word_embeddings": False,
        "swin_norm": model.swin_norm,
        "attention_bias": False,
        "mlp_bias": False,
        "vq_config": vq_config(config.image_tokenizer),
        "vocabulary_map": names,
        "dtype": dtype,
    }


def generation_config(config: RunConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    """The recipe's sampling settings for restoring, as far as `generate` supports them without the processor."""
    restore = config.restore
    return {
        "bos_token_id": vocabulary.bos,
        "pad_token_id": vocabulary.pad,
        "eos_token_id": vocabulary.end_turn,
        "do_sample": True,
        "temperature": restore.temperature,
        "top_k": restore.image_top_k,
        "top_p": restore.top_p,
        "max_new_tokens": config.rollout.max_new_tokens,
    }


def trace_config(config: RunConfig, vocabulary: Vocabulary) -> dict[str, object]:
    """The content of `realsr.json`: what the shipped processor needs beyond the model's configuration."""
    tokenizer = config.image_tokenizer
    return {
        "instruction": config.vlcot.instruction,
        "image_sizes_px": list(config.vlcot.image_sizes_px),
        "lq_size_px": config.vlcot.lq_size_px,
        "upscale": config.vlcot.upscale,
        "max_text_tokens": config.vlcot.max_text_tokens,
        "downsample": tokenizer.downsample,
        "num_codes": vocabulary.num_codes,
        "codes_in_block": vocabulary.codes_in_block,
        "vocab_size": vocabulary.size,
        "text_first": vocabulary.text_first,
        "num_text": vocabulary.num_text,
        "image_begin": vocabulary.image_begin,
        "image_end": vocabulary.image_end,
        "newline": vocabulary.newline,
        "end_turn": vocabulary.end_turn,
        "size_zero": vocabulary.image_end + 608,
        "bos": vocabulary.bos,
        "seed": config.seed,
        "restore": {
            **config.restore.model_dump(),
            "cfg_scale": config.rollout.cfg_scale if config.restore.cfg_scale is None else config.restore.cfg_scale,
        },
        "decoder": {
            "latent_channels": tokenizer.latent_channels,
            "base_channels": tokenizer.decoder_base,
            "channel_multiplier": list(tokenizer.decoder_multiplier),
            "num_res_blocks": tokenizer.num_res_blocks,
            "output_shuffle": tokenizer.decoder_output_shuffle,
            "norm": tokenizer.decoder_norm,
            "patch_px": tokenizer.downsample if tokenizer.decoder_patch_out else None,
            "lowest_attention": tokenizer.attention == "lowest",
        },
    }
