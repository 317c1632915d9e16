"""Chains: what stages are called, what makes them new, and a real one on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from realsr_hpc import runfolder
from realsr_hpc.commands.launch import chained, main
from realsr_hpc.config.chain import read_chain
from realsr_hpc.config.identity import digest, signature
from realsr_hpc.config.load import RecipeError, compose_one, to_yaml, written
from realsr_hpc.launch.chain import Node, chain_nodes
from realsr_hpc.launch.chain_stage import prepare_stage, run_stage
from realsr_hpc.launch.rundir import LAUNCH_VARIABLE, write_status
from realsr_hpc.locks import hold
from realsr_hpc.paths import project_root
from realsr_hpc.tracking import Place, recipe_of, write_place
from tests.slurm.conftest import SMALL

SMALL_RUN = [line for line in SMALL if not line.startswith(("recipe=", "cluster.kind", "model.weights"))]


def nodes(*overrides: str, chain: str = "tiny", multirun: bool = False) -> dict[str, Node]:
    return {node.stage: node for node in chain_nodes(read_chain(chain), list(overrides), chained(), multirun=multirun)}


@pytest.fixture
def chains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of chains beside the shipped recipes."""
    folder = tmp_path / "recipes"
    (folder / "chains").mkdir(parents=True)
    for path in (project_root() / "recipes").iterdir():
        if path.name != "chains":
            (folder / path.name).symlink_to(path)
    monkeypatch.setenv("REALSR_HPC_RECIPES", str(folder))
    return folder / "chains"


def test_a_stage_is_made_new_by_its_own_change_and_by_those_of_what_it_builds_on():
    before = nodes()
    assert list(before) == ["sft", "sft.export", "grpo", "evaluate", "export"]
    assert before["grpo"].config.model.weights == str(before["sft.export"].output)
    assert before["grpo"].after == (before["sft.export"].folder,)

    def changed(*overrides: str) -> set[str]:
        return {stage for stage, node in nodes(*overrides).items() if node.folder != before[stage].folder}

    assert changed("evaluate:num_images=3") == {"evaluate"}
    assert changed("grpo:grpo.kl_beta=0.5") == {"grpo", "evaluate", "export"}
    assert changed("sft:optim.lr=1e-3") == set(before)
    assert changed("tracking.description=don't", "grpo:cluster.time_min=9") == set()


def test_a_moved_output_root_holds_the_same_chain_and_its_runs_name_what_lies_there(tmp_path):
    here = tmp_path / "runs"
    before = nodes(f"output_root={here}")
    for node in before.values():
        node.folder.mkdir(parents=True)
        if not node.command:
            (node.folder / "recipe.yaml").write_text(to_yaml(node.config))
            write_place(node.folder, Place(str(node.folder), str(here)))
    before["sft.export"].output.mkdir()
    here.rename(there := tmp_path / "B's runs")
    after = nodes(f"output_root={written(str(there))}")
    assert {stage: node.folder for stage, node in after.items()} == {
        stage: there / node.folder.relative_to(here) for stage, node in before.items()
    }
    moved = recipe_of(after["grpo"].folder)
    assert moved.model.weights == str(after["sft.export"].output) and moved.output_root == str(there)
    assert moved.image_tokenizer == before["grpo"].config.image_tokenizer  # not below the root
    assert signature(moved) == signature(before["grpo"].config)


def test_the_root_that_holds_a_path_is_told_from_another(tmp_path):
    def named(root: str, weights: str) -> str:
        return signature(
            compose_one(["recipe=grpo_tiny", f"output_root={tmp_path / root}", f"model.weights={weights}"])
        )

    assert named("a", f"{tmp_path}/a/x") == named("b", f"{tmp_path}/b/x")
    assert len({named("a", f"{tmp_path}/{place}") for place in ("a/x", "b/x", "a/y", "ax", "a/a/x")}) == 5


