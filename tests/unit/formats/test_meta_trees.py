"""Meta's tree and Anole's: imported logits equal Meta's arithmetic; orders, shards and halves of trees."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from realsr_hpc.export import Sources, import_weights
from realsr_hpc.formats import open_source
from tests.unit.formats.layouts import HEADS, LAYERS, WIDTH, fused, layout, meta_logits, meta_state, recipe, write_tree

TOKENS = torch.randint(0, 900, (2, 12), generator=torch.Generator().manual_seed(1))
CASES = {
    "one file": (1, HEADS, False, False),
    "fused": (1, HEADS, True, False),
    "grouped queries": (1, 2, False, False),
    "grouped queries, fused": (1, 2, True, False),
    "four shards, norms of their own": (4, HEADS, False, False),
    "two fused shards, grouped queries": (2, 2, True, False),
    "four shards, norms after attention and MLP (the 30B)": (4, HEADS, False, True),
}
"""Shards, key heads, whether matrices are fused, `swin_norm`."""


@pytest.mark.parametrize("case", CASES)
def test_an_imported_tree_computes_what_metas_code_computes(case, tmp_path, logits_of):
    parts, kv_heads, is_fused, swin_norm = CASES[case]
    config = recipe(f"model.num_kv_heads={kv_heads}", f"model.swin_norm={swin_norm}")
    shards = meta_state(kv_heads, parts=parts)
    given = [fused(shard) for shard in shards] if is_fused else shards
    tree = write_tree(tmp_path / "tree", given, config, kv_heads, swin_norm)
    done = import_weights(Sources(tree), tmp_path / "out", config)
    assert f"{layout(config).size:,}" in done.recognised[0] and "interleaved (Meta's own files)" in done.recognised[0]
    theirs = meta_logits(shards, TOKENS, kv_heads, swin_norm)
    ours = logits_of(tmp_path / "out", config, TOKENS, 1024)
    assert theirs.abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    straight = logits_of(tree, config, TOKENS, 1024)  # model.weights may name the tree itself
    assert torch.equal(straight, ours)
    wrong = import_weights(Sources(tree, rotary="halves"), tmp_path / "wrong", config)
    assert (logits_of(wrong.output, config, TOKENS, 1024) - theirs).abs().max() > 0.05


def renamed_from_hugging_face(norm_rows: int):
    """A tree as Anole's bin_to_pth.py makes it: other names, the same order, `rope.freqs` None."""
    shard = meta_state()[0] | {"rope.freqs": None}
    for layer in range(LAYERS):
        for side in "qk":
            for kind in ("weight", "bias"):
                name = f"layers.{layer}.attention.{side}_normalization.{kind}"
                shard[name] = shard[name].expand(norm_rows, -1).clone() if norm_rows else shard[name]
    return [shard]


@pytest.mark.parametrize("rows", [1, HEADS])
def test_norms_of_a_hugging_face_folder_give_a_renamed_tree_away(rows, tmp_path):
    tree = write_tree(tmp_path / "tree", renamed_from_hugging_face(rows), recipe())
    done = import_weights(Sources(tree), tmp_path / "out", recipe())
    assert "rotary order halves" in done.recognised[0]
    written = load_file(tmp_path / "out" / "model.safetensors")
    kept = torch.load(tree / "models/7b/consolidated.pth", weights_only=True)
    assert torch.equal(written["model.layers.0.self_attn.q_proj.weight"], kept["layers.0.attention.wq.weight"])
    assert written["model.layers.1.self_attn.k_norm.bias"].shape == (HEADS, WIDTH)


def test_a_renamed_tree_that_does_not_say_its_order_asks_for_it(tmp_path):
    tree = write_tree(tmp_path / "tree", renamed_from_hugging_face(0), recipe())
    with pytest.raises(ValueError, match=r"rope.freqs is None.*rotary=interleaved .* or rotary=halves"):
        import_weights(Sources(tree), tmp_path / "out", recipe())
    assert not (tmp_path / "out").exists()
    assert "as requested" in import_weights(Sources(tree, rotary="halves"), tmp_path / "out", recipe()).recognised[0]


