"""CPU, CUDA or another device: the only module that distinguishes them.

Megatron-Core 0.16.1 is written for CUDA. On other devices, `prepare()` replaces the few `torch.cuda` functions that
Megatron calls, and `vendor_calls()` rewrites its `device="cuda"` literals during our calls into Megatron (nothing is
intercepted outside of them, so our own inner loops have no overhead). On CUDA neither does anything. Two faults in
Megatron's checkpoints of torch's Adam are also fixed here.
"""

from __future__ import annotations

import ctypes
import os
import queue
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar  # Any: what is replaced in torch.cuda and Megatron has no types

import psutil
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

T = TypeVar("T")
_CPU = torch.device("cpu")
_named: torch.device | None = None
_CGROUP = Path("/sys/fs/cgroup")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Option numbers of `mallopt`, from glibc's malloc.h."""
_FACTORIES = {
    torch.zeros, torch.ones, torch.empty, torch.full, torch.tensor, torch.arange,
    torch.empty_like, torch.zeros_like, torch.ones_like,
}  # fmt: skip


def compute_on(device: torch.device | None) -> None:
    """Compute on this device, which must be registered with torch; None: on the GPU if there is one, else the CPU.

    Call it before `process_groups.initialise`. To use the CPU of a machine with a GPU, call it before `prepare` in a
    process that has not used CUDA.
    """
    global _named
    _named = device


def on_cuda() -> bool:
    """Whether this process computes on a GPU."""
    return torch.cuda.is_available() if _named is None else _named.type == "cuda"


def device(local_rank: int = 0) -> torch.device:
    """The device of this process: the one named by `compute_on`, else its GPU, else the CPU."""
    if _named is not None:
        return _named
    return torch.device("cuda", local_rank) if on_cuda() else _CPU


def named_device(name: str) -> torch.device:
    """The device with this name. ValueError if it is not available on this machine."""
    try:
        where = torch.device(name)
        torch.empty(0, device=where)
        return where
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device={name} is not available here ({reason}); name cpu, or cuda if there is a GPU"
        ) from None


def chosen_device(name: str, choice: str, own: torch.device) -> torch.device:
    """The device that the recipe's field `name` chooses; auto: this process's. ValueError for cuda without a GPU."""
    if choice == "auto" or choice == own.type:
        return own
    if choice == "cpu":
        return _CPU
    raise ValueError(f"{name}={choice}: this process computes on {own.type}; set {name}=auto, or give it a GPU")


def dist_backend() -> str:
    """Name of the collective library: `nccl` or `gloo`."""
    return "nccl" if on_cuda() else "gloo"


def set_device(local_rank: int) -> None:
    """Make the process's GPU current; nothing on the CPU."""
    if on_cuda():
        torch.cuda.set_device(local_rank)


@cache
def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be used. CUDA is checked first: importing it without CUDA raises RuntimeError."""
    if not on_cuda():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return True


def captured(step: Callable[[], T], where: torch.device) -> Callable[[], T]:
    """`step` as a CUDA graph: a call replays it on the tensors that it was captured with.

    `step` is run three times before capturing, as CUDA graphs require. On other devices `step` itself is returned.
    """
    if where.type != "cuda":
        return step
    # warm up on a second stream, as torch's documentation of CUDA graphs asks
    current, side_stream = torch.cuda.current_stream(where), torch.cuda.Stream(where)
    side_stream.wait_stream(current)
    with torch.cuda.stream(side_stream):
        for _ in range(3):
            step()
    current.wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> T:
        graph.replay()
        return result

    return replay


def logit_columns(where: torch.device, vocabulary: int) -> int:
    """Number of vocabulary columns whose logits are computed at once when tokens are scored.

    On a CPU 2048, which stay in its caches with 1024 tokens (docs/benchmarks.md); up to 8192 columns are not split.
    """
    return 2048 if where.type == "cpu" and vocabulary > 8192 else vocabulary


def attention(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """softmax(q k / sqrt(d) + bias) v and the softmax's log-sum-exp; on a CPU by torch's fused kernel.

    Args:
        q: [n, h, r, d]; keys, values: [n, h, T, d].
        bias: [n, 1 or h, r, T] of q's type, added to the scores; no query may have only -inf.

    Returns:
        [n, h, r, d] of q's type, and [n, h, r], at least float32.
    """
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, keys, values, attn_mask=bias)
    return plain_attention(q, keys, values, bias)


def plain_attention(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`attention` computed from its definition, on any device."""
    # [n, h, r, d] @ [n, h, d, T] -> [n, h, r, T]; the softmax is computed in float32
    scores = ((q * q.shape[-1] ** -0.5) @ keys.transpose(-1, -2)).float()
    if bias is not None:
        scores = scores + bias
    lse = torch.logsumexp(scores, -1)
    return (scores - lse[..., None]).exp().to(q.dtype) @ values, lse


def synchronise(where: torch.device) -> None:
    """Wait for a GPU's pending work; other devices compute synchronously."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def peak_bytes(where: torch.device) -> int:
    """Peak bytes of tensors on a GPU since the process started; 0 on other devices."""
    return torch.cuda.max_memory_allocated(where) if where.type == "cuda" else 0


def name_of(where: torch.device) -> str:
    """A GPU's product name, or the type of another device."""
    return torch.cuda.get_device_name(where) if where.type == "cuda" else where.type


