"""A folder as transformers itself writes it: sharded Chameleon weights in, any layout, the same tensors out."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from realsr_hpc.config.load import compose_one
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.export.weight_files import weight_files
from realsr_hpc.parallel.process_groups import shutdown
from tests.distributed.launcher import run_ranks
from tests.unit.export.test_tools import command

TOKENS = torch.randint(8900, 65536, (2, 20), generator=torch.Generator().manual_seed(2))
SHAPE = [
    "model.num_layers=2", "model.hidden_size=32", "model.num_heads=4", "model.num_kv_heads=4",
    "model.ffn_hidden_size=48", "image_tokenizer.base_channels=32", "image_tokenizer.channel_multiplier=[1,1,1,1,1]",
    "image_tokenizer.num_res_blocks=1", "image_tokenizer.latent_channels=32", "image_tokenizer.embed_dim=8",
]  # fmt: skip
HEAD_NORMS = ("q_norm", "k_norm")


def recipe(folder: Path) -> list[str]:
    """How a user names the shape of foreign weights: the 7B recipe, its sizes, and where the image decoder lies."""
    decoder = f"image_tokenizer.weights={folder / 'image.safetensors'}"
    return ["recipe=sft_7b", *SHAPE, decoder, "precision.params=fp32"]


def tokenizer_file() -> dict[str, Any]:
    """Chameleon's 65536 ids; from 16384 on they are text."""
    vocab = {f"w{token}" if token >= 16384 else f"<x{token}>": token for token in range(65536)}
    return {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": vocab, "merges": []}}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder, and the tensors and logits that transformers has: per-head norms, all different."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    from realsr_hpc.export.hf_config import vq_config
    from realsr_hpc.export.image_weights import VQ_PREFIX, encoder_tensors
    from realsr_hpc.tokenizer.image import ImageTokenizer
    from realsr_hpc.tokenizer.image_file import save_image_tokenizer

    folder = tmp_path_factory.mktemp("stock")
    config: RunConfig = compose_one(recipe(folder))
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    codes = {f"IMGIMG{str(code).translate(letters)}Z": 4 + code for code in range(8192)}
    torch.manual_seed(0)
    model = ChameleonForConditionalGeneration(
        ChameleonConfig(
            vocab_size=65536,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            rms_norm_eps=config.model.norm_epsilon,
            vq_config=vq_config(config.image_tokenizer),
            vocabulary_map={"<s>": 0, "</s>": 2, "<eoss>": 8196, "<racm3:break>": 8197, "<image>": 8711, **codes},
        )
    ).eval()
    image = ImageTokenizer(config.image_tokenizer)
    save_image_tokenizer(image, folder / "image.safetensors")
    state = {name.removeprefix(VQ_PREFIX): value for name, value in encoder_tensors(image).items()}
    model.model.vqmodel.load_state_dict(state)
    for name, parameter in model.named_parameters():
        if "vqmodel" in name:
            continue
        if "norm" in name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        elif "proj" in name:
            parameter.data.mul_(8)
    model.save_pretrained(folder / "source", max_shard_size="3MB")
    (folder / "source" / "tokenizer.json").write_text(json.dumps(tokenizer_file()))
    yield folder, model
    shutdown()


def share_head_norms(source: Path, model: Any) -> None:
    """One q and one k norm per layer, kept as [1, head_dim]: how Lumina's weights are."""
    for name, parameter in model.named_parameters():
        if any(norm in name for norm in HEAD_NORMS):
            parameter.data.copy_(parameter[:1].expand_as(parameter).clone())
    for path in set(weight_files(source).values()):
        tensors = load_file(path)
        cut = {n: t[:1].clone() if any(norm in n for norm in HEAD_NORMS) else t for n, t in tensors.items()}
        save_file(cut, path, metadata={"format": "pt"})


def their_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.lm_head(model.model(input_ids=TOKENS).last_hidden_state).numpy()


def our_logits(recipe: list[str], start: Path, layout: dict[str, Any]) -> np.ndarray:
    """Of a policy started from the imported folder; [vocabulary shard] on ranks of the last stage, else empty."""
    from realsr_hpc.config.schema import ParallelConfig
    from realsr_hpc.model.policy import build_policy
    from realsr_hpc.parallel.pipeline import Microbatch, run_pipeline
    from realsr_hpc.parallel.process_groups import initialise

    config = compose_one([*recipe, f"model.weights={start}"])
    config = config.model_copy(update={"parallel": ParallelConfig(**layout)})
    policy = build_policy(config, initialise(config.parallel, 0), 65536, trainable=False)

    def keep(hidden: Any, weight: Any, microbatch: Any) -> Any:
        return hidden.sum(), {"logits": hidden @ weight.T}

    outputs = run_pipeline(policy, [Microbatch(TOKENS)], keep, forward_only=True)
    return outputs[0]["logits"].numpy() if outputs else np.empty((*TOKENS.shape, 0), np.float32)


@pytest.mark.parametrize("shared", [False, True], ids=["a norm per head", "one norm for all heads"])
def test_a_stock_folder_computes_the_same_on_any_layout_and_keeps_every_bit(
    stock: Any, shared: bool, tmp_path: Path
) -> None:
    folder, model = stock
    source, imported = folder / "source", tmp_path / "imported"
    assert len(set(weight_files(source).values())) == 3
    if shared:
        source = shutil.copytree(source, tmp_path / "source")
        share_head_norms(source, model)
    assert command("import_weights")([f"source={source}", f"output={imported}", *recipe(folder)]) == 0
    theirs = their_logits(model)
    assert np.abs(theirs).max() > 0.2
    for layout in ({}, {"tp": 2}, {"pp": 2}):
        ranks = run_ranks(2 if layout else 1, our_logits, recipe(folder), imported, layout)
        assert np.abs(np.concatenate(ranks, -1) - theirs).max() < 2e-5, layout
    written = {
        name: tensor for path in set(weight_files(imported).values()) for name, tensor in load_file(path).items()
    }
    wanted = {name.replace("model.language_model.", "model."): tensor for name, tensor in model.state_dict().items()}
    assert written.keys() == wanted.keys()
    assert [name for name, tensor in written.items() if not torch.equal(tensor, wanted[name])] == []


def cut_a_tensor(source: Path) -> str:
    path = next(path for name, path in weight_files(source).items() if "gate_proj" in name)
    tensors = load_file(path)
    name = next(name for name in tensors if "gate_proj" in name)
    save_file({**tensors, name: tensors[name][:, :31].clone()}, path)
    return r"gate_proj\.weight has shape \(48, 31\), .* has \(48, 32\)"


def lose_a_shard(source: Path) -> str:
    path = sorted(set(weight_files(source).values()))[1]
    path.unlink()
    return f"names {path.name}, not there; copy the missing shards"


def change_the_vocabulary(source: Path) -> str:
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**settings, "vocab_size": 65024}))
    return r"vocab_size 65024 \(recipe: 65536\)"


@pytest.mark.parametrize("spoil", [cut_a_tensor, lose_a_shard, change_the_vocabulary])
def test_a_folder_that_does_not_fit_is_one_error_and_leaves_nothing(
    stock: Any, spoil: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = stock
    source = shutil.copytree(folder / "source", tmp_path / "source")
    message = spoil(source)
    capsys.readouterr()
    assert command("import_weights")([f"source={source}", f"output={tmp_path / 'out'}", *recipe(folder)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and re.search(message, said[0]), said
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
