"""Resolves a chain into nodes: what each stage runs, in which folder, after which others. Submits and writes nothing.

A stage's folder is named after its signature, which covers the paths of the earlier stages it refers to. A changed
stage therefore changes the stages that build on it and no others, and chains share the folders of equal stages.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from realsr_hpc import runfolder
from realsr_hpc.config.chain import NAME, OF_COMMAND, OF_RUN, PLACEHOLDER, ChainConfig, StageConfig
from realsr_hpc.config.identity import digest
from realsr_hpc.config.load import GROUPS, RecipeError, compose_one, nearest, values_of, written
from realsr_hpc.config.operation import ClusterConfig
from realsr_hpc.config.places import output_root, without_root
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.config.weights import start_files
from realsr_hpc.files import Json, read_json
from realsr_hpc.launch.rundir import run_folder
from realsr_hpc.paths import resolve

READ_PATHS = ("data", "images", "weights_dir", "export", "checkpoint")
"""Arguments of commands whose values are paths that must exist."""
NOT_A_PATH = ("", "start", "none")
"""Values of `against` that are not folders."""
OUTPUT = "output"
"""Subfolder of a command's folder where it writes."""
STAGE_FILE = "stage.json"
"""File in a command's folder: a `CommandLine`."""
TIME_MIN = {"evaluate": 240, "export_hf": 60}
"""Time limit in minutes of a command's Slurm job, unless the chain's `cluster` or its run sets a shorter one."""


@dataclass(frozen=True)
class CommandLine:
    """stage.json: the command and its `key=value` arguments."""

    command: str
    arguments: list[str]


@dataclass(frozen=True)
class ChainCommand:
    """A command that a stage of a chain can run."""

    defaults: Mapping[str, str | None]
    """Its arguments with their defaults."""
    check: Callable[[dict[str, str | None]], None]
    """Raises ValueError for arguments that are invalid for every run."""
    fits: Callable[[dict[str, str | None], Callable[[str], RunConfig | None]], None]
    """Raises ValueError for arguments that do not suit the recipe of the run it works on; the second argument returns
    the recipe of the run at a path."""


Valid = Mapping[str, ChainCommand]


@dataclass(frozen=True)
class Node:
    """One run or command of a chain."""

    stage: str
    """Its name in the chain; `sft.export` for an export that a later stage refers to and no stage declares."""
    folder: Path
    config: RunConfig
    """The run's recipe. For a command, the recipe of the run it works on with the command's own cluster section."""
    after: tuple[Path, ...]
    """Folders of the nodes that must be done first."""
    command: str = ""
    """Name of the command; empty for a run."""
    arguments: tuple[str, ...] = ()
    """The command's arguments as `key=value`."""

    def missing(self) -> list[str]:
        """Messages about paths that a command reads and that neither exist nor are written by an earlier stage."""
        given = _pairs(self.arguments)
        own = [(key, given[key]) for key in READ_PATHS if key in given]
        own += [("against", name) for name in given.get("against", "").split(",") if name not in NOT_A_PATH]
        absent = [(key, path) for key, path in own if not any(Path(path).is_relative_to(item) for item in self.after)]
        return [f"{self.stage}: {key}: {path} is not there" for key, path in absent if not Path(path).exists()]

    @property
    def output(self) -> Path:
        """Where a command writes."""
        return self.folder / OUTPUT


