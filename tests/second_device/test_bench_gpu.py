"""`bench.py gpu` without a GPU: it refuses in one line, and every part of it runs on the second device."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launcher import run_ranks
from tests.second_device.cases import on_far
from tools.benchmarks import gpu

PARTS = ["parity", "train", "fp8", "decode", "degradation", "rewards"]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def rehearse(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every part's figures on narrow shapes."""
    torch.set_num_threads(1)
    return {part: gpu.measure(part, "far", folder) for part in PARTS}


def test_every_part_runs_on_the_second_device(tmp_path):
    """Parity against the CPU, which a program of its own computes, holds there as it has to hold on a GPU."""
    [found] = run_ranks(1, on_far, rehearse, tmp_path)
    assert list(found) == PARTS and not list(tmp_path.iterdir())
    values = [figure["value"] for figures in found.values() for figure in figures]
    assert len(values) > 20 and all(math.isfinite(value) and value >= 0 for value in values)
    assert all(figure["as_expected"] for figure in found["parity"])
    unchanged = [figure for figure in found["decode"] if "change hidden states" in figure["name"]]
    assert [figure["value"] for figure in unchanged] == pytest.approx([0, 0], abs=1e-2)


@without_gpu
def test_without_a_gpu_it_refuses_in_one_line(tmp_path, capsys):
    assert gpu.main([f"output={tmp_path / 'report'}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "device=cpu" in said and not (tmp_path / "report").exists()


@without_gpu
def test_a_part_that_fails_is_reported_and_the_others_stand(tmp_path):
    """Asked for a GPU that is not there, a part's own program ends with one line."""
    failed = gpu.in_own_process("train", "cuda", tmp_path)
    assert failed["status"] == "failed" and "torch sees none here" in failed["error"]
    figure = {"name": "step", "value": 2.0, "unit": "s", "least": None, "most": 1.0, "as_expected": False}
    slow = {"status": "not as expected", "seconds": 3.0, "error": "", "figures": [figure]}
    page = gpu.markdown({"machine": {"device": "x"}, "parts": gpu.compared({"train": failed, "decode": slow})})
    assert "torch sees none here" in page and "| step | 2 s | <= 1 (no) |" in page
