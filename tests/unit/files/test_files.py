"""Files are the old content or the new, on disk before they have their name."""

from __future__ import annotations

import os

import pytest

from realsr_hpc import files


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What is asked of the operating system, in order."""
    seen: list[str] = []
    flush, replace = files.flush, os.replace
    monkeypatch.setattr(files, "flush", lambda path: (seen.append(f"flush {path.name}"), flush(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(f"name {b.name}"), replace(a, b)))
    return seen


def test_bytes_are_on_disk_before_the_name_and_the_name_before_it_returns(tmp_path, calls):
    files.write_atomically(tmp_path / "a.json", "é")
    assert (tmp_path / "a.json").read_bytes() == "é".encode()
    aside, *rest = calls
    assert aside.startswith("flush .a.json.") and f".{os.getpid()}." in aside
    assert rest == ["name a.json", f"flush {tmp_path.name}"]


def test_json_of_any_form_is_a_value_or_a_value_error():
    assert files.json_value('{"a": [1]}') == {"a": [1]}
    for content in ("[" * 100_000, "[1", "", b"\xff"):
        with pytest.raises(ValueError):
            files.json_value(content)


def test_a_block_that_raises_leaves_the_old_content_and_nothing_else(tmp_path):
    (path := tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_name_that_is_no_utf_8_is_written_as_it_came(tmp_path):
    files.write_atomically(tmp_path / "a", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "a").read_bytes() == b"caf\xe9"


def test_a_device_or_pipe_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        files.write_atomically(pipe, "x")
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
