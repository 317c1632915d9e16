"""What a recipe needs, checked, collected, packed and checked again."""

import tarfile

import pytest

from realsr_hpc.commands import stage_weights
from realsr_hpc.config.load import compose_one
from realsr_hpc.config.weights import PYIQA_FILES, needs_of, pyiqa_needs, state
from realsr_hpc.files import sha256_of


@pytest.fixture(scope="module")
def tool():
    return stage_weights


def test_the_small_recipe_has_all_it_needs_and_packs(tool, tmp_path, capsys, monkeypatch):
    target = tmp_path / "weights.tar"
    assert tool.main(["recipe=grpo_tiny", f"pack={target}"]) == 0
    assert capsys.readouterr().out.count(" there ") >= 4
    with tarfile.open(target) as archive:
        archive.extractall(tmp_path, filter="data")
    sums = tmp_path / "weights" / "SHA256SUMS"
    for line in sums.read_text().splitlines():
        digest, name = line.split(maxsplit=1)
        assert sha256_of(tmp_path / name) == digest
    assert tool.main(["recipe=grpo_tiny", f"check={sums}"]) == 0
    sums.write_text(sums.read_text().replace(sums.read_text()[:8], "00000000", 1))
    assert tool.main(["recipe=grpo_tiny", f"check={sums}"]) == 1


def test_pyiqas_files_are_collected_listed_and_their_faults_named(tool, tmp_path):
    config = compose_one(
        [
            "recipe=grpo_tiny",
            "rewards.terms.generation.options={expert: pyiqa, metrics: [niqe, musiq], weights_dir: "
            + f"{tmp_path}/iqa}}",
        ]
    )
    needs = [need for need in needs_of(config) if need.weights_dir]
    assert [state(need) for need in needs] == ["missing", "missing"]
    (tmp_path / "downloads").mkdir()
    for need in needs:
        (tmp_path / "downloads" / need.path.name).write_bytes(b"numbers")
    tool.collect(needs, tmp_path / "downloads", tool.Console(quiet=True))
    assert {need.path.name: state(need) for need in needs} == {
        "niqe_modelparameters.mat": "there",
        "musiq_koniq_ckpt-e95806b9.pth": "differs",  # the name says how the checksum begins
    }
    needs[0].path.write_bytes(b"other numbers")
    assert state(needs[0]) == "differs"


def test_a_metric_out_of_the_table_and_wrong_usage_are_named(tool, tmp_path, capsys):
    assert "nrqm" not in PYIQA_FILES
    assert [need.path.name for need in pyiqa_needs("x", ["nrqm"], str(tmp_path))] == ["SHA256SUMS"]
    assert tool.main([]) == 2 and "recipe=NAME is needed" in capsys.readouterr().out
    assert tool.main(["recipe=grpo_tiny", "collect=/nowhere"]) == 2
