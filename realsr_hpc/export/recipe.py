"""The recipe inside an export, without paths and settings of the machine that trained it."""

from __future__ import annotations

from realsr_hpc.config.operation import ClusterConfig
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.paths import expanded, project_root

_SIZES = ("kind", "nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "gpu_memory_gib", "time_min")
"""Fields of the cluster section to keep: the machine's size. The others name accounts and files of a site."""


def portable(config: RunConfig) -> RunConfig:
    """`config` without this machine's folders, tracking server (its address may contain a password) and site settings.

    Paths inside the project become relative to it; of other paths only the last part is kept.
    """
    cluster = ClusterConfig(**{name: getattr(config.cluster, name) for name in _SIZES})
    image, text, data, model = config.image_tokenizer, config.text_tokenizer, config.data, config.model
    return config.model_copy(
        update={
            "output_root": RunConfig.model_fields["output_root"].default,
            "tracking": config.tracking.model_copy(update={"uri": None}),
            "cluster": cluster,
            "image_tokenizer": image.model_copy(update={"weights": _short(image.weights)}),
            "text_tokenizer": text.model_copy(update={"path": _short(text.path)}),
            "data": data.model_copy(update={"manifest": _short(data.manifest)}),
            "model": model.model_copy(update={"weights": None if model.weights is None else _short(model.weights)}),
        }
    )


def _short(path: str) -> str:
    absolute = expanded(path)
    if not absolute.is_absolute():
        return path
    root = project_root()
    return absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else absolute.name
