"""Where results go: one writer a folder, and what the system refuses is a line."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from realsr_hpc import commands
from realsr_hpc.data.decoding import BrokenImage, decode_image
from realsr_hpc.export.weight_files import Aside
from realsr_hpc.files import write_atomically
from realsr_hpc.locks import LockRefused, hold
from realsr_hpc.paths import project_root

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8))
WRITERS = {
    "prepare-data": "source={source}",
    "evaluate": "images={source} against=none set=unpaired data={source} pyiqa=none",
    "make-scenes": "shapes=1 signs=1 heldout_signs=1 photographs=1",
    "degrade": "recipe=grpo_tiny images=1",
    "freeze-traces": "recipe=sft_tiny samples=1",
    "fit-experts": "only=niqe",
}


@pytest.fixture
def source(tmp_path):
    (folder := tmp_path / "photographs").mkdir()
    NOISE.save(folder / "a.png")
    return folder


def words(name: str, source, output) -> list[str]:
    return [name, *WRITERS[name].format(source=source).split(), f"output={output}"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_second_writer_of_a_folder_is_told_who_writes_there(name, source, tmp_path, capsys):
    (output := tmp_path / "out").mkdir()
    part = "-1-of-1" if name == "freeze-traces" else ""
    with hold(output / f".writing{part}.lock", "writing"):
        before = sorted(output.iterdir())
        assert commands.main(words(name, source, output)) == 2
        assert sorted(output.iterdir()) == before
    said = " ".join("".join(capsys.readouterr()).split())
    assert f"output={output}: process {os.getpid()} on {os.uname().nodename} since " in said, said


def test_shards_prepare_side_by_side_and_the_same_one_does_not(source, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    with hold(output / ".writing-1-of-2.lock"):
        assert commands.main(["prepare-data", f"source={source}", f"output={output}", "shard=1/2"]) == 2
        assert commands.main(["prepare-data", f"source={source}", f"output={output}", "shard=2/2"]) == 0


def test_an_export_about_to_be_written_is_another_processs_and_a_killed_ones_rest_is_none(tmp_path):
    output = tmp_path / "export"
    with Aside(output) as folder:
        (folder / "a").write_text("first")
        with pytest.raises(LockRefused, match=f"process {os.getpid()}"), Aside(output):
            pass
        assert (folder / "a").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    with pytest.raises(ValueError, match="exists; name a new folder"), Aside(output):
        pass
    program = (
        "import os, pathlib; from realsr_hpc.export.weight_files import Aside; "
        f"Aside(pathlib.Path({str(output) + '2'!r})).__enter__()"
    )
    subprocess.run([sys.executable, "-c", f"{program}.joinpath('half').touch(); os._exit(9)"], check=False)
    assert (tmp_path / ".export2.aside" / "half").exists()
    with Aside(tmp_path / "export2") as folder:
        assert not list(folder.iterdir())
    assert (tmp_path / "export2").is_dir()


@pytest.mark.parametrize(
    "command",
    ["carry-over policy={source} recipe=sft_tiny", "import-weights source={source} recipe=sft_tiny"],
)
def test_a_second_writer_of_weights_is_told_so_before_anything_is_read(command, source, tmp_path, capsys):
    (source / "model.safetensors").write_bytes(b"nothing that could be read")
    with Aside(tmp_path / "out"):
        assert commands.main([*command.format(source=source).split(), f"output={tmp_path / 'out'}"]) == 2
        said = capsys.readouterr().err
    assert f"output={tmp_path / 'out'}: process {os.getpid()} on " in said and "writes it; wait for it" in said
    (tmp_path / "out").rmdir()


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_cannot_be_made_is_one_line(name, source, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert commands.main(words(name, source, tmp_path / "file" / "out")) == 2
    said = "".join(capsys.readouterr())
    assert "Not a directory" in " ".join(said.split()) and "Traceback" not in said


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("score input={source} output={file}/x.csv", "output={file} cannot be written (File exists)"),
        ("prepare-data source={source} output={source}/out captions={source}", "Is a directory"),
        ("gallery evaluation={source} output={source}", "output={source}: a folder; name a file, such as gallery.html"),
        ("score input={source} output=/dev/null", "output=/dev/null: a device or pipe; name a file"),
        ("restore export=x input={source} output={source}/out upscale=0", "upscale=0 is below 1; give one from 1 up"),
        ("evaluate images={source} set=unpaired data={source} upscale=65", "upscale=65 is above 64; give the set's"),
    ],
)
def test_what_the_system_refuses_or_no_number_can_be_is_one_line(command, line, source, tmp_path, capsys):
    (file := tmp_path / "file").touch()
    assert commands.main(command.format(source=source, file=file).split()) == 2
    said = " ".join("".join(capsys.readouterr()).split())
    assert line.format(file=file, source=source) in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("evaluate images={0} set=unpaired data={0} num_images=4", "num_images=4 goes without data=DIR"),
        ("evaluate run={0} upscale=2", "upscale=2 goes with images=DIR"),
        ("evaluate images={0} set=unpaired data={0} temperature=0.5", "temperature=0.5 goes with a model"),
        ("evaluate images={0} set=unpaired data={0} against=none draws=3", "draws=3 goes with a model"),
        ("score input={0} rewards=tiny metric=psnr_y", "metric=psnr_y: not with rewards="),
        ("score input={0} rewards.terms.fidelity.weight=2", "weight=2: goes with rewards=GROUP or recipe=NAME"),
        ("score input={0} manifest={0}/m.parquet", "m.parquet: goes with rewards=GROUP or recipe=NAME"),
    ],
)
def test_options_that_would_be_lost_are_refused(command, said, source, capsys):
    assert commands.main(command.format(source).split()) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("restore export={policy} input={file}/none output={file}-out", "input={file}/none: no images found"),
        ("restore export={policy} input={source} output={source}", "is the folder of the input"),
        ("evaluate export={policy} against=none set=unpaired data={file}", "data={file}: no such folder"),
    ],
)
def test_inputs_are_looked_for_before_a_model_is_loaded(command, said, source, tmp_path, capsys, monkeypatch):
    """At 7B loading takes minutes."""
    (file := tmp_path / "file").touch()
    loaded = []
    monkeypatch.setattr("realsr_hpc.restore.open_with_options", lambda *given, **more: loaded.append(given))
    policy = project_root() / "recipes" / "assets" / "tiny" / "policy_sft"
    assert commands.main(command.format(policy=policy, source=source, file=file).split()) == 2
    assert said.format(file=file) in capsys.readouterr().err and not loaded


def test_a_reader_that_has_enough_ends_a_command_without_a_traceback(source):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "realsr_hpc.commands", "score", f"input={source}", "metric=niqe"]
    answer = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=120)
    os.close(writing)
    assert "Traceback" not in answer.stderr and "BrokenPipe" not in answer.stderr, answer.stderr


def test_methods_of_one_name_are_told_apart_by_the_folders_above(source, tmp_path, capsys):
    for folder in ("one/swinir", "two/swinir", "all/truth"):
        (tmp_path / folder).mkdir(parents=True)
        NOISE.save(tmp_path / folder / "a.png")
    words = ["evaluate", "set=unpaired", f"data={source}", "pyiqa=none", f"images={tmp_path / 'one/swinir'}"]
    assert commands.main([*words, f"against={tmp_path / 'two/swinir'}", f"output={tmp_path / 'out'}"]) == 0
    assert {path.name for path in (tmp_path / "out/images").iterdir()} >= {"swinir", "two_swinir"}
    words[-1] = f"images={tmp_path / 'all/truth'}"  # the set's own images are called so
    assert commands.main([*words, "against=none", f"output={tmp_path / 'truths'}"]) == 0
    assert (tmp_path / "truths/images/all_truth/a.png").exists()
    same = f"{tmp_path / 'two/swinir'},{tmp_path / 'two/swinir'}"
    assert commands.main([*words, f"against={same}", f"output={tmp_path / 'twice'}"]) == 2
    assert "is given twice; name it once" in capsys.readouterr().err and not (tmp_path / "twice").exists()


def test_comparing_where_nothing_ran_makes_no_database(tmp_path, capsys):
    assert commands.main(["compare", "sweep=x", f"root={tmp_path}"]) == 2
    assert "has no mlflow.db" in "".join(capsys.readouterr()) and not list(tmp_path.iterdir())


def test_score_names_files_of_formats_that_are_not_read(source, capsys):
    (source / "b.heic").touch()
    assert commands.main(["score", f"input={source}", "metric=stripes"]) == 1
    assert "b.heic: format: .heic is not read" in capsys.readouterr().err


def test_score_tells_files_of_one_name_apart_and_pairs_each_with_its_own_truth(source, tmp_path, capsys):
    truth, odd = tmp_path / "truth", os.fsdecode(b"caf\xe9.png")
    for folder in (source, truth):
        (folder / "sub").mkdir(parents=True)
        NOISE.save(folder / "sub" / "a.png")
    with (source / odd).open("wb") as named, (truth / odd).open("wb") as other:
        NOISE.save(named, "PNG"), NOISE.save(other, "PNG")
    Image.new("RGB", NOISE.size).save(truth / "a.png")
    words = ["score", f"input={source}", f"truth={truth}", "metric=psnr_y"]
    assert commands.main([*words, f"output={tmp_path / 'new' / 't.csv'}"]) == 0
    rows = dict(line.split(",") for line in (tmp_path / "new" / "t.csv").read_text().splitlines()[1:])
    assert set(rows) == {"a.png", "sub/a.png", "caf\\xe9.png"}
    assert float(rows["a.png"]) < 20 and float(rows["sub/a.png"]) == float(rows["caf\\xe9.png"]) == 100
    (truth / "sub" / "a.png").unlink()
    assert commands.main(words) == 2 and "has no sub/a.png" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "score", "prepare-data"])
def test_what_is_no_regular_file_is_named_and_nothing_waits_for_it(command, source, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(source / "pipe.png")
    (source / "linked.png").symlink_to(tmp_path / "pipe")
    (source / "itself.png").symlink_to("itself.png")
    given = {
        "evaluate": [f"images={source}", "against=none", "set=unpaired", f"data={source}", "pyiqa=none"],
        "score": [f"input={source}", "metric=stripes"],
        "prepare-data": [f"source={source}"],
    }
    output = tmp_path / "out" / ("t.csv" if command == "score" else "")
    assert commands.main([command, *given[command], f"output={output}"]) == 1
    told = "".join(capsys.readouterr()) + "".join(path.read_text() for path in output.glob("report.json"))
    for name, why in {"pipe": "special: a pipe", "linked": "special: a pipe", "itself": "link: Too many"}.items():
        assert f"{name}.png" in told and why in told


def test_a_pipe_that_a_manifest_or_note_names_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BrokenImage, match="not a regular file"):
        decode_image(tmp_path / "pipe.png")


def test_a_file_is_written_whatever_the_length_of_its_name(tmp_path):
    for name in ("x" * 255, "\u00fc" * 127):
        write_atomically(tmp_path / name, "whole")
        assert (tmp_path / name).read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 2


def test_degrading_that_was_interrupted_can_be_repeated(tmp_path, monkeypatch, capsys):
    words = ["degrade", "recipe=grpo_tiny", "images=1", f"output={tmp_path / 'out'}"]

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("realsr_hpc.tracking.drawing.image_grid", interrupted)  # the last that is written
        assert commands.main(words) == 130
    assert "the same command continues it, or starts it over" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")]
    assert commands.main(words) == 0 and len(list((tmp_path / "out" / "lq").iterdir())) == 1
