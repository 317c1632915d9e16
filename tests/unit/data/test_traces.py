"""Frozen traces hold the tokens that SFT would make itself; writing and reading can be resumed."""

from dataclasses import replace

import pytest
import torch

from realsr_hpc.config.load import compose_one
from realsr_hpc.data.loader import LQLoader
from realsr_hpc.data.manifest import read_manifest, write_manifest
from realsr_hpc.data.traces import FrozenTraces, TraceLoader, freeze_traces
from realsr_hpc.paths import project_root
from realsr_hpc.tokenizer.trace import TraceTokenizer

torch.set_num_threads(1)
RECIPE = ["recipe=sft_tiny", "data.manifest=recipes/assets/photographs/manifest.parquet"]


@pytest.fixture(scope="module")
def config():
    return compose_one(RECIPE)


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("traces")
    assert freeze_traces(config, path, 10, 4, shard=(2, 2)) == 4
    assert freeze_traces(config, path, 10, 4) == 10
    return path


def test_they_are_the_traces_made_on_the_fly(config, folder):
    loader = LQLoader(config, config.data.train_split, 10)
    batch = loader.next()
    loader.close()
    tokens = TraceTokenizer.load(config, torch.device("cpu"))
    frozen = FrozenTraces(folder, config)
    expected = zip(tokens.prompts(batch.lq), tokens.responses(batch), strict=True)
    for number, (prompt, response) in enumerate(expected):
        found_prompt, found_response = frozen[number]
        assert torch.equal(found_prompt, prompt) and found_response == response


def test_a_killed_run_writes_what_is_missing_only(config, folder):
    files = sorted(folder.glob("*.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in files}
    files[1].unlink()
    assert freeze_traces(config, folder, 10, 4) == 10
    after = {path: path.stat().st_mtime_ns for path in files}
    assert [before[path] == after[path] for path in files] == [True, False, True]


def test_another_seed_may_train_on_them_in_its_own_later_order(config, folder):
    here, other = (TraceLoader(compose_one([*RECIPE, f"seed={seed}"]), folder, 10) for seed in (config.seed, 7))
    assert first(here.next()) == first(other.next())
    mine, theirs = first(here.next()), first(other.next())
    assert mine != theirs and sorted(mine) == sorted(theirs)


def test_a_folder_with_a_gap_is_refused(config, folder, tmp_path):
    for path in (sorted(folder.glob("traces-*"))[0], sorted(folder.glob("traces-*"))[2]):
        (tmp_path / path.name).symlink_to(path)
    with pytest.raises(ValueError, match=r"lacks files \[1\]"):
        TraceLoader(config, tmp_path, 2)


@pytest.mark.parametrize("damage", [b"", b"x" * 50, "cut"])
def test_a_damaged_file_of_traces_is_named(config, folder, tmp_path, damage):
    whole = sorted(folder.glob("traces-*"))[0]
    path = tmp_path / whole.name
    path.write_bytes(whole.read_bytes()[:-10] if damage == "cut" else damage)
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        TraceLoader(config, tmp_path, 2)


def test_photographs_without_captions_give_no_trace(tmp_path):
    bundled = read_manifest(project_root() / "recipes/assets/photographs/manifest.parquet")
    entries = [replace(entry, path=str(bundled.path(entry)), caption_final="") for entry in bundled.entries]
    write_manifest(tmp_path / "manifest.parquet", entries)
    untold = compose_one(["recipe=sft_tiny", f"data.manifest={tmp_path / 'manifest.parquet'}"])
    assert freeze_traces(untold, tmp_path / "traces", 4, 4) == 0
    with pytest.raises(ValueError, match="holds no trace"):
        TraceLoader(untold, tmp_path / "traces", 2)


def first(pairs):
    return [(prompt.tolist(), response) for prompt, response in pairs]


def test_ranks_share_batches_rounds_differ_and_resuming_is_exact(config, folder):
    whole = TraceLoader(config, folder, 4)
    batches = [first(whole.next()) for _ in range(5)]
    ranks = [TraceLoader(config, folder, 2, dp_rank=rank, dp_size=2) for rank in range(2)]
    assert first(ranks[0].next()) + first(ranks[1].next()) == batches[0]
    state = ranks[0].state_dict()
    resumed = TraceLoader(config, folder, 4)
    resumed.load_state_dict(state)
    assert [first(resumed.next()) for _ in range(4)] == batches[1:]
    rows = [row for batch in batches for row in batch]
    assert rows[:10] != rows[10:20] and sorted(rows[:10]) == sorted(rows[10:20])


def test_traces_of_another_recipe_are_refused(config, folder, tmp_path):
    other = compose_one([*RECIPE, "degradation.preset=seesr"])
    with pytest.raises(ValueError, match="another degradation"):
        TraceLoader(other, folder, 2)
    with pytest.raises(ValueError, match="another seed"):
        freeze_traces(compose_one([*RECIPE, "seed=7"]), folder, 10, 4)
    with pytest.raises(ValueError, match="holds no traces"):
        FrozenTraces(tmp_path, config)
    with pytest.raises(ValueError, match="other traces"):
        TraceLoader(config, folder, 2).load_state_dict({"position": 0, "traces": "x"})
