"""Frozen VLCoT traces: prompts and true responses, tokenized once, so that SFT needs no images and no tokenizer.

The folder holds `traces-00000.safetensors` and so on. Each file has the tokens of some traces in sequence, the start of
each, and the length of its prompt. Files are written under a temporary name and renamed. The content of a file depends
only on its number: a killed command continues at the first missing file, and the tasks of a job array write disjoint
files. Each file records what its tokens depend on (seed, photographs, degradation, both tokenizers, shape of a trace);
this is compared on reading, except for the seed. As with on-the-fly degradation, each visit of a photograph has its own
window and degradation. After the last trace the same traces are repeated in another order. Packing traces into rows is
done later (`sft.packing`).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from realsr_hpc.config.schema import RunConfig
from realsr_hpc.data.degradation import Stream, generator
from realsr_hpc.data.loader import LQLoader
from realsr_hpc.files import parse_json, replacing, sha256_of
from realsr_hpc.locks import sole_writer
from realsr_hpc.paths import resolve
from realsr_hpc.tokenizer.trace import TraceTokenizer

logger = logging.getLogger(__name__)

TracePair = tuple[Tensor, list[int]]
"""Prompt tokens, int64 [L], and response tokens."""


def freeze_traces(
    config: RunConfig,
    output: Path,
    num_samples: int,
    samples_per_file: int = 1024,
    *,
    device: torch.device | None = None,
    shard: tuple[int, int] = (1, 1),
    on_file: Callable[[int, int], None] = lambda done, total: None,
    skipped: dict[str, str] | None = None,
) -> int:
    """Tokenise the first `num_samples` samples of the training split. Returns the number of traces in the folder.

    A photograph without captions gives no trace. `shard` (k, n) writes every n-th file, from file k. skipped: receives
    the reasons, by key, of photographs that could not be used.

    Raises:
        ValueError: if the folder holds files of another recipe or cannot be written, or another process writes this
            shard.
    """
    with sole_writer(output, part="{}-of-{}".format(*shard)):
        return _frozen(
            config, output, num_samples, samples_per_file, device, shard, on_file, {} if skipped is None else skipped
        )


def _frozen(
    config: RunConfig,
    output: Path,
    num_samples: int,
    samples_per_file: int,
    device: torch.device | None,
    shard: tuple[int, int],
    on_file: Callable[[int, int], None],
    skipped: dict[str, str],
) -> int:
    identity = trace_identity(config)
    for path in sorted(output.glob("traces-*.safetensors")):
        _require_same(path, _identity_of(path), identity)
    starts = list(range(0, num_samples, samples_per_file))
    tokens = TraceTokenizer.load(config, device or torch.device("cpu"))
    # shard k of n (from 1) makes every n-th file; files that exist are complete and are kept
    for number in range(shard[0] - 1, len(starts), shard[1]):
        path = output / f"traces-{number:05d}.safetensors"
        if not path.is_file():
            stop = min(starts[number] + samples_per_file, num_samples)
            pairs = list(_pairs(config, tokens, starts[number], stop, skipped))
            _write(path, pairs, identity | {"samples": samples_per_file})
        on_file(number // shard[1] + 1, -(-(len(starts) - shard[0] + 1) // shard[1]))
    if tokens.codec.shortened_texts:
        logger.warning(
            "%d texts did not fit vlcot.text_slots and lost their last words; raise it to keep them",
            tokens.codec.shortened_texts,
        )
    return len(FrozenTraces(output, config))


def trace_identity(config: RunConfig) -> dict[str, object]:
    """Everything that the tokens of a trace depend on, as JSON values."""
    return {
        "seed": config.seed,
        "vlcot": config.vlcot.model_dump(mode="json"),
        "degradation": config.degradation.model_dump(mode="json"),
        "windows": [config.data.mode, config.data.train_split, config.data.min_scene_fraction, config.data.hflip],
        "photographs": _digest("data.manifest", config.data.manifest),
        "image_tokenizer": _digest("image_tokenizer.weights", config.image_tokenizer.weights),
        "text_tokenizer": _digest("text_tokenizer.path", config.text_tokenizer.path),
    }


def _digest(field: str, named: str) -> str:
    try:
        return sha256_of(resolve(named))
    except OSError as error:
        raise ValueError(f"{field}: {resolve(named)} cannot be read ({error.strerror}); name another") from None


class FrozenTraces:
    """The traces of a folder by number, read from disk on access."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        paths = sorted(folder.glob("traces-*.safetensors"))
        if not paths:
            raise ValueError(f"{folder} holds no traces; make them with realsr-hpc freeze-traces")
        identity = trace_identity(config) | {"seed": _identity_of(paths[0])["seed"]}
        for path in paths:
            _require_same(path, _identity_of(path), identity)
        self._files = [safe_open(path, framework="pt") for path in paths]
        numbers = [int(path.stem.partition("-")[2]) for path in paths]
        self.missing = sorted(set(range(numbers[-1])) - set(numbers))
        """Numbers of missing files, below that of the last one."""
        self._starts = [file.get_tensor("starts") for file in self._files]
        self._ends = np.cumsum([len(starts) - 1 for starts in self._starts])
        self.fingerprint = hashlib.sha256(json.dumps([identity, self._ends.tolist()]).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> TracePair:
        # file that holds the trace, and the trace's row in it
        place = int(np.searchsorted(self._ends, number, side="right"))
        row = number - int(self._ends[place - 1] if place else 0)
        start, stop = self._starts[place][row : row + 2].tolist()
        tokens = self._files[place].get_slice("tokens")[start:stop].long()
        prompt = int(self._files[place].get_slice("prompts")[row : row + 1])
        return tokens[:prompt], tokens[prompt:].tolist()


class TraceLoader:
    """Batches of frozen traces for one data-parallel rank, as `LQLoader` gives images: endless and resumable."""

    def __init__(self, config: RunConfig, folder: Path, batch_size: int, *, dp_rank: int = 0, dp_size: int = 1) -> None:
        self.traces = FrozenTraces(folder, config)
        if self.traces.missing:
            raise ValueError(f"{folder} lacks files {self.traces.missing}; write them with realsr-hpc freeze-traces")
        if not len(self.traces):
            raise ValueError(f"{folder} holds no trace: its photographs had no captions (realsr-hpc prepare-data)")
        self._seed, self._batch_size, self._dp_rank, self._dp_size = config.seed, batch_size, dp_rank, dp_size
        self.position = 0
        """Index at which the next global batch starts."""
        self._order: tuple[int, np.ndarray] = (0, np.arange(len(self.traces)))

    def __len__(self) -> int:
        """Number of traces in the folder."""
        return len(self.traces)

    def next(self) -> list[TracePair]:
        """The next batch of this rank."""
        start = self.position + self._dp_rank * self._batch_size
        self.position += self._batch_size * self._dp_size
        return [self.traces[self._number(index)] for index in range(start, start + self._batch_size)]

    def state_dict(self) -> dict[str, bool | int | str]:
        """The position as JSON values, for `load_state_dict`."""
        return {"position": self.position, "traces": self.traces.fingerprint}

    def load_state_dict(self, state: Mapping[str, bool | int | str]) -> None:
        """Continue at the saved position, also with another batch size or data-parallel size.

        Raises:
            ValueError: if the state belongs to other traces.
        """
        if state.get("traces") != self.traces.fingerprint:
            raise ValueError("the saved data position belongs to other traces; resume with those of the run's start")
        self.position = int(state["position"])

    @property
    def skipped(self) -> dict[str, str]:
        """Always empty: unusable photographs were skipped when the traces were frozen."""
        return {}

    def close(self) -> None:
        """Nothing runs in the background."""

    def _number(self, index: int) -> int:
        """Number of the trace: the first epoch is in the order of the files, each later one is shuffled differently."""
        epoch, place = divmod(index, len(self.traces))
        if epoch == 0:
            return place
        if self._order[0] != epoch:
            self._order = (epoch, generator(self._seed, epoch, Stream.ORDER).permutation(len(self.traces)))
        return int(self._order[1][place])


def _identity_of(path: Path) -> dict[str, object]:
    try:
        with safe_open(path, framework="pt") as file:
            found = parse_json((file.metadata() or {}).get("identity", "").encode(), dict[str, object])
            if {"tokens", "starts", "prompts"} <= set(file.keys()) and "seed" in found:
                return found
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove it, then make it again with realsr-hpc freeze-traces"
        ) from None
    raise ValueError(f"{path} was not written by realsr-hpc freeze-traces; name a folder that holds nothing but traces")


