"""Writes a checkpoint in three phases: all ranks plan it, each rank writes its files, all ranks complete it.

Only the first and the last phase are collective. The middle phase writes tensors that were copied before, so it may run
during the next training steps (`Saver(behind=True)`). If one rank cannot write (full disk, quota, lost file server),
NotSaved is raised on every rank at a collective point, and the previous checkpoint stays the newest. Megatron's own
background processes are not used, because they fork a process that holds threads and a GPU.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any  # Megatron's plans, buckets and requests have no types

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as vendor
from megatron.core.dist_checkpointing.strategies.base import StrategyAction, register_default_strategy
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from realsr_hpc.checkpoint import integrity
from realsr_hpc.checkpoint.loading import (
    STATE,
    Optimiser,
    RunState,
    Stored,
    counters,
    layout,
    random_file,
    random_states,
    sharded_state,
)
from realsr_hpc.model.policy import Policy
from realsr_hpc.parallel import backend
from realsr_hpc.parallel.reduce import gather_objects

logger = logging.getLogger(__name__)

RESERVE = ".tmp-reserve"
RESERVE_BYTES = 1 << 23
"""Bytes reserved on disk first, for small files that Megatron writes while other ranks wait in a collective.

A full disk is then noticed earlier, while each rank writes independently.
"""


class _HeldCommon(TorchCommonSaveStrategy):
    """Keeps Megatron's unsharded state for us to write: Megatron would write it while other ranks already wait."""

    state: Any = None

    def save_common(self, common_state_dict: Any, checkpoint_dir: str | Path) -> None:
        """Keep the state until this rank writes independently."""
        self.state = common_state_dict


_COMMON = _HeldCommon("torch", 1)
register_default_strategy(StrategyAction.SAVE_COMMON, "torch", 1, _COMMON)


class _Writer(FileSystemWriterAsync):
    """Megatron's writer, without copies of all views (a layer's gate and up halves) before the first byte is written.

    Here they stay views of the weights; `_compact` copies one at a time.
    """

    def prepare_write_data(self, plan: Any, planner: Any) -> None:
        """Call Megatron's method with empty tensors, then put the real ones back."""
        resolve, kept = planner.resolve_data, []

        def empty(item: Any) -> Any:
            data = resolve(item)
            if not isinstance(data, torch.Tensor):
                return data
            kept.append(data.detach())
            return data.new_empty(0)

        planner.resolve_data = empty
        try:
            super().prepare_write_data(plan, planner)
        finally:
            del planner.resolve_data
        # the buckets list the tensors in the order in which they were resolved
        data = iter(kept)
        for _, _, (_, tensors) in self.write_buckets or []:
            tensors[:] = [(item, next(data)) for item, _ in tensors]


