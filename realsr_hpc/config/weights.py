"""Lists the files that a recipe needs besides the code: tokenizers, start weights, reward networks.

Nothing is downloaded, here or anywhere else, because compute nodes often have no network. pyiqa's files are listed for
the metrics of the super-resolution literature; for other metrics, pyiqa's adapter names missing files when it is built.
File names and addresses: pyiqa 0.1.15 (`default_model_urls`), torchvision and OpenAI's CLIP. A name that ends in
`-0123abcd` carries the beginning of the file's SHA-256.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from realsr_hpc.config.reward_options import FidelityOptions, GenerationOptions, UnderstandingOptions, read_options
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.files import SUMS_FILE, check_listed, check_sums, sha256_of, weight_map
from realsr_hpc.paths import resolve

WEIGHTS_DIR = "weights/iqa"
"""Folder of pyiqa's weights, unless an option names another."""
State = Literal["there", "missing", "differs", "damaged", "unlisted"]

_PYIQA = "https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main/"
_TORCH = "https://download.pytorch.org/models/"
_CLIP_RN50 = (
    "hub/clip/RN50.pt",
    "https://openaipublic.azureedge.net/clip/models/"
    "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt",
)
_CLIP_VIT = (
    "hub/clip/ViT-B-32.pt",
    "https://openaipublic.azureedge.net/clip/models/"
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
)
_ONE_ALIGN = ("huggingface/hub/models--q-future--one-align", "https://huggingface.co/q-future/one-align")
_RESNET50 = ("huggingface/hub/models--timm--resnet50.a1_in1k", "https://huggingface.co/timm/resnet50.a1_in1k")
_VIT = (
    "huggingface/hub/models--timm--vit_base_patch8_224.augreg2_in21k_ft_in1k",
    "https://huggingface.co/timm/vit_base_patch8_224.augreg2_in21k_ft_in1k",
)


def _head(name: str) -> tuple[str, str]:
    return f"hub/pyiqa/{name}", _PYIQA + name


def _backbone(name: str) -> tuple[str, str]:
    return f"hub/checkpoints/{name}", _TORCH + name


PYIQA_FILES: dict[str, tuple[tuple[str, str], ...]] = {
    "musiq": (_head("musiq_koniq_ckpt-e95806b9.pth"),),
    "musiq-ava": (_head("musiq_ava_ckpt-e8d3f067.pth"),),
    "musiq-spaq": (_head("musiq_spaq_ckpt-358bb6af.pth"),),
    "musiq-paq2piq": (_head("musiq_paq2piq_ckpt-364c0c84.pth"),),
    "maniqa": (_head("ckpt_koniq10k.pt"), _VIT),
    "maniqa-kadid": (_head("ckpt_kadid10k.pt"), _VIT),
    "maniqa-pipal": (_head("MANIQA_PIPAL-ae6d356b.pth"), _VIT),
    "clipiqa": (_CLIP_RN50,),
    "clipiqa+": (_head("CLIP-IQA+_learned_prompts-603f3273.pth"), _CLIP_RN50),
    "topiq_nr": (_head("cfanet_nr_koniq_res50-9a73138b.pth"), _RESNET50),
    "topiq_nr-flive": (_head("cfanet_nr_flive_res50-ded1c74e.pth"), _RESNET50),
    "topiq_nr-spaq": (_head("cfanet_nr_spaq_res50-a7f799ac.pth"), _RESNET50),
    "topiq_fr": (_head("cfanet_fr_kadid_res50-2c4cc61d.pth"), _RESNET50),
    "topiq_fr-pipal": (_head("cfanet_fr_pipal_res50-69bbe5ba.pth"), _RESNET50),
    "lpips": (_head("LPIPS_v0.1_alex-df73285e.pth"), _backbone("alexnet-owt-7be5be79.pth")),
    "lpips-vgg": (_head("LPIPS_v0.1_vgg-a78928a0.pth"), _backbone("vgg16-397923af.pth")),
    "dists": (_head("DISTS_weights-f5e65c96.pth"), _backbone("vgg16-397923af.pth")),
    "liqe": (_head("liqe_koniq.pt"), _CLIP_VIT),
    "liqe_mix": (_head("liqe_mix.pt"), _CLIP_VIT),
    "maclip": (_CLIP_RN50,),
    "qualiclip": (_head("QualiCLIP.pth"), _CLIP_RN50),
    "qualiclip+": (_head("QualiCLIP.pth"), _head("QualiCLIP+_koniq.pth"), _CLIP_RN50),
    **{
        f"qualiclip+-{data}": (_head("QualiCLIP.pth"), _head(f"QualiCLIP+_{data}.pth"), _CLIP_RN50)
        for data in ("clive", "flive", "spaq")
    },
    **{name: (_head("afine.pth"), _CLIP_VIT) for name in ("afine_nr", "afine_fr", "afine_all", "afine_all_scale")},
    **{name: (_ONE_ALIGN,) for name in ("qalign", "qalign_8bit", "qalign_4bit")},
    "niqe": (_head("niqe_modelparameters.mat"),),
    "brisque": (_head("brisque_svm_weights.pth"),),
    "ilniqe": (_head("ILNIQE_templateModel.mat"),),
    **{name: () for name in ("piqe", "psnr", "psnry", "ssim", "ssimc", "ms_ssim", "cw_ssim", "fsim", "vsi")},
    **{name: () for name in ("gmsd", "vif", "nlpd", "mad")},
}
"""Path below `weights_dir` and address of each file, by pyiqa's name of the metric. A folder is a Hugging Face cache of
one model."""


