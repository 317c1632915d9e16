"""An export is loaded by transformers, computes the same, and comes back bit by bit."""

import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, ChameleonForConditionalGeneration, LogitsProcessorList

from realsr_hpc.config.load import from_yaml, to_yaml
from realsr_hpc.config.operation import ClusterConfig, TrackingConfig
from realsr_hpc.config.schema import DataConfig
from realsr_hpc.export import Sources, export_policy, export_run, import_weights
from realsr_hpc.export.hf_config import code_name, special_tokens
from realsr_hpc.export.incoming import IMAGE_FILE, TEXT_FILE
from realsr_hpc.export.recipe import portable
from realsr_hpc.export.weight_files import weight_files, write_weights
from realsr_hpc.model.policy import build_policy
from realsr_hpc.parallel.process_groups import initialise
from realsr_hpc.paths import project_root
from realsr_hpc.tokenizer.image_file import load_image_tokenizer
from realsr_hpc.tokenizer.trace import TraceTokenizer
from realsr_hpc.tracking.results import log_results
from realsr_hpc.vlcot.grammar import Grammar
from realsr_hpc.vlcot.vocabulary import Vocabulary

_PACKAGES = itertools.count()


def shipped(folder: Path, name: str):
    """A python file of the export, imported as part of a package, because one of them imports another."""
    package = types.ModuleType(f"shipped_{next(_PACKAGES)}")
    package.__path__ = [str(folder)]
    sys.modules[package.__name__] = package
    return importlib.import_module(f"{package.__name__}.{name}")


@pytest.fixture(scope="module")
def model(run):
    module = shipped(run.export, "modeling_realsr")
    return module.RealSRForConditionalGeneration.from_pretrained(run.export).eval()


@pytest.fixture
def tokens(run) -> torch.Tensor:
    size = run.tokens.codec.vocabulary.size
    return torch.randint(0, size, (2, 24), generator=torch.Generator().manual_seed(1))


def our_logits(run, tokens):
    with torch.no_grad():
        return run.policy.chunks[0](tokens) @ run.policy.output_weight.T


def test_every_exported_tensor_is_ours_bit_by_bit(run):
    stored = {name: value for path in set(weight_files(run.export).values()) for name, value in load_file(path).items()}
    for name, value in run.weights.items():
        assert torch.equal(stored.pop(name), value), name
    assert stored
    assert all(name.startswith("model.vqmodel.") for name in stored)


def test_whoever_may_read_the_card_may_read_the_weights(run):
    modes = {path.stat().st_mode for path in run.export.iterdir()}
    assert modes == {(run.export / "README.md").stat().st_mode}


def test_transformers_loads_it_without_a_missing_or_unexpected_key(run):
    _, report = ChameleonForConditionalGeneration.from_pretrained(run.export, output_loading_info=True)
    assert not any(report.values()), report


def test_logits_of_transformers_are_ours(run, model, tokens):
    with torch.no_grad():
        theirs = model(tokens).logits
    torch.testing.assert_close(theirs, our_logits(run, tokens), rtol=0, atol=2e-5)


def test_the_stock_class_masks_image_codes_and_the_shipped_one_does_not(run, model, tokens):
    stock = ChameleonForConditionalGeneration.from_pretrained(run.export).eval()
    vocabulary = run.tokens.codec.vocabulary
    codes = [vocabulary.code_to_id(code) for code in range(vocabulary.num_codes)]
    with torch.no_grad():
        masked, free = stock(tokens).logits, model(tokens).logits
    assert (masked[..., codes] == torch.finfo(masked.dtype).min).all()
    assert free[..., codes].abs().max() < 1e3
    others = [token for token in range(vocabulary.size) if token not in codes]
    assert torch.equal(masked[..., others], free[..., others])


def test_trust_remote_code_gives_the_shipped_class(run, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    loaded = AutoModelForCausalLM.from_pretrained(run.export, trust_remote_code=True).eval()
    assert type(loaded).__name__ == "RealSRForConditionalGeneration"
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, our_logits(run, tokens), rtol=0, atol=2e-5)


