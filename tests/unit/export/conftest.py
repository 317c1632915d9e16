"""A tiny run with random weights, exported once for the room's tests."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from realsr_hpc import checkpoint
from realsr_hpc.config.load import to_yaml
from realsr_hpc.config.schema import (
    ImageTokenizerConfig,
    ModelConfig,
    PrecisionConfig,
    RunConfig,
    TextTokenizerConfig,
)
from realsr_hpc.export import export_run
from realsr_hpc.model.hf_mapping import local_to_hf
from realsr_hpc.model.policy import Policy, build_policy
from realsr_hpc.parallel.process_groups import initialise, shutdown
from realsr_hpc.quality.pyiqa_adapter import declare_torchvision_operators
from realsr_hpc.tokenizer.image import ImageTokenizer
from realsr_hpc.tokenizer.image_file import save_image_tokenizer
from realsr_hpc.tokenizer.text import train_text_tokenizer
from realsr_hpc.tokenizer.trace import TraceTokenizer
from realsr_hpc.vlcot.sequence import FIELDS

torch.set_num_threads(1)
declare_torchvision_operators()  # before transformers looks for torchvision


@dataclass
class Run:
    """A run folder of ours, what it holds in memory, and its export."""

    folder: Path
    export: Path
    config: RunConfig
    policy: Policy
    tokens: TraceTokenizer
    weights: dict[str, torch.Tensor]


def make_config(
    folder: Path, params: str = "fp32", normalised: bool = False, attention: Literal["middle", "lowest"] = "middle"
) -> RunConfig:
    image = ImageTokenizerConfig(
        weights=str(folder / "image.safetensors"), codebook_size=40, latent_channels=16, base_channels=32,
        normalised_codes=normalised, attention=attention,
    )  # fmt: skip
    model = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_hidden_size=48, init_std=0.2)
    return RunConfig(
        name="tiny_export",
        task="grpo",
        image_tokenizer=image,
        text_tokenizer=TextTokenizerConfig(path=str(folder / "text.json")),
        model=model,
        precision=PrecisionConfig(params=params),
    )


def _make_run(folder: Path, **options) -> Run:
    """Random weights (norms too), saved as a checkpoint of step 7 and exported."""
    folder.mkdir()
    config = make_config(folder, **options)
    torch.manual_seed(0)
    image = ImageTokenizer(config.image_tokenizer)
    with torch.no_grad():
        features = image.features(torch.rand(4, 3, 64, 64) * 2 - 1).flatten(0, 2)
        image.quantize.embedding.weight.copy_(features[torch.randperm(len(features))[:40]])
    save_image_tokenizer(image, folder / "image.safetensors")
    tags = [f"<{name}>" for name in FIELDS] + [f"</{name}>" for name in FIELDS]
    train_text_tokenizer(["a lion on a rock under the sky"] * 3, 320, folder / "text.json", tags)
    groups = initialise(config.parallel, config.seed)
    tokens = TraceTokenizer.load(config, groups.device)
    policy = build_policy(config, groups, tokens.codec.vocabulary.size)
    with torch.no_grad():
        for name, parameter in policy.chunks[0].named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    run_dir = folder / "run"
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text(to_yaml(config))
    state = checkpoint.RunState(7)
    checkpoint.save(run_dir / "checkpoints", 7, policy, None, state, checkpoint.Keep(last=1))
    export_run(run_dir, folder / "export")
    return Run(run_dir, folder / "export", config, policy, tokens, local_to_hf(policy))


@pytest.fixture(scope="package")
def run(tmp_path_factory) -> Run:
    made = _make_run(tmp_path_factory.mktemp("export") / "fp32")
    yield made
    shutdown()


@pytest.fixture
def make_run():
    """Makes other runs: `make_run(folder, params=..., normalised=...)`."""
    return _make_run
