"""Runs a function on gloo ranks, forked from a server that has imported torch, Megatron and MLflow and nothing else.

The server is a fresh process: a rank never inherits a process group, threads or patches of the test session, and a
world starts in a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Callable
from typing import Any

from realsr_hpc.launch.environment import reserved_port

RANK_TIMEOUT_S = 300
_IMPORTED_BY_SERVER = [
    "pytest", "realsr_hpc.model.policy", "realsr_hpc.optim.step", "realsr_hpc.checkpoint",
    "tests.stores", "mlflow.store.tracking.sqlalchemy_store",
]  # fmt: skip


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on every rank of a fresh world; the results in rank order.

    Function (of a module's top level), arguments and results travel pickled: numbers, strings, configurations, numpy
    arrays. A failing rank ends the world at once and raises here with its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_BY_SERVER)
    results: Any = context.Queue()
    port = reserved_port()
    ranks = [
        context.Process(target=_rank, args=(rank, world_size, port, results, function, arguments))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    finished = False
    try:
        collected = _collect(results, ranks)
        finished = True
        return collected
    finally:
        for process in ranks:
            process.join(timeout=10 if finished else 0)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(results: Any, ranks: list[Any]) -> list[Any]:
    collected: dict[int, Any] = {}
    deadline = time.monotonic() + RANK_TIMEOUT_S
    while len(collected) < len(ranks):
        try:
            rank, result, failure = results.get(timeout=1)
        except queue.Empty:
            _check_alive(ranks, collected, deadline)
            continue
        if failure:
            raise AssertionError(f"rank {rank} failed:\n{failure}")
        collected[rank] = result
    return [collected[rank] for rank in range(len(ranks))]


def _check_alive(ranks: list[Any], collected: dict[int, Any], deadline: float) -> None:
    missing = [rank for rank in range(len(ranks)) if rank not in collected]
    died = [rank for rank in missing if ranks[rank].exitcode not in (None, 0)]
    if died:
        raise AssertionError(f"ranks {died} died with exit codes {[ranks[rank].exitcode for rank in died]}")
    if time.monotonic() > deadline:
        raise TimeoutError(f"ranks {missing} gave no result in {RANK_TIMEOUT_S} s")


def _rank(rank: int, world_size: int, port: int, results: Any, function: Callable[..., Any], arguments: Any) -> None:
    import torch

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK="0",
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        results.put((rank, function(*arguments), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        results.close()
        results.join_thread()
        os._exit(1)
    _leave()


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