def chain_nodes(chain: ChainConfig, overrides: list[str], valid: Valid, *, multirun: bool = False) -> list[Node]:
    """Nodes of the chain, or of every chain of a sweep, in execution order and without duplicates.

    overrides: `STAGE:KEY=VALUE`, or `KEY=VALUE` for every recipe. valid: the available commands by name. Raises
    RecipeError naming the stage and key at fault.
    """
    choices = [_choices(line, multirun) for line in overrides]
    nodes: dict[Path, Node] = {}
    for combination in itertools.product(*choices):
        for node in _Resolver(chain, list(combination), valid).nodes.values():
            nodes.setdefault(node.folder, node)
    kinds = {node.config.cluster.kind: node.stage for node in nodes.values()}
    if len(kinds) > 1:
        where = ", ".join(f"{stage} {kind}" for kind, stage in kinds.items())
        raise RecipeError(
            f"chain {chain.name}: cluster.kind: {where}: all stages must run in one place; give them one cluster.kind"
        )
    roots = {output_root(node.config) for node in nodes.values()}
    if len(roots) > 1:
        raise RecipeError(
            f"chain {chain.name}: output_root: {', '.join(map(str, roots))}: all stages must share one; set it alike"
        )
    return list(nodes.values())


def signature_of(nodes: list[Node]) -> str:
    """Signature of a chain: 8 hexadecimal digits that cover the folders of all nodes."""
    return digest([node.folder.name for node in nodes])[:8]


def _choices(line: str, multirun: bool) -> list[str]:
    """One override per value of a swept override."""
    stage, rest = split_stage(line)
    if PLACEHOLDER.search(rest):
        return [line]
    values = values_of(rest)
    if len(values) > 1 and not multirun:
        raise RecipeError(f"{line}: several values need -m (a sweep)")
    return [f"{stage}:{value}" if stage else value for value in values]


def split_stage(line: str) -> tuple[str, str]:
    """Split `STAGE:KEY=VALUE` into STAGE and KEY=VALUE; STAGE is empty if none is given."""
    found = re.match(rf"({NAME}):(.+)", line, re.DOTALL)
    return (found[1], found[2]) if found else ("", line)


