"""An export does not depend on the layout that writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from realsr_hpc.config.operation import ClusterConfig
from realsr_hpc.config.schema import ImageTokenizerConfig, ParallelConfig, TextTokenizerConfig
from tests.distributed.launcher import run_ranks
from tests.distributed.worlds import tiny_config

FILES = ("model.safetensors", "config.json", "vq_decoder.safetensors", "tokenizer.json")


def config_in(folder: Path, parallel: ParallelConfig) -> Any:
    return tiny_config({}, {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48}).model_copy(
        update={
            "parallel": parallel,
            "cluster": ClusterConfig(tasks_per_node=parallel.tp * parallel.pp),
            "image_tokenizer": ImageTokenizerConfig(
                weights=str(folder / "image.safetensors"), codebook_size=40, latent_channels=16, base_channels=32
            ),
            "text_tokenizer": TextTokenizerConfig(path=str(folder / "text.json")),
        }
    )


def make_run(folder: Path, wide: ParallelConfig) -> None:
    """A run folder of random weights, its recipe in the wide layout; and its export by this one process."""
    from realsr_hpc import checkpoint
    from realsr_hpc.config.load import to_yaml
    from realsr_hpc.export import export_run
    from realsr_hpc.model.policy import build_policy
    from realsr_hpc.parallel.process_groups import initialise
    from realsr_hpc.tokenizer.image import ImageTokenizer
    from realsr_hpc.tokenizer.image_file import save_image_tokenizer
    from realsr_hpc.tokenizer.text import train_text_tokenizer
    from realsr_hpc.tokenizer.trace import TraceTokenizer

    config = config_in(folder, ParallelConfig())
    save_image_tokenizer(ImageTokenizer(config.image_tokenizer), folder / "image.safetensors")
    train_text_tokenizer(["a lion on a rock"], 300, folder / "text.json")
    groups = initialise(config.parallel, config.seed)
    size = TraceTokenizer.load(config, groups.device).codec.vocabulary.size
    state = checkpoint.RunState(1)
    checkpoint.save(folder / "checkpoints", 1, build_policy(config, groups, size), None, state, checkpoint.Keep(last=1))
    (folder / "recipe.yaml").write_text(to_yaml(config_in(folder, wide)))
    export_run(folder, folder / "single")


def export_wide(folder: Path) -> None:
    from realsr_hpc.export import export_run

    export_run(folder, folder / "wide")


def test_export_by_four_ranks_equals_that_of_one(tmp_path: Path) -> None:
    run_ranks(1, make_run, tmp_path, ParallelConfig(tp=2, pp=2))
    run_ranks(4, export_wide, tmp_path)
    for file in FILES:
        assert (tmp_path / "wide" / file).read_bytes() == (tmp_path / "single" / file).read_bytes(), file
    assert len(list(tmp_path.glob(".*"))) == 0
