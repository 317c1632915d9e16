"""What is computed on the CPU and on the second device: on each in a process of its own, results as plain numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.distributed.launcher import run_ranks
from tests.distributed.worlds import with_image_tokenizer


def on_both(function: Callable[..., Any], *arguments: Any, ranks: int = 1) -> tuple[list[Any], list[Any]]:
    """Results of `function(*arguments)` on every rank of a world on the CPU, and of another one on the second device.

    A Path among the arguments is a folder: each world gets its own one inside.
    """
    near, far = (
        [argument / name if isinstance(argument, Path) else argument for argument in arguments]
        for name in ("cpu", "far")
    )
    for folder in [*near, *far]:
        if isinstance(folder, Path):
            folder.mkdir()
    return run_ranks(ranks, on_near, function, *near), run_ranks(ranks, on_far, function, *far)


def on_near(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` on the CPU, with the attention kernels that are taken for the second device."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from realsr_hpc.parallel import backend

    backend.attention = backend.plain_attention  # of this process alone
    with sdpa_kernel(SDPBackend.MATH):
        return function(*arguments)


def on_far(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` where the second device is the one to compute on."""
    from realsr_hpc.parallel import backend
    from tests.second_device.far import FarTensor, far_device

    with far_device() as device:
        backend.compute_on(device)
        before = FarTensor.made
        result = function(*arguments)
        assert FarTensor.made > before + 100, "nothing was computed on the second device"
        return result


def one_step(sections: dict[str, Any]) -> dict[str, Any]:
    """A GRPO step and the policy's log-probabilities of its rollouts: everything that it decides."""
    import torch

    from realsr_hpc.train.grpo import step
    from realsr_hpc.train.scoring import logprobs_of
    from realsr_hpc.train.updates import grpo_batches
    from tests.steps import Images, small_parts

    torch.set_num_threads(1)
    parts = small_parts(**sections)
    share = 2 // parts.groups.dp_size
    report = step(parts, Images(range(parts.groups.dp_rank * share, (parts.groups.dp_rank + 1) * share)), 1)
    rollouts = [value for group in report.groups for value in vars(group.rollouts).values() if torch.is_tensor(value)]
    assert rollouts and all(value.device.type == "cpu" for value in rollouts), "rollouts are in host memory"
    [batch, *_] = grpo_batches(parts, report.groups, parts.sampler.masks)
    scored = logprobs_of(parts.policy, parts.group_microbatches(batch.groups), parts.sampler.masks.allowed)
    return {
        "tokens": [group.rollouts.tokens.tolist() for group in report.groups],
        "logprobs": [group.rollouts.rollout_logprobs.tolist() for group in report.groups],
        "images": [None if image is None else image.tolist() for group in report.groups for image in group.images],
        "scored": [None if values is None else values.tolist() for values in scored],
        "metrics": {name: value for name, value in report.metrics.items() if not timed(name)},
        "weights": [parameter.detach().cpu().double().sum().item() for parameter in parts.policy.parameters()],
    }


def apart(ours: Any, theirs: Any) -> float:
    """Largest difference of floats in two results of one form, relative where they exceed 1; all else must be equal."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        return max((apart(value, theirs[name]) for name, value in ours.items()), default=0.0)
    if isinstance(ours, list):
        assert len(ours) == len(theirs)
        return max((apart(one, other) for one, other in zip(ours, theirs, strict=True)), default=0.0)
    if isinstance(ours, float):
        return abs(ours - theirs) / max(1.0, abs(theirs))
    assert np.array_equal(ours, theirs), f"{ours!r} is not {theirs!r}"
    return 0.0


def timed(metric: str) -> bool:
    """Metrics that follow the clock."""
    return metric.startswith(("time/", "system/", "rollout/tokens_per_s"))


def train_and_use(recipe: list[str], folder: Path, use: bool) -> dict[str, Any]:
    """Train with a stop and a resumption, then restore and evaluate with the last checkpoint: metrics and images."""
    import torch

    from realsr_hpc.commands import evaluate, restore
    from realsr_hpc.config.load import to_yaml
    from realsr_hpc.parallel import backend
    from realsr_hpc.tracking.spool import metrics_by_step
    from realsr_hpc.train import grpo, sft

    torch.set_num_threads(1)
    run_dir = folder / "run"
    run_dir.mkdir()
    config = with_image_tokenizer(recipe, folder)
    (run_dir / "recipe.yaml").write_text(to_yaml(config), encoding="utf-8")
    loop: Any = {"grpo": grpo, "sft": sft}[config.task]
    assert loop.main(config, run_dir, lambda: True) == 85 and loop.main(config, run_dir) == 0
    result: dict[str, Any] = {
        "metrics": {
            step: {name: value for name, value in values.items() if not timed(name)}
            for step, values in metrics_by_step(run_dir).items()
        }
    }
    if use:
        backend.workers = lambda where: 1  # the same batches on both devices: convolutions round by them
        given = [f"run={run_dir}", "temperature=0.7", "image_top_k=20", "cfg_scale=1.5"]
        assert restore.main([*given, f"input={small_photograph(folder)}", f"output={folder / 'restored'}"]) == 0
        assert evaluate.main([f"run={run_dir}", "num_images=2", "pyiqa=none", f"output={folder / 'report'}"]) == 0
        result["images"] = pixels_of(folder / "restored") | pixels_of(folder / "report" / "images")
    return result


def drawn_codes(recipe: list[str], folder: Path) -> dict[str, Any]:
    """Tokens of supervised training's first batch, before and after the policy has drawn its own codes."""
    import torch

    from realsr_hpc.data.loader import LQLoader
    from realsr_hpc.train.own_codes import with_own_codes
    from realsr_hpc.train.parts import build_parts
    from realsr_hpc.train.sft import trace_sequences

    torch.set_num_threads(1)
    config = with_image_tokenizer([*recipe, "sft.own_codes=1"], folder)
    parts = build_parts(config, 1)
    sequences = trace_sequences(parts.tokens, LQLoader(config, config.data.train_split, 2).next())
    before = parts.microbatches(sequences, packing=config.sft.packing)
    after = with_own_codes(parts, before, 1)
    return {"before": [m.tokens.tolist() for m in before], "after": [m.tokens.tolist() for m in after]}


def small_photograph(folder: Path) -> Path:
    """A picture of a few tiles."""
    from PIL import Image
    from skimage import data

    path = folder / "photograph.png"
    Image.fromarray(data.astronaut()[64:112, 96:160]).save(path)
    return path


def pixels_of(folder: Path) -> dict[str, np.ndarray]:
    """Every PNG under a folder."""
    from PIL import Image

    return {str(path.relative_to(folder)): np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))}