def test_half_of_a_tree_names_what_is_missing(tmp_path):
    tree = write_tree(tmp_path / "tree", meta_state(parts=4), recipe())
    shard = tree / "models/7b/consolidated.02.pth"
    kept = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ValueError, match=r"consolidated.02.pth missing of 4 shards"):
        open_source(tree)
    shard.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(ValueError, match="consolidated.02.pth is damaged"):
        open_source(tree)
    shard.write_bytes(kept)
    (tree / "tokenizer/text_tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"without a text tokenizer; add text_tokenizer=FILE \(text_tokenizer.json"):
        import_weights(Sources(tree), tmp_path / "out", recipe())
    (tree / "models/7b/params.json").unlink()
    shutil.copy(tree / "models/7b/consolidated.00.pth", tree / "tokenizer/vqgan.ckpt")  # with its tokenizers as well
    with pytest.raises(ValueError, match="nearest is Meta Chameleon tree.*but not 7b/params.json"):
        open_source(tree)
    for path in tree.glob("models/7b/consolidated.0*.pth"):
        path.unlink()
    (tree / "models/7b/params.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"nearest is Meta Chameleon tree: models/7b/params.json found, but not consol"
    ):
        open_source(tree)
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"swin_norm": True}, r"model.swin_norm: swin_norm True \(recipe: False\)"),
        ({"qk_normalization": False}, "qk_normalization False"),
        ({"rope_theta": 500000.0}, r"model.rope_theta: rope_theta 500000.0 \(recipe: 10000.0\)"),
        ({"norm_eps": 1e-6}, "rms_norm_eps 1e-06"),
        ({"non_linearity": "gelu"}, r"non_linearity 'gelu' \(ours: 'swiglu'\)"),
        ({"head_dim": 16}, "head_dim 16"),
        ({"weight_tying": True}, "weight_tying True"),
        ({"logit_softcap": 30.0}, "logit_softcap 30.0"),
    ],
)
def test_settings_of_params_json_are_used_or_refused(setting, message, tmp_path):
    tree = write_tree(tmp_path / "tree", meta_state(), recipe())
    path = tree / "models/7b/params.json"
    params = json.loads(path.read_text())
    path.write_text(json.dumps({**params, "model": {**params["model"], **setting}}))
    with pytest.raises(ValueError, match=message):
        import_weights(Sources(tree), tmp_path / "out", recipe())


@pytest.mark.parametrize(
    ("parts", "name", "shape", "message"),
    [
        (1, "attention.wqkv.weight", (5, 48), "wqkv.weight has 5 rows, which are no wqkv of 4 heads"),
        (1, "feed_forward.w13.weight", (129, 48), "w13.weight has 129 rows"),
        (1, "attention.q_normalization.weight", (5,), r"has shape \[5\] \(head width 12, 4 heads\)"),
        (1, "attention.k_normalization.bias", (3, 12), r"has shape \[3, 12\] \(head width 12, 4 heads\)"),
        (2, "attention.wo.weight", (40, 24), r"other shapes in other shards: \[48, 24\], \[40, 24\]"),
        (2, "ffn_norm.weight", (40,), r"other shapes in other shards: \[48\], \[40\]"),
    ],
)
def test_tensors_that_cannot_be_cut_or_joined_are_refused_by_name(parts, name, shape, message, tmp_path):
    shards = [fused(shard) for shard in meta_state(parts=parts)]
    shards[-1][f"layers.1.{name}"] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        import_weights(Sources(write_tree(tmp_path / "tree", shards, recipe())), tmp_path / "out", recipe())
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_two_models_or_two_layouts_in_one_tree_ask_which(tmp_path):
    tree = write_tree(tmp_path / "tree", meta_state(), recipe())
    params = tree / "models/7b/params.json"
    kept = params.read_text()
    for key, value in (("n_kv_heads", "x"), ("model_parallel_size", "many"), ("dim", None)):
        params.write_text(json.dumps({**json.loads(kept)["model"], key: value}))
        if key == "model_parallel_size":
            (tree / "models/7b/consolidate_params.json").unlink()
        with pytest.raises(ValueError, match=f"params.json: {key} is"):
            open_source(tree)
    params.write_text(kept)
    shutil.copytree(tree / "models/7b", tree / "models/30b")
    with pytest.raises(ValueError, match="holds the models 30b and 7b; name one of them: source=.*models/30b"):
        open_source(tree)
    assert open_source(tree / "models/7b").text == tree / "tokenizer/text_tokenizer.json"
    shutil.copy(tree / "models/7b/consolidated.pth", tree / "models/7b/consolidated.00.pth")
    with pytest.raises(ValueError, match=r"holds consolidated.pth and consolidated.00.pth; move one"):
        open_source(tree / "models/7b")


def test_a_tensor_without_a_place_is_refused_by_name(tmp_path):
    shard = meta_state()[0] | {"layers.0.attention.wq.bias": torch.zeros(48)}
    tree = write_tree(tmp_path / "tree", [shard], recipe())
    with pytest.raises(ValueError, match=r"tensor layers\.0\.attention\.wq\.bias \(not in our model\)"):
        import_weights(Sources(tree), tmp_path / "out", recipe())
    shards = meta_state(parts=2)
    shards[1]["layers.1.adapter.weight"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"tensor layers\.1\.adapter\.weight \(not in our model\)"):
        import_weights(Sources(write_tree(tmp_path / "two", shards, recipe())), tmp_path / "out", recipe())


def test_settings_that_metas_loader_does_not_read_are_named(tmp_path):
    tree = write_tree(tmp_path / "tree", meta_state(), recipe())
    path = tree / "models/7b/params.json"
    params = json.loads(path.read_text())
    path.write_text(json.dumps({**params, "model": {**params["model"], "attn_dropout": 0.1, "init": {"std": 0.02}}}))
    done = import_weights(Sources(tree), tmp_path / "out", recipe())
    assert "not read: params.json: attn_dropout, init (Meta's own loader reads none of them)" in done.recognised
