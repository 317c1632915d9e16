"""What the distributed tests run on a rank: a tiny policy, fixed data, one step; results as numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from realsr_hpc.config.schema import ModelConfig, OptimConfig, ParallelConfig, PrecisionConfig, RunConfig
from realsr_hpc.parallel.pipeline import Microbatch, Outputs

VOCAB, ROWS, LENGTH = 256, 8, 24
NARROW = [
    "seed=3",
    "vlcot.image_sizes_px=[32,64,96]",
    "vlcot.lq_size_px=32",
    "vlcot.max_text_tokens=6",
    "vlcot.text_slots=null",
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.weights=null",
]
"""Overrides that make a policy recipe one of seconds."""


def with_image_tokenizer(overrides: list[str], folder: Path) -> RunConfig:
    """The recipe with `folder` as its output root and in it an image tokenizer of random weights, always the same."""
    from realsr_hpc.config.load import compose_one
    from realsr_hpc.tokenizer.image import ImageTokenizer
    from realsr_hpc.tokenizer.image_file import save_image_tokenizer

    weights = folder / "image_tokenizer.safetensors"
    config = compose_one([*overrides, f"image_tokenizer.weights={weights}", f"output_root={folder}"])
    if not weights.exists():
        torch.manual_seed(0)
        save_image_tokenizer(ImageTokenizer(config.image_tokenizer), weights)
    return config


def tiny_config(parallel: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **sections: Any) -> Any:
    """A four-layer model; `parallel`, `model` and `optim` as keywords of their sections."""
    shape = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "num_kv_heads": 2, "init_std": 0.15}
    return RunConfig(
        name="t",
        task="grpo",
        seed=3,
        model=ModelConfig(**(shape | (model or {}))),
        parallel=ParallelConfig(**({"distributed_optimizer": False} | (parallel or {}))),
        optim=OptimConfig(**sections.get("optim", {})),
        precision=PrecisionConfig(**sections.get("precision", {})),
    )


def all_rows(packed: bool) -> tuple[Tensor, Tensor | None]:
    """Tokens [ROWS, LENGTH] and, packed, the ids of three segments a row."""
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(7))
    if not packed:
        return tokens, None
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor([5, 11, 8]))
    return tokens, ids.expand(ROWS, -1).contiguous()


def microbatches(count: int, dp_rank: int, dp_size: int, packed: bool = False) -> list[Microbatch]:
    """This data-parallel rank's share of the rows, in `count` microbatches."""
    tokens, ids = all_rows(packed)
    mine = slice(dp_rank * ROWS // dp_size, (dp_rank + 1) * ROWS // dp_size)
    parts = tokens[mine].chunk(count)
    id_parts: Any = [None] * count if ids is None else ids[mine].chunk(count)
    return [Microbatch(t, i) for t, i in zip(parts, id_parts, strict=True)]


class ShardedLogprob(torch.autograd.Function):
    """log p(target) over vocabulary shards; backward gives this shard's share of the hidden gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, group: Any, offset: int) -> Tensor:
        logits = hidden @ weight.T
        top = logits.max(-1).values
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        total = (logits - top[..., None]).exp().sum(-1)
        dist.all_reduce(total, group=group)
        logsum = total.log() + top
        local = target - offset
        mine = (local >= 0) & (local < weight.size(0))
        onehot = torch.nn.functional.one_hot(local.clamp(0, weight.size(0) - 1), weight.size(0)) * mine[..., None]
        chosen = (logits * onehot).sum(-1)
        dist.all_reduce(chosen, group=group)
        ctx.save_for_backward(hidden, weight, onehot - (logits - logsum[..., None]).exp())
        return chosen - logsum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, weight, slope = ctx.saved_tensors
        d_logits = slope * grads[0][..., None]
        return d_logits @ weight, d_logits.flatten(0, 1).T @ hidden.flatten(0, 1), None, None, None


def loss_of(policy: Any) -> Any:
    """Summed next-token loss over the global number of tokens."""
    groups = policy.groups
    offset = groups.tp_rank * (policy.padded_vocab_size // groups.tp_size)

    def loss(hidden: Tensor, weight: Tensor, microbatch: Microbatch) -> tuple[Tensor, Outputs]:
        target = microbatch.tokens[:, 1:]
        logprob = ShardedLogprob.apply(hidden[:, :-1], weight, target, groups.tp, offset)
        value = -logprob.sum() / (ROWS * (LENGTH - 1))
        return value, {"loss": value.detach().clone(), "hidden": hidden.detach().clone()}

    return loss


def start(config: RunConfig) -> Any:
    """Groups and a policy on this rank."""
    from realsr_hpc.model import whole_adapters
    from realsr_hpc.model.policy import build_policy
    from realsr_hpc.parallel.process_groups import initialise

    groups = initialise(config.parallel, config.seed)
    policy = build_policy(config, groups, VOCAB)
    if policy.lora is not None:
        whole_adapters.load(policy, DrawnAdapters(policy))
    return policy


class DrawnAdapters(dict[str, Tensor]):
    """Whole adapters by name; a trained B is not zero, and only then does A have a gradient."""

    def __init__(self, policy: Any):
        from realsr_hpc.model.lora import whole_shape
        from realsr_hpc.model.whole_adapters import names

        for name in names(policy):
            generator = torch.Generator().manual_seed(sum(name.encode()))
            self[name] = 0.1 * torch.randn(whole_shape(name, policy), generator=generator)


def trained(policy: Any, part: Any = Tensor.detach) -> dict[str, np.ndarray]:
    """Whole trained tensors on world rank 0: the adapters, or all weights where there are none."""
    from realsr_hpc.model.hf_mapping import local_to_hf
    from realsr_hpc.model.whole_adapters import whole_tensors

    whole = whole_tensors(policy, part) if policy.lora is not None else local_to_hf(policy, part).items()
    return {name: tensor.numpy() for name, tensor in whole if tensor is not None}


def broadcast_outputs(outputs: list[Outputs], groups: Any) -> list[Outputs]:
    """The last stage's outputs on every pipeline stage, tensors on the device."""
    if groups.pp_size == 1:
        return outputs
    source = dist.get_global_rank(groups.pp, groups.pp_size - 1)
    box: list[Any] = [
        [{name: (tuple(t.shape), t.dtype) for name, t in one.items()} for one in outputs]
        if groups.is_last_stage
        else None
    ]
    dist.broadcast_object_list(box, src=source, group=groups.pp)
    if not groups.is_last_stage:
        outputs = [
            {name: torch.empty(shape, dtype=dtype, device=groups.device) for name, (shape, dtype) in one.items()}
            for one in box[0]
        ]
    for one in outputs:
        for name in sorted(one):
            one[name] = one[name].contiguous()
            dist.broadcast(one[name], src=source, group=groups.pp)
    return outputs


def gradients(config: RunConfig, count: int, packed: bool) -> dict[str, Any]:
    """Loss, hidden states of this rank's rows, and (on world rank 0) whole gradients after one backward."""
    from realsr_hpc.optim.step import Optimiser

    policy = start(config)
    groups = policy.groups
    optimiser = Optimiser(policy, config, total_steps=3)
    outputs: list[Outputs] = []
    optimiser.backward(microbatches(count, groups.dp_rank, groups.dp_size, packed), loss_of(policy), outputs)
    outputs = broadcast_outputs(outputs, groups)
    loss = torch.stack([one["loss"] for one in outputs]).sum()
    dist.all_reduce(loss, group=groups.dp)
    return {
        "loss": loss.item(),
        "hidden": torch.cat([one["hidden"] for one in outputs]).numpy(),
        "gradients": trained(policy, lambda parameter: parameter.main_grad),
    }


def updates(config: RunConfig, steps: int, count: int = 2) -> dict[str, Any]:
    """Weights (world rank 0), grad norms and learning rates after some updates."""
    from realsr_hpc.optim.step import Optimiser

    policy = start(config)
    groups = policy.groups
    optimiser = Optimiser(policy, config, total_steps=steps)
    data = microbatches(count, groups.dp_rank, groups.dp_size)
    results = [optimiser.step(data, loss_of(policy)) for _ in range(steps)]
    return {
        "norms": [r.grad_norm for r in results],
        "applied": [r.applied for r in results],
        "lrs": [r.lr for r in results],
        "weights": trained(policy),
    }


def largest_difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Largest absolute difference over all tensors; the names must agree."""
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)
