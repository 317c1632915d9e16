"""The files that a recipe needs are checked, collected, packed and checked again."""

import json
import tarfile
import zipfile

import pytest
import torch

from realsr_hpc.commands import stage_weights
from realsr_hpc.config.load import compose_one
from realsr_hpc.config.weights import PYIQA_FILES, needs_of, pyiqa_needs, state
from realsr_hpc.files import sha256_of, write_sums


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


SEVEN = {"dim": 4096, "n_layers": 32, "n_heads": 32}
THIRTY = {"dim": 8192, "n_layers": 48, "n_heads": 64}


def archive(path, content=b"numbers"):
    """The outer structure of a file that torch.save wrote."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", content * 100)


def tree(root, model="7b", sizes=None, parts=1):
    """A tree in Meta's layout whose files hold no numbers."""
    folder = root / "models" / model
    for number in range(parts):
        archive(folder / ("consolidated.pth" if parts == 1 else f"consolidated.{number:02d}.pth"))
    (folder / "params.json").write_text(json.dumps({"model": sizes or SEVEN}))
    (folder / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": parts}))
    archive(root / "tokenizer" / "vqgan.ckpt")
    (root / "tokenizer" / "text_tokenizer.json").write_text("{}")


def hugging_face(folder, **settings):
    folder.mkdir(parents=True)
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 65536}
    (folder / "config.json").write_text(json.dumps({"model_type": "chameleon", **sizes, **settings}))
    (folder / "tokenizer.json").write_text("{}")
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"four")


def listed(tool, folder, capsys):
    """Policy -> the lines printed about it, and the import command if there is one."""
    assert tool.main(["recipe=sft_7b", f"downloads={folder}"]) == 1
    lines = capsys.readouterr().out.splitlines()
    own = [number for number, line in enumerate(lines) if line.startswith(f"{folder}/")]
    followed = {number: lines[number + 1] if number + 1 < len(lines) else "" for number in own}
    return {
        lines[number].partition(": ")[0].removeprefix(f"{folder}/"): (
            lines[number].partition(": ")[2],
            followed[number] if followed[number].startswith("python ") else "",
        )
        for number in own
    }


def test_one_tree_of_two_models_names_the_folder_of_the_one_that_fits(tool, tmp_path, capsys):
    tree(tmp_path / "chameleon")
    tree(tmp_path / "chameleon", "30b", THIRTY, parts=4)
    said = listed(tool, tmp_path, capsys)
    seven, thirty = said["chameleon/models/7b"], said["chameleon/models/30b"]
    assert seven[1].startswith(f"python tools/import_weights.py source={tmp_path}/chameleon/models/7b recipe=sft_7b")
    assert "model.hidden_size 8192 (recipe: 4096)" in thirty[0] and not thirty[1]
    (tmp_path / "chameleon/models/30b/params.json").write_text(json.dumps({"model": SEVEN}))
    (tmp_path / "chameleon/models/30b/consolidated.02.pth").unlink()
    assert "consolidated.02.pth is not there" in listed(tool, tmp_path, capsys)["chameleon/models/30b"][0]


def test_downloads_that_are_cut_or_no_such_file_get_no_command(tool, tmp_path, capsys):
    def cut(path):
        path.write_bytes(path.read_bytes()[:-3])

    def pointer(path):
        path.write_text("version https://git-lfs.github.com/spec/v1\n")

    for name, harm in (("cut", cut), ("pointer", pointer), ("empty", lambda path: path.write_bytes(b""))):
        hugging_face(tmp_path / f"hf_{name}")
        tree(tmp_path / f"tree_{name}")
        tree(tmp_path / f"image_{name}")
        harm(tmp_path / f"hf_{name}/model.safetensors")
        harm(tmp_path / f"tree_{name}/models/7b/consolidated.pth")
        harm(tmp_path / f"image_{name}/tokenizer/vqgan.ckpt")
        hugging_face(tmp_path / f"text_{name}")
        (tmp_path / f"text_{name}/tokenizer.json").write_text("<html>log in</html>")
    said = listed(tool, tmp_path, capsys)
    assert len(said) == 12
    wrongs = ("is truncated or not", "is empty", "is a Git LFS pointer", "is a web page")
    for name, (told, command) in said.items():
        assert any(wrong in told for wrong in wrongs) and not command, name
    assert "is a Git LFS pointer" in said["image_pointer"][0] and "is a web page" in said["text_cut"][0]


@pytest.mark.parametrize(("freqs", "orders"), [(None, ["interleaved", "halves"]), (torch.zeros(2), [])])
def test_a_renamed_tree_gets_a_command_for_each_rotary_order(freqs, orders, tool, tmp_path, capsys):
    """A tree as Anole's bin_to_pth.py writes it: `rope.freqs` is None, so the user must choose the rotary order."""
    tree(tmp_path / "anole")
    shard = {"norm.weight": torch.ones(2), "rope.freqs": freqs, "output.weight": torch.ones(2, 2)}
    torch.save(shard, tmp_path / "anole/models/7b/consolidated.pth")
    assert tool.main(["recipe=sft_7b", f"downloads={tmp_path}"]) == 1
    told = capsys.readouterr().out
    commands = [line for line in told.splitlines() if line.startswith("python tools/import_weights.py ")]
    assert [f"rotary={order}" for order in orders] == [
        word for line in commands for word in line.split() if "rotary" in word
    ]
    assert len(commands) == max(1, len(orders)) and ("choose rotary=interleaved (" in told) == bool(orders)


def test_a_linked_folder_is_found_and_a_whole_tokenizer_preferred(tool, tmp_path, capsys):
    hugging_face(tmp_path / "elsewhere" / "Lumina")
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    (downloads / "Lumina").symlink_to(tmp_path / "elsewhere" / "Lumina")
    (downloads / "round").symlink_to(downloads)
    (downloads / "a" / "tokenizer").mkdir(parents=True)
    (downloads / "a" / "tokenizer" / "vqgan.ckpt").write_text("<html>")
    (downloads / "nowhere").symlink_to(tmp_path / "gone")
    assert "vqgan.ckpt is a web page, not the file" in listed(tool, downloads, capsys)["Lumina"][0]
    archive(downloads / "b" / "tokenizer" / "vqgan.ckpt")
    command = listed(tool, downloads, capsys)["Lumina"][1]
    assert f"source={downloads}/Lumina image_tokenizer={downloads}/b/tokenizer/vqgan.ckpt recipe=sft_7b" in command


def test_collecting_takes_no_raw_download_for_what_an_import_makes(tool, tmp_path, capsys):
    """`tokenizer.json` may be any model's, and a folder with it alone is no policy."""
    hugging_face(tmp_path / "downloads" / "policy")
    place = tmp_path / "weights" / "policy"
    words = ["recipe=sft_7b", f"model.weights={place}", f"text_tokenizer.path={place}/tokenizer.json"]
    words += [f"image_tokenizer.weights={place}/image_tokenizer.safetensors", f"collect={tmp_path / 'downloads'}"]
    assert tool.main(words) == 1 and not place.exists()
    place.mkdir(parents=True)
    (place / "tokenizer.json").write_text("{}")
    assert tool.main(words) == 1
    assert "holds no weights" in " ".join(capsys.readouterr().out.split())
    (place / "tokenizer.json").unlink()
    place.rmdir()
    write_sums(tmp_path / "downloads" / "policy")
    assert tool.main(words) == 1 and (place / "model.safetensors").is_file()
