"""docs/start.md followed word by word: narrow models in the publishers' layouts, from downloads to two steps.

The commands are read from the page. The checkout they run in has the 7B recipes with narrow model files, nothing else
of it differs.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from realsr_hpc import paths
from realsr_hpc.commands import import_weights, launch, stage_weights
from realsr_hpc.config.load import compose_one
from realsr_hpc.config.schema import RunConfig, VLCoTConfig
from realsr_hpc.config.weights import needs_of, state
from realsr_hpc.export.hf_config import special_tokens
from realsr_hpc.export.text_files import combined
from realsr_hpc.model.chunks import WeightShapes
from realsr_hpc.model.hf_mapping import hf_shapes
from realsr_hpc.paths import project_root
from realsr_hpc.tokenizer.image import ImageTokenizer
from realsr_hpc.tokenizer.text import train_text_tokenizer
from realsr_hpc.tracking.spool import metrics_by_step
from realsr_hpc.vlcot.sequence import FIELDS
from realsr_hpc.vlcot.vocabulary import build_vocabulary
from tests.unit.formats import reference_llamagen
from tests.unit.formats.layouts import FFN, HEADS, HIDDEN, LAYERS, meta_state, write_tree

CHECKOUT = project_root()
BLOCKS = re.findall(r"```sh\n(.*?)```", (CHECKOUT / "docs" / "start.md").read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = [
    line.split("   #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.startswith("python ")
]
IMPORTS = [line for line in COMMANDS if "import_weights.py source=" in line]
LAUNCHES = [line for line in COMMANDS if "launch.py" in line]
NARROW = {
    "model": {"num_layers": LAYERS, "hidden_size": HIDDEN, "num_heads": HEADS, "ffn_hidden_size": FFN},
    "image_tokenizer": {"base_channels": 32, "num_res_blocks": 1, "latent_channels": 24},
}
CODE_WIDTH = {"chameleon_7b": 6, "chameleon_7b_f8": 8}
TWO_STEPS = [
    "cluster=local", "cluster.tasks_per_node=1", "parallel=single", "parallel.sequence_parallel=false",
    "vlcot.image_sizes_px=[32,64,96]", "vlcot.lq_size_px=32", "vlcot.max_text_tokens=8", "data.num_threads=1",
    "optim.warmup_steps=0", "sft.num_steps=2", "sft.batch_size=2", "sft.heldout_traces=2", "sft.sample_every_steps=0",
]  # fmt: skip


def words(command: str) -> list[str]:
    """What a shell would hand to the tool."""
    return shlex.split(command)[2:]


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A checkout with narrow models and somebody's photographs; commands start in it."""
    root = tmp_path / "project"
    shutil.copytree(CHECKOUT / "recipes", root / "recipes", ignore=shutil.ignore_patterns("assets"))
    for name, width in CODE_WIDTH.items():
        path = root / "recipes" / "model" / f"{name}.yaml"
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        for section, sizes in NARROW.items():
            assert sizes.keys() <= tree[section].keys()
            tree[section] |= sizes
        tree["image_tokenizer"]["embed_dim"] = width
        path.write_text(f"# @package _global_\n{yaml.safe_dump(tree)}", encoding="utf-8")
    path = root / "recipes" / "model" / "chameleon_30b.yaml"  # its tokenizer is that of chameleon_7b
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    tree["model"] |= NARROW["model"] | {"num_kv_heads": HEADS}
    path.write_text(f"# @package _global_\n{yaml.safe_dump(tree)}", encoding="utf-8")
    (root / "realsr_hpc").mkdir()
    (root / "data").mkdir()
    (root / "recipes" / "assets").symlink_to(CHECKOUT / "recipes" / "assets")
    (root / "data" / "photographs").symlink_to(CHECKOUT / "recipes" / "assets" / "photographs")
    monkeypatch.setattr(paths, "PACKAGE", root / "realsr_hpc")
    monkeypatch.chdir(root)
    return root


