"""Meta's Chameleon tree, also used by Anole: `models/7b/consolidated.pth`, `params.json`, `tokenizer/`.

Names and the order of rows follow facebookresearch/chameleon, `inference/transformer.py`. wqkv and w13 may be fused.
Several `consolidated.0N.pth` are tensor-parallel shards, each with its own q and k norm.

Meta's rotary embedding rotates pairs of consecutive rows, ours rotates the two halves of a head. So the rows of wq, wk
and the q and k norms are reordered. Trees that were converted from a Hugging Face folder (Anole's `bin_to_pth.py`) do
not record their order in any key; they are recognised by their norms or by `rope.freqs`. Anole's own fork of
transformers keeps Meta's order; releases of transformers do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from realsr_hpc.config.downloads import CHOOSE
from realsr_hpc.files import Json
from realsr_hpc.formats.found import Found, FoundPolicy, Spec
from realsr_hpc.formats.pickles import read_pickle
from realsr_hpc.formats.place import Format, Place, Rotary, Signs, read_json
from realsr_hpc.formats.tensor_files import TensorFiles, state_of
from realsr_hpc.formats.vqgan import open_vqgan

NAME = "Meta Chameleon tree"
_UNFUSED, _FUSED = "layers.0.attention.wq.weight", "layers.0.attention.wqkv.weight"
_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_UNKNOWN = (
    "use_scaled_rope", "rope_scaling", "attention_bias", "qkv_bias", "sliding_window", "use_moe",
    "weight_tying", "tie_embeddings", "tie_word_embeddings", "parallel_residual", "logit_softcap", "n_experts", "moe",
)  # fmt: skip
"""Settings of params.json that must be absent or false."""
_USED = (
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "ffn_dim_multiplier", "multiple_of", "norm_eps",
    "rope_theta", "swin_norm", "head_dim", "model_parallel_size",
)  # fmt: skip
"""Settings that are compared with sizes or shapes."""
_FIXED = {"qk_normalization": True, "non_linearity": "swiglu", "activation": "swiglu", "norm_type": "rmsnorm"}
"""Settings that must be absent, null or have this value."""


def _folder(place: Place) -> Path | None:
    """Folder with the weights: the given one, or one below models/; None if there is none."""
    if place.file("consolidated*.pth") is not None:
        return place.path
    if place.path.is_dir():
        folders = sorted({path.parent for path in place.path.glob("models/*/consolidated*.pth")})
        if len(folders) > 1:
            names = " and ".join(folder.name for folder in folders)
            raise ValueError(f"{place.path} holds the models {names}; name one of them: source={folders[0]}")
        return folders[0] if folders else None
    if place.path.is_file() and place.path.name.startswith("consolidated"):
        return place.path.parent
    return None


def recognise(place: Place) -> Signs:
    """Recognised by file names, then by the keys of the first file."""
    folder = _folder(place)
    signs = Signs().add(folder is not None, "consolidated*.pth, there or below models/*/")
    if folder is None:
        beside = place.file("params.json", "models/*/params.json")
        return signs if beside is None else signs.add(True, str(beside.relative_to(place.path)))
    signs = signs.add((folder / "params.json").is_file(), f"{folder.name}/params.json")
    first = sorted(folder.glob("consolidated*.pth"))[0]
    content = read_pickle(first)
    keys = set(content) if isinstance(content, dict) else set()
    signs = signs.add("tok_embeddings.weight" in keys, f"tok_embeddings.weight in {first.name}")
    return signs.add(bool(keys & {_UNFUSED, _FUSED}), f"{_UNFUSED} or wqkv in {first.name}")


def open_tree(place: Place, rotary: Rotary | None) -> Found:
    """The tree, with all shards memory-mapped. ValueError for a missing shard or an unclear rotary order."""
    folder = _folder(place)
    assert folder is not None, "call recognise before opening"
    files = _shard_files(folder)
    contents = [read_pickle(path) for path in files]
    first = contents[0] if isinstance(contents[0], Mapping) else {}
    shards = [TensorFiles([(path, state_of(content, path))]) for path, content in zip(files, contents, strict=True)]
    params = _params(folder)
    tree = _Tree(shards, params, len(shards))
    order, known = _order(rotary, first, tree)
    root = next((path for path in (folder, folder.parent.parent, folder.parent) if (path / "tokenizer").is_dir()), None)
    text = root / "tokenizer" / "text_tokenizer.json" if root else None
    image = root / "tokenizer" / "vqgan.ckpt" if root else None
    policy = FoundPolicy(
        format=NAME + (f" of {len(shards)} shards" if len(shards) > 1 else ""),
        path=folder,
        tensors=tree.specs(),
        read=lambda name: tree.read(name, order),
        sizes=tree.sizes(),
        rotary=f"{order} ({known})",
        faults=(*_setting_faults(params, len(shards)), *tree.faults()),
        left=(*(["rope.freqs (follows from rope_theta)"] if "rope.freqs" in first else []), *_not_read(params)),
    )
    opened = open_vqgan(Place(image), None).image if image and image.is_file() else None
    return Found(NAME, policy, opened, text if text and text.is_file() else None)


def _shard_files(folder: Path) -> list[Path]:
    whole, files = folder / "consolidated.pth", sorted(folder.glob("consolidated.*.pth"))
    if whole.is_file() and files:
        raise ValueError(f"{folder} holds consolidated.pth and {files[0].name}; move one of them elsewhere")
    if whole.is_file():
        return [whole]
    wanted = _count(_params(folder), "model_parallel_size") or len(files)
    names = [f"consolidated.{number:02d}.pth" for number in range(max(wanted, len(files)))]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder}: {', '.join(missing)} missing of {len(names)} shards; copy the tree again")
    return files


def _params(folder: Path) -> dict[str, Json]:
    params = read_json(folder / "params.json")
    beside = folder / "consolidate_params.json"
    model = params.get("model")
    nested = model if isinstance(model, dict) else {}
    return {**params, **nested, **(read_json(beside) if beside.is_file() else {})}


def _count(params: Mapping[str, Json], name: str) -> int | None:
    """A positive integer of params.json; None if it is missing or null. ValueError for anything else."""
    value = params.get(name)
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ValueError(f"params.json: {name} is {value!r}, no positive number; copy the tree again")
    return value


def _constant(params: Mapping[str, Json], name: str, default: float) -> float:
    """A number of params.json, or `default` if it is missing. ValueError for anything else."""
    value = params.get(name, default)
    if not isinstance(value, int | float):
        raise ValueError(f"params.json: {name} is {value!r}, no number; copy the tree again")
    return value


def _setting_faults(params: Mapping[str, Json], shards: int) -> list[str]:
    faults = [f"{key} {params[key]!r} (ours: none)" for key in _UNKNOWN if params.get(key)]
    faults += [
        f"{key} {params[key]!r} (ours: {ours!r})" for key, ours in _FIXED.items() if params.get(key) not in (None, ours)
    ]
    width = _count(params, "head_dim")
    if width is not None and width * (_count(params, "n_heads") or 0) != params.get("dim"):
        faults.append(f"head_dim {width} (ours: dim / n_heads of {params.get('dim')} / {params.get('n_heads')})")
    parts = _count(params, "model_parallel_size")
    if parts is not None and parts != shards:
        faults.append(f"model_parallel_size {parts} ({shards} files consolidated*.pth are there)")
    return faults


def _not_read(params: Mapping[str, Json]) -> list[str]:
    """Settings of the model that neither Meta's code nor ours uses."""
    model = params.get("model")
    nested = model if isinstance(model, dict) else {}
    given = [key for key in nested if key not in {*_USED, *_FIXED, *_UNKNOWN} and nested[key] not in (None, False)]
    return [f"params.json: {', '.join(given)} (Meta's own loader reads none of them)"] if given else []


