"""What the documentation tells people to type exists, takes those words and is run by a test; the reference is current.

A block of commands that needs a cluster, several GPUs or a browser is marked `<!-- cluster -->`.
"""

from __future__ import annotations

import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from realsr_hpc import runfolder
from realsr_hpc.commands import COMMANDS
from realsr_hpc.commands.launch import chained
from realsr_hpc.config.chain import read_chain
from realsr_hpc.config.identity import marks, may_change_on_resume
from realsr_hpc.config.load import GROUPS
from realsr_hpc.launch.chain import chain_nodes
from realsr_hpc.launch.command import choose, read_command_line
from realsr_hpc.paths import project_root

ROOT = project_root()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = {"make", "for", "do", "done", "mlflow", "torchrun", "pip", "sbatch", "source", "cd", "export", "sudo", "git"}
BY_HAND = {"bench": "measures for minutes", "demo": "make demo; its commands have tests of their own"}
"""Documented tools that no test runs, and why."""
CHECKOUT_ONLY = ("bench", "recipe_reference")
"""Tools that work on the checkout itself and are no commands of the installed package."""
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))


def commands(page: Path) -> list[tuple[str, bool]]:
    """Lines of a page's `sh` blocks and its indented lines that call us; whether they need a cluster."""
    text = page.read_text()
    blocks = re.findall(r"(<!-- cluster -->\n)?```(?:sh|bash)\n(.*?)```", text, re.DOTALL)
    lines = [(line, bool(mark)) for mark, block in blocks for line in block.splitlines()]
    indented = re.findall(r"^    ((?:python tools/|realsr-hpc )\S+.*)$", text, re.MULTILINE)
    lines += [(line, "7b" in line) for line in indented]
    return [(line.split("   #")[0].split("  # ")[0].strip(), needs) for line, needs in lines if line.strip()]


def tool(name: str):
    """The module of a command, or of a tool of ours for this checkout alone."""
    return importlib.import_module(f"{'tools' if name in CHECKOUT_ONLY else 'realsr_hpc.commands'}.{name}")


DOCUMENTED = sorted({(page.name, *command) for page in PAGES for command in commands(page)})


@pytest.mark.parametrize(("page", "command", "needs_cluster"), DOCUMENTED)
def test_a_documented_command_is_there_takes_its_words_and_is_run_by_a_test(page, command, needs_cluster):
    words = shlex.split(command)
    called = re.search(r"tools/(\w+)\.py|realsr-hpc ([a-z-]+)", command)
    if called is None:
        assert words[0] in SHELL, f"{page}: {command!r} is neither a command of this project nor a known one"
        return
    name = called[1] or called[2].replace("-", "_")
    assert (ROOT / "tools" / f"{name}.py").is_file(), f"{page}: {command!r}: no such tool"
    assert name in CHECKOUT_ONLY or name.replace("_", "-") in COMMANDS, f"{page}: {command!r}: no such command"
    rest = shlex.split(command[called.end() :].split(";")[0])
    given = [
        word for word in rest if "=" in word and not word.startswith("recipe=") and "." not in word.partition("=")[0]
    ]
    if name == "launch":
        launch(rest)
    else:
        module = tool(name)
        keys = getattr(module, "DEFAULTS", getattr(module, "OPTIONS", None))
        unknown = [word for word in given if keys is not None and word.partition("=")[0] not in keys]
        assert not unknown, f"{page}: {command!r}: {unknown} are no keys of tools/{name}.py: {list(keys or ())}"
    if not needs_cluster and name not in BY_HAND:
        assert re.search(rf"""["'/]{name}(\.py)?["']|commands import .*\b{name}\b""", TESTS), f"no test runs {name}"


def test_small_commands_run(tmp_path, capsys):
    assert tool("jobs").main([f"root={tmp_path}"]) == 0 and tool("sync_tracking").main([f"root={tmp_path}"]) == 0
    assert "no runs in" in capsys.readouterr().out
    made = ["shapes=1", "signs=1", "heldout_signs=0", "photographs=1"]
    assert tool("make_scenes").main([*made, f"output={tmp_path / 'scenes'}"]) == 0
    names = {path.name for path in (tmp_path / "scenes").iterdir() if not path.name.startswith(".")}
    assert names == {"shapes-00000.jpg", "train-sign-00000.jpg", "manifest.parquet", "manifest.parquet.sha256"}


def launch(words: list[str]) -> None:
    """Options are known and the recipe, or each of the chain's, composes."""
    given = [word for word in words if "..." not in word]
    if chain := next((word.partition("=")[2] for word in given if word.startswith("chain=")), ""):
        overrides = [word for word in given if "=" in word and not word.startswith(("chain=", "plan="))]
        assert chain_nodes(read_chain(chain), overrides, chained(), multirun="-m" in given)
    else:
        assert choose(*read_command_line(given))


def test_the_recipe_reference_is_what_the_schema_says():
    reference = tool("recipe_reference").reference()
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert page == reference, "docs/recipes.md is out of date: python tools/recipe_reference.py"
    assert all(f"`{group}=`" in page for group in GROUPS)


def test_operations_lists_every_section_and_field_that_a_resume_may_change():
    lists = re.search(r"A resume may change .*?\n\n(.*?)\n\n", page("operations"), re.DOTALL)
    listed = set(re.findall(r"`([\w.]+)`", lists[1]))
    changeable = {path for path in marks() if "." in path and may_change_on_resume(path)}
    covered = {path for path in changeable if path in listed or path.partition(".")[0] in listed}
    assert covered == changeable and all(may_change_on_resume(key) for key in listed)


def test_operations_lists_every_file_of_a_runs_folder():
    named = re.findall(r"[\w-]+\.(?:json|jsonl|yaml|txt|lock|sh)\b", runfolder.__doc__)
    table = page("operations").partition("## States")[0]
    folders = re.findall(r"(\w+)/", runfolder.__doc__.partition("recipe.yaml")[2])
    wanted = {*named, "code", "results.lock", "mlflow.lock", *(f"{name}/" for name in folders)}
    assert [name for name in sorted(wanted) if name not in table] == []


def test_contributing_names_the_layers_that_imports_are_checked_against():
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    wanted = [set(re.findall(r"\w+", layer)) for layer in contract["layers"]]
    chain = re.search(r"^    (commands > .*?)\n\n", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE)
    assert [set(re.findall(r"\w+", layer)) for layer in chain[1].split(">")] == wanted
    diagram = page("architecture").partition("## One GRPO step")[0]
    assert {room for layer in wanted for room in layer if not re.search(rf"\b{room}\b", diagram)} == {"__main__"}


def page(name: str) -> str:
    """Text of a page of docs/."""
    return (ROOT / "docs" / f"{name}.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target} is not there"
