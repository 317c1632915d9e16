import numpy as np
import pytest
import torch
from PIL import Image

from realsr_hpc.paths import resolve
from realsr_hpc.quality.fit import SEVERITIES, ranking_loss, share_in_order, train_ranker
from realsr_hpc.quality.ladder import OPERATORS, ladder, random_crop
from realsr_hpc.quality.ranker import Ranker, high_pass
from realsr_hpc.rewards.generation import RANKER_PATH


@pytest.fixture(scope="module")
def ranker():
    return Ranker.load(resolve(RANKER_PATH))


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_shipped_ranker_orders_degradations(ranker, other_photograph, operator):
    scores = ranker.score(ladder(other_photograph, [operator], SEVERITIES, seed=3))
    assert share_in_order(scores) >= 0.8 and scores[0] > scores[-1]


def test_brightness_alone_changes_nothing(photograph):
    pixels = torch.from_numpy(photograph.copy()).permute(2, 0, 1)[None].float() / 510.0
    torch.testing.assert_close(high_pass(pixels + 0.3), high_pass(pixels), atol=1e-5, rtol=0)


def test_scores_do_not_depend_on_the_batch_and_survive_the_file(ranker, photograph, other_photograph, tmp_path):
    both = ranker.score([photograph, other_photograph, photograph[:64]])
    alone = [ranker.score([image])[0] for image in (photograph, other_photograph, photograph[:64])]
    np.testing.assert_allclose(both, alone, atol=1e-5)
    ranker.save(tmp_path / "ranker.safetensors")
    np.testing.assert_allclose(Ranker.load(tmp_path / "ranker.safetensors").score([photograph]), both[:1], atol=1e-5)
    assert np.isnan(ranker.score([photograph[:16]])).all()


def test_shares_are_the_scores_derivative_by_the_weight_of_a_place(ranker, photograph, other_photograph):
    """Autograd's answer, with mean and variance written for places that weigh differently."""
    images = [photograph, other_photograph]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    field = ranker.body(high_pass(pixels)).flatten(2).detach()  # [n, C, places]
    weights = torch.full((2, 1, field.shape[-1]), 1 / field.shape[-1], requires_grad=True)
    mean = (weights * field).sum(-1)
    variance = (weights * (field - mean.detach()[..., None]).square()).sum(-1)
    score = ranker.head(torch.cat([mean, (variance + 1e-4).sqrt()], dim=1))[:, 0]
    np.testing.assert_allclose(score.detach().numpy(), ranker.score(images), rtol=1e-5)
    score.sum().backward()
    expected = (weights.grad - weights.grad.mean(-1, keepdim=True))[:, 0].numpy()
    scores, shares = ranker.shares(images)
    np.testing.assert_array_equal(scores, ranker.score(images))
    np.testing.assert_allclose(shares.reshape(2, -1), expected, rtol=1e-4, atol=1e-5)


def test_missing_weights_name_the_command(tmp_path):
    with pytest.raises(ValueError, match="fit-experts"):
        Ranker.load(tmp_path / "none.safetensors")


def test_ranking_loss_falls_with_the_right_order():
    severities = torch.tensor([[0.0, 0.5, 1.0]])
    right, wrong = torch.tensor([[2.0, 0.0, -2.0]]), torch.tensor([[-2.0, 0.0, 2.0]])
    assert ranking_loss(right, severities) == 0.0
    assert ranking_loss(wrong, severities) > 3.0


def test_a_ranker_can_learn_the_order_of_a_ladder(photograph):
    rungs = ladder(photograph[:64, :64], ["noise"], [0.0, 0.5, 1.0], seed=0)
    pixels = torch.from_numpy(np.stack(rungs)).permute(0, 3, 1, 2).float() / 255.0
    severities = torch.tensor([[0.0, 0.5, 1.0]])
    torch.manual_seed(0)
    fresh = Ranker()
    optimizer = torch.optim.Adam(fresh.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = ranking_loss(fresh(pixels)[None], severities)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_training_repeats_itself_with_its_seed(photograph):
    picture = Image.fromarray(photograph)
    first, second, other = (
        train_ranker([picture], num_steps=4, batch_size=1, seed=seed).score([photograph]) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, second)
    assert first != other


def test_crops_keep_the_shape_and_follow_the_generator(photograph):
    picture = Image.fromarray(photograph)
    crops = [random_crop(picture, 64, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert crops[0].shape == (64, 64, 3)
    np.testing.assert_array_equal(crops[0], crops[1])
    assert (crops[0] != crops[2]).any()


@pytest.mark.parametrize("operator", OPERATORS)
def test_ladders_start_clean_move_away_and_repeat(photograph, operator):
    rungs = ladder(photograph, [operator], [0.0, 0.3, 1.0], seed=1)
    assert rungs[0] is photograph and rungs[2].dtype == np.uint8 and rungs[2].shape == photograph.shape
    distance = [np.abs(rung.astype(int) - photograph).mean() for rung in rungs]
    assert 0 < distance[1] < distance[2]
    np.testing.assert_array_equal(ladder(photograph, [operator], [1.0], seed=1)[0], rungs[2])