def workers(where: torch.device) -> int:
    """Number of independent tasks to run in parallel, one thread each; 1 on a GPU.

    On a CPU the cores are divided among the processes that a launcher started on this machine.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // local) if where.type == "cpu" else 1


def rows_at_once(where: torch.device) -> int:
    """Rows of a decoding batch beyond which throughput hardly increases; a CPU is limited by arithmetic early."""
    return 32 if where.type == "cpu" else 256


@contextmanager
def one_thread_each() -> Iterator[Callable[[], None]]:
    """Context for computing in parallel threads.

    Yields a function that each thread calls first and that limits torch to one thread.
    """
    threads = torch.get_num_threads()
    try:
        yield lambda: torch.set_num_threads(1)
    finally:
        torch.set_num_threads(threads)


def free_bytes(where: torch.device) -> int:
    """Free memory of the GPU in bytes; else of the machine, within the limit of this process's cgroup."""
    if where.type == "cuda":
        return torch.cuda.mem_get_info(where)[0]
    free = psutil.virtual_memory().available
    limit, used = (_CGROUP / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and (most := limit.read_text(encoding="ascii").strip()).isdigit():
        free = min(free, int(most) - int(used.read_text(encoding="ascii")))
    return max(0, free)


def work_seconds(where: torch.device) -> float:
    """A clock in seconds to compare amounts of work: CPU time on a CPU, which may be shared, else wall time."""
    return time.process_time() if where.type == "cpu" else time.perf_counter()


def _names_cuda(value: object) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.startswith("cuda")


class _CudaLiteralsToOurs(TorchFunctionMode):
    """`device="cuda"` -> our device; `Tensor.cuda()` -> `Tensor.to(it)`; `Tensor.type()` -> `torch.cuda.*Tensor`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES:
            kwargs = _on_ours(kwargs)
        elif func is torch.Tensor.cuda:
            return args[0].to(device())
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(*args)  # Megatron's optimizers compare with 'torch.cuda.FloatTensor'
            return f"torch.cuda.{name.rpartition('.')[2]}"
        elif func is torch.Tensor.to:
            kwargs = _on_ours(kwargs)
            args = tuple(device() if _names_cuda(arg) else arg for arg in args)
        return func(*args, **kwargs)


def _on_ours(kwargs: dict[str, object]) -> dict[str, object]:
    changed = dict(kwargs)
    named = changed.get("device")
    # an integer device means a CUDA ordinal; bool is excluded by the type of the argument
    if named is not None and (isinstance(named, int) or _names_cuda(named)):
        changed["device"] = device()
    if changed.get("pin_memory"):
        changed["pin_memory"] = False
    return changed


@contextmanager
def vendor_calls() -> Iterator[None]:
    """Context of a call into Megatron (building, schedule, optimizer, checkpoint)."""
    if on_cuda():
        yield
        return
    with _CudaLiteralsToOurs(), warnings.catch_warnings():
        # Megatron's calls pass through this module's mode, so its warnings appear under this module's name
        warnings.filterwarnings("ignore", module=__name__.replace(".", r"\."))
        yield


@cache
def prepare() -> None:
    """Make Megatron usable on this device. Further calls do nothing."""
    _write_checkpoints_without_manager()
    if not on_cuda():
        _keep_freed_memory()
        _replace_cuda_functions()
    if not has_transformer_engine():
        _fix_adam_checkpoints()


def _keep_freed_memory() -> None:
    """Have the C library (glibc) keep the memory of freed tensors for the next ones.

    By default it returns large blocks to the system, which must then map and clear their pages again for the next
    tensors: this takes a tenth of a small model's training step.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, 2**25)  # the largest that glibc accepts
        set_option(_M_TRIM_THRESHOLD, 2**31 - 1)


def _replace_cuda_functions() -> None:
    import megatron.core.tensor_parallel.random as vendor_random

    cuda: Any = torch.cuda
    cuda.current_device = device
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.empty_cache = lambda: None
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    rng: Any = vendor_random
    rng._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _write_checkpoints_without_manager() -> None:
    """Replace the manager process through which Megatron passes a writer's results by a plain queue.

    The process would import the whole program again. Our writers run in this process, so a queue suffices.
    """
    import megatron.core.dist_checkpointing.strategies.filesystem_async as vendor_writer

    writer: Any = vendor_writer
    writer._results_queue = queue.Queue()


def _fix_adam_checkpoints() -> None:
    """Fix Megatron's loading of torch's Adam, which keeps `step` as a tensor in each parameter's state.

    Megatron expects Transformer Engine's Adam: loading raises KeyError on 'step', and gives all parameters one shared
    `step` tensor, which Adam then increases once for each of them.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        states = {"param": main, **self.optimizer.state[main]}
        with torch.no_grad():
            for name in states.keys() & tensors.keys():
                states[name].copy_(tensors[name])

    load: Callable[[Any, Any], None] = DistributedOptimizer.load_state_dict

    def load_state_dict(self: Any, state_dict: Any) -> None:
        load(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    vendor: Any = DistributedOptimizer
    vendor._set_main_param_and_optimizer_states = set_states
    vendor.load_state_dict = load_state_dict
