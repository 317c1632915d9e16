"""A Slurm of this machine's own, and the small SFT recipe launched on it with the project's own command."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from realsr_hpc.commands.launch import main
from realsr_hpc.config.load import compose
from realsr_hpc.paths import project_root
from realsr_hpc.runfolder import list_runs

SMALL = [
    "recipe=sft_tiny",
    "data.manifest=recipes/assets/photographs/manifest.parquet",
    "cluster.kind=slurm",
    "cluster.tasks_per_node=1",
    "cluster.cpus_per_task=1",
    "vlcot.image_sizes_px=[32,64,96]",
    "vlcot.lq_size_px=32",
    "vlcot.max_text_tokens=6",
    "vlcot.text_slots=null",
    "model.weights=null",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "sft.batch_size=2",
    "sft.heldout_every_steps=100000",
    "sft.heldout_traces=2",
    "sft.sample_every_steps=0",
    "optim.warmup_steps=0",
]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two nodes of four processors, stopped afterwards by their process ids.

    A site unlike most: no accounting, its own name for the default partition, arrays of 50 jobs at most.
    """
    script = project_root() / "slurm" / "dev_cluster.sh"
    # KILLWAIT: on a machine that does much else a step and its checkpoint take their time
    settings = {
        "SLURM_ROOT": str(tmp_path_factory.mktemp("slurm")), "PORT": str(10000 + 20 * (os.getpid() % 450)),
        "NODES": "2", "GPUS": "0", "KILLWAIT": "60", "PARTITION": "everyday", "MAXARRAY": "50",
    }  # fmt: skip
    environment = {**os.environ, **settings}
    up = subprocess.run([script, "up"], env=environment, capture_output=True, text=True, check=False)
    assert up.returncode == 0, up.stdout + up.stderr
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = up.stdout.strip().splitlines()[-1].partition("SLURM_CONF=")[2]
    yield
    subprocess.run([script, "down"], env=environment, check=True)
    if before is None:
        del os.environ["SLURM_CONF"]
    else:
        os.environ["SLURM_CONF"] = before


@pytest.fixture(scope="session")
def image_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights are enough to train on."""
    import torch

    from realsr_hpc.tokenizer.image import ImageTokenizer
    from realsr_hpc.tokenizer.image_file import save_image_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "image_tokenizer.safetensors"
    torch.manual_seed(0)
    save_image_tokenizer(ImageTokenizer(compose(["recipe=sft_tiny"]).image_tokenizer), path)
    return path


@pytest.fixture(scope="session")
def launch(cluster: None, image_tokenizer: Path) -> Callable[..., list[Path]]:
    """What tools/launch.py does, with the small recipe into an output root; the folders of all its runs."""

    def run(root: Path, *arguments: str) -> list[Path]:
        places = [f"output_root={root}", f"image_tokenizer.weights={image_tokenizer}", "follow=false"]
        assert main([*SMALL, *places, *arguments]) == 0
        return list_runs(root)

    return run