class _Resolver:
    """Resolves one chain with one combination of overrides into `nodes`, by stage name."""

    def __init__(self, chain: ChainConfig, overrides: list[str], valid: Valid) -> None:
        self.chain, self.valid = chain, valid
        self.nodes: dict[str, Node] = {}
        self.overrides = [split_stage(line) for line in overrides]
        for stage, line in self.overrides:
            if stage and stage not in chain.stages:
                hint = nearest(stage, chain.stages)
                raise self._fault(f"{stage}:{line}", f"no such stage{hint}; available: {', '.join(chain.stages)}")
        for name, stage in chain.stages.items():
            self.nodes[name] = self._run(name, stage) if stage.recipe else self._command(name, stage)

    def _run(self, name: str, stage: StageConfig) -> Node:
        after: dict[Path, None] = {}
        lines = {key: self._line(name, key, value, after) for key, value in stage.set.items()}
        for target, line in self.overrides:
            if target in ("", name):
                key, _, value = line.partition("=")
                lines[key] = self._line(name, key, value, after) if PLACEHOLDER.search(value) else line
        try:
            config = compose_one([f"recipe={stage.recipe}", *lines.values()])
        except RecipeError as error:
            raise self._fault(name, str(error)) from None
        for field, path in start_files(config).items():
            if path is not None and (fault := self._start_fault(field, resolve(path))):
                raise self._fault(name, f"{field}: {path}: {fault}")
        return Node(name, run_folder(config), config, tuple(after))

    def _start_fault(self, field: str, path: Path) -> str:
        """Why the earlier stage that owns `path` will not write the file that `field` needs there; empty if it will."""
        node = next((node for node in self.nodes.values() if path.is_relative_to(node.folder)), None)
        if node is None:
            return ""
        if node.command:
            form = "peft" if "form=peft" in node.arguments else "merged"
            wanted = {"model.weights": "merged", "model.lora.weights": "peft"}.get(field, form)
            fits = node.command == "export_hf" and form == wanted
            return "" if fits else f"{node.stage} writes no {wanted} export there"
        left = runfolder.tokenizer_files(node.folder) if node.config.task == "tokenizer" else {}
        if path == left.get(field):
            return ""
        there = f"it leaves {left[field].name}" if field in left else f"write {{{node.stage}.export}}"
        return f"{node.stage} leaves no such file; {there}"

    def _line(self, name: str, key: str, value: Json, after: dict[Path, None]) -> str:
        value = self._filled(name, key, value, after)
        return f"{key}={value}" if key in GROUPS and isinstance(value, str) else f"{key}={written(value)}"

    def _command(self, name: str, stage: StageConfig) -> Node:
        command = stage.command or ""
        defaults = self.valid[command].defaults
        given: dict[str, str] = {}
        after: dict[Path, None] = {}
        for key, value in (stage.set | _pairs(line for target, line in self.overrides if target == name)).items():
            if key == "output" or key not in defaults:
                valid = [item for item in defaults if item != "output"]
                problem = "the chain chooses it" if key == "output" else f"unknown key{nearest(key, valid)}"
                raise self._fault(name, f"{key}: {problem}; valid for {command}: {', '.join(valid)}")
            if value is not None:  # null: the default
                given[key] = self._argument(name, key, value, after)
        if not after:
            raise self._fault(
                name, "it uses no earlier stage (such as run: '{STAGE.run}'), so it does not belong in a chain"
            )
        try:
            self.valid[command].check({**defaults, **given, "output": OUTPUT})
            self.valid[command].fits({**defaults, **given}, self._recipe_of)
        except ValueError as error:
            raise self._fault(name, str(error)) from None
        return self._command_node(name, command, given, tuple(after), stage.cluster)

    def _recipe_of(self, path: str) -> RunConfig | None:
        """The recipe of the stage whose folder contains `path`; None if no stage writes there."""
        return next((node.config for node in self.nodes.values() if Path(path).is_relative_to(node.folder)), None)

    def _argument(self, name: str, key: str, value: Json, after: dict[Path, None]) -> str:
        """A value as on the command line: lists joined by commas, relative paths resolved from the project's root."""
        items = value if isinstance(value, list) else [value]
        words = []
        for item in items:
            if isinstance(item, list | dict) or item in (None, ""):
                raise self._fault(name, f"{key}: {value!r}: give text, a number, true or false, or a list of such")
            filled = self._filled(name, key, item, after)
            words.append(filled if isinstance(filled, str) else json.dumps(filled))
        if key == "against":
            words = [word for text in words for word in text.split(",")]
            return ",".join(word if word in NOT_A_PATH else str(resolve(word)) for word in words)
        return str(resolve(",".join(words))) if key in READ_PATHS else ",".join(words)

    def _command_node(
        self, name: str, command: str, given: dict[str, str], after: tuple[Path, ...], cluster: Mapping[str, Json]
    ) -> Node:
        """The node of a command. Its job has one task with the run's resources per task, unless `cluster` differs."""
        upstream = next(node for node in self.nodes.values() if node.folder == after[0]).config
        base = upstream.cluster.model_dump()
        base |= {"nodes": 1, "tasks_per_node": 1, "gpus_per_node": min(1, upstream.cluster.gpus_per_node)}
        base |= {"time_min": min(TIME_MIN[command], upstream.cluster.time_min)}
        try:
            own = ClusterConfig.model_validate({**base, **cluster})
        except ValidationError as error:
            fault = error.errors()[0]
            raise self._fault(name, f"cluster.{fault['loc'][0]}: {fault['input']!r}: {fault['msg']}") from None
        arguments = tuple(f"{key}={value}" for key, value in given.items())
        folder = _command_folder(output_root(upstream), command, arguments)
        config = upstream.model_copy(update={"cluster": own, "name": f"{self.chain.name}-{name}"})
        return Node(name, folder, config, after, command, arguments)

    def _filled(self, name: str, key: str, value: Json, after: dict[Path, None]) -> Json:
        """Replace every `{STAGE.WHAT}` in the value by its path; adds the folders of those nodes to `after`."""
        if isinstance(value, list):
            return [self._filled(name, key, item, after) for item in value]
        if isinstance(value, dict):
            return {item: self._filled(name, key, inner, after) for item, inner in value.items()}
        if not isinstance(value, str):
            return value
        if cut := re.search(rf"\{{{NAME}\.[a-z_]*", PLACEHOLDER.sub("", value)):
            raise self._fault(name, f"{key}: {cut[0]}: not a placeholder; write {{STAGE.WHAT}} with both braces")
        return PLACEHOLDER.sub(lambda found: str(self._place(name, key, found, after)), value)

    def _place(self, name: str, key: str, found: re.Match[str], after: dict[Path, None]) -> Path:
        stage, what = found[1], found[2]
        node = self.nodes.get(stage)
        if node is None:
            hint = nearest(stage, self.nodes) or f"; before it are: {', '.join(self.nodes) or 'none'}"
            raise self._fault(name, f"{key}: {found[0]}: no stage {stage!r} before it{hint}")
        known = OF_COMMAND if node.command else OF_RUN
        if what not in known:
            raise self._fault(name, f"{key}: {found[0]}: {stage} leaves no {what!r}; it leaves: {', '.join(known)}")
        if what in ("best", "best_export") and not node.config.checkpoint.keep_best:
            raise self._fault(
                name, f"{key}: {found[0]}: {stage} keeps no best checkpoint; set its checkpoint.keep_best to 1"
            )
        if what in ("export", "best_export"):
            node = self._export(stage, what, node)
        after[node.folder] = None
        return {"best": runfolder.best_checkpoint(node.folder), "run": node.folder}.get(what, node.output)

    def _export(self, stage: str, what: str, node: Node) -> Node:
        """The node of an export that a stage refers to as `{STAGE.export}`; created on first use."""
        name = f"{stage}.{what}"
        if name not in self.nodes:
            given = {"run": str(node.folder)}
            if what == "best_export":
                given["checkpoint"] = str(runfolder.best_checkpoint(node.folder))
            try:
                self.valid["export_hf"].fits({**self.valid["export_hf"].defaults, **given}, self._recipe_of)
            except ValueError as error:
                raise self._fault(name, str(error)) from None
            self.nodes[name] = self._command_node(name, "export_hf", given, (node.folder,), {})
        return self.nodes[name]

    def _fault(self, where: str, fault: str) -> RecipeError:
        return RecipeError("\n".join(f"chain {self.chain.name}: {where}: {line}" for line in fault.splitlines()))