@pytest.mark.parametrize("moved", [False, True])
def test_a_chain_of_an_earlier_version_keeps_its_folders_also_where_its_root_was_moved(moved, tmp_path):
    """Then a command's name counted paths in full, and a run's signature too."""
    here = there = tmp_path / "runs"
    earlier: dict[str, Path] = {}
    for stage in ("sft", "sft.export", "grpo", "evaluate", "export"):
        node = nodes(f"output_root={here}")[stage]  # what came before has the names of then
        name = f"{node.command}-{digest([node.command, sorted(node.arguments)])[:12]}"
        earlier[stage] = node.folder.with_name(name if node.command else f"{node.config.name}-0000000000{len(earlier)}")
        earlier[stage].mkdir(parents=True)
        if node.command:
            prepare_stage(replace(node, folder=earlier[stage]))
        else:
            text = to_yaml(node.config).partition("\n")[2]
            (earlier[stage] / "recipe.yaml").write_text(f"# fields that the signature covers: 00000000\n{text}")
            write_place(earlier[stage], Place(str(earlier[stage]), str(here)))
    if moved:
        here.rename(there := tmp_path / "B's runs")
    after = nodes(f"output_root={written(str(there))}")
    assert {stage: node.folder for stage, node in after.items()} == {
        stage: there / folder.relative_to(here) for stage, folder in earlier.items()
    }
    changed = nodes(f"output_root={written(str(there))}", "evaluate:num_images=3")
    assert changed["evaluate"].folder != after["evaluate"].folder and changed["grpo"].folder == after["grpo"].folder


def test_a_sweep_of_chains_shares_the_stages_that_do_not_differ():
    found = chain_nodes(read_chain("tiny"), ["grpo:grpo.kl_beta=0,0.5"], chained(), multirun=True)
    assert [node.stage for node in found] == ["sft", "sft.export", *2 * ["grpo", "evaluate", "export"]]
    seen = set()
    for node in found:
        assert set(node.after) <= seen
        seen.add(node.folder)
    with pytest.raises(RecipeError, match="several values need -m"):
        nodes("grpo:grpo.kl_beta=0,0.5")


def test_the_papers_chain_takes_the_best_and_runs_commands_on_one_gpu():
    found = nodes("cluster.array_parallelism=3", chain="paper")
    assert f"checkpoint={found['grpo'].folder}/checkpoints/best" in found["realsr"].arguments
    assert found["heldout"].config.cluster.gpus_per_node == 1 and found["grpo"].config.cluster.gpus_per_node == 4
    assert all("is not there" in found[stage].missing()[0] for stage in ("realsr", "drealsr"))
    assert not found["heldout"].missing() and not found["export"].missing()


def evaluated(more: str) -> str:
    """Stages of a run and its evaluation."""
    return f"{{a: {{recipe: sft_tiny}}, b: {{command: evaluate, set: {{run: '{{a.run}}', {more}}}}}}}"


def exported(more: str) -> str:
    """Stages of a run and its export."""
    return f"{{a: {{recipe: sft_tiny}}, b: {{command: export_hf, set: {{run: '{{a.run}}', {more}}}}}}}"