def _order(requested: Rotary | None, content: Mapping[object, object], tree: _Tree) -> tuple[Rotary, str]:
    if requested is not None:
        return requested, "as requested"
    norm = tree.shards[0].specs.get("layers.0.attention.q_normalization.weight")
    if norm is not None and len(norm.shape) > 1:
        return "halves", f"q norms of shape {list(norm.shape)}: renamed from a Hugging Face folder"
    if "rope.freqs" in content and not isinstance(content["rope.freqs"], Tensor):
        raise ValueError(
            f"{tree.shards[0].path_of('norm.weight')}: rope.freqs is {content['rope.freqs']!r}, so its tensors were "
            f"renamed from a Hugging Face folder, and no key says in which order their rotary pairs are: {CHOOSE}"
        )
    return "interleaved", "Meta's own files"


class _Tree:
    """The tensors in Hugging Face's format, assembled from all shards."""

    def __init__(self, shards: list[TensorFiles], params: Mapping[str, Json], parts: int):
        self.shards, self.parts, self.params = shards, parts, params
        self.fused = _FUSED in shards[0].specs
        self.fused_gate = "layers.0.feed_forward.w13.weight" in shards[0].specs
        self.heads = self._number("n_heads")
        self.kv_heads = _count(params, "n_kv_heads") or self.heads
        self.layers = self._number("n_layers")
        self.hidden = self._number("dim")
        self.width = self.hidden // self.heads
        self.table = self._table()

    def _number(self, name: str) -> int:
        value = _count(self.params, name)
        if value is None:
            raise ValueError(f"params.json: {name} is missing; copy the tree again")
        return value

    def sizes(self) -> dict[str, float]:
        """Sizes under config.json's names."""
        specs = self.tensors_of("output.weight")
        gate = self.tensors_of(f"layers.0.feed_forward.{'w13' if self.fused_gate else 'w1'}.weight")
        return {
            "vocab_size": sum(spec.shape[0] for spec in specs),
            "hidden_size": self.hidden,
            "intermediate_size": sum(spec.shape[0] for spec in gate) // (2 if self.fused_gate else 1),
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": _constant(self.params, "norm_eps", 1e-5),
            "rope_theta": _constant(self.params, "rope_theta", 10000.0),
            "swin_norm": _constant(self.params, "swin_norm", False) if self.params.get("swin_norm") else False,
        }

    def tensors_of(self, name: str) -> list[Spec]:
        """Spec of a tensor in each shard. ValueError if a shard lacks it."""
        for shard in self.shards:
            if name not in shard.specs:
                raise ValueError(f"{shard.path_of(next(iter(shard.specs)))} has no tensor {name}; copy the tree again")
        return [shard.specs[name] for shard in self.shards]

    def _table(self) -> dict[str, tuple[tuple[str, ...], Callable[[list[Tensor], Rotary], Tensor]]]:
        """Hugging Face's name -> names in the files, and the function that merges the shards of one tensor."""
        # Meta's n shards: column-parallel weights and the output are cut by rows, [out / n, in]; row-parallel weights
        # and the embedding by columns, [out, in / n].
        rows = lambda parts, order: torch.cat(parts)  # noqa: E731
        columns = lambda parts, order: torch.cat(parts, 1)  # noqa: E731
        table = {
            "model.embed_tokens.weight": (("tok_embeddings.weight",), columns),
            "model.norm.weight": (("norm.weight",), _mean),
            "lm_head.weight": (("output.weight",), rows),
        }
        for layer in range(self.layers):
            ours, theirs = f"model.layers.{layer}.", f"layers.{layer}."
            for number, part in enumerate(_MATRICES[:3]):
                kept = f"attention.{'wqkv' if self.fused else ('wq', 'wk', 'wv')[number]}.weight"
                table[f"{ours}{part}.weight"] = ((theirs + kept,), self._projection(number))
            table[f"{ours}self_attn.o_proj.weight"] = ((f"{theirs}attention.wo.weight",), columns)
            for side, heads in (("q", self.heads), ("k", self.kv_heads)):
                for kind in ("weight", "bias"):
                    norm = (f"{theirs}attention.{side}_normalization.{kind}",)
                    table[f"{ours}self_attn.{side}_norm.{kind}"] = (norm, self._head_norm(heads))
            for number, part in enumerate(("gate_proj", "up_proj")):
                kept = f"feed_forward.{'w13' if self.fused_gate else ('w1', 'w3')[number]}.weight"
                table[f"{ours}mlp.{part}.weight"] = ((theirs + kept,), self._half(number) if self.fused_gate else rows)
            table[f"{ours}mlp.down_proj.weight"] = ((f"{theirs}feed_forward.w2.weight",), columns)
            for kept, part in _NORMS.items():
                table[f"{ours}{part}.weight"] = ((f"{theirs}{kept}.weight",), _mean)
        return table

    def _projection(self, number: int) -> Callable[[list[Tensor], Rotary], Tensor]:
        """Merges the projection of queries (0), keys (1) or values (2); each shard holds its own heads."""
        counts = [self.heads // self.parts, self.kv_heads // self.parts, self.kv_heads // self.parts]
        heads = (self.heads, self.kv_heads, self.kv_heads)[number]

        def merge(parts: list[Tensor], order: Rotary) -> Tensor:
            if self.fused:
                parts = [part.split([count * self.width for count in counts])[number] for part in parts]
            whole = torch.cat(parts)
            return halves_of(whole, heads) if number < 2 and order == "interleaved" else whole

        return merge

    def _half(self, number: int) -> Callable[[list[Tensor], Rotary], Tensor]:
        return lambda parts, order: torch.cat([part.chunk(2)[number] for part in parts])

    def _head_norm(self, heads: int) -> Callable[[list[Tensor], Rotary], Tensor]:
        """Merges q or k norms to [heads, width], from one norm per shard or from one per head."""

        def merge(parts: list[Tensor], order: Rotary) -> Tensor:
            rows = torch.cat([part.reshape(-1, self.width) for part in parts])
            if order == "interleaved":  # [rows, d/2, 2] -> [rows, 2, d/2]
                rows = rows.view(-1, self.width // 2, 2).transpose(1, 2).reshape(-1, self.width)
            return rows.repeat_interleave(heads // len(rows), 0)

        return merge

    def specs(self) -> dict[str, Spec]:
        """Shapes after merging, without reading the tensors; a tensor that a shard lacks is omitted."""
        sizes, found = self.sizes(), {}
        for name, (kept, _) in self.table.items():
            if all(kept[0] in shard.specs for shard in self.shards):
                found[name] = Spec(self._shape(name, kept[0], sizes), self.shards[0].specs[kept[0]].dtype)
        return found

    def _shape(self, name: str, kept: str, sizes: dict[str, float]) -> tuple[int, ...]:
        shapes = [shard.specs[kept].shape for shard in self.shards]
        if name.split(".")[-2] in ("q_norm", "k_norm"):
            return (self.heads if ".q_norm." in name else self.kv_heads, self.width)
        if len(shapes[0]) != 2:
            return shapes[0]
        if "_proj" in name and self.fused and name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
            return ((self.heads if ".q_proj." in name else self.kv_heads) * self.width, shapes[0][1])
        if self.fused_gate and name.split(".")[-2] in ("gate_proj", "up_proj"):
            return (int(sizes["intermediate_size"]), shapes[0][1])
        beside = name.split(".")[-2] in ("embed_tokens", "o_proj", "down_proj")
        total = sum(shape[1 if beside else 0] for shape in shapes)
        return (shapes[0][0], total) if beside else (total, shapes[0][1])

    def faults(self) -> list[str]:
        """Tensors that our model does not have, and tensors whose shapes do not fit the settings."""
        used = {kept for names, _ in self.table.values() for kept in names} | {"rope.freqs"}
        given = {name for shard in self.shards for name in shard.specs}
        extra = [f"tensor {name} (not in our model)" for name in sorted(given - used)]
        return [*extra, *(fault for name in sorted(given & used - {"rope.freqs"}) if (fault := self._odd(name)))]

    def _odd(self, name: str) -> str | None:
        """The fault of the shapes of a tensor's shards; None: none."""
        shapes = [shard.specs[name].shape for shard in self.shards if name in shard.specs]
        shape, part = shapes[0], name.split(".")[-2]
        if not shape:
            return f"tensor {name} is a single number"
        if any(other != shape for other in shapes):
            return f"tensor {name} has other shapes in other shards: {', '.join(map(str, map(list, shapes)))}"
        side = self.heads if part == "q_normalization" else self.kv_heads
        if part.endswith("_normalization"):
            rows = torch.Size(shape).numel() // self.width
            whole = shape[-1:] == (self.width,) and rows and side % (rows * self.parts) == 0
            return None if whole else f"tensor {name} has shape {list(shape)} (head width {self.width}, {side} heads)"
        rows = {"wqkv": (self.heads + 2 * self.kv_heads) * self.width // self.parts}.get(part, shape[0])
        odd = shape[0] != rows or (part == "w13" and shape[0] % 2)
        return f"tensor {name} has {shape[0]} rows, which are no {part} of {self.heads} heads" if odd else None

    def read(self, name: str, order: Rotary) -> Tensor:
        """One tensor in Hugging Face's format; only its own shards are read. ValueError if a shard lacks it."""
        if name not in self.table:
            raise ValueError(f"a {NAME} has no tensor {name}")
        kept, merge = self.table[name]
        self.tensors_of(kept[0])
        return merge([shard.read(kept[0]) for shard in self.shards], order)


def halves_of(weight: Tensor, heads: int) -> Tensor:
    """Reorders rows [heads * d, hidden] from interleaved rotary pairs (0 1 0 1 ...) to halves (0 0 ... 1 1 ...)."""
    # [heads, d/2, 2, hidden] -> [heads, 2, d/2, hidden]
    pairs = weight.view(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _mean(parts: list[Tensor], order: Rotary) -> Tensor:
    """Merge norms, which every shard holds whole; if they differ, their mean, as in transformers' converter."""
    return parts[0] if all(torch.equal(parts[0], part) for part in parts) else torch.stack(parts).mean(0)


FORMAT = Format(NAME, recognise, open_tree)