@dataclass(frozen=True)
class Need:
    """One file or folder that a recipe reads."""

    purpose: str
    """Field of the recipe, or reward and metric."""
    path: Path
    origin: str
    """Origin, in words or as an address."""
    weights_dir: Path | None = None
    """Folder whose SHA256SUMS must list it."""
    converted: bool = False
    """Whether import-weights makes it from published files."""

    def files(self) -> list[Path]:
        """The existing files: the file itself, or all below the folder."""
        if self.path.is_dir():
            return sorted(path for path in self.path.rglob("*") if path.is_file())
        return [self.path] if self.path.is_file() else []


_CONVERTED = "; import-weights makes it from them: downloads=DIR lists what is there, and the commands (docs/start.md)"
_RESEARCH = "Chameleon Research License: non-commercial research"
PUBLIC: dict[str, tuple[str, str, str]] = {
    "chameleon_f16": (
        "facebook/chameleon-7b, Alpha-VLLM/Lumina-mGPT-7B-512, GAIR/Anole-7b-v0.1, leloy/Anole-7b-v0.1-hf, or "
        f"consolidated.pth and params.json of Meta's release ({_RESEARCH})",
        f"vqgan.ckpt and vqgan.yaml of Meta's Chameleon release ({_RESEARCH})",
        f"text_tokenizer.json of Meta's Chameleon release, or tokenizer.json beside the policy ({_RESEARCH})",
    ),
    "llamagen_f8": (
        "nonwhy/PURE (its code is Lumina-mGPT's; read its licence, and Chameleon's, on which both are based)",
        "vq_ds8_c2i.pt of FoundationVision/LlamaGen (MIT)",
        "tokenizer.json beside the policy in nonwhy/PURE",
    ),
}
"""Policy, image tokenizer and text tokenizer under their owners' names, with licences, by `vlcot.vocabulary`."""


_SMALL = "realsr-hpc launch recipe=tokenizer_small; copy it from the run's folder (docs/weekend.md)"
OWN: dict[str, str] = {
    "weights/small/image_tokenizer.safetensors": _SMALL,
    "weights/small/text_tokenizer.json": _SMALL,
    "weights/small/policy_sft": "realsr-hpc launch recipe=sft_small, then "
    "realsr-hpc export-hf run=RUN_DIR output=weights/small/policy_sft",
}
"""Commands that make the files of the small recipes, which are not published."""


def start_files(config: RunConfig) -> dict[str, str | None]:
    """Files that a run starts from, by field; None: random initial values."""
    if config.task == "tokenizer":  # makes its own
        return {}
    return {
        "text_tokenizer.path": config.text_tokenizer.path,
        "image_tokenizer.weights": config.image_tokenizer.weights,
        "model.weights": config.model.weights,
        "model.lora.weights": config.model.lora.weights if config.model.lora else None,
    }


