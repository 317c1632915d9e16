"""Runs a function on forked gloo ranks: the parent has imported torch and Megatron, so a world starts in 0.1 s."""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

RANK_TIMEOUT_S = 120


def free_port() -> int:
    """A port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on every rank of a fresh world; the results in rank order.

    Results travel pickled: return numbers, strings or numpy arrays. A failing rank ends the world at once and
    raises here with its traceback.
    """
    import megatron.core  # noqa: F401  forked ranks inherit the imports

    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    port = free_port()
    ranks = [
        context.Process(target=_rank, args=(rank, world_size, port, results, function, arguments))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        return _collect(results, world_size)
    finally:
        for process in ranks:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def _collect(results: Any, world_size: int) -> list[Any]:
    collected: dict[int, Any] = {}
    while len(collected) < world_size:
        try:
            rank, result, failure = results.get(timeout=RANK_TIMEOUT_S)
        except queue.Empty:
            missing = sorted(set(range(world_size)) - set(collected))
            raise TimeoutError(f"ranks {missing} gave no result in {RANK_TIMEOUT_S} s") from None
        if failure:
            raise AssertionError(f"rank {rank} failed:\n{failure}")
        collected[rank] = result
    return [collected[rank] for rank in range(world_size)]


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
