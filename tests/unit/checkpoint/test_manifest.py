"""Which folders count as checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from realsr_hpc import runfolder
from realsr_hpc.checkpoint import integrity


def write(root: Path, step: int, metric: float | None = None) -> Path:
    aside = integrity.aside_of(root, step)
    aside.mkdir(parents=True)
    for name in ("a.bin", "b.bin"):
        (aside / name).write_bytes(str(step).encode() * 100)
    final = integrity.folder_of(root, step)
    files = integrity.describe(aside, integrity.content(aside))
    integrity.complete(aside, final, files, integrity.Facts(step, metric=metric))
    return final


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_byte(path: Path) -> None:
    path.write_bytes(b"\xff" + path.read_bytes()[1:])


@pytest.mark.parametrize("damage", [truncate, flip_a_byte, Path.unlink])
def test_damaged_shard_is_said_and_the_previous_checkpoint_used(
    tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    before, newest = write(tmp_path, 10), write(tmp_path, 20)
    assert integrity.latest(tmp_path) == newest
    damage(newest / "b.bin")  # type: ignore[operator]
    with caplog.at_level(logging.ERROR):
        assert integrity.latest(tmp_path) == before
    assert "step-000020 rejected: b.bin" in caplog.text


def test_half_written_checkpoint_is_none(tmp_path: Path) -> None:
    assert integrity.latest(tmp_path / "absent") is None
    integrity.aside_of(tmp_path, 5).mkdir(parents=True)
    (integrity.folder_of(tmp_path, 6)).mkdir()
    assert integrity.latest(tmp_path) is None
    with pytest.raises(ValueError, match="was never completed"):
        integrity.read(integrity.folder_of(tmp_path, 6))


def test_order_is_by_number_and_old_ones_go(tmp_path: Path) -> None:
    for step in (9, 1_000_000, 10):
        write(tmp_path, step)
    integrity.aside_of(tmp_path, 11).mkdir()
    integrity.prune(tmp_path, integrity.Keep(last=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-1000000"]
    assert integrity.latest(tmp_path) == integrity.folder_of(tmp_path, 1_000_000)


def test_a_step_written_again_replaces_the_old_one(tmp_path: Path) -> None:
    folder = write(tmp_path, 3)
    truncate(folder / "a.bin")
    assert write(tmp_path, 3) == folder
    assert integrity.fault(folder) is None


@pytest.mark.parametrize(("highest", "left"), [(True, [20, 50]), (False, [10, 30, 50])])
def test_the_best_stay_beside_the_last_and_are_linked(tmp_path: Path, highest: bool, left: list[int]) -> None:
    for step, metric in ((10, 0.1), (20, 0.9), (30, 0.2), (40, float("nan")), (50, 0.9 if highest else None)):
        write(tmp_path, step, metric)
    integrity.prune(tmp_path, integrity.Keep(last=1, best=2, highest=highest))
    assert [runfolder.step_of(folder) for folder in integrity.completed(tmp_path)] == left
    assert runfolder.step_of((tmp_path / runfolder.BEST).resolve()) == (50 if highest else 10)
    assert integrity.latest(tmp_path) == integrity.folder_of(tmp_path, 50)


DAMAGED = [b"", b"\xff{", b"null", b"[1]", b'{"files": {}}', b'{"step": 1, "files": {"a": 3}}']


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_old_manifest_hinders_no_new_checkpoint(tmp_path: Path, content: bytes) -> None:
    old, new = write(tmp_path, 10, 0.5), write(tmp_path, 20, 0.7)
    (old / integrity.MANIFEST).write_bytes(content)
    assert "damaged" in (integrity.fault(old) or "")
    integrity.prune(tmp_path, integrity.Keep(last=1, best=1))
    write(tmp_path, 30, 0.6)
    integrity.prune(tmp_path, integrity.Keep(last=2, best=1))
    assert integrity.latest(tmp_path) == integrity.folder_of(tmp_path, 30)
    assert [folder.name for folder, _ in integrity.best(tmp_path, 1, highest=True)] == [new.name]


def test_when_every_checkpoint_is_damaged_a_run_asks_instead_of_starting_anew(tmp_path: Path) -> None:
    for step, lost in ((10, "a.bin"), (20, integrity.MANIFEST)):
        (write(tmp_path, step) / lost).unlink()
    with pytest.raises(ValueError, match="all 2 checkpoints are damaged.*newest is step-000020.*start again"):
        integrity.latest(tmp_path)


def test_shares_of_a_checkpoint_are_all_of_it(tmp_path: Path) -> None:
    folder = write(tmp_path, 10)
    flip_a_byte(folder / "b.bin")
    found = [list(integrity.faults_of_share(folder, number, 2)) for number in range(2)]
    assert sorted(found) == [[], ["b.bin differs from the manifest's sha256"]]
