"""Signs: texts and pixels show the whole word; the splits share neither words nor fonts."""

import numpy as np
import pytest
from PIL import Image

from realsr_hpc.commands import main as command
from realsr_hpc.commands import make_scenes
from realsr_hpc.config.schema import RunConfig
from realsr_hpc.data.lexicon import HELDOUT_WORDS, TRAINING_WORDS
from realsr_hpc.data.loader import LQLoader
from realsr_hpc.data.manifest import read_manifest
from realsr_hpc.data.signs import HELDOUT_FONTS, MIN_CONTRAST, TRAINING_FONTS, Ground, _font_file, make_sign
from tests.manifests import verify

LUMA = np.array([0.299, 0.587, 0.114])


def sign(number: int, heldout: bool = False):
    ground = Ground(Image.fromarray(np.full((80, 96, 3), 90, np.uint8)), "wall, grey")
    return make_sign(np.random.default_rng([7, number]), 128, [ground], heldout)


def test_words_and_fonts_of_the_splits_are_apart():
    assert not set(TRAINING_WORDS) & set(HELDOUT_WORDS) and not set(TRAINING_FONTS) & set(HELDOUT_FONTS)
    for words in (TRAINING_WORDS, HELDOUT_WORDS):
        assert len(set(words)) == len(words) and all(3 <= len(word) <= 6 and word.islower() for word in words)
    assert set("".join(HELDOUT_WORDS)) <= set("".join(TRAINING_WORDS))
    assert all(_font_file(font).is_file() for font in (*TRAINING_FONTS, *HELDOUT_FONTS))
    assert {sign(n, heldout=True).scene.word for n in range(8)} <= set(HELDOUT_WORDS)
    assert {sign(n).scene.word for n in range(8)} <= set(TRAINING_WORDS)


@pytest.mark.parametrize("number", range(12))
def test_texts_are_true_and_letters_stand_out(number):
    made = sign(number)
    assert made.scene == sign(number).scene and made.image.tobytes() == sign(number).image.tobytes()
    assert all(made.scene.word.upper() in caption for caption in made.scene.captions)
    assert made.scene.word in made.scene.tags and "sign" in made.scene.tags
    assert all(tag in made.scene.rough.lower() for tag in made.scene.tags)
    luma = np.asarray(made.image) @ LUMA
    assert luma.max() - luma.min() > MIN_CONTRAST - 40  # colours are slightly uneven


def test_the_tool_writes_a_manifest_of_all_and_signs_are_never_cut_or_mirrored(tmp_path, capsys):
    make_scenes.main(["shapes=2", "signs=3", "heldout_signs=2", "photographs=1", f"output={tmp_path}"])
    manifest = read_manifest(tmp_path / "manifest.parquet")
    assert not verify(manifest).faults
    signs = [entry for entry in manifest.entries if entry.word]
    assert [entry.split for entry in signs] == ["train"] * 3 + ["heldout"] * 2
    assert [entry.word in HELDOUT_WORDS for entry in signs] == [False] * 3 + [True] * 2
    assert [bool(entry.word) for entry in manifest.split("heldout").entries[:4]] == [False, True, False, True]
    config = RunConfig.model_validate(
        {
            "name": "t",
            "task": "sft",
            "data": {"manifest": str(tmp_path / "manifest.parquet"), "min_scene_fraction": 0.1},
            "degradation": {"usm_sharpen_gt": False},
        }
    )
    loader = LQLoader(config, "heldout", 4, shuffle=False)
    batch = loader.next()
    loader.close()
    assert [scene.word != "" for scene in batch.scenes] == [False, True, False, True]
    for row, entry in ((1, signs[3]), (3, signs[4])):
        whole = np.asarray(Image.open(manifest.path(entry)), np.int16)
        assert np.abs(batch.gt[row].movedim(0, -1).numpy().astype(np.int16) - whole).max() <= 1
    assert make_scenes.main(["sings=3"]) == 2 and "did you mean 'signs'" in capsys.readouterr().err
    assert command(["make-shapes"]) == 2 and "make-scenes" in capsys.readouterr().err
