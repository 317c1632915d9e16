"""Folders of transformers' Chameleon: `.bin`, gaps in config.json, decoders inside, PURE's second block."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from realsr_hpc.export import Sources, import_weights
from realsr_hpc.export.hf_config import special_tokens, vq_config
from realsr_hpc.formats import open_source
from realsr_hpc.formats.settings import setting_faults, sizes_of
from realsr_hpc.model.chunks import WeightShapes
from realsr_hpc.model.hf_mapping import hf_shapes
from realsr_hpc.tokenizer.image import ImageTokenizer
from realsr_hpc.tokenizer.image_file import load_image_tokenizer
from realsr_hpc.tokenizer.trace import TraceTokenizer
from tests.unit.formats.layouts import (
    HEADS,
    HIDDEN,
    layout,
    meta_state,
    recipe,
    whole_names,
    write_tokenizer,
    write_tree,
)

TOKENS = torch.randint(50, 900, (2, 12), generator=torch.Generator().manual_seed(1))


def stock_model(config: Any, vocab: int = 1024) -> Any:
    """transformers' own class, its weights spread so that every one of them matters."""
    torch.manual_seed(0)
    shape = config.model
    sizes = {"hidden_size": shape.hidden_size, "intermediate_size": shape.ffn_hidden_size}
    sizes |= {"num_hidden_layers": shape.num_layers, "rope_theta": shape.rope_theta}
    heads = {"num_attention_heads": shape.num_heads, "num_key_value_heads": shape.num_kv_heads or shape.num_heads}
    heads |= {"rms_norm_eps": shape.norm_epsilon}
    names = {name: token for name, token in whole_names(config).items() if name.startswith(("IMG", "<"))}
    model = ChameleonForConditionalGeneration(
        ChameleonConfig(
            vocab_size=vocab, **sizes, **heads, vq_config=vq_config(config.image_tokenizer), vocabulary_map=names
        )
    ).eval()
    for name, parameter in model.named_parameters():
        if "vqmodel" not in name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return stock_model(recipe())


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name.replace("model.language_model.", "model."): value for name, value in model.state_dict().items()}


