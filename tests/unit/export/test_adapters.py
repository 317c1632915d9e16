"""A run with adapters, exported both ways: merged, and in PEFT's form, which `peft` loads onto the base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from realsr_hpc import checkpoint
from realsr_hpc.config.adapters import PEFT_BASE, PEFT_CONFIG, PEFT_WEIGHTS
from realsr_hpc.config.load import to_yaml
from realsr_hpc.config.schema import LoRAConfig, RunConfig
from realsr_hpc.export import export_run
from realsr_hpc.launch.damaged_files import damaged_files
from realsr_hpc.model import lora
from realsr_hpc.model.policy import Policy, build_policy

TOKENS = torch.arange(20, 44).view(2, 12)
LORA = LoRAConfig(rank=3, alpha=6.0, targets=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"))


def with_lora(config: RunConfig, weights: Path, start: Path | None = None) -> RunConfig:
    adapters = LORA.model_copy(update={"weights": None if start is None else str(start)})
    model = config.model.model_copy(update={"weights": str(weights), "lora": adapters})
    return config.model_copy(update={"model": model})


@pytest.fixture(scope="module")
def adapted(run, tmp_path_factory) -> tuple[Path, RunConfig, Policy]:
    """A run folder whose checkpoint holds trained-looking adapters on the export of another run."""
    folder = tmp_path_factory.mktemp("adapted")
    config = with_lora(run.config, run.export)
    policy = build_policy(config, run.policy.groups, run.tokens.codec.vocabulary.size)
    torch.manual_seed(1)
    for _, parameter in lora.parameters(policy):
        parameter.data.normal_(0.0, 0.3)
    (folder / "recipe.yaml").write_text(to_yaml(config))
    state = checkpoint.RunState(2)
    checkpoint.save(folder / "checkpoints", 2, policy, None, state, checkpoint.Keep(last=1))
    return folder, config, policy


def our_logits(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return (policy.chunks[0](TOKENS) @ policy.output_weight.t())[..., : policy.vocab_size]


def their_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def load(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)


def test_a_merged_export_is_the_adapted_model(adapted, tmp_path):
    folder, _, policy = adapted
    export_run(folder, tmp_path / "merged")
    assert (our_logits(policy) - their_logits(load(tmp_path / "merged"))).abs().max() < 1e-4
    assert "lora: null" in (tmp_path / "merged" / "recipe.yaml").read_text()


def test_peft_loads_the_adapters_onto_the_base(run, adapted, tmp_path):
    peft = pytest.importorskip("peft")
    folder, config, policy = adapted
    export_run(folder, tmp_path / "adapter", form="peft")
    base = load(run.export)
    plain = their_logits(base)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    theirs = their_logits(model)
    assert (our_logits(policy) - theirs).abs().max() < 1e-4 and (plain - theirs).abs().max() > 0.1
    again = with_lora(config, run.export, tmp_path / "adapter")
    back = build_policy(again, policy.groups, policy.vocab_size, trainable=False)
    pairs = zip(lora.parameters(policy), lora.parameters(back), strict=True)
    assert all(torch.equal(ours, read) for (_, ours), (_, read) in pairs)


def test_adapters_that_peft_wrote_are_read(run, adapted, tmp_path):
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=3, lora_alpha=6.0, target_modules=list(LORA.targets))
    model = peft.get_peft_model(load(run.export), options)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.3)
    model.save_pretrained(tmp_path / "peft")
    _, config, policy = adapted
    ours = build_policy(with_lora(config, run.export, tmp_path / "peft"), policy.groups, policy.vocab_size)
    assert (our_logits(ours) - their_logits(model)).abs().max() < 1e-4


def refused(config: RunConfig, policy: Policy, folder: Path, **change) -> str:
    """What `build_policy` says of the adapters of a folder; change: of model.lora, or num_layers of model."""
    layers = {"num_layers": change.pop("num_layers")} if "num_layers" in change else {}
    wrong = config.model.lora.model_copy(update={"weights": str(folder)} | change)
    model = config.model.model_copy(
        update={"lora": wrong, "weights": None if layers else config.model.weights} | layers
    )
    with pytest.raises(ValueError) as error:
        build_policy(config.model_copy(update={"model": model}), policy.groups, policy.vocab_size)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"rank": 4}, "r 3;"),
        ({"alpha": 7.0}, "lora_alpha 6.0"),
        ({"targets": ("gate_proj",)}, "targets"),
        ({"targets": LORA.targets[:3]}, "does not belong here"),
        ({"weights": "/no"}, "PEFT folder"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(change, word, adapted, tmp_path):
    folder, config, policy = adapted
    export_run(folder, tmp_path / "adapter", form="peft")
    assert word in refused(config, policy, change.pop("weights", tmp_path / "adapter"), **change)


@pytest.mark.parametrize(
    "variant",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"alora_invocation_tokens": [1, 2]},
        {"use_of_a_later_release": True},
        {"peft_type": "LOHA"},
        {"rank_pattern": {"q_proj": 5}},
    ],
    ids=lambda variant: next(iter(variant)),
)
def test_variants_of_lora_are_refused_by_name_at_launch_and_in_the_job(variant, adapted, tmp_path):
    folder, config, policy = adapted
    export_run(folder, tmp_path / "adapter", form="peft")
    (tmp_path / "adapter" / "SHA256SUMS").unlink()
    path, [(name, value)] = tmp_path / "adapter" / PEFT_CONFIG, variant.items()
    lora_config = config.model.lora.model_copy(update={"weights": str(tmp_path / "adapter")})
    named = config.model_copy(update={"model": config.model.model_copy(update={"lora": lora_config})})
    assert not [fault for _, fault in damaged_files(named) if "adapter" in fault]
    path.write_text(json.dumps(json.loads(path.read_text()) | variant))
    assert f"{name} {value!r}" in refused(config, policy, tmp_path / "adapter")
    assert any(f"{name} {value!r}" in fault for _, fault in damaged_files(named))


@pytest.mark.parametrize("missing", [PEFT_WEIGHTS, PEFT_CONFIG])
def test_a_folder_without_one_of_its_files_is_refused(missing, adapted, tmp_path):
    folder, config, policy = adapted
    export_run(folder, tmp_path / "adapter", form="peft")
    (tmp_path / "adapter" / missing).unlink()
    assert "name a PEFT folder" in refused(config, policy, tmp_path / "adapter")


def test_adapters_of_a_deeper_model_are_refused(adapted, tmp_path):
    folder, config, policy = adapted
    export_run(folder, tmp_path / "adapter", form="peft")
    assert "layers.1." in refused(config, policy, retold(tmp_path / "adapter", {}), num_layers=1)
    assert "no tensor model.layers.2." in refused(config, policy, tmp_path / "adapter", num_layers=3)


def retold(folder: Path, notes: dict[str, str]) -> Path:
    """The folder with other notes in its weights, as if another program had written them."""
    tensors = load_file(folder / PEFT_WEIGHTS)
    save_file(tensors, folder / PEFT_WEIGHTS, metadata={"format": "pt"} | notes)
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    path = folder / PEFT_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {PEFT_BASE: None}))
    return folder


def test_adapters_of_other_weights_are_refused(run, adapted, tmp_path):
    """Ours by the checksum they carry; those of `peft` where they name a folder that is here."""
    folder, config, policy = adapted
    export_run(folder, tmp_path / "adapter", form="peft")
    other = tmp_path / "other"
    shutil.copytree(run.export, other)
    (other / "more.bin").write_bytes(b"weights")
    elsewhere = with_lora(config, other, tmp_path / "adapter")
    said = refused(elsewhere, policy, tmp_path / "adapter")
    assert "trained on weights of sha256" in said and "model.weights" in said
    theirs = retold(tmp_path / "adapter", {})
    build_policy(with_lora(config, other, theirs), policy.groups, policy.vocab_size)  # it does not tell
    path = theirs / PEFT_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {PEFT_BASE: str(run.export)}))
    assert str(run.export) in refused(elsewhere, policy, theirs)
    build_policy(with_lora(config, run.export, theirs), policy.groups, policy.vocab_size)


def test_a_run_without_adapters_has_none_to_export(run, tmp_path):
    with pytest.raises(ValueError, match="no adapters"):
        export_run(run.folder, tmp_path / "adapter", form="peft")
