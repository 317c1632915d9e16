"""The two commands, as a user calls them."""

import importlib.util
from pathlib import Path

import realsr_hpc

TOOLS = Path(realsr_hpc.__file__).parent.parent / "tools"


def command(name: str):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_export_and_import_commands(run, tmp_path, capsys):
    exported, imported = tmp_path / "exported", tmp_path / "imported"
    assert command("export_hf")([f"run={run.folder}", f"output={exported}", "licence=mit"]) == 0
    assert "step-000007" in capsys.readouterr().out
    assert "license: mit" in (exported / "README.md").read_text()
    assert command("import_hf")([f"source={exported}", f"output={imported}"]) == 0
    assert "checkpoints/step-000000" in capsys.readouterr().out
    assert (imported / "recipe.yaml").is_file()


def test_a_recipe_of_another_shape_is_refused(run, tmp_path, capsys):
    arguments = [f"source={run.export}", f"output={tmp_path / 'x'}", "recipe=grpo_tiny"]
    assert command("import_hf")(arguments) == 2
    assert "hidden_size 32 (recipe: 192)" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_wrong_usage_is_answered_with_the_usage(capsys):
    assert command("export_hf")(["run=x"]) == 2
    assert command("export_hf")(["run=x", "output=y", "format=z"]) == 2
    assert command("import_hf")(["source=x"]) == 2
    assert capsys.readouterr().err.count("usage:") == 3