def _require_same(path: Path, found: Mapping[str, object], expected: Mapping[str, object]) -> None:
    for name, here in expected.items():
        if found.get(name) != here:
            raise ValueError(f"{path} was made with another {name}; make traces of this recipe in another folder")


def _pairs(
    config: RunConfig, tokens: TraceTokenizer, start: int, stop: int, skipped: dict[str, str]
) -> Iterator[TracePair]:
    """Traces of the samples start..stop; the batch size divides the range, so that no sample is read twice."""
    size = next(size for size in range(16, 0, -1) if (stop - start) % size == 0)
    loader = LQLoader(config, config.data.train_split, size)
    loader.load_state_dict({**loader.state_dict(), "position": start})
    for _ in range((stop - start) // size):
        batch = loader.next()
        for prompt, response in zip(tokens.prompts(batch.lq), tokens.responses(batch), strict=True):
            if response is not None:
                yield prompt, response
    skipped |= loader.skipped
    loader.close()


def _write(path: Path, pairs: list[TracePair], identity: Mapping[str, object]) -> None:
    # rows of different lengths, one after another: row i is tokens[starts[i] : starts[i + 1]]
    rows = [torch.cat([prompt, torch.tensor(response)]) for prompt, response in pairs]
    tensors = {
        "tokens": torch.cat(rows).int() if rows else torch.zeros(0, dtype=torch.int32),
        "starts": torch.tensor([0, *np.cumsum([len(row) for row in rows])], dtype=torch.int64),
        "prompts": torch.tensor([len(prompt) for prompt, _ in pairs], dtype=torch.int32),
    }
    with replacing(path) as aside:
        save_file(tensors, aside, metadata={"identity": json.dumps(identity)})