def started(recipe: str, more: str) -> str:
    """Stages of two runs, where one starts from the other."""
    return f"{{a: {{recipe: {recipe}}}, b: {{recipe: sft_tiny, set: {{name: x, {more}}}}}}}"


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("{a: {recipe: sft_tiny, command: evaluate}}", "stages.a: give either recipe or command"),
        ("{a: {recpie: sft_tiny}}", "stages.a.recpie: unknown key; did you mean 'recipe'?"),
        ("{a: {command: evalaute}}", "stages.a.command: "),
        ("{a: {recipe: sft_tniy}}", "a: recipe: there is no 'sft_tniy'; did you mean 'sft_tiny'"),
        ("{a: {recipe: sft_tiny, set: {sft.num_stpes: 3}}}", "a: recipe sft_tiny: sft.num_stpes: unknown key"),
        ("{a: {recipe: sft_tiny}, b: {command: evaluate, set: {rum: x}}}", "b: rum: unknown key; did you mean 'run'?"),
        ("{a: {recipe: sft_tiny}, b: {command: evaluate, set: {run: x}}}", "b: it uses no earlier stage"),
        ("{a: {recipe: sft_tiny}, b: {command: export_hf, set: {run: '{A.run}'}}}", "no stage 'A' before it"),
        (
            "{a: {recipe: sft_tiny}, b: {command: export_hf, set: {run: '{a.rnu}'}}}",
            "a leaves no 'rnu'; it leaves: run",
        ),
        ("{a: {recipe: sft_tiny}, b: {command: evaluate, set: {checkpoint: '{a.best}'}}}", "checkpoint.keep_best to 1"),
        ("{}", "stages: "),
        ("{a: {recipe: sft_tiny}, b: {command: export_hf, set: {run: '{a.run'}}}", "run: {a.run: not a placeholder"),
        (evaluated("num_images: abc"), "num_images='abc' is not a whole number; give one of at least 1"),
        (evaluated("draws: 2.5"), "draws='2.5' is not a whole number"),
        (evaluated("temperature: .nan"), "temperature=NaN: "),
        (evaluated("colour: [wavelet, adain]"), "colour=wavelet,adain: Input should be 'none', 'wavelet', 'adain' or "),
        (evaluated("choose: {ranker: 1}"), "choose: {'ranker': 1}: give text, a number"),
        (evaluated("against: ''"), "against: '': give text"),
        (evaluated("set: realsr"), "set=realsr needs data=DIR"),
        (evaluated("set: raelsr, data: x"), "set='raelsr' is not one of realsr, drealsr"),
        (evaluated("export: '{a.export}'"), "give one of run=RUN_DIR"),
        (exported("dtype: fp16"), "dtype='fp16' is not one of"),
        (exported("shard_mb: true"), "shard_mb='true' is no"),
        (evaluated("split: hedlout"), "split='hedlout': no photograph of the manifest in"),
        (evaluated("split: train, data: x, set: paired"), "split=train chooses among the recipe's own images"),
        (evaluated("overlap_px: 17"), "overlap_px=17 must be in 0..16 (half a tile)"),
        (evaluated("candidates: 2, choose: 'pyiqa:musiq', weights_dir: none"), "stage it from https://"),
        (exported("form: peft"), "form=peft: this run trained no adapters (model.lora is null); leave form out"),
        (exported("checkpoint: elsewhere/checkpoints/step-1"), "name one of /"),
        ("{a: {recipe: tokenizer_tiny}, b: {command: evaluate, set: {run: '{a.run}'}}}", "b: tokenizer_tiny trained"),
        (started("tokenizer_tiny", "model.weights: '{a.export}'"), "a.export: run=/"),
        (started("tokenizer_tiny", "text_tokenizer.path: '{a.run}/x'"), "it leaves text_tokenizer.json"),
        (started("sft_tiny", "model.weights: '{a.run}'"), "a leaves no such file; write {a.export}"),
        (started("sft_tiny", "model.lora: {weights: '{a.export}'}"), "a.export writes no peft export there"),
        (evaluated("data: nowhere, set: paired"), "data: "),
        (evaluated("against: [start, nowhere]"), "against: "),
    ],
)
def test_faults_name_stage_and_field_before_anything_is_written(stages, said, chains, tmp_path, capsys):
    (chains / "odd.yaml").write_text(f"name: odd\nstages: {stages}\n")
    root = tmp_path / "runs"
    assert main(["chain=odd", f"output_root={root}"]) == 2
    shown = capsys.readouterr().out
    assert shown.startswith((f"chain odd: {said.split(':')[0]}", "chain odd: b: ", "b: ")), shown
    assert said in shown and not root.exists()


