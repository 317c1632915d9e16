"""Rules for where and how a recipe executes: parallel layout, number formats, machines, checkpoints, tracking.

They have the form of the rules in checks.py, which collects them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

from realsr_hpc.config.derived import VOCABULARY_SIZES, fp8_widths, world_size
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.paths import resolve

Rule = Callable[[RunConfig], Iterator[str]]

_SECRET_KEY = re.compile(
    r"(^|[&;#])([^=&;]*(passw|pwd|secret|token|api_?key|credential|signature)[^=&;]*|auth|sig|key)=", re.IGNORECASE
)
_STORES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "file", "databricks")
"""Schemes of MLflow's stores; a database's may name a driver, `postgresql+psycopg2`."""
_UNFIT_IN_PATHS = {
    ":": "PYTHONPATH",
    "%": "Slurm's file names",
    "\\": "Slurm's file names",
    "?": "MLflow's address",
    "#": "MLflow's address",
}
"""Characters that must not occur in the path of a folder of runs, and where they have a special meaning."""
RESERVED = ("array", "output", "error", "open-mode", "signal", "nodes", "ntasks", "ntasks-per-node", "wrap", "parsable")
"""Options of sbatch that launching sets itself and parses."""

FP8_MULTIPLE = 16


def layers_divide_over_pipeline_stages(config: RunConfig) -> Iterator[str]:
    """All stages and virtual chunks hold the same number of layers."""
    parallel, layers = config.parallel, config.model.num_layers
    chunks = parallel.pp * parallel.virtual_pp
    if layers % chunks:
        yield f"parallel.pp: {parallel.pp} x virtual_pp {parallel.virtual_pp}: must divide model.num_layers {layers}"
    if parallel.virtual_pp > 1 and parallel.pp == 1:
        yield f"parallel.virtual_pp: {parallel.virtual_pp}: needs parallel.pp >= 2; set it to 1"


def tensor_parallel_divides_the_model(config: RunConfig) -> Iterator[str]:
    """Heads, key/value heads, feed-forward and vocabulary are split over the tensor-parallel ranks."""
    tp, model = config.parallel.tp, config.model
    parts = {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.num_kv_heads or model.num_heads,
        "model.ffn_hidden_size": model.ffn_hidden_size,
        "model.hidden_size": model.hidden_size,
    }
    for field, value in parts.items():
        if value % tp:
            yield f"{field}: {value}: must be divisible by parallel.tp {tp}"
    vocabulary = VOCABULARY_SIZES.get(config.vlcot.vocabulary)
    if vocabulary and vocabulary % (128 * tp):
        yield f"parallel.tp: {tp}: the vocabulary {vocabulary} must be divisible by 128 x tp"


def sequence_parallel_needs_tensor_parallel(config: RunConfig) -> Iterator[str]:
    """Sequence parallelism shards the activations that tensor parallelism does not."""
    if config.parallel.sequence_parallel and config.parallel.tp == 1:
        yield "parallel.sequence_parallel: true: needs parallel.tp >= 2; set it to false"


LAYOUT_RULES: tuple[Rule, ...] = (
    layers_divide_over_pipeline_stages,
    tensor_parallel_divides_the_model,
    sequence_parallel_needs_tensor_parallel,
)
"""Rules that the parallel layout sets for the model."""


def world_size_divides_by_the_layout(config: RunConfig) -> Iterator[str]:
    """The data-parallel size is the world size divided by TP x PP."""
    world, block = world_size(config), config.parallel.tp * config.parallel.pp
    if world % block:
        yield (
            f"parallel: tp {config.parallel.tp} x pp {config.parallel.pp} = {block}: must divide the world size "
            f"{world} (cluster.nodes x cluster.tasks_per_node); change cluster.tasks_per_node or the layout"
        )


def data_parallel_ranks_share_the_batch_evenly(config: RunConfig) -> Iterator[str]:
    """Prompts (GRPO) and traces (SFT) are distributed evenly."""
    block = config.parallel.tp * config.parallel.pp
    dp = max(1, world_size(config) // block)
    if config.task == "grpo" and config.grpo.prompts_per_step % dp:
        yield f"grpo.prompts_per_step: {config.grpo.prompts_per_step}: must be divisible by the data-parallel size {dp}"
    if config.task == "sft" and config.sft.batch_size % dp:
        yield f"sft.batch_size: {config.sft.batch_size}: must be divisible by the data-parallel size {dp}"
    if config.task == "tokenizer" and world_size(config) > 1:
        yield f"cluster.tasks_per_node: {world_size(config)} processes: the tokenizer trains in one; set it to 1"


def a_microbatch_holds_one_sequence(config: RunConfig) -> Iterator[str]:
    """The token budget of a microbatch holds at least one whole sequence."""
    budget, longest = config.parallel.microbatch_tokens, config.model.max_sequence_tokens
    if config.task != "tokenizer" and budget < longest:
        yield f"parallel.microbatch_tokens: {budget}: must hold one sequence of model.max_sequence_tokens {longest}"


def fp8_needs_bf16_gpus_and_aligned_dimensions(config: RunConfig) -> Iterator[str]:
    """Megatron ignores fp8 silently without Transformer Engine, and FP8 products need multiples of 16."""
    precision, gpus = config.precision, config.cluster.gpus_per_node > 0
    real = precision.fp8 != "none" and precision.fp8_backend == "transformer_engine"
    if real and not gpus:
        yield (
            f"precision.fp8: {precision.fp8}: needs GPUs; set cluster.gpus_per_node, or fp8=none, or "
            "fp8_backend=emulated to see what FP8 does to the numbers"
        )
    if (real or (precision.rollout_fp8 and gpus)) and precision.params != "bf16":
        yield f"precision.params: {precision.params}: FP8 layers keep bf16 parameters; set bf16"
    if real or precision.rollout_fp8:
        for field, width in fp8_widths(config).items():
            if width % FP8_MULTIPLE:
                yield f"model.{field}: {width} per tensor-parallel rank: FP8 needs a multiple of {FP8_MULTIPLE}"


def lean_optimizers_need_gpus(config: RunConfig) -> Iterator[str]:
    """Offloading frees GPU memory; 16-bit remainders need Transformer Engine."""
    optim, gpus = config.optim, config.cluster.gpus_per_node > 0
    if optim.cpu_offload and not gpus:
        yield "optim.cpu_offload: true: without GPUs everything is in host memory already; set it to false"
    if optim.main_params == "bf16":
        if not gpus or config.precision.params != "bf16":
            yield (
                "optim.main_params: bf16: needs GPUs (Transformer Engine's optimizer) and precision.params=bf16; "
                "set it to fp32"
            )
        if not config.parallel.distributed_optimizer:
            yield "optim.main_params: bf16: needs parallel.distributed_optimizer=true; set it, or main_params=fp32"


def graphs_hold_whole_decode_steps(config: RunConfig) -> Iterator[str]:
    """A step that waits for another pipeline stage cannot be replayed."""
    if config.parallel.decode_graphs and config.parallel.pp > 1:
        yield f"parallel.decode_graphs: true: needs parallel.pp=1, not {config.parallel.pp}; set one of them"


def one_task_per_gpu(config: RunConfig) -> Iterator[str]:
    """A task drives one GPU; on a CPU cluster there are none."""
    cluster = config.cluster
    if cluster.gpus_per_node and cluster.tasks_per_node > cluster.gpus_per_node:
        yield (
            f"cluster.tasks_per_node: {cluster.tasks_per_node}: more than gpus_per_node {cluster.gpus_per_node}; "
            "one task drives one GPU"
        )


def a_local_run_has_one_node(config: RunConfig) -> Iterator[str]:
    """The local executor starts processes on this machine only."""
    if config.cluster.kind == "local" and config.cluster.nodes > 1:
        yield f"cluster.nodes: {config.cluster.nodes}: cluster.kind=local is one machine; set 1 or cluster=slurm"


def a_checkpoint_can_be_taken_before_time_is_up(config: RunConfig) -> Iterator[str]:
    """The warning signal must come inside the time limit."""
    if config.cluster.signal_delay_s >= 60 * config.cluster.time_min:
        yield (
            f"cluster.signal_delay_s: {config.cluster.signal_delay_s}: must be below cluster.time_min "
            f"{config.cluster.time_min} min; lower it"
        )


def a_tracking_uri_holds_no_password(config: RunConfig) -> Iterator[str]:
    """The URI is logged as a parameter and written to files that people share."""
    uri = unquote(config.tracking.uri or "")
    place, *rest = re.split("[?#;]", uri.partition("://")[2], maxsplit=1)
    if ":" in place.rpartition("@")[0] or any(_SECRET_KEY.search(part) for part in rest):
        yield (
            "tracking.uri: holds a password; leave it out and give MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD (a server) or PGPASSFILE (PostgreSQL) in cluster.environment_file"
        )


def a_tracking_uri_is_an_address(config: RunConfig) -> Iterator[str]:
    """A relative path would be another store for the job than for the launcher, because the job starts elsewhere."""
    uri = config.tracking.uri
    if not uri or uri == "databricks":
        return
    scheme, _, rest = uri.partition(":")
    kind = scheme.partition("+")[0]
    if kind not in _STORES or (kind in ("http", "https") and not re.match(r"//[^/?#]", rest)):
        yield (
            f"tracking.uri: {uri!r}: not an address of an MLflow store ({', '.join(_STORES)}); write "
            "http://HOST:PORT or sqlite:////ABSOLUTE/PATH.db, or null for a database in output_root"
        )
    elif (kind == "sqlite" and not rest.startswith("////")) or (kind == "file" and not rest.startswith("/")):
        yield f"tracking.uri: {uri!r}: a relative path; write it as {kind}:{'//' * (kind == 'sqlite')}//ABSOLUTE/PATH"


def path_fault(path: Path) -> str:
    """Why runs cannot be in this folder, whose path also Slurm, PYTHONPATH and MLflow parse; "": they can."""
    text = str(path)
    if not text.isprintable():
        return f"{text!r}: holds characters that cannot be printed; rename the folder"
    if "'" in text and '"' in text:
        return f"{text!r}: holds both kinds of quotation marks, which MLflow cannot search for; rename the folder"
    found = next((mark for mark in text if mark in _UNFIT_IN_PATHS), None)
    if found is None:
        return ""
    return f"{text!r}: holds {found!r}, which means something else in {_UNFIT_IN_PATHS[found]}; rename the folder"


def an_output_root_can_be_written_anywhere(config: RunConfig) -> Iterator[str]:
    """Shell commands quote spaces, `$` and one kind of quotation marks in it; some characters cannot be quoted."""
    if fault := path_fault(resolve(config.output_root)):
        yield f"output_root: {fault}"


def slurm_options_are_single_lines(config: RunConfig) -> Iterator[str]:
    """A line break in a value would begin another line of the batch script."""
    values = config.cluster.model_dump(exclude={"extra_sbatch"})
    named = {f"cluster.{key}": value for key, value in values.items() if isinstance(value, str)}
    for key, value in config.cluster.extra_sbatch.items():
        named[f"cluster.extra_sbatch.{key}"] = str(value)
        name = key.replace("_", "-")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
            yield f"cluster.extra_sbatch: {key!r}: not an option of sbatch; write it as after `--`, such as mail-type"
        if name in RESERVED:
            yield f"cluster.extra_sbatch.{key}: launching gives --{name} itself; set the fields of cluster instead"
    for name, value in named.items():
        if not value.isprintable() or not value.strip():
            yield f"{name}: {value!r}: must be one line of printable characters; null leaves it out"


EXECUTION_RULES: tuple[Rule, ...] = (
    layers_divide_over_pipeline_stages,
    tensor_parallel_divides_the_model,
    sequence_parallel_needs_tensor_parallel,
    world_size_divides_by_the_layout,
    data_parallel_ranks_share_the_batch_evenly,
    a_microbatch_holds_one_sequence,
    fp8_needs_bf16_gpus_and_aligned_dimensions,
    lean_optimizers_need_gpus,
    graphs_hold_whole_decode_steps,
    one_task_per_gpu,
    a_local_run_has_one_node,
    a_checkpoint_can_be_taken_before_time_is_up,
    a_tracking_uri_holds_no_password,
    a_tracking_uri_is_an_address,
    an_output_root_can_be_written_anywhere,
    slurm_options_are_single_lines,
)
