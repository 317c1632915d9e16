"""`.nemo` archives through nemo-toolkit; without the extra, what a user is told."""

import importlib.util

import pytest

from realsr_hpc.export import Sources, import_weights
from realsr_hpc.export.nemo_archive import pack, unpack
from tests.unit.export.test_tools import command

installed = importlib.util.find_spec("nemo") is not None
needs_nemo = pytest.mark.skipif(not installed, reason="the extra `nemo` is not installed")


@pytest.mark.filterwarnings("ignore")
@needs_nemo
def test_unpacking_gives_the_packed_export_file_by_file(run, tmp_path, monkeypatch):
    archive, folder = tmp_path / "policy.nemo", tmp_path / "unpacked"
    monkeypatch.chdir(tmp_path)
    assert command("nemo_archive")([f"pack={run.export}", "output=policy.nemo"]) == 0
    assert command("nemo_archive")([f"unpack={archive}", f"output={folder}"]) == 0
    packed = {path.name: path.read_bytes() for path in run.export.iterdir() if path.is_file()}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == packed
    assert import_weights(Sources(folder), tmp_path / "imported").output.is_dir()
    with pytest.raises(ValueError, match="exists"):
        pack(run.export, archive)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.filterwarnings("ignore")
@needs_nemo
def test_a_damaged_archive_is_named_and_nothing_is_written(run, tmp_path):
    archive = tmp_path / "policy.nemo"
    pack(run.export, archive)
    archive.write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(ValueError, match="policy.nemo"):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(installed, reason="the extra `nemo` is installed")
def test_without_the_extra_its_name_is_said(run, tmp_path, capsys):
    assert command("nemo_archive")([f"pack={run.export}", f"output={tmp_path / 'policy.nemo'}"]) == 2
    assert "realsr_hpc[nemo]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
