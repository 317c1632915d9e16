"""Packs a Hugging Face export into a `.nemo` archive and unpacks it, through nemo-toolkit's SaveRestoreConnector.

It needs the extra `nemo`. The archive has the recipe as NeMo's model_config.yaml, all small files of the export as NeMo
artifacts, and the weights as model_weights.ckpt. nemo-toolkit 3.0.0 no longer has Megatron models, so restoring an
archive with NeMo gives a container of weights and files, not a network: unpack it to use the folder.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any  # nemo-toolkit's classes and OmegaConf's trees

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from realsr_hpc.config.identity import flatten
from realsr_hpc.config.load import from_yaml
from realsr_hpc.export.weight_files import INDEX, SHARD_BYTES, Aside, refuse_taken, weight_files, write_weights
from realsr_hpc.files import check_sums, first_line, replacing
from realsr_hpc.runfolder import RECIPE

CONFIG = "model_config.yaml"
_CONFIG_KEYS = frozenset({"recipe", "shard_bytes", "files", "target", "nemo_version"})
_REMEDY = "name one that realsr-hpc nemo-archive packed"
_PLAIN = re.compile(r"[\w][\w.+-]*")
"""Name of a file at the top level of the archive: no path, no `..`, no OmegaConf interpolation."""


def pack(export: Path, archive: Path) -> None:
    """Write the `.nemo` file `archive` from an export folder, under a temporary name that is renamed when complete.

    Raises:
        ValueError: if the folder is not a complete export, the archive exists, or nemo-toolkit is not installed.
    """
    _check_name(archive)
    if archive.exists():
        raise ValueError(f"output={archive} exists; name a new archive, or remove that one first")
    check_sums(export)
    places = weight_files(export)
    if not (export / RECIPE).is_file():
        raise ValueError(f"{export} has no {RECIPE} (not an export of ours); name a folder that export_hf wrote")
    vendor = _Vendor()
    weights = {path.name for path in places.values()} | {INDEX}
    small = sorted(path for path in export.iterdir() if path.is_file() and path.name not in weights)
    config = {
        # Flat keys `section.field`, because NeMo gives a nested key `params`, as in our precision section, a meaning.
        "recipe": flatten(from_yaml(export / RECIPE)),
        "shard_bytes": _largest_shard(places) if (export / INDEX).is_file() else SHARD_BYTES,
        "files": {f"file{number}": {"name": path.name, "path": str(path)} for number, path in enumerate(small)},
    }
    carrier = vendor.carrier(vendor.as_config(config))
    carrier.load_state_dict(dict(_tensors(places)))
    archive.parent.mkdir(parents=True, exist_ok=True)
    with replacing(archive.absolute()) as aside:  # NeMo expects a folder in front of its name
        vendor.connector.save_to(carrier, str(aside))


def unpack(archive: Path, folder: Path) -> None:
    """Write the export folder that `archive` was packed from, byte for byte.

    Raises:
        ValueError: if the archive is missing, damaged or was not packed by this project, the folder exists, or
            nemo-toolkit is not installed.
    """
    _check_name(archive)
    if not archive.is_file():
        raise ValueError(f"{archive} is not there; {_REMEDY}")
    refuse_taken(folder)
    refuse_foreign_files(archive)
    vendor = _Vendor()
    carrier = vendor.restore(archive)
    with Aside(folder) as aside:
        for name, content in carrier.files.items():
            (aside / name).write_bytes(content)
        tensors = carrier.state_dict()
        sizes = {name: value.nbytes for name, value in tensors.items()}
        write_weights(aside, tensors.items(), sizes, carrier.cfg.shard_bytes)
        check_sums(aside)


def refuse_foreign_files(archive: Path) -> None:
    """Check an archive's members and configuration before NeMo reads them: NeMo would copy any file that they name.

    Raises:
        ValueError: if the archive is damaged, has a link or a path outside it, or names a file that is not a member.
    """
    try:
        with tarfile.open(archive, "r:*") as tar:
            members = {info.name.removeprefix("./"): info for info in tar if not info.isdir()}
            odd = [name for name, info in members.items() if not info.isreg() or not _PLAIN.fullmatch(name)]
            if odd:
                raise ValueError(f"its member {odd[0]!r} is a link, or lies outside")
            stream = tar.extractfile(members[CONFIG])
            config = yaml.safe_load(stream.read()) if stream else None
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG} holds no fields")
        unknown = sorted(set(config) - _CONFIG_KEYS)
        if unknown:
            raise ValueError(f"{CONFIG} has {unknown[0]!r}, which no archive of ours has")
        files = config.get("files")
        if not isinstance(files, dict) or not all(isinstance(item, dict) for item in files.values()):
            raise ValueError(f"{CONFIG} lists no files")
        for item in files.values():
            named = item.get("path")
            own = str(named).removeprefix("nemo:")
            if named != f"nemo:{own}" or own not in members or not _PLAIN.fullmatch(str(item.get("name"))):
                raise ValueError(f"{CONFIG} names {named!r}, which is not a file of the archive")
    except (tarfile.TarError, OSError, EOFError, zlib.error, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{archive} cannot be read ({first_line(error)}); copy it again") from None
    except KeyError:
        raise ValueError(f"{archive} is not an archive of this project (it has no {CONFIG}); {_REMEDY}") from None
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{archive} is not an archive of this project ({first_line(error)}); {_REMEDY}") from None


def _check_name(archive: Path) -> None:
    if archive.suffix != ".nemo":
        raise ValueError(f"{archive} does not end in .nemo; NeMo finds its archives by that ending")


def _largest_shard(places: dict[str, Path]) -> int:
    """Bytes of tensors in the largest shard; sharding with this limit reproduces the shards."""
    totals: dict[Path, int] = {}
    for name, value in _tensors(places):
        totals[places[name]] = totals.get(places[name], 0) + value.nbytes
    return max(totals.values())


def _tensors(places: dict[str, Path]) -> Iterator[tuple[str, Tensor]]:
    for name, path in places.items():
        with safe_open(path, framework="pt") as file:
            yield name, file.get_tensor(name)


class _Vendor:
    """nemo-toolkit, imported on first use because the import takes seconds."""

    def __init__(self) -> None:
        try:
            from nemo.core.classes import common
            from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
            from omegaconf import OmegaConf
        except ImportError as error:
            raise ValueError(
                f".nemo archives need nemo-toolkit ({error}); install the extra: pip install 'realsr_hpc[nemo]'"
            ) from None

        class Connector(SaveRestoreConnector):
            """Loads weights with `weights_only=True`, so that an archive cannot execute code."""

            @staticmethod
            def _load_state_dict_from_disk(model_weights: str, map_location: Any = "cpu") -> dict[str, Tensor]:
                return torch.load(model_weights, map_location=map_location, weights_only=True)

        self.connector = Connector()
        self.as_config = OmegaConf.create
        self.carrier = carrier_class()
        self.target = f"{self.carrier.__module__}.{self.carrier.__name__}"
        if self.target not in common.ALLOWED_TARGET_PREFIXES:
            common.ALLOWED_TARGET_PREFIXES.append(self.target)  # NeMo instantiates only classes listed there

    def restore(self, archive: Path) -> Any:
        """The carrier inside an archive."""
        arguments = {"restore_path": str(archive), "map_location": torch.device("cpu")}
        try:
            config = self.connector.restore_from(self.carrier, return_config=True, **arguments)
            kind = config.get("target")
            if kind != self.target:
                raise ValueError(f"{archive} holds a {kind}, not an export of ours; restore it with NeMo")
            return self.connector.restore_from(self.carrier, **arguments)
        except ValueError:
            raise
        except Exception as error:  # NeMo and torch raise many kinds for a damaged archive
            raise ValueError(f"{archive} cannot be read ({first_line(error)}); copy it again") from None


def carrier_class() -> Any:
    """The class `ExportCarrier`, defined on first use because its base class needs nemo-toolkit."""
    if "ExportCarrier" in globals():
        return globals()["ExportCarrier"]
    from nemo.core.classes import ModelPT

    class ExportCarrier(ModelPT):
        """Container of an export's weights and files that NeMo's connector can save and restore."""

        def __init__(self, cfg: Any, trainer: Any = None) -> None:
            super().__init__(cfg=cfg, trainer=trainer)
            self.files: dict[str, bytes] = {}
            """Name -> content, read now because NeMo removes the unpacked folder afterwards."""
            for key, item in list(cfg.files.items()):
                name = Path(item.name).name
                self.files[name] = Path(self.register_artifact(f"files.{key}.path", item.path)).read_bytes()
            self._tensors: dict[str, Tensor] = {}

        def state_dict(self, *arguments: Any, **named: Any) -> dict[str, Tensor]:
            """Whole tensors by their Hugging Face names."""
            return dict(self._tensors)

        def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> None:
            """Store the tensors as they are."""
            self._tensors = dict(state_dict)

        def setup_training_data(self, train_data_config: Any) -> None:
            """A carrier is not trained."""

        def setup_validation_data(self, val_data_config: Any) -> None:
            """A carrier is not trained."""

        @classmethod
        def list_available_models(cls) -> None:
            """None are published."""

    ExportCarrier.__qualname__ = "ExportCarrier"  # NeMo finds a class by module and name
    globals()["ExportCarrier"] = ExportCarrier
    return ExportCarrier
