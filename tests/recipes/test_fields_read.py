"""The marks of the schema hold: what a task reads while it trains is marked as read by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from realsr_hpc.config.identity import marks
from realsr_hpc.config.load import compose_one
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.config.section import Section
from tests.distributed.launcher import run_ranks

SHORT = {
    "tokenizer_tiny": [
        "tokenizer_training.num_steps=1",
        "tokenizer_training.batch_size=1",
        "tokenizer_training.crop_px=32",
        "image_tokenizer.codebook_size=64",
        "image_tokenizer.latent_channels=32",
        "image_tokenizer.decoder_base_channels=32",
    ],
    "sft_tiny": ["sft.num_steps=1", "sft.batch_size=2", "sft.heldout_traces=2", "sft.sample_every_steps=1"],
    "grpo_tiny": [
        "grpo.num_steps=1",
        "grpo.prompts_per_step=1",
        "grpo.group_size=2",
        "grpo.heldout_prompts=1",
        "grpo.heldout_every_steps=1",
    ],
}


def train_and_record(config: RunConfig, run_dir: Path) -> None:
    """Train; write down every (section, field) that was read."""
    seen: set[tuple[str, str]] = set()
    plain = Section.__getattribute__

    def recording(self: Section, name: str):
        if name in type(self).model_fields:
            seen.add((type(self).__name__, name))
        return plain(self, name)

    Section.__getattribute__ = recording
    from realsr_hpc.train import grpo, sft, tokenizer

    {"grpo": grpo, "sft": sft, "tokenizer": tokenizer}[config.task].main(config, run_dir)
    (run_dir / "read.json").write_text(json.dumps(sorted(seen)))


def paths(section: type[Section] = RunConfig, prefix: str = "") -> dict[tuple[str, str], str]:
    """(section, field) -> path."""
    found = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= paths(field.annotation, f"{prefix}{name}.")
        else:
            found[section.__name__, name] = f"{prefix}{name}"
    return found


@pytest.mark.parametrize("recipe", SHORT)
def test_what_a_task_reads_is_marked_so(recipe, tmp_path):
    config = compose_one([f"recipe={recipe}", "cluster.tasks_per_node=1", "optim.warmup_steps=0", *SHORT[recipe]])
    run_ranks(1, train_and_record, config, tmp_path)
    read = {paths().get(tuple(item)) for item in json.loads((tmp_path / "read.json").read_text())} - {None}
    assert len(read) > 20
    assert {path for path in read if config.task not in marks()[path].tasks} == set()
