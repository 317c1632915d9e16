"""The commands: listed, quick to answer, the same through each door, and refused in one line where they cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from PIL import Image

from realsr_hpc import commands
from realsr_hpc.launch import command
from realsr_hpc.paths import PACKAGE, project_root

MODULES = sorted(path.stem for path in (PACKAGE / "commands").glob("*.py") if not path.stem.startswith("_"))


def run(*command: str, **settings) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, **settings)


def test_every_module_is_a_listed_command_with_a_door(capsys):
    assert sorted(name.replace("-", "_") for name in commands.COMMANDS) == MODULES
    assert commands.main(["--help"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == list(commands.COMMANDS)
    doors = {path.stem for path in (project_root() / "tools").glob("*.py") if "run(" in path.read_text()}
    assert doors == {*MODULES, "_door"}


def test_help_names_each_command_and_loads_nothing_heavy():
    program = """if True:
        import sys
        from realsr_hpc.commands import COMMANDS, main
        for name in COMMANDS:
            try:
                code = main([name, "--help"])
            except SystemExit as end:
                code = end.code
            assert code == 0 and "torch" not in sys.modules, (name, code)
    """
    answer = run("-c", program)
    assert answer.returncode == 0, answer.stderr
    assert all(f"realsr-hpc {name}" in answer.stdout for name in commands.COMMANDS)


def test_an_unknown_command_is_answered_with_the_nearest(capsys):
    assert commands.main(["lanch", "recipe=grpo_tiny"]) == 2
    assert "did you mean 'launch'?" in capsys.readouterr().err


def test_a_door_and_the_command_say_the_same():
    door = run(str(project_root() / "tools" / "launch.py"), "recipe=grpo_tiny", "resolve=true", cwd="/")
    command = run("-m", "realsr_hpc.commands", "launch", "recipe=grpo_tiny", "resolve=true")
    assert door.returncode == command.returncode == 0 and door.stdout == command.stdout


def test_a_door_without_the_package_says_what_to_do():
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    answer = run("-S", str(project_root() / "tools" / "jobs.py"), cwd="/", env=environment)
    assert answer.returncode == 1 and answer.stderr.count("\n") == 1 and "pip install -e ." in answer.stderr


def test_no_command_depends_on_the_locales_encoding(tmp_path):
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG"))}
    locale = plain | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    (folder := tmp_path / "bilder-ü").mkdir()
    os.mkdir(odd := os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    Image.effect_noise((96, 96), 60).convert("RGB").save(os.path.join(odd, os.fsdecode(b"\xe9.png")))
    Image.effect_noise((96, 96), 60).convert("RGB").save(folder / "é.png")  # of a flat one NIQE knows nothing
    note = "tracking.description=größer"
    door = [sys.executable, "-m", "realsr_hpc.commands", "launch", "recipe=grpo_tiny", note, "resolve=true"]
    assert "größer" in subprocess.run(door, capture_output=True, env=locale, check=True).stdout.decode("utf-8")
    works = [
        ["launch", "recipe=grpo_tiny", note, "plan=true"],
        ["launch", "chain=tiny", f"grpo:{note}", f"output_root={folder}", "plan=true"],
        ["jobs", f"root={folder}"],
        ["jobs", f"root={folder}", "json=true"],
        ["sync-tracking", f"root={folder}"],
        ["stage-weights", "recipe=sft_tiny"],
        ["prepare-data", f"source={odd}", f"output={folder / 'prepared'}"],
        ["degrade", "recipe=grpo_tiny", f"output={tmp_path / 'klein-ü'}", "images=1"],
        ["score", f"input={odd}", "metric=stripes"],
        ["evaluate", f"images={folder}", "against=none", "set=unpaired", f"data={folder}", "pyiqa=none"],
    ]
    wrong = [[name, "größe=1"] for name in commands.COMMANDS]
    script = "import json, sys; from realsr_hpc import commands; commands._use_utf8(); "
    script += "print([commands.main(words) for words in json.loads(sys.argv[1])])"
    words = [sys.executable, "-c", script, json.dumps([*works, *wrong])]
    answer = subprocess.run(words, capture_output=True, env=locale, timeout=600)
    told = (answer.stdout + answer.stderr).decode("utf-8")
    assert answer.stdout.decode("utf-8").splitlines()[-1] == str([0] * len(works) + [2] * len(wrong)), told
    assert told.count("größe") > len(wrong) / 2  # the others miss a key before they come to it
    table = (tmp_path / "bilder-ü-evaluation" / "unpaired" / "metrics.csv").read_text(encoding="utf-8")
    assert "é" in table


def test_launchings_help_keeps_its_columns_on_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert command.main(["--help"]) == 0
    assert f"\n{command.USAGE.strip().splitlines()[-1]}\n" in capsys.readouterr().out