def write_folder(
    folder: Path, model: Any, state: dict[str, torch.Tensor], bins: int = 0, config: Any = None, **settings: Any
) -> Path:
    """config.json, tokenizer.json and the state as one safetensors file, or as so many `.bin` with an index."""
    model.config.save_pretrained(folder)
    kept = json.loads((folder / "config.json").read_text())
    changed = {k: v for k, v in {**kept, **settings}.items() if v != "absent"}
    (folder / "config.json").write_text(json.dumps(changed))
    write_tokenizer(folder / "tokenizer.json", whole_names(config or recipe()))
    if not bins:
        save_file({name: value.clone() for name, value in state.items()}, folder / "model.safetensors")
        return folder
    names = sorted(state)
    files = {name: f"pytorch_model-{index % bins + 1:05d}-of-{bins:05d}.bin" for index, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: state[name].clone() for name in names if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def their_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.lm_head(model.model(input_ids=TOKENS).last_hidden_state)


@pytest.mark.parametrize(
    ("bins", "settings"), [(0, {}), (3, {"num_key_value_heads": "absent"}), (1, {"model_type": "chameleon_xllmx"})]
)
def test_logits_are_transformers_and_every_tensor_is_kept_bit_by_bit(bins, settings, model, tmp_path, logits_of):
    state = {name: value for name, value in state_of(model).items() if "vqmodel" not in name}
    source = write_folder(tmp_path / "source", model, state, bins, **settings)
    config = recipe("model.num_kv_heads=4")
    import_weights(Sources(source), tmp_path / "out", config)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert list(written) == sorted(state)
    assert all(torch.equal(written[name], state[name]) for name in state)
    assert (their_logits(model) - logits_of(tmp_path / "out", config, TOKENS, 1024)).abs().max() < 2e-5


@pytest.mark.parametrize(("hidden", "heads", "kv_heads", "theta"), [(96, 6, 2, 500000.0), (56, 7, 1, 10000.0)])
def test_other_widths_grouped_queries_and_rotary_bases(hidden, heads, kv_heads, theta, tmp_path, logits_of):
    sizes = [f"model.hidden_size={hidden}", f"model.num_heads={heads}", f"model.num_kv_heads={kv_heads}"]
    sizes += ["model.ffn_hidden_size=100", "model.num_layers=3", f"model.rope_theta={theta}"]
    config = recipe(*sizes, "model.norm_epsilon=1e-6", "image_tokenizer.codebook_size=200")
    vocab = layout(config).size
    model = stock_model(config, vocab)
    state = {name: value for name, value in state_of(model).items() if "vqmodel" not in name}
    source = write_folder(tmp_path / "source", model, state, bins=2, config=config)
    import_weights(Sources(source), tmp_path / "out", config)
    theirs, ours = their_logits(model), logits_of(tmp_path / "out", config, TOKENS, vocab)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    wrong = import_weights(Sources(source, rotary="interleaved"), tmp_path / "wrong", config)
    assert (logits_of(wrong.output, config, TOKENS, vocab) - theirs).abs().max() > 0.05


@pytest.mark.parametrize("hidden", [48, 80])
def test_a_folder_of_anoles_fork_keeps_metas_rotary_order(hidden, tmp_path, logits_of):
    """The fork stores the tensors of Meta's tree under Hugging Face's names, and permutes within attention."""
    sizes = [f"model.hidden_size={hidden}", "model.num_kv_heads=2"]
    config = recipe(*sizes)
    model = stock_model(config)
    state = {name: value for name, value in state_of(model).items() if "vqmodel" not in name}
    for name, value in state.items():  # halves (0 0 ... 1 1 ...) -> pairs (0 1 0 1 ...)
        if ".q_proj." in name or ".k_proj." in name:
            rows = value.unflatten(0, (-1, 2, hidden // HEADS // 2)).transpose(1, 2)
            state[name] = rows.reshape(value.shape)
        if ".q_norm." in name or ".k_norm." in name:  # one norm for all heads
            state[name] = value[:1].unflatten(1, (2, -1)).transpose(1, 2).reshape(-1)
            value.copy_(value[:1].clone().expand(value.shape))  # the model itself
    fork = {"architectures": ["ChameleonForCausalLM"], "qk_layernorm": True}
    source = write_folder(tmp_path / "source", model, state, bins=1, config=config, **fork)
    done = import_weights(Sources(source), tmp_path / "out", config)
    assert "rotary order interleaved (ChameleonForCausalLM" in done.recognised[0]
    theirs = their_logits(model)
    torch.testing.assert_close(logits_of(tmp_path / "out", config, TOKENS, 1024), theirs, rtol=1e-5, atol=2e-5)
    write_folder(tmp_path / "source", model, state, bins=1, config=config, qk_layernorm=True)
    wrong = import_weights(Sources(source), tmp_path / "wrong", config)
    assert (logits_of(wrong.output, config, TOKENS, 1024) - theirs).abs().max() > 0.05


@pytest.mark.parametrize("groups", [1, 2])
def test_shared_norms_are_given_to_all_heads_so_that_transformers_loads_the_folder(groups, model, tmp_path):
    """One norm for all heads, or one for each group of consecutive heads, as in Lumina-mGPT's 34B."""
    state = {name: value for name, value in state_of(model).items() if "vqmodel" not in name}
    state |= {name: value[:groups].clone() for name, value in state.items() if "_norm." in name and value.dim() == 2}
    import_weights(Sources(write_folder(tmp_path / "source", model, state)), tmp_path / "out", recipe())
    written = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.self_attn.q_norm.bias"
    assert torch.equal(written[name], state[name][[head * groups // HEADS for head in range(HEADS)]])
    ChameleonForConditionalGeneration.from_pretrained(tmp_path / "out")  # raises where a shape differs


def test_a_decoder_inside_becomes_the_recipes_image_tokenizer(model, tmp_path):
    """As in leloy's Anole: `model.vqmodel.decoder.*` beside transformers' encoder."""
    config = recipe()
    image = ImageTokenizer(config.image_tokenizer)
    inside = {f"model.vqmodel.{name}": value for name, value in image.state_dict().items()}
    source = write_folder(tmp_path / "source", model, {**state_of(model), **inside})
    done = import_weights(Sources(source), tmp_path / "out", config)
    path = tmp_path / "out" / "image_tokenizer.safetensors"
    loaded = load_image_tokenizer(config.image_tokenizer.model_copy(update={"weights": str(path)}), "cpu")
    assert all(torch.equal(value, image.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert f"image_tokenizer.weights={path}" in done.overrides
    _, report = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    restart = recipe(*done.overrides)
    assert TraceTokenizer.load(restart, torch.device("cpu")).codec.vocabulary == layout(config)


def test_an_encoder_of_another_tokenizer_is_refused(model, tmp_path):
    from realsr_hpc.tokenizer.image_file import save_image_tokenizer

    source = write_folder(tmp_path / "source", model, state_of(model))
    done = import_weights(Sources(source), tmp_path / "alone", recipe())
    assert "missing: the image tokenizer with its decoder; import again with image_tokenizer=FILE" in done.recognised[1]
    torch.manual_seed(5)
    save_image_tokenizer(ImageTokenizer(recipe().image_tokenizer), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not the image tokenizer of .* differs there"):
        import_weights(Sources(source, image_tokenizer=tmp_path / "other.safetensors"), tmp_path / "out", recipe())
    with pytest.raises(ValueError, match=r"embed_dim|quant_conv|quantize"):
        import_weights(Sources(source), tmp_path / "out", recipe("image_tokenizer.embed_dim=8"))


FOREIGN = {
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0},
    "rope_parameters partial_rotary_factor": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "rope_parameters rope_theta": {"rope_type": "default", "rope_theta": 500000.0},
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-3,
    "attention_bias": True,
    "mlp_bias": True,
    "swin_norm": True,
    "tie_word_embeddings": True,
    "sliding_window": 512,
    "quantization_config": {"quant_method": "awq"},
    "hidden_act": "gelu",
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "attn_logit_softcapping": 30.0,
    "final_logit_softcapping": 30.0,
    "use_qk_norm": False,
    "rope_interleaved": True,
    "layer_types": ["sliding_attention", "full_attention"],
    "model_type": "llama",
    "model_type chameleonic": "chameleonic",
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("key", FOREIGN)
def test_a_setting_that_decides_the_forward_pass_is_refused_at_both_doors(key, model, tmp_path, logits_of):
    state = {name: value for name, value in state_of(model).items() if "vqmodel" not in name}
    source = write_folder(tmp_path / "source", model, state, **{key.split()[0]: FOREIGN[key]})
    named = key.split()[-1]
    with pytest.raises(ValueError, match=named):
        import_weights(Sources(source), tmp_path / "out", recipe())
    with pytest.raises(ValueError, match=f"model.weights = .*{named}"):
        logits_of(source, recipe(), TOKENS, 1024)
    assert not (tmp_path / "out").exists()


def test_adapters_beside_the_weights_are_refused(model, tmp_path, logits_of):
    """transformers adds them when it loads such a folder; taking the weights alone would be another model."""
    source = write_folder(tmp_path / "source", model, state_of(model))
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config.json beside the weights .* model.lora.weights"):
        import_weights(Sources(source), tmp_path / "out", recipe())
    with pytest.raises(ValueError, match="model.weights = .*adapter_config.json beside"):
        logits_of(source, recipe(), TOKENS, 1024)


def test_tensors_without_a_place_missing_ones_and_nan_are_refused_at_both_doors(model, tmp_path, logits_of):
    state = {name: value for name, value in state_of(model).items() if "vqmodel" not in name}
    gate = "model.layers.1.mlp.gate_proj.weight"
    damaged = state[gate].clone()
    damaged[3, 5] = float("nan")
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(HIDDEN)}
    spoilt = {"q_proj.bias, which our model does not have": {**state, **bias}}
    spoilt[r"gate_proj\.weight holds NaN"] = {**state, gate: damaged}
    spoilt[r"no tensor model\.layers\.1\.mlp\.gate_proj"] = {n: v for n, v in state.items() if n != gate}
    for number, (message, tensors) in enumerate(spoilt.items()):
        source = write_folder(tmp_path / str(number), model, tensors)
        with pytest.raises(ValueError, match=message):
            import_weights(Sources(source), tmp_path / "out", recipe())
        with pytest.raises(ValueError, match=message):
            logits_of(source, recipe(), TOKENS, 1024)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_weights_of_a_pickle_that_are_no_plain_floats_are_refused(dtype, model, tmp_path):
    """A safetensors header states the type; from a pickle, integers were once accepted unchanged."""
    gate = "model.layers.0.mlp.gate_proj.weight"
    state = {name: value for name, value in state_of(model).items() if "vqmodel" not in name}
    source = write_folder(tmp_path / "source", model, {**state, gate: state[gate].to(dtype)}, bins=1)
    named = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"gate_proj.weight is stored as {named}, strided; only F64"):
        import_weights(Sources(source), tmp_path / "out", recipe())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_folder_with_weights_twice_says_which_are_read_and_with_two_formats_asks_for_one(model, tmp_path):
    source = write_folder(tmp_path / "source", model, state_of(model))
    torch.save({}, source / "pytorch_model.bin")
    shown = []
    done = import_weights(Sources(source), tmp_path / "out", recipe(), lambda *counts: shown.append(counts))
    assert "not read: pytorch_model.bin (model.safetensors holds the weights)" in done.recognised
    assert shown[-1][0] == shown[-1][1] > shown[0][0] > 0
    write_tree(source, meta_state(), recipe())
    with pytest.raises(ValueError, match="in two formats, Hugging Face Chameleon folder and Meta Chameleon tree; move"):
        open_source(source)


def test_half_a_folder_and_malformed_json_name_the_file(model, tmp_path):
    source = write_folder(tmp_path / "source", model, state_of(model), bins=2)
    (source / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        open_source(source)
    write_folder(tmp_path / "source", model, state_of(model), bins=2)
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ValueError, match="names pytorch_model-00002-of-00002.bin, not there"):
        open_source(source)
    with pytest.raises(ValueError, match="does not exist"):
        open_source(tmp_path / "nowhere")
    save_file({"weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="in none of the known formats|nearest is .*but not"):
        open_source(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda names: names | {"IMGIMGAZ": 5, "IMGIMGBZ": 4},
            r"2 of 40 image codes have other ids, first code 0 with",
        ),
        (lambda names: {n: t for n, t in names.items() if n != "IMGIMGDJZ"}, r"39 image codes .* layout: 40"),
        (lambda names: names | {"<eoss>": 46}, r"<eoss> has id 46 \(the recipe's layout: 44\)"),
        (lambda names: names | {"lion": 500}, r"1 pieces of text have ids below 808"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused_with_both_sides(change, message, model, tmp_path):
    source = write_folder(tmp_path / "source", model, state_of(model), vocabulary_map=None)
    write_tokenizer(source / "tokenizer.json", change(whole_names(recipe())))
    with pytest.raises(ValueError, match=message):
        import_weights(Sources(source), tmp_path / "out", recipe())


def test_pures_second_block_of_codes_is_read_and_is_no_text(tmp_path, logits_of):
    """Vocabulary 73,728: codes 8192..16383 are named at 65536..73727; `vqmodel` is not in the folder."""
    words = ["vlcot.vocabulary=llamagen_f8", "image_tokenizer.codebook_size=16384", "image_tokenizer.downsample=8"]
    config = recipe(*words, "image_tokenizer.channel_multiplier=[1,2,2,4]")
    names = special_tokens(layout(config, 49152)) | {f"w{token}": token for token in range(16384, 65536)}
    model = stock_model(recipe(), vocab=73728)
    state = {name: value for name, value in state_of(model).items() if "vqmodel" not in name}
    source = write_folder(tmp_path / "source", model, state, bins=2, vocabulary_map=None)
    write_tokenizer(source / "tokenizer.json", names)
    done = import_weights(Sources(source), tmp_path / "out", config)
    assert "vocabulary 73,728: 16,384 image codes, 49,152 text tokens" in done.recognised[0]
    assert (their_logits(model) - logits_of(tmp_path / "out", config, TOKENS, 73728)).abs().max() < 2e-5
    refused = {n: t for n, t in names.items() if t < 65536}
    write_tokenizer(source / "tokenizer.json", refused)
    with pytest.raises(ValueError, match=r"8192 image codes are named .*layout: 16384"):
        import_weights(Sources(source), tmp_path / "refused", config)


def test_the_7b_inventory_is_transformers():
    with torch.device("meta"):
        model = ChameleonForConditionalGeneration(ChameleonConfig(vocabulary_map={"<image>": 8711}))
    theirs = {n: tuple(v.shape) for n, v in state_of(model).items() if "vqmodel" not in n}
    seven_b = recipe("model=chameleon_7b", "model.num_layers=32", "model.hidden_size=4096", "model.num_heads=32",
                     "model.ffn_hidden_size=11008", *VQ_16_SIZES)  # fmt: skip
    assert hf_shapes(WeightShapes.of(seven_b.model, 65536)) == theirs


VQ_16_SIZES = ["vlcot.vocabulary=chameleon_f16", "image_tokenizer.codebook_size=8192", "image_tokenizer.downsample=16",
               "image_tokenizer.channel_multiplier=[1,1,2,2,4]"]  # fmt: skip


@pytest.mark.parametrize("value", [0, 0.0, 0.5, "", "x", [1]])
def test_an_unknown_key_of_config_json_is_refused_whatever_it_says(value):
    faults = setting_faults({"logit_scale": value})
    assert len(faults) == 1 and faults[0].startswith(f"logit_scale {value!r} (unknown here")
    assert not setting_faults({"logit_scale": None, "use_it": False, "layers_of_it": [], "map_of_it": {}})


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("vocabulary_map", [], "is [], no mapping"),
        ("vocabulary_map", "IMGIMGAZ", "is 'IMGIMGAZ', no mapping"),
        ("vocabulary_map", {"IMGIMGAZ": "4"}, ": 'IMGIMGAZ' has id '4', no number"),
        ("vq_config", [1], "is [1], no mapping"),
    ],
)
def test_maps_of_another_kind_are_named_at_both_doors(key, value, said, model, tmp_path, logits_of):
    source = write_folder(tmp_path / "source", model, state_of(model), **{key: value})
    with pytest.raises(ValueError, match=re.escape(f"config.json: {key} {said}".replace(" :", ":"))):
        import_weights(Sources(source), tmp_path / "out", recipe())
    with pytest.raises(ValueError, match=f"model.weights = .*config.json: {key}"):
        logits_of(source, recipe(), TOKENS, 1024)


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", "112"), ("rope_theta", "10000"), ("num_hidden_layers", [2])]
)
def test_a_size_that_is_no_number_is_named(key, value):
    with pytest.raises(ValueError, match=re.escape(f"config.json: {key} is {value!r}, no number")):
        sizes_of({"num_attention_heads": 4, key: value})
