"""Damaged and hostile exports and archives: the same result, or one line that names the file."""

import io
import shutil
import tarfile

import numpy as np
import pytest
import yaml

from realsr_hpc.commands.nemo_archive import main
from realsr_hpc.export import Sources, import_weights
from realsr_hpc.export.nemo_archive import refuse_foreign_files, unpack
from realsr_hpc.export.weight_files import weight_files
from realsr_hpc.files import SUMS_FILE, write_sums
from realsr_hpc.restore import find_model


def damages(content: bytes, random: np.random.Generator):
    """A flipped bit, a cut, nothing at all."""
    place = int(random.integers(len(content)))
    flipped = bytearray(content)
    flipped[place] ^= 1 << int(random.integers(8))
    yield bytes(flipped)
    yield content[:place]
    yield None


def test_every_file_of_an_export_is_whole_or_named(run, tmp_path):
    folder, random = tmp_path / "export", np.random.default_rng(0)
    shutil.copytree(run.export, folder)
    recipe = (folder / "recipe.yaml").read_text()
    for name in ("image.safetensors", "text.json"):  # this machine has the tokenizers that the recipe names
        recipe = recipe.replace(name, str(run.folder.parent / name))
    (folder / "recipe.yaml").write_text(recipe)
    write_sums(folder, ("README.md",))
    wanted = find_model({"export": str(folder)})
    refused, sources, out = 0, Sources(folder), tmp_path / "out"
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for damaged in damages(content, random):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            for door in (lambda: find_model({"export": str(folder)}), lambda: import_weights(sources, out)):
                try:
                    assert door() == wanted or path.name in ("README.md", SUMS_FILE)
                except ValueError as error:
                    assert path.name in str(error) and "\n" not in str(error)
                    refused += 1
                shutil.rmtree(tmp_path / "out", ignore_errors=True)
            path.write_bytes(content)
    assert refused >= 2 * 3 * (len(list(folder.iterdir())) - 2)


def archive_of(folder, path, change=lambda config: None, extra=()):
    """What NeMo's connector writes: a configuration, the weights, and the files it names, in one tar."""
    small = [file for file in sorted(folder.iterdir()) if file not in set(weight_files(folder).values())]
    config = {
        "target": "realsr_hpc.export.nemo_archive.ExportCarrier",
        "nemo_version": "3.0.0",
        "shard_bytes": 10**9,
        "recipe": {},
        "files": {f"file{n}": {"name": f.name, "path": f"nemo:{n}_{f.name}"} for n, f in enumerate(small)},
    }
    change(config)
    with tarfile.open(path, "w:") as tar:
        members = {"./model_config.yaml": yaml.safe_dump(config).encode(), "./model_weights.ckpt": b"x"}
        members |= {f"./{n}_{file.name}": file.read_bytes() for n, file in enumerate(small)}
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in extra:
            tar.addfile(info)
    return path


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "etc/passwd", "nemo:../secret", "nemo:/etc/passwd", "nemo:absent", "${oc.env:HOME}", "nemo:.", 3],
)
def test_an_archives_configuration_names_its_own_files_alone(run, tmp_path, path):
    def change(config):
        config["files"]["file0"]["path"] = path

    refuse_foreign_files(archive_of(run.export, tmp_path / "whole.nemo"))
    archive = archive_of(run.export, tmp_path / "hostile.nemo", change)
    with pytest.raises(
        ValueError, match="hostile.nemo is not an archive of this project .*which is not a file of the archive"
    ):
        unpack(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (b"[1]", "holds no fields"),
        (b"recipe: {}", "lists no files"),
        (b"files: {a: [x]}", "lists no files"),
        (b"files: {a: {name: x}}", "names None"),
        (b"files: {a: {name: x, path: 'nemo:x'}}", "names 'nemo:x'"),
        (b"!!python/object/apply:os.system ['touch pwned']", "cannot be read"),
        (b"[" * 20_000, "cannot be read"),
        (b"recipe: \xff", "cannot be read"),
        (None, "has no model_config.yaml"),
    ],
)
def test_what_is_no_archive_is_one_line_of_the_command_and_nothing_is_written(
    config, said, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with tarfile.open("bob's ä.nemo", "w:") as tar:
        info = tarfile.TarInfo("other" if config is None else "./model_config.yaml")
        info.size = len(config or b"")
        tar.addfile(info, io.BytesIO(config or b""))
    assert main(["unpack=bob's ä.nemo", "output=out"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "bob's ä.nemo" in told and said in told
    assert {path.name for path in tmp_path.iterdir()} == {"bob's ä.nemo"}


def test_links_and_paths_that_leave_an_archive_are_refused(run, tmp_path):
    for number, info in enumerate([link("x", "/etc/passwd"), link("y", "../z"), tarfile.TarInfo("../w")]):
        archive = archive_of(run.export, tmp_path / f"{number}.nemo", extra=[info])
        with pytest.raises(ValueError, match="is a link, or lies outside"):
            refuse_foreign_files(archive)
    for key in ("train_ds", "artifacts"):
        archive = archive_of(run.export, tmp_path / f"{key}.nemo", lambda config, key=key: config.update({key: {}}))
        with pytest.raises(ValueError, match=f"has '{key}'"):
            refuse_foreign_files(archive)


def test_damaged_archives_are_one_line(run, tmp_path):
    whole, random = archive_of(run.export, tmp_path / "a.nemo").read_bytes(), np.random.default_rng(0)
    for _ in range(40):
        for damaged in (content for content in damages(whole[:60_000], random) if content is not None):
            (tmp_path / "a.nemo").write_bytes(damaged)
            try:
                refuse_foreign_files(tmp_path / "a.nemo")
            except ValueError as error:
                assert "a.nemo" in str(error) and "\n" not in str(error)