def needs_of(config: RunConfig) -> list[Need]:
    """Every file that the recipe reads besides code and photographs."""
    if config.task == "tokenizer":  # makes its own
        return []
    own = "realsr-hpc launch recipe=tokenizer_tiny"
    public = PUBLIC.get(config.vlcot.vocabulary)
    exported = "realsr-hpc export-hf run=RUN_DIR output=DIR"
    policy, image, text = (part + _CONVERTED for part in public) if public else (exported, own, own)
    made_by = {
        "text_tokenizer.path": text,
        "image_tokenizer.weights": image,
        "model.weights": policy,
        "model.lora.weights": f"{exported} form=peft",
    }
    named = start_files(config).items()
    origins = {field: (path, OWN.get(path) or made_by[field]) for field, path in named if path is not None}
    needs = [
        Need(field, resolve(path), origin, converted=origin.endswith(_CONVERTED))
        for field, (path, origin) in origins.items()
    ]
    if config.task == "grpo":
        needs += [need for name in config.rewards.terms for need in _of_reward(config, name)]
    return list(dict.fromkeys(needs))


def _of_reward(config: RunConfig, name: str) -> Iterator[Need]:
    match read_options(name, config.rewards.terms[name]):
        case GenerationOptions(expert="pyiqa") | FidelityOptions(metric="pyiqa") as options:
            yield from pyiqa_needs(f"rewards.terms.{name}", options.metrics, options.weights_dir)
        case GenerationOptions() as options:
            own = {"ranker": "ranker.safetensors", "niqe": "niqe_pristine.npz"}[options.expert]
            path = resolve(options.weights or f"recipes/assets/tiny/{own}")
            yield Need(f"rewards.terms.{name}", path, "realsr-hpc fit-experts")
        case UnderstandingOptions(synonyms="wordnet") as options:
            for file in ("index.noun", "data.noun"):
                path = resolve(options.wordnet_dir) / file
                yield Need(f"rewards.terms.{name}", path, "WordNet 3; Debian: wordnet-base")
        case _:
            pass  # computed from nothing but the rollouts


def missing_shards(folder: Path) -> list[str]:
    """Files that the index of a Hugging Face folder names and that are not there; [] without a readable index."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            named = (weight_map(folder / index) or {}).values()  # reading the weights reports a damaged index
            return sorted({name for name in named if not (folder / name).is_file()})
    return []


def pyiqa_needs(purpose: str, metrics: list[str], weights_dir: str | None) -> list[Need]:
    """Files of pyiqa metrics; for a metric that is not in the table, only the folder's SHA256SUMS is required."""
    folder = resolve(weights_dir or WEIGHTS_DIR)
    needs: list[Need] = []
    for metric in metrics:
        if metric not in PYIQA_FILES:
            needs.append(Need(f"{purpose}: {metric}", folder / SUMS_FILE, "see pyiqa's documentation of the metric"))
        for path, address in PYIQA_FILES.get(metric, ()):
            needs.append(Need(f"{purpose}: {metric}", folder / path, address, folder))
    return needs


def read_sums(folder: Path) -> dict[str, str]:
    """SHA-256 by path from the folder, from its SHA256SUMS; empty without one."""
    listing = folder / SUMS_FILE
    return read_listing(listing) if listing.is_file() else {}


def read_listing(path: Path) -> dict[str, str]:
    """SHA-256 by file name, from a file that `sha256sum` wrote. ValueError names the file and the invalid line."""
    sums: dict[str, str] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        row = re.fullmatch(rb"([0-9a-f]{64})[ \t]+\*?(.+)", line.strip())
        if row is not None:
            sums[os.fsdecode(row[2])] = row[1].decode()
        elif line.strip():
            raise ValueError(f"{path}:{number}: not a line of sha256sum; copy the file again, or make the list again")
    return sums


def state(need: Need) -> State:
    """Whether the file is there, and its SHA-256 is the listed one, or begins with the digits in its name.

    A folder of weights, or a file of one, is compared with the `SHA256SUMS` that its import or export wrote.
    """
    files = need.files()
    if not files:
        return "missing"
    try:
        (check_sums if need.path.is_dir() else check_listed)(need.path)
    except ValueError:
        return "differs"
    if missing_shards(need.path):
        return "differs"
    sums = read_sums(need.weights_dir) if need.weights_dir else {}
    for path in files:
        named = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
        listed = sums.get(path.relative_to(need.weights_dir).as_posix(), "") if need.weights_dir else ""
        expected = listed or (named[1] if named else "")
        if expected and not sha256_of(path).startswith(expected):
            return "differs"
        if need.weights_dir and not listed:
            return "unlisted"
    return "there"
