"""Writing a checkpoint: planned together, written by each rank alone, completed together.

Only the first and the last part are collective. What the middle part writes was copied before, so it may run behind
the next training steps (`Saver(behind=True)`); a write that fails raises when the checkpoint would be completed, and
the checkpoint before it stays the newest. Left out: Megatron's own background processes, which fork a process that
holds threads and a GPU.
"""

from __future__ import annotations

import json
import queue
import shutil
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from realsr_hpc.checkpoint import manifest
from realsr_hpc.checkpoint.store import (
    STATE,
    Optimiser,
    counters,
    layout,
    random_file,
    random_states,
    sharded_state,
)
from realsr_hpc.model.policy import Policy
from realsr_hpc.parallel import backend
from realsr_hpc.parallel.reduce import gather_objects


def save(
    root: Path,
    step: int,
    policy: Policy,
    optimiser: Optimiser | None,
    state: dict[str, Any],
    keep: manifest.Keep,
    metric: float | None = None,
) -> Path:
    """Write the checkpoint of `step` under `root`, then drop those that `keep` does not name; all ranks together.

    state: what the run needs to go on, as JSON (data position, counters, MLflow run id). metric: what the best are
    chosen by. The folder appears under its name only when every byte of it is on disk and hashed.
    """
    saver = Saver(root, keep, behind=False)
    saver.start(step, policy, optimiser, state, metric)
    return saver.complete()


class Saver:
    """The saves of one run, one at a time, before the caller goes on or behind it."""

    def __init__(self, root: Path, keep: manifest.Keep, *, behind: bool) -> None:
        self.root, self.keep, self.behind = root, keep, behind
        self._saving: _Saving | None = None
        self._thread: threading.Thread | None = None

    @property
    def pending(self) -> bool:
        """A save was started and not completed; the same on all ranks."""
        return self._saving is not None

    @property
    def writing(self) -> bool:
        """This rank's files are still being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(
        self, step: int, policy: Policy, optimiser: Optimiser | None, state: dict[str, Any], metric: float | None
    ) -> None:
        """Begin the checkpoint of a step, as `save` says; all ranks together, none pending."""
        assert self._saving is None, f"checkpoint of step {step}: the one before is not completed"
        self._saving = _Saving(self.root, step, policy, optimiser, state, metric, copy=self.behind)
        if self.behind:
            self._thread = threading.Thread(target=self._saving.write, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._saving.write()

    def complete(self) -> Path:
        """Wait for this rank's files, give the checkpoint its name; all ranks together. Raises what writing raised."""
        assert self._saving is not None, "no checkpoint was started"
        if self._thread is not None:
            self._thread.join()
        saving, self._saving, self._thread = self._saving, None, None
        return saving.complete(self.keep)


class _Saving:
    """One checkpoint on its way to disk."""

    def __init__(
        self,
        root: Path,
        step: int,
        policy: Policy,
        optimiser: Optimiser | None,
        state: dict[str, Any],
        metric: float | None,
        *,
        copy: bool,
    ) -> None:
        self._groups = policy.groups
        self._root, self._aside, self._final = root, manifest.aside_of(root, step), manifest.folder_of(root, step)
        self._facts = {"step": step, "layout": layout(policy.groups, policy), "metric": metric}
        if self._groups.is_main:
            shutil.rmtree(self._aside, ignore_errors=True)
            self._aside.mkdir(parents=True)
        dist.barrier()
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        with backend.vendor_calls():
            wanted = sharded_state(policy, optimiser, loading=False)
            self._request: Any = dist_checkpointing.save(wanted, str(self._aside), strategy, async_sharded_save=True)
        if self._groups.is_main:
            own = {"run": state, "optimiser": None if optimiser is None else counters(optimiser)}
            (self._aside / STATE).write_text(json.dumps(own, indent=1))
        self._buckets = self._stage(copy)
        self._random = random_states()
        self._files: dict[str, dict[str, Any]] = {}
        self._error: Exception | None = None

    def _stage(self, copy: bool) -> list[Any]:
        """This rank's tensors in host memory, copied where training would change them while they are written."""
        if self._request.async_fn is None:
            return []
        staged = []
        for path, key, (texts, tensors) in self._request.async_fn_args[1]:
            here = [(item, tensor.detach().to("cpu", copy=copy)) for item, tensor in tensors]
            staged.append((path, key, (texts, here)))
        return staged

    def write(self) -> None:
        """This rank's files, flushed and hashed; no collective. An error waits for `complete`."""
        try:
            mine = [self._aside / random_file(self._groups.world_rank)]
            torch.save(self._random, mine[0])
            results = {}
            for number, bucket in enumerate(self._buckets):
                results[number] = self._write_bucket(number, bucket)
                mine.append(Path(bucket[0]))
            if self._buckets:
                self._request.async_fn_args[2].put(results)
            self._files = manifest.describe(self._aside, mine)
        except Exception as error:  # raised again in complete(), where all ranks are together
            self._error = error

    def _write_bucket(self, number: int, bucket: Any) -> Any:
        results: queue.Queue[Any] = queue.Queue()
        running: queue.Queue[int] = queue.Queue()
        running.put(number)
        transforms = self._request.async_fn.args[0]
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, results, running, True)  # type: ignore[arg-type]
        _, outcome = results.get()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def complete(self, keep: manifest.Keep) -> Path:
        """Metadata, manifest, name; all ranks together."""
        if self._error is not None:
            raise self._error
        with backend.vendor_calls():
            for finalise in self._request.finalize_fns:
                finalise()
        shares = gather_objects(self._files, dist.group.WORLD)
        if self._groups.is_main:
            files = {name: facts for share in shares for name, facts in share.items()}
            rest = [
                path for path in manifest.content(self._aside) if path.relative_to(self._aside).as_posix() not in files
            ]
            manifest.complete(self._aside, self._final, files | manifest.describe(self._aside, rest), self._facts)
            manifest.prune(self._root, keep)
        dist.barrier()
        return self._final
