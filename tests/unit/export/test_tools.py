"""The two commands, as a user calls them."""

import importlib


def command(name: str):
    return importlib.import_module(f"realsr_hpc.commands.{name}").main


def test_export_and_import_commands(run, tmp_path, capsys):
    exported, imported = tmp_path / "exported", tmp_path / "imported"
    assert command("export_hf")([f"run={run.folder}", f"output={exported}", "licence=mit"]) == 0
    assert "step-000007" in capsys.readouterr().out
    assert "license: mit" in (exported / "README.md").read_text()
    assert command("import_weights")([f"source={exported}", f"output={imported}"]) == 0
    assert f"model.weights={imported}" in capsys.readouterr().out
    assert (imported / "recipe.yaml").is_file()


def test_a_recipe_of_another_shape_is_refused(run, tmp_path, capsys):
    arguments = [f"source={run.export}", f"output={tmp_path / 'x'}", "recipe=grpo_tiny"]
    assert command("import_weights")(arguments) == 2
    assert "hidden_size 32 (recipe: 192)" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_only_a_checkpoint_of_the_run_is_exported(run, tmp_path, capsys):
    for named in (tmp_path, tmp_path / "none", run.folder / "checkpoints"):
        assert command("export_hf")([f"run={run.folder}", f"output={tmp_path / 'x'}", f"checkpoint={named}"]) == 2
        assert f"checkpoint={named}: not a checkpoint of {run.folder}" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_wrong_usage_names_what_is_wrong(capsys):
    wrong = {
        "export_hf": (
            ["run=x"],
            ["run=x", "output=y", "outptu=z"],
            ["run=x", "output=y", "dtype=fp16"],
            ["run=x", "output=y", "licence=mit\nbase_model: x"],
        ),
        "import_weights": (["source=x"], ["source=x", "output=y", "recipe=grpo_tinny"]),
    }
    assert all(command(name)(arguments) == 2 for name, given in wrong.items() for arguments in given)
    said = capsys.readouterr().err.splitlines()
    parts = (
        "output=DIR are needed",
        "did you mean 'output'",
        "not one of bf16, fp32",
        "give its short name",
        "are needed",
        "'grpo_tiny'",
    )
    assert len(said) == len(parts)
    assert all(part in line for part, line in zip(parts, said, strict=True)), said
