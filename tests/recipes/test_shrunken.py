"""7B and small recipes, model and image sizes cut, all other keys as shipped, train two steps on the CPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from realsr_hpc.config.load import compose_one
from realsr_hpc.config.schema import RunConfig
from tests.distributed.launcher import run_ranks

CUT = [
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_heads=4",
    "model.ffn_hidden_size=96",
    "model.weights=null",
    "vlcot.image_sizes_px=[32,64,96]",
    "vlcot.lq_size_px=32",
    "vlcot.max_text_tokens=8",
    "image_tokenizer.base_channels=32",
    "image_tokenizer.num_res_blocks=1",
    "image_tokenizer.latent_channels=32",
    "data=bundled",
    "data.num_threads=1",
    "optim.warmup_steps=0",
]
"""Sizes, files, and warm-up, which is longer than two steps."""
SHORT = {
    "sft": ["sft.num_steps=2", "sft.batch_size=2", "sft.heldout_traces=2", "sft.sample_every_steps=0"],
    "grpo": [
        "grpo.num_steps=2",
        "grpo.prompts_per_step=1",
        "grpo.heldout_every_steps=0",
        "rewards=default",
        # an untrained policy's rollouts are all alike, without images where its text is greedy; an update must be made
        "grpo.zero_variance=keep",
        "rollout.grammar=constrained",
    ],
}
LEVELS = {
    "chameleon_7b": "[1,1,1,1,1]",
    "chameleon_30b": "[1,1,1,1,1]",
    "chameleon_7b_f8": "[1,1,1,1]",
    "small": "[1,1,1,1]",
}
TOKENS = {"chameleon_7b": 96, "chameleon_30b": 96, "chameleon_7b_f8": 272, "small": 272}
"""Of a rollout: three images and a little text. An untrained policy goes on to the last one, whatever their number."""
OWN_SIZES = {"small": ["image_tokenizer.decoder_base_channels=32"], "chameleon_30b": ["model.num_kv_heads=2"]}
LOSS = {"sft": "sft/loss/mean", "grpo": "rewards/total/mean"}


def cut(recipe: str, model: str, folder: Path, layout: list[str], root: Path) -> RunConfig:
    task = recipe.split("_")[0]
    own = [
        f"image_tokenizer.weights={folder / 'image.safetensors'}",
        f"text_tokenizer.path={folder / 'text.json'}",
        f"image_tokenizer.channel_multiplier={LEVELS[model]}",
        f"rollout.max_new_tokens={TOKENS[model]}",
        f"output_root={root}",
    ]
    return compose_one(
        [
            f"recipe={recipe}",
            f"model={model}",
            "cluster=local",
            *layout,
            *CUT,
            *own,
            *OWN_SIZES.get(model, []),
            *SHORT[task],
        ]
    )


def test_two_steps_of_the_small_tokenizer(tmp_path: Path) -> None:
    """What it leaves is what the small policy's recipes name."""
    from realsr_hpc.tokenizer.trace import TraceTokenizer
    from realsr_hpc.tracking.spool import metrics_by_step
    from realsr_hpc.train import tokenizer

    sizes = ["tokenizer_training.num_steps=2", "tokenizer_training.start_batches=2", "tokenizer_training.crop_px=64"]
    sizes += ["tokenizer_training.text_vocab_size=400", "image_tokenizer.codebook_size=64", "data=bundled"]
    cut_short = [*sizes, "cluster=local", f"output_root={tmp_path}", "image_tokenizer.decoder_base_channels=32"]
    assert tokenizer.main(compose_one(["recipe=tokenizer_small", *cut_short]), tmp_path) == 0
    assert math.isfinite(metrics_by_step(tmp_path)[2]["tokenizer/loss/step"])
    left = [f"image_tokenizer.weights={tmp_path / 'image_tokenizer.safetensors'}"]
    left += [f"text_tokenizer.path={tmp_path / 'text_tokenizer.json'}", *cut_short]
    traces = TraceTokenizer.load(compose_one(["recipe=sft_small", *left]), torch.device("cpu"))
    assert traces.codec.vocabulary.num_text == 400 and traces.codec.vocabulary.num_codes == 64


def two_steps(config: RunConfig, run_dir: Path) -> tuple[int, dict[int, dict[str, float]]]:
    from realsr_hpc.tracking.spool import metrics_by_step
    from realsr_hpc.train import grpo, sft

    loop: Any = {"grpo": grpo, "sft": sft}[config.task]
    run_dir.mkdir(exist_ok=True)
    return loop.main(config, run_dir), metrics_by_step(run_dir)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """model -> folder with its tokenizers, made once."""
    made: dict[str, Path] = {}

    def folder_of(model: str) -> Path:
        if model not in made:
            made[model] = tmp_path_factory.mktemp(model)
            recipe = "sft_small" if model == "small" else "sft_7b"
            run_ranks(1, make_tokenizers, cut(recipe, model, made[model], ONE, made[model]), made[model])
        return made[model]

    return folder_of


def make_tokenizers(config: RunConfig, folder: Path) -> None:
    """Random image tokenizer and a small text tokenizer: what a 7B recipe reads from `weights/`."""
    from realsr_hpc.tokenizer.image import ImageTokenizer
    from realsr_hpc.tokenizer.image_file import save_image_tokenizer
    from realsr_hpc.tokenizer.text import train_text_tokenizer
    from realsr_hpc.vlcot.sequence import FIELDS

    torch.manual_seed(0)
    save_image_tokenizer(ImageTokenizer(config.image_tokenizer), folder / "image.safetensors")
    tags = [f"<{name}>" for name in FIELDS] + [f"</{name}>" for name in FIELDS]
    train_text_tokenizer(["a lion on a rock under the sky"] * 3, 320, folder / "text.json", tags)


ONE = ["parallel.tp=1", "parallel.pp=1", "parallel.sequence_parallel=false"]
FOUR = ["parallel.tp=2", "cluster.tasks_per_node=4"]
"""Pipeline stages, sequence parallelism and recomputation as shipped."""


@pytest.mark.parametrize(
    ("recipe", "model", "layout"),
    [
        ("sft_7b", "chameleon_7b", FOUR),
        ("sft_7b", "chameleon_7b_f8", ONE),
        ("grpo_7b", "chameleon_7b", FOUR),
        ("grpo_7b", "chameleon_7b_f8", ONE),
        ("grpo_7b_paper", "chameleon_7b", ONE),
        ("grpo_7b_paper", "chameleon_7b_f8", FOUR),
        ("sft_30b_lora", "chameleon_30b", ["cluster.tasks_per_node=2"]),
        ("sft_small", "small", ONE),
        ("grpo_small", "small", ONE),
    ],
)
def test_two_steps(recipe: str, model: str, layout: list[str], tokenizers: Any, tmp_path: Path) -> None:
    config = cut(recipe, model, tokenizers(model), layout, tmp_path)
    assert config.precision.params == "bf16"
    world = config.cluster.tasks_per_node
    results = run_ranks(world, two_steps, config, tmp_path / "run")
    assert {code for code, _ in results} == {0}
    steps = results[0][1]
    assert sorted(steps)[-2:] == [1, 2]
    for name in ("optim/grad_norm/step", LOSS[config.task]):
        assert all(math.isfinite(steps[step][name]) for step in (1, 2))
