"""An endless, deterministic, resumable stream of `LQBatch`.

Its position is one number: the global index of the first sample of the next global batch. A global batch consists of
one batch per data-parallel rank, so any number of ranks reads the same samples in the same order. A background thread
prepares batches ahead; a saved position counts only the batches that were returned.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch

from realsr_hpc.config.schema import RunConfig
from realsr_hpc.data.degradation import PRESETS, Stream, generator
from realsr_hpc.data.graph_inputs import DegradationInput
from realsr_hpc.data.labels import Labeller
from realsr_hpc.data.manifest import Manifest, read_manifest
from realsr_hpc.data.operators import operators_of
from realsr_hpc.data.samples import Geometry, Sample, Samples
from realsr_hpc.paths import resolve
from realsr_hpc.records import DegradationLabel, LQBatch, Operators

if TYPE_CHECKING:
    from realsr_hpc.data.dali_pipeline import DegradationPipeline


class LQLoader:
    """Batches of one split for one data-parallel rank.

    With `shuffle=False` the order is the manifest's, so that the first batch of a held-out split is always the same
    images. `batch_size` is this rank's. The global index keeps counting over epochs, so a photograph gets a new window
    and degradation in each epoch. device_id: the GPU that degrades images; None: the CPU.
    """

    def __init__(
        self,
        config: RunConfig,
        split: str,
        batch_size: int,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        shuffle: bool = True,
        device_id: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: give at least 1")
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank is {dp_rank} with dp_size {dp_size}: give 0 <= dp_rank < dp_size")
        self._config, self._split, self._batch_size = config, split, batch_size
        self._dp_rank, self._dp_size, self._device_id = dp_rank, dp_size, device_id
        manifest = read_manifest(resolve(config.data.manifest)).split(split)
        self._fingerprint = _fingerprint(manifest)
        self._samples = Samples(
            manifest,
            config.data.mode,
            _geometry(config),
            PRESETS[config.degradation.preset],
            seed=config.seed,
            shuffle=shuffle,
        )
        self._labeller = Labeller(config.degradation, self._samples.geometry.gt_size_px, config.vlcot.upscale)
        self._pipeline: DegradationPipeline | None = None
        self._position, self._handed_out = 0, 0
        self._ahead: deque[Future[LQBatch]] = deque()
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="lq-loader")
        self._readers = ThreadPoolExecutor(config.data.num_threads, thread_name_prefix="lq-reader")

    def __len__(self) -> int:
        """Number of photographs in the split."""
        return len(self._samples.manifest)

    @property
    def position(self) -> int:
        """Global index at which the next global batch starts."""
        return self._position

    @property
    def skipped(self) -> dict[str, str]:
        """Reasons, by key, for the photographs that could not be used so far."""
        return dict(self._samples.skipped)

    def next(self) -> LQBatch:
        """The next batch of this rank.

        Raises:
            ValueError: if no photograph of the split can be used.
        """
        self._make_ahead(1)
        batch = self._ahead.popleft().result()
        self._position += self._batch_size * self._dp_size
        # No batch is prepared ahead at the first call: a caller may want only one fixed batch.
        if self._handed_out:
            self._make_ahead(self._config.data.prefetch)
        self._handed_out += 1
        return batch

    def state_dict(self) -> dict[str, bool | int | str]:
        """The position, and the seed, split, order and photographs it belongs to, as JSON values."""
        return {"position": self._position, **self._identity()}

    def load_state_dict(self, state: Mapping[str, bool | int | str]) -> None:
        """Continue at a saved position; `dp_size`, batch size and number of threads may differ.

        Raises:
            ValueError: if the position belongs to another seed, split, order or set of photographs.
        """
        for name, here in self._identity().items():
            if state.get(name) != here:
                raise ValueError(
                    f"{name} of the saved data position is {state.get(name)!r}, here it is {here!r}; "
                    "resume with the recipe and manifest the run began with, or start a new run"
                )
        self._drop_ahead()
        self._position = int(state["position"])

    def close(self) -> None:
        """Stop the threads and free the DALI graph."""
        self._drop_ahead()
        self._maker.shutdown(wait=True, cancel_futures=True)
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._pipeline = None

    def _identity(self) -> dict[str, bool | int | str]:
        return {
            "seed": self._config.seed,
            "split": self._split,
            "mode": self._config.data.mode,
            "shuffle": self._samples.shuffle,
            "photographs": self._fingerprint,
        }

    def _drop_ahead(self) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def _make_ahead(self, num_batches: int) -> None:
        global_batch = self._batch_size * self._dp_size
        while len(self._ahead) < num_batches:
            # global batches follow one another; within one, rank r has samples [r x batch_size, (r + 1) x batch_size)
            start = self._position + len(self._ahead) * global_batch + self._dp_rank * self._batch_size
            self._ahead.append(self._maker.submit(self._make, range(start, start + self._batch_size)))

    def _make(self, indices: range) -> LQBatch:
        # Reading is a map over indices, so its order, and with it the batch, does not depend on the threads.
        samples = list(self._readers.map(self._samples.__getitem__, indices))
        lq, gt = self._pixels(samples)
        operators = tuple(
            sample.parameters and operators_of(sample.parameters, self._samples.geometry.lq_size_px)
            for sample in samples
        )
        return LQBatch(
            lq=_to_tensor(lq),
            gt=None if gt is None else _to_tensor(gt),
            labels=tuple(map(self._label, samples, operators)),
            scenes=tuple(sample.entry.scene for sample in samples),
            keys=tuple(sample.entry.key for sample in samples),
            index=torch.tensor([sample.index for sample in samples], dtype=torch.int64),
            operators=operators,
        )

    def _label(self, sample: Sample, operators: Operators | None) -> DegradationLabel | None:
        if sample.parameters is None or operators is None or sample.gt is None:
            return None
        return self._labeller(sample.parameters, operators, sample.gt)

    def _pixels(self, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray | None]:
        if self._config.data.mode == "unpaired":
            return self._degrade(samples)
        lq = np.stack([sample.lq for sample in samples if sample.lq is not None])
        gt = [sample.gt for sample in samples if sample.gt is not None]
        return lq, np.stack(gt) if gt else None

    def _degrade(self, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
        # DALI takes over a second to import, which paired data and readers of a manifest do not need.
        from realsr_hpc.data.dali_pipeline import DegradationPipeline

        if self._pipeline is None:
            geometry = self._samples.geometry
            self._pipeline = DegradationPipeline(
                self._batch_size,
                geometry.gt_size_px,
                geometry.upscale,
                usm_sharpen_gt=self._config.degradation.usm_sharpen_gt,
                num_threads=self._config.data.num_threads,
                device_id=self._device_id,
            )
        return self._pipeline.run(
            [
                DegradationInput(s.gt, s.parameters, generator(self._config.seed, s.index, Stream.NOISE))
                for s in samples
                if s.gt is not None and s.parameters is not None
            ]
        )


def _geometry(config: RunConfig) -> Geometry:
    gt_size_px, upscale = max(config.vlcot.image_sizes_px), config.vlcot.upscale
    if gt_size_px % upscale:
        raise ValueError(f"vlcot.upscale {upscale} does not divide the final image's side of {gt_size_px} px")
    return Geometry(gt_size_px, upscale, config.data.min_scene_fraction, config.data.hflip)


def _fingerprint(manifest: Manifest) -> str:
    """A digest that changes when a photograph is added, removed, moved or altered."""
    text = "\n".join(f"{entry.key} {entry.sha256}" for entry in manifest.entries)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _to_tensor(images: np.ndarray) -> torch.Tensor:
    """[B, H, W, 3] -> [B, 3, H, W]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
