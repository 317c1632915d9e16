"""A checkpoint that would execute code is refused before any part of it is loaded."""

import os
import pickle
import shutil
from pathlib import Path

import pytest

from realsr_hpc.checkpoint.pickles import METADATA, refuse_code


class Touch:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def written(tmp_path: Path) -> Path:
    """A small checkpoint in torch's format: one tensor and one part that is not a tensor."""
    import torch
    import torch.distributed.checkpoint as dcp

    folder = tmp_path / "step-000001"
    dcp.save({"weight": torch.arange(6.0), "note": {"a": 1}}, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_data_passes_and_one_with_code_does_not_run(tmp_path):
    folder = written(tmp_path)
    refuse_code(folder)
    whole = (folder / METADATA).read_bytes()
    (folder / METADATA).write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"\.metadata cannot be trusted .*posix.mkdir, which is not part"):
        refuse_code(folder)
    metadata = pickle.loads(whole)
    (index,) = [index for index in metadata.storage_data if index.fqn.startswith("note")]
    info = metadata.storage_data[index]
    torn = folder / info.relative_path
    content = bytearray(torn.read_bytes())
    import io

    import torch

    buffer = io.BytesIO()
    torch.save(Touch(tmp_path / "ran"), buffer)
    content[info.offset :] = buffer.getvalue()
    metadata.storage_data[index] = type(info)(info.relative_path, info.offset, len(buffer.getvalue()))
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    torn.write_bytes(content)
    with pytest.raises(ValueError, match=f"{torn.name} cannot be trusted"):
        refuse_code(folder)
    metadata.storage_data[index] = type(info)("../x", info.offset, info.length)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="outside of the checkpoint"):
        refuse_code(folder)
    metadata = pickle.loads(whole)
    (index,) = [index for index in metadata.storage_data if index.fqn == "weight"]  # data, but whose?
    info = metadata.storage_data[index]
    metadata.storage_data[index] = type(info)("/etc/hostname", 0, info.length)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="names /etc/hostname, outside of the checkpoint"):
        refuse_code(folder)
    assert not (tmp_path / "ran").exists()
    shutil.copy(__file__, folder / METADATA)
    with pytest.raises(ValueError, match=r"\.metadata cannot be trusted or is damaged"):
        refuse_code(folder)
    (folder / METADATA).unlink()
    with pytest.raises(ValueError, match=r"has no \.metadata"):
        refuse_code(folder)
