"""The exported processor in a fresh process, as transformers finds it: by folder, by a name of the Hub, saved again."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from realsr_hpc.records import Case
from realsr_hpc.restore.colour import fix_colour
from realsr_hpc.rollout.policy_restorer import PolicyRestorer
from tests.unit.export.test_export import shipped

SCRIPT = """
import sys
import numpy as np
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

def both(source):
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True).eval()
    return model, AutoProcessor.from_pretrained(source, trust_remote_code=True)

lq = Image.open("lq.png")
model, processor = both("us/policy")
restored = {"hub": processor.restore(model, lq)}
model.save_pretrained("model_again")
restored["model saved"] = (lambda pair: pair[1].restore(pair[0], lq))(both("model_again"))
processor.save_pretrained("processor_again")
processor = AutoProcessor.from_pretrained("processor_again", trust_remote_code=True)
restored["processor saved"] = processor.restore(model, lq)
for name, image in restored.items():
    image.save(f"{name}.png")
assert not [name for name in sys.modules if name.startswith(("realsr_hpc.", "megatron"))]
"""


def ours(run, lq: np.ndarray, restore) -> np.ndarray:
    """What tools/restore.py makes of one tile."""
    config = run.config.model_copy(update={"restore": restore})
    return fix_colour(PolicyRestorer(run.policy, run.tokens, config)([Case("x", lq)])[0].image, lq, restore.colour)


@pytest.fixture
def lq() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def test_it_restores_as_our_own_command_by_name_and_after_saving(run, lq, tmp_path):
    commit = "0123456789" * 4
    snapshot = tmp_path / "hf/hub/models--us--policy/snapshots" / commit
    shutil.copytree(run.export, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text(commit)
    Image.fromarray(lq).save(tmp_path / "lq.png")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, check=True)
    wanted = ours(run, lq, run.config.restore)
    for name in ("hub", "model saved", "processor saved"):
        with Image.open(tmp_path / f"{name}.png") as image:
            # The same tokens; the decoders' float32 may round a pixel otherwise.
            assert np.abs(np.asarray(image).astype(int) - wanted).max() <= 1, name


IMAGE_SCRIPT = """
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

model, report = AutoModelForCausalLM.from_pretrained("export", trust_remote_code=True, output_loading_info=True)
processor = AutoProcessor.from_pretrained("export", trust_remote_code=True)
assert not any(report.values()), report
pictures = torch.load("pictures.pt")
decoder = model.load_decoder(processor.source)
pixels = decoder(torch.load("codes.pt"))
torch.save({"tokens": model.eval().get_image_tokens(pictures / 127.5 - 1), "pixels": pixels,
            "prompt": processor.prompt(model, pictures)}, "theirs.pt")
"""


def test_llamagens_image_tokenizer_is_loaded_in_a_fresh_process_and_computes_the_same(make_run, tmp_path):
    """Attention behind each block of the lowest level, codes as unit vectors: `model=chameleon_7b_f8`'s kind."""
    made = make_run(tmp_path / "made", normalised=True, attention="lowest")
    assert any(".attn." in name and ".mid." not in name for name in made.tokens.image.state_dict())
    pictures = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codes = made.tokens.image.encode(pictures / 127.5 - 1)
    assert len(codes.unique()) > 3
    shutil.copytree(made.export, tmp_path / "export")
    torch.save(pictures, tmp_path / "pictures.pt")
    torch.save(codes, tmp_path / "codes.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", IMAGE_SCRIPT], cwd=tmp_path, env=environment, check=True)
    theirs = torch.load(tmp_path / "theirs.pt")
    vocabulary = made.tokens.codec.vocabulary
    assert theirs["tokens"].flatten().tolist() == [vocabulary.code_to_id(code) for code in codes.flatten().tolist()]
    assert torch.equal(theirs["prompt"], made.tokens.prompts(pictures))
    torch.testing.assert_close(theirs["pixels"], made.tokens.image.decode(codes), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 0.3, "text_temperature": 2.0},
        {"image_top_k": 3, "text_top_k": 2},
        {"top_p": 0.5},
        {"cfg_scale": 3.0},
        {"colour": "wavelet"},
        {"colour": "adain"},
        {"colour": "back_projection"},
    ],
)
def test_every_setting_of_restoring_holds(run, lq, changed):
    model = shipped(run.export, "modeling_realsr").RealSRForConditionalGeneration.from_pretrained(run.export).eval()
    processor = shipped(run.export, "processing_realsr").RealSRProcessor(run.export)
    restored = np.asarray(processor.restore(model, Image.fromarray(lq), **changed)).astype(int)
    plain = np.asarray(processor.restore(model, Image.fromarray(lq))).astype(int)
    wanted = ours(run, lq, run.config.restore.model_copy(update=changed))
    assert np.abs(restored - wanted).max() <= 1 and np.abs(restored - plain).max() > 1
    other = np.asarray(processor.restore(model, Image.fromarray(lq), seed=run.config.seed + 1)).astype(int)
    assert np.abs(other - plain).max() > 1
    with pytest.raises(TypeError, match="num_beams is not one of temperature"):
        processor.restore(model, Image.fromarray(lq), num_beams=2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0},
        {"temperature": float("nan")},
        {"text_temperature": 0.0},
        {"top_p": 0},
        {"top_p": 1.5},
        {"image_top_k": -1},
        {"text_top_k": 2.5},
        {"cfg_scale": float("inf")},
        {"temperature": "0.3"},
        {"colour": "sepia"},
    ],
)
def test_a_setting_that_nothing_can_be_sampled_with_is_refused(run, lq, wrong):
    processor = shipped(run.export, "processing_realsr").RealSRProcessor(run.export)
    model = shipped(run.export, "modeling_realsr").RealSRForConditionalGeneration.from_pretrained(run.export).eval()
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}: give ")):
        processor.restore(model, Image.fromarray(lq), **wrong)


def test_more_candidates_than_tokens_are_all_and_a_profile_of_rgb_stays(run, lq):
    model = shipped(run.export, "modeling_realsr").RealSRForConditionalGeneration.from_pretrained(run.export).eval()
    processor = shipped(run.export, "processing_realsr").RealSRProcessor(run.export)
    image = Image.fromarray(lq)
    plain = processor.restore(model, image, image_top_k=0, text_top_k=0)
    image.info["icc_profile"] = b"profile"
    restored = processor.restore(model, image, image_top_k=10**9, text_top_k=10**9)
    np.testing.assert_array_equal(np.asarray(restored), np.asarray(plain))
    assert restored.info == {"icc_profile": b"profile"} and plain.info == {}


def test_sixteen_bits_floats_and_rotation_are_seen_as_restoring_sees_them(run, tmp_path):
    from realsr_hpc.restore import read_picture

    as_rgb = shipped(run.export, "images_realsr").as_rgb
    grey = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    with_nan = grey / np.float32(255)
    with_nan[3, 3] = np.nan
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = {
        "deep.png": (Image.fromarray(grey.astype(np.uint16) * 257), {}),
        "float.tif": (Image.fromarray(with_nan.astype(np.float32)), {}),
        "turned.jpg": (Image.fromarray(grey), {"exif": exif}),
        "palette.png": (Image.fromarray(np.dstack([grey] * 3)).convert("P"), {}),
    }
    for name, (picture, options) in pictures.items():
        picture.save(tmp_path / name, **options)
        with Image.open(tmp_path / name) as image:
            np.testing.assert_array_equal(np.asarray(as_rgb(image)), read_picture(tmp_path / name).rgb)
