import numpy as np
import pytest
from PIL import Image

from realsr_hpc.config.reward_options import GenerationOptions
from realsr_hpc.paths import resolve
from realsr_hpc.quality.ladder import ladder
from realsr_hpc.quality.ranker import Ranker
from realsr_hpc.quality.stripes import stripe_guard, stripe_share
from realsr_hpc.rewards.generation import RANKER_PATH, GenerationReward, niqe_to_unit

from .conftest import make_candidate


@pytest.fixture(scope="module")
def photographs():
    """The bundled photographs at the size of the small recipes; a brick wall is last."""
    files = sorted(resolve("recipes/assets/photographs").glob("*.jpg"), key=lambda file: file.stem == "brick")
    return [np.asarray(Image.open(file).convert("RGB").resize((128, 128), Image.Resampling.BICUBIC)) for file in files]


def striped(image, period, amplitude, horizontal=False):
    wave = np.sign(np.sin(2 * np.pi * (np.arange(128) + 0.5) / period))
    wave = wave[:, None, None] if horizontal else wave[None, :, None]
    return np.clip(image + amplitude * wave, 0, 255).astype(np.uint8)


def test_photographs_keep_their_reward_degraded_ones_too(photographs):
    assert (stripe_guard(photographs) == 1.0).all()
    for operator in ("blur", "resize", "noise", "jpeg", "sharpen"):
        assert (stripe_guard([ladder(image, [operator], [0.6], 0)[0] for image in photographs[:-1]]) == 1.0).all()


def test_what_repeats_in_the_truth_may_repeat_in_the_image(photographs):
    mesh = striped(photographs[0], 6, 30)
    assert stripe_guard([mesh])[0] < 0.5
    np.testing.assert_array_equal(stripe_guard([mesh, mesh], [mesh, photographs[0]]), [1.0, stripe_guard([mesh])[0]])


@pytest.mark.parametrize("period", [2, 3, 4, 5, 8])
def test_stripes_lose_it(photographs, period):
    fakes = [striped(image, period, 24, horizontal=i % 2 == 0) for i, image in enumerate(photographs)]
    assert np.median(stripe_guard(fakes)) < 0.5 and stripe_guard(fakes[:1], photographs[:1])[0] < 0.9


def test_a_code_painted_everywhere_loses_it():
    patch = np.random.default_rng(0).integers(60, 200, (8, 8, 3), dtype=np.uint8)
    assert stripe_guard([np.tile(patch, (16, 16, 1)), np.tile(patch, (64, 64, 1))]).max() == 0.0


def test_share_ignores_brightness_batch_and_flat_or_small_images(photographs):
    image = striped(photographs[0] // 2, 4, 16)
    shares = stripe_share([image, image + 40, photographs[1], np.full((128, 128, 3), 90, np.uint8), image[:16]])
    assert shares[0] == pytest.approx(shares[1], abs=1e-3)
    assert shares[2] == pytest.approx(stripe_share([photographs[1]])[0], abs=1e-6)
    assert shares[3] < 1e-9 and shares[4] == 0.0


def test_the_generation_reward_is_guarded_unless_told_otherwise(photographs):
    items = [make_candidate(photographs[0]), make_candidate(striped(photographs[0], 4, 40))]
    plain, guarded = (GenerationReward(GenerationOptions(stripe_guard=on)).score(items) for on in (False, True))
    np.testing.assert_allclose(guarded, plain * stripe_guard([item.image for item in items]))
    assert guarded[0] == plain[0] and guarded[1] < plain[1]


def test_places_of_the_generation_reward_average_to_it_guard_included(photographs):
    items = [make_candidate(photographs[0]), make_candidate(None), make_candidate(striped(photographs[0], 4, 40))]
    for on in (False, True):
        reward = GenerationReward(GenerationOptions(stripe_guard=on))
        places = reward.score_places(items)
        assert places.shape == (3, 256) and np.isnan(places[1]).all() and places[0].std() > 0.01
        np.testing.assert_allclose(places[[0, 2]].mean(1), reward.score(items)[[0, 2]], rtol=1e-6)
    assert GenerationReward(GenerationOptions(expert="niqe")).score_places(items) is None


def test_a_place_has_the_score_and_its_own_share_by_the_chain_rule(photographs):
    """Of the logistic function, whose derivative is s (1 - s); codes lie over the ranker's positions."""
    raw, shares = Ranker.load(resolve(RANKER_PATH)).shares(photographs[:1])
    score = 1 / (1 + np.exp(-raw[0]))
    [found] = GenerationReward(GenerationOptions(stripe_guard=False)).score_places([make_candidate(photographs[0])])
    over = np.arange(16) * len(shares[0]) // 16
    expected = score + score * (1 - score) * shares[0][np.ix_(over, over)]
    np.testing.assert_allclose(found.reshape(16, 16), expected, rtol=1e-5)


def test_niqes_distance_of_6_scores_a_half():
    np.testing.assert_allclose(niqe_to_unit(np.array([0.0, 6.0, 12.0])), [1.0, 0.5, 0.2])