@functools.cache
def text_file(layout: VLCoTConfig, num_codes: int) -> str:
    """A tokenizer's file with the names of all codes and control tokens, its text learnt from a line."""
    tags = [f"<{name}>" for name in FIELDS] + [f"</{name}>" for name in FIELDS]
    with tempfile.TemporaryDirectory() as folder:
        train_text_tokenizer(["a lion on a rock under the sky"] * 3, 320, Path(folder) / "text.json", tags)
        text = json.loads((Path(folder) / "text.json").read_text(encoding="utf-8"))
    count = len(text["model"]["vocab"]) + len(text["added_tokens"])
    vocabulary = build_vocabulary(layout, num_codes, count)
    return json.dumps(combined(text, special_tokens(vocabulary), vocabulary))


def write_text(path: Path, config: RunConfig) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text_file(config.vlcot, config.image_tokenizer.codebook_size), encoding="utf-8")


def write(path: Path, tree: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree), encoding="utf-8")


def tokenizers(folder: Path, config: RunConfig) -> None:
    """`tokenizer/` of Meta's release."""
    write_text(folder / "tokenizer" / "text_tokenizer.json", config)
    torch.save({"state_dict": ImageTokenizer(config.image_tokenizer).state_dict()}, folder / "tokenizer" / "vqgan.ckpt")
    settings = {"embed_dim": 6, "n_embed": 8192, "ddconfig": {"double_z": False, "attn_resolutions": []}}
    (folder / "tokenizer" / "vqgan.yaml").write_text(yaml.safe_dump({"model": {"params": settings}}))


def meta_tree(folder: Path, config: RunConfig) -> None:
    shard = {name: value.bfloat16() for name, value in meta_state(vocab=65536)[0].items()}
    write_tree(folder, [shard], config)
    tokenizers(folder, config)


def two_models(folder: Path, config: RunConfig) -> None:
    """7b and 30b in one tree: the larger in four shards, its norms after attention and MLP."""
    meta_tree(folder.parents[1], config)
    shards = [{name: value.bfloat16() for name, value in shard.items()} for shard in meta_state(vocab=65536, parts=4)]
    write_tree(Path("thirty"), shards, config, HEADS, swin_norm=True)
    (Path("thirty") / "models" / "7b").rename(folder)


