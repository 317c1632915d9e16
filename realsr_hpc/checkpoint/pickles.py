"""Ensures that reading a checkpoint runs no code: checks the pickles that Megatron and torch would load.

`torch.distributed.checkpoint` loads `.metadata` with plain pickle and non-tensor parts with `weights_only=False`, so
the author of a checkpoint could run code in the process that loads it, even if it is only used for restoring images.
Here `.metadata` is first read by an unpickler that allows only the classes such a file consists of, and every
non-tensor part is read with `weights_only`. Checkpoints that pass contain no code.

Not covered: the states that Transformer Engine keeps inside tensors (FP8 scales) and unpickles itself.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import torch

from realsr_hpc.files import first_line

METADATA = ".metadata"
_CHECKPOINT = "torch.distributed.checkpoint"
_ALLOWED = {
    f"{_CHECKPOINT}.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    f"{_CHECKPOINT}.planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    f"{_CHECKPOINT}.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"Path", "PosixPath"},
}  # fmt: skip
_VALUES = (torch.dtype, torch.layout, torch.memory_format)


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        is_value = module == "torch" and isinstance(getattr(torch, name, None), _VALUES)
        if not is_value and name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(
                f"it refers to {module}.{name}, which is not part of a checkpoint and could run code"
            )
        return super().find_class(module, name)


def refuse_code(folder: Path) -> None:
    """Check everything that loading this checkpoint would unpickle.

    Raises:
        ValueError: naming the file, if it contains anything but data or is damaged.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as stream:
            metadata = _Restricted(stream).load()
        storage, kinds = metadata.storage_data, metadata.state_dict_metadata
        for part in storage.values():
            if Path(part.relative_path).name != part.relative_path:  # of tensors too: their bytes would be exported
                raise pickle.UnpicklingError(f"{METADATA} names {part.relative_path}, outside of the checkpoint")
        for index, part in storage.items():
            if type(kinds[index.fqn]).__name__ == "BytesStorageMetadata":
                path = folder / part.relative_path
                _read_part(path, part.offset, part.length)
    except FileNotFoundError:
        raise ValueError(f"checkpoint {path.parent} has no {path.name}; name a complete one") from None
    except Exception as error:  # a damaged pickle can raise any exception
        raise ValueError(f"checkpoint file {path} cannot be trusted or is damaged ({first_line(error)})") from None


def _read_part(path: Path, offset: int, length: int) -> None:
    with path.open("rb") as stream:
        stream.seek(offset)
        torch.load(io.BytesIO(stream.read(length)), map_location="cpu", weights_only=True)