def test_a_plan_names_what_is_missing_and_tells_limits_from_estimates(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = [f"output_root={tmp_path}", "evaluate:data=no such folder", "evaluate:set=paired", "evaluate:num_images=16"]
    words.append("plan=true")
    assert main(["chain=tiny", *words, f"data.manifest={tmp_path / 'none.parquet'}"]) == 0
    shown = capsys.readouterr().out
    assert f"evaluate: data: {project_root() / 'no such folder'} is not there" in shown
    assert f"data.manifest: {tmp_path / 'none.parquet'} is not there" in shown
    assert "(limit)" not in shown  # this machine sets commands none
    assert main(["recipe=sft_tiny", f"data.manifest={tmp_path / 'none.parquet'}", "plan=true"]) == 0
    assert f"data.manifest: {tmp_path / 'none.parquet'} is not there" in capsys.readouterr().out
    assert nodes("cluster.kind=slurm", "cluster.time_min=600")["sft.export"].config.cluster.time_min == 60


def test_a_command_that_slurm_gave_up_too_early_is_not_run_again_once_it_has_ended(tmp_path, monkeypatch):
    """The node's daemon went away and Slurm requeued the job; the command itself went on to its end."""
    (tmp_path / "stage.json").write_text('{"command": "export_hf", "arguments": ["run=/none"]}')
    monkeypatch.setenv(LAUNCH_VARIABLE, "a")
    write_status(tmp_path, "done", 0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run_stage(tmp_path) == 0 and not (tmp_path / "log.txt").exists()
    write_status(tmp_path, "running")
    first = """import time; from pathlib import Path; from realsr_hpc.locks import hold
from realsr_hpc.launch.rundir import write_status
with hold(Path("run.lock")): print(flush=True); time.sleep(2); write_status(Path(), "done", 0)
"""
    assert runfolder.lock(tmp_path) == tmp_path / "run.lock"
    with subprocess.Popen([sys.executable, "-c", first], stdout=subprocess.PIPE, cwd=tmp_path) as attempt:
        assert attempt.stdout is not None and attempt.stdout.readline()
        assert run_stage(tmp_path) == 0 and not (tmp_path / "log.txt").exists()  # waited for it
    (tmp_path / "stage.json").write_text("{")
    with pytest.raises(ValueError, match="stage.json is missing or damaged; launch the chain again"):
        run_stage(tmp_path)


SMALL_CHAIN = """
name: small
stages:
  first: {recipe: sft_tiny, set: {model.weights: null, sft.num_steps: 1}}
  second: {recipe: sft_tiny, set: {name: second-run, model.weights: "{first.export}", sft.num_steps: 1}}
"""


def stages_of(root: Path) -> dict[str, Path]:
    [folder] = (root / "chains").iterdir()
    return {path.name: path.resolve() for path in sorted(folder.iterdir()) if path.is_symlink()}


@pytest.mark.timeout(900)
def test_a_chain_on_this_machine_runs_what_is_missing_or_failed(chains, tmp_path, image_tokenizer, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    (chains / "small.yaml").write_text(SMALL_CHAIN)
    root = tmp_path / "it's a root"
    lines = [*SMALL_RUN, f"output_root={written(str(root))}", f"image_tokenizer.weights={image_tokenizer}"]
    words = ["chain=small", *lines]
    assert main([*words, "plan=true"]) == 0 and not root.exists()
    export = nodes(*lines, chain="small")["first.export"].folder
    export.mkdir(parents=True)
    with hold(runfolder.lock(export), "somebody else"):
        assert main(words) == 2  # it comes to the export and no further
    assert "somebody else" in capsys.readouterr().out
    links = stages_of(root)
    assert list(links) == ["01-first", "02-first.export", "03-second"] and links["02-first.export"] == export
    first = (links["01-first"] / "status.json").read_text()
    assert json.loads(first)["state"] == "done" and not links["03-second"].exists()

    assert main(words) == 0
    states = {name: (link / "status.json").read_text() for name, link in links.items()}
    assert states["01-first"] == first and {json.loads(text)["state"] for text in states.values()} == {"done"}
    assert main(words) == 0
    assert {name: (link / "status.json").read_text() for name, link in links.items()} == states

    (export / "output" / "config.json").unlink()  # what a command wrote is gone; a run failed
    failed = json.loads(states["03-second"]) | {"state": "failed", "code": 1}
    (links["03-second"] / "status.json").write_text(json.dumps(failed))
    capsys.readouterr()
    assert main([*words, "plan=true"]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[1]: line for line in shown if len(line) > 5 and line[1] in ("first", "first.export", "second")}
    assert [next(word for word in ("done", "lost", "failed") if word in row) for row in rows.values()] == [
        "done", "lost", "failed",
    ]  # fmt: skip
    assert main(words) == 0
    assert (export / "output" / "config.json").exists()
    again = {name for name, link in links.items() if (link / "status.json").read_text() != states[name]}
    assert again == {"02-first.export", "03-second"}
