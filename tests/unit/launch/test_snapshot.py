"""The snapshot of the code that jobs run: verified, repaired, private."""

from __future__ import annotations

import os
import subprocess

import pytest

from realsr_hpc.config.load import compose
from realsr_hpc.launch.snapshot import take_snapshot


def test_a_snapshot_is_verified_repaired_and_private(tmp_path):
    config = compose(["recipe=grpo_tiny", f"output_root={tmp_path}"])
    (tmp_path / "code").mkdir(mode=0o777)
    os.chmod(tmp_path / "code", 0o777)
    code = take_snapshot([config])
    assert all(folder.stat().st_mode & 0o077 == 0 for folder in (code, code.parent))
    sources = {path.relative_to(code): (path.read_bytes(), path.stat().st_mode) for path in code.rglob("*.*")}
    victim, slurm, script = code / "realsr_hpc" / "files.py", code / "slurm", code / "slurm" / "dev_cluster.sh"
    damages = {
        "purged": victim.unlink,
        "altered": lambda: victim.write_text("planted = True"),
        "added": lambda: (code / "torch.py").write_text("planted = True"),
        "emptied": lambda: [subprocess.run(["rm", "-r", path], check=True) for path in code.iterdir()],
        "a link": lambda: (victim.rename(tmp_path / "files.py"), victim.symlink_to(tmp_path / "files.py")),
        "a linked folder": lambda: (slurm.rename(tmp_path / "slurm"), slurm.symlink_to(tmp_path / "slurm")),
        "compiled elsewhere": lambda: ((pyc := victim.parent / "__pycache__").mkdir(), (pyc / "x").symlink_to(victim)),
        "open to all": lambda: victim.chmod(0o666),
        "a folder open to all": lambda: slurm.chmod(0o777),
        "closed": lambda: victim.chmod(0),
        "no program any more": lambda: script.chmod(0o644),
        "a file": lambda: (code.rename(tmp_path / "old"), code.write_text("x")),
        "a dead link": lambda: (code.rename(tmp_path / "older"), code.symlink_to("/nowhere")),
    }
    for damage, do in damages.items():
        do()
        assert take_snapshot([config]) == code
        found = {path.relative_to(code): (path.read_bytes(), path.stat().st_mode) for path in code.rglob("*.*")}
        assert found == sources and not code.is_symlink(), damage
        assert slurm.stat().st_mode & 0o022 == 0 and not slurm.is_symlink(), damage
    if os.getuid() == 0:
        os.chown(code, 12345, -1)
        with pytest.raises(ValueError, match="belongs to user 12345"):
            take_snapshot([config])


def test_a_snapshot_stays_where_the_file_system_knows_no_modes(tmp_path, monkeypatch):
    """As an SMB mount shows them, whatever chmod said."""
    monkeypatch.setattr("realsr_hpc.launch.snapshot._mode", lambda path: 0o777)
    config = compose(["recipe=grpo_tiny", f"output_root={tmp_path}"])
    code = take_snapshot([config])
    before = code.stat().st_ino
    assert take_snapshot([config]).stat().st_ino == before
    (code / "realsr_hpc" / "files.py").write_text("planted = True")
    assert take_snapshot([config]).stat().st_ino != before