def test_training_loss_counts_image_codes(run, model, tokens):
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss
    expected = torch.nn.functional.cross_entropy(our_logits(run, tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("normalised", [False, True])
def test_image_codes_and_pixels_are_ours(run, make_run, tmp_path, normalised):
    made = make_run(tmp_path / "other", normalised=True) if normalised else run
    stock = ChameleonForConditionalGeneration.from_pretrained(made.export).eval()
    images = torch.rand(2, 3, 32, 64) * 2 - 1
    codes = made.tokens.image.encode(images)
    names = stock.get_image_tokens(images)
    vocabulary = made.tokens.codec.vocabulary
    assert names.flatten().tolist() == [vocabulary.code_to_id(code) for code in codes.flatten().tolist()]
    decoder = shipped(made.export, "modeling_realsr").load_decoder(made.export)
    torch.testing.assert_close(decoder(codes), made.tokens.image.decode(codes), rtol=0, atol=1e-5)
    assert len(codes.unique()) > 3


def test_tokenizer_writes_our_text_ids(run):
    tokenizer = AutoTokenizer.from_pretrained(run.export)
    codec = run.tokens.codec
    text = "<final_understand>a lion & Größe 7</final_understand>"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == codec.encode_text(text)
    assert tokenizer.decode(codec.encode_text(text)) == text
    for name, token in special_tokens(codec.vocabulary).items():
        assert tokenizer.convert_tokens_to_ids(name) == token
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (codec.vocabulary.bos, codec.vocabulary.pad)


def test_processor_makes_our_prompts_and_reads_our_traces(run, model):
    processor = shipped(run.export, "processing_realsr").RealSRProcessor(run.export)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(processor.prompt(model, images), run.tokens.prompts(images))
    from realsr_hpc.vlcot.sequence import Trace

    grids = tuple(np.random.default_rng(0).integers(0, 40, (side, side)) for side in (4, 8, 16))
    trace = Trace("light blur, keep, heavy noise, light compression, keep", ("a", "a rock", "a lion"), grids)
    fields = processor.parse(run.tokens.codec.build(trace))
    assert fields["degradation"] == trace.degradation
    assert (fields["rough_understand"], fields["final_understand"]) == ("a", "a lion")
    for name, grid in zip(("rough_image", "middle_image", "final_image"), grids, strict=True):
        assert np.array_equal(fields[name], grid)


def test_generate_with_the_shipped_grammar_paints_whole_images(run, model):
    """The prompt ends inside an image block: whatever the weights, the block comes out complete."""
    module = shipped(run.export, "modeling_realsr")
    processor = shipped(run.export, "processing_realsr").RealSRProcessor(run.export)
    vocabulary = run.tokens.codec.vocabulary
    prompt = torch.tensor([[vocabulary.bos], [vocabulary.bos]])
    grammar = module.ImageBlockGrammar(processor.trace, 1)
    start = torch.tensor([[vocabulary.image_begin, vocabulary.size_token(32)]]).expand(2, -1)
    torch.manual_seed(0)
    tokens = model.generate(
        torch.cat([prompt, start], 1),
        attention_mask=torch.ones(2, 3, dtype=torch.long),
        logits_processor=LogitsProcessorList([grammar]),
        do_sample=True,
        max_new_tokens=1 + 4 * 5 + 1,
    )
    text, grids = processor._linearise(tokens[0, 1:].tolist())
    assert [grid.shape for grid in grids] == [(4, 4)]
    assert text == "\ue0000\ue001"


@pytest.mark.parametrize("params", ["fp32", "bf16"])
def test_import_then_export_is_the_identity(run, make_run, tmp_path, params):
    made = run if params == "fp32" else make_run(tmp_path / "bf16", params="bf16")
    imported = tmp_path / "imported"
    import_weights(Sources(made.export), imported)
    config = from_yaml(imported / "recipe.yaml")
    started = config.model_copy(update={"model": config.model.model_copy(update={"weights": str(imported)})})
    tokens = TraceTokenizer.load(started, torch.device("cpu"))
    groups = initialise(started.parallel, 0)
    policy = build_policy(started, groups, tokens.codec.vocabulary.size, trainable=False)
    export_policy(policy, config, tokens, tmp_path / "again")
    names = weight_files(made.export)
    assert names.keys() == weight_files(tmp_path / "again").keys()
    before, after = load_file(made.export / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    for name, value in before.items():
        assert after[name].dtype == value.dtype, name
        assert torch.equal(after[name], value), name
    assert before["lm_head.weight"].dtype == (torch.float32 if params == "fp32" else torch.bfloat16)
    for file in ("config.json", "tokenizer.json", "realsr.json", "generation_config.json", "vq_decoder.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (made.export / file).read_bytes(), file


def test_imported_tokenizers_are_the_runs_own(run, tmp_path):
    import_weights(Sources(run.export), tmp_path / "imported")
    config = from_yaml(tmp_path / "imported" / "recipe.yaml")
    assert config.image_tokenizer.weights == str(tmp_path / "imported" / IMAGE_FILE)
    assert config.text_tokenizer.path == str(tmp_path / "imported" / TEXT_FILE)
    ours = run.tokens.image.state_dict()
    for name, value in load_image_tokenizer(config.image_tokenizer, "cpu").state_dict().items():
        assert torch.equal(value, ours[name]), name
    from realsr_hpc.tokenizer.text import TextTokenizer

    text = TextTokenizer(config.text_tokenizer.path, run.tokens.codec.vocabulary.text_first)
    assert text.vocab_size == run.tokens.codec.text.vocab_size
    sentence = "<degradation>a rock, Ü</degradation>"
    assert text.encode(sentence) == run.tokens.codec.text.encode(sentence)


def test_large_weights_are_split_and_indexed(tmp_path):
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}
    write_weights(tmp_path, tensors.items(), {name: value.nbytes for name, value in tensors.items()}, shard_bytes=90)
    files = weight_files(tmp_path)
    assert sorted({path.name for path in files.values()}) == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert all(torch.equal(load_file(files[name])[name], value) for name, value in tensors.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 200


def test_a_missing_shard_is_named(tmp_path):
    tensors = {f"t{i}": torch.zeros(10) for i in range(5)}
    write_weights(tmp_path, tensors.items(), dict.fromkeys(tensors, 40), shard_bytes=90)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors, not there"):
        weight_files(tmp_path)


@pytest.mark.parametrize("index", ["[" * 100_000, "{}", '{"weight_map": {"t": 1}}', '{"weight_map": {"t": "../t"}}'])
def test_an_index_that_is_none_or_leaves_its_folder_is_named(index, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="model.safetensors.index.json (is not an index|names files outside)"):
        weight_files(tmp_path)


def test_a_damaged_file_is_named(run, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((run.export / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        weight_files(tmp_path)


def test_a_wrong_shape_or_vocabulary_is_named(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run.export, copy)
    with pytest.raises(ValueError, match=r"num_hidden_layers 2 \(recipe: 3\)"):
        deeper = run.config.model_copy(update={"model": run.config.model.model_copy(update={"num_layers": 3})})
        import_weights(Sources(copy), tmp_path / "out", deeper)
    (copy / "SHA256SUMS").unlink()  # changed on purpose
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**settings, "vocab_size": 99}))
    with pytest.raises(ValueError, match="vocab_size 99"):
        import_weights(Sources(copy), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_folder_without_decoder_or_recipe_says_what_to_do(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run.export, copy)
    (copy / "vq_decoder.safetensors").unlink()
    (copy / "SHA256SUMS").unlink()  # an older export
    with pytest.raises(ValueError, match=r"an export of ours without vq_decoder.safetensors; copy it again"):
        import_weights(Sources(copy), tmp_path / "out")
    (copy / "recipe.yaml").unlink()
    with pytest.raises(ValueError, match="add recipe=NAME"):
        import_weights(Sources(copy), tmp_path / "out")


def test_an_export_never_overwrites_and_a_failed_one_leaves_nothing(run, tmp_path):
    with pytest.raises(ValueError, match="exists"):
        export_run(run.folder, run.export)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        empty = tmp_path / "empty"
        empty.mkdir()
        shutil.copy(run.folder / "recipe.yaml", empty)
        export_run(empty, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_card_names_recipe_step_and_licence(run):
    card = (run.export / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "tiny_export" in card
    assert "step 7" in card
    assert "None recorded" in card
    written, own = from_yaml(run.export / "recipe.yaml"), from_yaml(run.folder / "recipe.yaml")
    assert (written.model, written.grpo, written.rollout) == (own.model, own.grpo, own.rollout)


def test_the_card_shows_the_evaluations_of_the_exported_step(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    for step, value in ((7, 24.0), (7, 25.5), (3, 11.0)):
        log_results(folder, step, {"evaluate/photos/ours/psnr": value}, [], "evaluation/photos")
    export_run(folder, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| evaluate/photos/ours/psnr | 25.5 |" in card and card.count("evaluate/") == 1


def test_the_recipe_in_an_export_names_nothing_of_this_machine(run):
    there = "/scratch/me"
    config = run.config.model_copy(
        update={
            "output_root": there,
            "tracking": TrackingConfig(uri="postgresql://me:password@host/db", description="kept"),
            "cluster": ClusterConfig(account="mine", environment_file=f"{there}/env.sh", tasks_per_node=2),
            "data": DataConfig(manifest=str(project_root() / "data" / "m.parquet")),
        }
    )
    text = to_yaml(portable(config))
    assert not any(part in text for part in (there, "password", "mine", str(project_root()), str(run.folder.parent)))
    kept = portable(config)
    assert (kept.data.manifest, kept.image_tokenizer.weights) == ("data/m.parquet", "image.safetensors")
    assert (kept.tracking.description, kept.cluster.tasks_per_node) == ("kept", 2)


def test_the_readmes_example_restores_an_image_with_transformers_alone(run, tmp_path):
    """In a fresh interpreter, away from the project: the code between the README's fences, as it stands."""
    readme = (project_root() / "README.md").read_text()
    (example,) = [code for code in re.findall("```python\n(.*?)```", readme, re.DOTALL) if "processor.restore" in code]
    shutil.copytree(run.export, tmp_path / "export")
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "lq.png")
    alone = "\nimport sys; assert not [name for name in sys.modules if name.startswith(('realsr_hpc.', 'megatron'))]"
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", example + alone], cwd=tmp_path, env=environment, check=True)
    with Image.open(tmp_path / "sr.png") as restored:
        assert restored.size == (run.config.vlcot.image_sizes_px[-1],) * 2


def test_the_shipped_grammar_is_the_constrained_one(run):
    """Both walks side by side: the same choices at every position of random traces."""
    shipped_grammar = shipped(run.export, "processing_realsr")
    theirs = shipped_grammar.TraceGrammar(shipped_grammar.RealSRProcessor(run.export))
    ours = Grammar(run.tokens.codec, "constrained")
    masks, random = ours.mask_table, np.random.default_rng(0)
    for _ in range(3):
        walks, allowed, length = (theirs.walk(), ours.mask_ids()), [], 0
        choices = [next(walk) for walk in walks]
        while choices:
            allowed = np.flatnonzero(masks[choices[1]])
            assert sorted(choices[0]) == allowed.tolist()
            token, length = int(random.choice(allowed)), length + 1
            try:
                choices = [walks[0].send(token), walks[1].send(token)]
            except StopIteration:
                choices = []
        assert token == run.tokens.codec.vocabulary.end_turn
        assert length <= theirs.longest


def test_special_names_are_chameleons():
    vocabulary = Vocabulary(num_codes=8192, codes_in_block=8192, text_first=16384, num_text=49152, size=65536)
    names = special_tokens(vocabulary)
    assert len(names) == 16384
    assert code_name(0) == "IMGIMGAZ"
    assert names[code_name(8191)] == 8195
    assert (names["<eoss>"], names["<racm3:break>"], names["<image>"]) == (8196, 8197, 8711)
    assert names["<reserved08706>"] == 8710
    assert names["<reserved08799>"] == 8803