def _command_folder(root: Path, command: str, arguments: Sequence[str]) -> Path:
    """The folder of a command, named after its arguments with paths relative to the output root."""
    wanted = without_root([command, sorted(arguments)], root)
    folder = root / "stages" / f"{command}-{digest(wanted)[:12]}"
    return folder if folder.exists() else _of_earlier_version(folder, arguments) or folder


def _of_earlier_version(folder: Path, arguments: Sequence[str]) -> Path | None:
    """The same command's folder from an earlier version, whose name covers absolute paths.

    It is found by its stage.json, because the output root may have been moved since.
    """
    root, wanted = folder.parent.parent, sorted(arguments)
    for path in sorted(folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*/{STAGE_FILE}")):
        line = read_json(path, CommandLine)
        given = sorted(line.arguments) if line else []
        if given and without_root(given, _root_then(given, wanted, root)) == without_root(wanted, root):
            return path.parent
    return None


def _root_then(given: Sequence[str], wanted: Sequence[str], root: Path) -> Path:
    """The output root at the time the arguments were written: what they have in place of the present `root`."""
    for before, now in zip(given, wanted, strict=False):
        key, _, below = now.partition(f"={root}/")
        if below and before.startswith(f"{key}=") and before.endswith(f"/{below}"):
            return Path(before[len(key) + 1 : -len(below) - 1])
    return root


def _pairs(lines: Iterable[str]) -> dict[str, str]:
    """`KEY=VALUE` lines by key."""
    return {key: value for key, _, value in (line.partition("=") for line in lines)}