def hugging_face(folder: Path, config: RunConfig, vocab: int, **inside: torch.Tensor) -> dict[str, torch.Tensor]:
    """config.json as Lumina-mGPT's, tokenizer.json, and tensors with one q and one k norm per layer."""
    folder.mkdir(parents=True)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "vocab_size": vocab}
    settings = {"model_type": "chameleon", "num_attention_heads": HEADS, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
    write(folder / "config.json", {**sizes, **settings, "swin_norm": False, "mask_image_logits": False})
    write_text(folder / "tokenizer.json", config)
    tensors = {}
    for name, shape in hf_shapes(WeightShapes.of(config.model, vocab)).items():
        rows = 1 if name.split(".")[-2] in ("q_norm", "k_norm") else shape[0]
        value = torch.randn(rows, *shape[1:]) * 0.05 + (1 if "norm" in name and name.endswith("weight") else 0)
        tensors[name] = value.bfloat16()
    return tensors | inside


def lumina(folder: Path, config: RunConfig) -> None:
    save_file(hugging_face(folder, config, 65536), folder / "model.safetensors")


def anole_hf(folder: Path, config: RunConfig) -> None:
    image = ImageTokenizer(config.image_tokenizer).state_dict()
    inside = {f"model.vqmodel.{name}": value.clone() for name, value in image.items()}
    save_file(hugging_face(folder, config, 65536, **inside), folder / "model.safetensors")


def pure(folder: Path, config: RunConfig) -> None:
    tensors = hugging_face(folder, config, 73728)
    files = {name: f"pytorch_model-0000{number % 2 + 1}-of-00002.bin" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        torch.save({name: value for name, value in tensors.items() if files[name] == file}, folder / file)
    write(folder / "pytorch_model.bin.index.json", {"weight_map": files})


DOWNLOADS = {
    "downloads/chameleon": meta_tree,
    "downloads/chameleon/models/30b": two_models,
    "downloads/Lumina-mGPT-7B-512": lumina,
    "downloads/Anole-7b-v0.1": meta_tree,
    "downloads/Anole-7b-v0.1-hf": anole_hf,
    "downloads/PURE": pure,
}


def download(given: dict[str, str], config: RunConfig) -> None:
    """Narrow files under the names that a command of the page gives."""
    torch.manual_seed(0)
    DOWNLOADS[given["source"]](Path(given["source"]), config)
    image = Path(given.get("image_tokenizer", "nowhere"))
    if image.name == "vqgan.ckpt":
        tokenizers(image.parent.parent, config)
    elif image.name == "vq_ds8_c2i.pt":
        torch.save({"model": reference_llamagen.random_state([1, 2, 2, 4], 16384, 32, 24, 8, 1)}, image)


def test_the_page_has_each_start() -> None:
    sources = [dict(word.split("=", 1) for word in words(line))["source"] for line in IMPORTS]
    assert sorted(sources) == sorted(DOWNLOADS)


@pytest.mark.parametrize("command", IMPORTS)
def test_a_start_is_followed_from_downloads_to_plans(command: str, project: Path, capsys: Any) -> None:
    """And what was imported of the first is trained for two steps."""
    from realsr_hpc.train import sft

    given = dict(word.split("=", 1) for word in words(command))
    config = compose_one([f"recipe={given['recipe']}"])
    download(given, config)
    named = [need for need in needs_of(config) if not need.purpose.startswith("rewards")]
    assert [state(need) for need in named] == ["missing"] * 3
    assert stage_weights.main([f"recipe={given['recipe']}", "downloads=downloads"]) == 1
    assert command in capsys.readouterr().out.splitlines(), "what is listed for downloads is what the page says"
    assert import_weights.main(words(command)) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "parameters" in said and "missing" not in said
    assert said.rstrip().endswith("start from it with recipe=NAME"), "the recipe names all that was written"
    assert [state(need) for need in named] == ["there"] * 3
    weights = Path(given["output"]) / "model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert [state(need) for need in named] == ["there", "there", "differs"]
    weights.write_bytes(kept)
    chosen = {line: [word for word in words(line) if word != "plan=true"] for line in LAUNCHES}
    launches = [line for line in LAUNCHES if compose_one(chosen[line]).model.weights == given["output"]]
    assert any(given["recipe"] in line for line in launches)
    for line in launches:
        assert launch.main(list(dict.fromkeys([*words(line), "plan=true"]))) == 0
        assert "Nothing was submitted." in capsys.readouterr().out
    if given["source"] == "downloads/chameleon":
        assert sft.main(compose_one(["recipe=sft_7b", *TWO_STEPS]), project / "run") == 0
        steps = metrics_by_step(project / "run")
        assert all(steps[step]["sft/loss/mean"] > 0 for step in (1, 2)) and steps[2]["optim/grad_norm/step"] > 0


def test_other_words_of_the_page(project: Path, capsys: Any) -> None:
    """Another output prints what to type; a text tokenizer may be named; what is needed is listed beforehand."""
    page = (CHECKOUT / "docs" / "start.md").read_text(encoding="utf-8")
    Path("downloads").mkdir()
    listed = [line for line in COMMANDS if "stage_weights.py" in line]
    assert stage_weights.main(["recipe=grpo_7b", "downloads=nowhere"]) == 2
    assert listed and all(stage_weights.main(words(line)) == 1 for line in listed)
    said = " ".join(capsys.readouterr().out.split())
    assert "missing" in said and "Chameleon Research License" in said
    line = next(line for line in IMPORTS if "Lumina" in line)
    given = dict(word.split("=", 1) for word in words(line))
    download(given, compose_one([f"recipe={given['recipe']}"]))
    (Path(given["source"]) / "tokenizer.json").unlink()
    assert stage_weights.main([f"recipe={given['recipe']}", "downloads=downloads"]) == 1
    (word,) = re.findall(r"`(text_tokenizer=downloads\S+)`", page)
    assert word in capsys.readouterr().out
    elsewhere = [given_word for given_word in words(line) if not given_word.startswith("output=")]
    assert import_weights.main([*elsewhere, word, "output=elsewhere"]) == 0, capsys.readouterr().err
    overrides = capsys.readouterr().out.rpartition("recipe=NAME ")[2].split()
    assert {word.partition("=")[0] for word in overrides} == set(re.findall(r"([a-z_]+\.[a-z]+)=DIR", page))
    assert launch.main(["recipe=sft_7b", *overrides, "plan=true"]) == 0
    assert compose_one(["recipe=sft_7b", *overrides]).model.weights == "elsewhere"