vendor.FileSystemWriterAsync = _Writer  # Megatron takes no writer as an argument


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in its own memory, because torch saves the whole storage of a view."""
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


class NotSaved(RuntimeError):
    """A checkpoint could not be written; raised on every rank. Earlier checkpoints are unchanged."""


def save(
    root: Path,
    step: int,
    policy: Policy,
    optimiser: Optimiser | None,
    state: RunState,
    keep: integrity.Keep,
    metric: float | None = None,
) -> Path:
    """Write the checkpoint of `step` under `root`, then remove those that `keep` does not keep; all ranks together.

    metric: the value by which the best checkpoints are chosen. The folder gets its name only after all its bytes are on
    disk and hashed. NotSaved, on every rank, if one of them cannot write.
    """
    saver = Saver(root, keep, behind=False)
    saver.start(step, policy, optimiser, state, metric)
    return saver.complete()


class Saver:
    """Saves the checkpoints of one run, one at a time, either before returning or in a background thread."""

    def __init__(self, root: Path, keep: integrity.Keep, *, behind: bool) -> None:
        self.root, self.keep, self.behind = root, keep, behind
        self._saving: _Saving | None = None
        self._thread: threading.Thread | None = None

    @property
    def pending(self) -> bool:
        """Whether a save was started and not completed; the same on all ranks."""
        return self._saving is not None

    @property
    def writing(self) -> bool:
        """Whether this rank's files are still being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(
        self, step: int, policy: Policy, optimiser: Optimiser | None, state: RunState, metric: float | None
    ) -> None:
        """Begin the checkpoint of a step (arguments: see `save`); all ranks together. NotSaved if it cannot begin."""
        assert self._saving is None, f"checkpoint of step {step} begins before the previous one is complete"
        self._saving = _Saving(self.root, step, policy, optimiser, state, metric, copy=self.behind)
        if self.behind:
            self._thread = threading.Thread(target=self._saving.write, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._saving.write()

    def complete(self) -> Path:
        """Wait for this rank's files and rename the folder; all ranks together. NotSaved: the folder is removed."""
        assert self._saving is not None, "no checkpoint was started"
        if self._thread is not None:
            self._thread.join()
        saving, self._saving, self._thread = self._saving, None, None
        return saving.complete(self.keep)


class _Saving:
    """One checkpoint that is being written."""

    def __init__(
        self,
        root: Path,
        step: int,
        policy: Policy,
        optimiser: Optimiser | None,
        state: RunState,
        metric: float | None,
        *,
        copy: bool,
    ) -> None:
        self._groups = policy.groups
        self._root, self._aside, self._final = root, integrity.aside_of(root, step), integrity.folder_of(root, step)
        self._facts = integrity.Facts(step, layout(policy.groups, policy), metric, policy.base)
        self._results: dict[int, Any] = {}
        self._files: dict[str, integrity.FileFacts] = {}
        self._error = ""
        if self._groups.is_main:
            self._attempt(self._prepare)
        self._agree()
        strategy: Any = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        if policy.groups.dp_size > 1:  # each data-parallel rank writes a share of what all of them hold
            strategy = FullyParallelSaveStrategyWrapper(strategy, policy.groups.dp)
        with backend.vendor_calls():
            wanted = sharded_state(policy, optimiser, loading=False)
            self._request: Any = dist_checkpointing.save(wanted, str(self._aside), strategy, async_sharded_save=True)
        if self._groups.is_main:
            own = Stored(state, None if optimiser is None else counters(optimiser))
            self._attempt(lambda: self._write_common(_COMMON.state, json.dumps(asdict(own), indent=1)))
        self._buckets = self._stage(copy)
        self._random = random_states()

    def _prepare(self) -> None:
        """Make an empty folder and the reserve file, half of which is freed for what Megatron writes."""
        shutil.rmtree(self._aside, ignore_errors=True)
        self._aside.mkdir(parents=True)
        reserve = self._root / RESERVE
        reserve.write_bytes(bytes(2 * RESERVE_BYTES))
        os.truncate(reserve, RESERVE_BYTES)

    def _write_common(self, common: Any, state: str) -> None:
        with (self._aside / COMMON_STATE_FNAME).open("wb") as stream:
            torch.save(common, stream)
        (self._aside / STATE).write_text(state, encoding="utf-8")

    def _attempt(self, write: Callable[[], object]) -> None:
        """Do one rank's own work; an exception is kept and raised by `_agree`."""
        try:
            write()
        except Exception as error:  # of any kind: the other ranks must be told
            self._error = f"rank {self._groups.world_rank}: {type(error).__name__}: {error}"

    def _agree(self) -> None:
        """Raise NotSaved on every rank if one of them failed; all ranks together."""
        errors = [error for error in gather_objects(self._error, dist.group.WORLD) if error]
        if not errors:
            return
        if self._groups.is_main:
            shutil.rmtree(self._aside, ignore_errors=True)
            (self._root / RESERVE).unlink(missing_ok=True)
        dist.barrier()
        raise NotSaved(f"checkpoint {self._final} was not written ({errors[0]}); free space there if the disk is full")

    def _stage(self, copy: bool) -> list[Any]:
        """This rank's tensors in host memory; copy: also those on the CPU, because training changes them meanwhile."""
        if self._request.async_fn is None:
            return []
        staged = []
        for path, key, (texts, tensors) in self._request.async_fn_args[1]:
            here = [(item, tensor.detach().to("cpu", copy=copy)) for item, tensor in tensors]
            staged.append((path, key, (texts, here)))
        return staged

    def write(self) -> None:
        """Write, flush and hash this rank's files; not collective. An error is reported by `complete`."""
        self._attempt(self._write)

    def _write(self) -> None:
        paths = [self._aside / random_file(self._groups.world_rank)]
        with paths[0].open("wb") as stream:  # torch's own stream would hide the kind of error
            torch.save(self._random, stream)
        for number, bucket in enumerate(self._buckets):
            self._results[number] = self._write_bucket(number, bucket)
            paths.append(Path(bucket[0]))
        self._files = integrity.describe(self._aside, paths)

    def _write_bucket(self, number: int, bucket: Any) -> Any:
        # Megatron's function for a writer process, called in this thread: it marks its slot in `running` as done
        path, key, (texts, tensors) = bucket
        compact: Iterator[Any] = ((item, _compact(tensor)) for item, tensor in tensors)
        results: queue.Queue[Any] = queue.Queue()
        running: queue.Queue[int] = queue.Queue()
        running.put(number)
        transforms = self._request.async_fn.args[0]
        lazy: Any = (path, key, (texts, compact))
        FileSystemWriterAsync.write_preloaded_data(transforms, number, lazy, results, running, True)  # type: ignore[arg-type]
        _, outcome = results.get()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def complete(self, keep: integrity.Keep) -> Path:
        """Write metadata and manifest and rename the folder; all ranks together."""
        self._agree()
        if self._groups.is_main:
            (self._root / RESERVE).unlink(missing_ok=True)
        if self._buckets:  # where Megatron's finalisation expects the results of its writers
            self._request.async_fn_args[2].put(self._results)
        with backend.vendor_calls():
            for finalise in self._request.finalize_fns:
                finalise()
        shares = gather_objects(self._files, dist.group.WORLD)
        if self._groups.is_main:
            written = {name: facts for share in shares for name, facts in share.items()}
            self._attempt(lambda: self._publish(written, keep))
        self._agree()
        return self._final

    def _publish(self, written: dict[str, integrity.FileFacts], keep: integrity.Keep) -> None:
        named = {self._aside / name for name in written}
        # files that Megatron wrote on this rank are hashed now; the ranks have hashed their own
        rest = [path for path in integrity.content(self._aside) if path not in named]
        integrity.complete(self._aside, self._final, written | integrity.describe(self._aside, rest), self._facts)
        try:
            integrity.prune(self._root, keep)
        except OSError as error:  # this checkpoint is complete; the next one tries again
            logger.error("checkpoints of %s: old ones were not removed (%s)", self._root, error)
