"""By the planner: the 7B on one to 128 nodes of eight H100, and what runs on one or two GPUs; the 30B."""

from __future__ import annotations

from rich.console import Console

from realsr_hpc.config.arguments import read_arguments, read_flag
from realsr_hpc.config.load import compose_one
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.plan.tables import comparison, markdown

BASE = ["recipe=grpo_7b", "cluster=slurm_h100x8", "rollout.batch_size=64", "parallel.microbatch_tokens=8192"]
NODES = (1, 2, 4, 8, 16, 32, 64, 128)
LAYOUTS = ((8, 1), (4, 2), (4, 1), (2, 2), (2, 1))
TWO_OF_48_GB = "parallel=tp2 cluster.tasks_per_node=2 cluster.gpus_per_node=2 cluster.gpu_memory_gib=47".split()
FEW = (
    ["sft_small"],
    ["grpo_small"],
    ["sft_7b_lora"],
    ["sft_7b_lora", *TWO_OF_48_GB],
    ["grpo_7b_lora", "rewards=paper"],
    ["grpo_7b_lora", "rewards=paper", *TWO_OF_48_GB],
    ["sft_30b_lora"],
    ["grpo_7b_lora", "rewards=paper", "model=chameleon_30b", "parallel=tp2", "cluster=slurm_h100x8"],
)
"""Recipes with their overrides for which one GPU or two are enough; the 30B needs one node."""
TITLES = {
    "layouts": "Layouts of 32 prompts x 8 rollouts on one node",
    "growing": "TP 2, 8 prompts per data-parallel rank; nodes and batch grow together",
    "fixed": "TP 2, 512 prompts x 8 rollouts; more nodes, the same batch",
    "long": "The same layouts for the f = 8 variant (5,500 image tokens per trace)",
    "few": "`sft_small`, `grpo_small`, then `sft_7b_lora` and `grpo_7b_lora rewards=paper` on one GPU and on two "
    "of 48 GB; the same for the 30B on a node of eight (`sft_30b_lora`, and GRPO with `model=chameleon_30b`)",
}


def recipes(table: str) -> list[RunConfig]:
    """The recipes of one table."""
    if table == "few":
        return [compose_one([f"recipe={recipe}", *words]) for recipe, *words in FEW]
    if table in ("layouts", "long"):
        longer = ["model=chameleon_7b_f8", "parallel.microbatch_tokens=10496", "rollout.batch_size=32"]
        extra = longer if table == "long" else []
        return [_recipe(1, tp, pp, 32, extra) for tp, pp in LAYOUTS]
    return [_recipe(nodes, 2, 1, 32 * nodes if table == "growing" else 512) for nodes in NODES]


def _recipe(nodes: int, tp: int, pp: int, prompts: int, extra: list[str] | None = None) -> RunConfig:
    layout = [f"parallel.tp={tp}", f"parallel.pp={pp}"]
    return compose_one([*BASE, f"cluster.nodes={nodes}", *layout, f"grpo.prompts_per_step={prompts}", *(extra or [])])


def main(arguments: list[str]) -> int:
    """Print all tables; markdown=true as docs/scaling.md has them. Exit code 0."""
    as_markdown = read_flag(read_arguments(arguments, {"markdown": "false"}, __doc__), "markdown")
    console = Console(width=180)
    for table, title in TITLES.items():
        if as_markdown:
            print(f"{title}:\n\n{markdown(recipes(table))}\n")
        else:
            console.print(comparison(recipes(table), title))
    return 0
