import cv2
import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from realsr_hpc.records import Case, ParsedTrace, RestoredImage
from realsr_hpc.restore import RestoreSettings, restore_cases
from realsr_hpc.restore.colour import fix_colour, low_frequencies


def test_colour_fixes_keep_detail_and_take_the_colours_of_the_input():
    smooth = np.linspace(0, 120, 96)[:, None, None] + np.zeros((96, 96, 3))
    detail = 30 * (np.indices((96, 96)).sum(0) % 2)[..., None]
    reference = (smooth + 40).astype(np.uint8)
    image = (smooth * [0.5, 1.0, 0.8] + detail + [60, 0, 20]).astype(np.uint8)
    # a reference of the image's size is an input that is not enlarged
    adain = fix_colour(image, reference, "adain").astype(float)
    np.testing.assert_allclose(adain.mean((0, 1)), reference.mean((0, 1)), atol=0.6)
    np.testing.assert_allclose(adain.std((0, 1)), reference.std((0, 1)), atol=0.6)
    wavelet = torch.from_numpy(fix_colour(image, reference, "wavelet")).permute(2, 0, 1).float()
    ours, theirs = (torch.from_numpy(np.array(x)).permute(2, 0, 1).float() for x in (image, reference))
    inside = slice(32, 64)
    np.testing.assert_allclose(
        low_frequencies(wavelet)[:, inside, inside], low_frequencies(theirs)[:, inside, inside], atol=2
    )
    high = wavelet - low_frequencies(wavelet) - (ours - low_frequencies(ours))
    assert float(high[:, inside, inside].abs().max()) < 3
    bright = fix_colour((90 + detail + 0 * smooth).astype(np.uint8), np.full_like(image, 250), "wavelet")
    assert set(np.unique(bright[inside, inside])) == {235, 255}  # 265 is cut off
    faint = (10 + np.indices((96, 96)).sum(0) % 2)[..., None].repeat(3, 2).astype(np.uint8)
    strong = (50 + 100 * (faint - 10)).astype(np.uint8)
    np.testing.assert_array_equal(fix_colour(faint, strong, "adain"), strong)
    third = np.full((96, 96, 3), 101, np.uint8)
    third[::3] = 100  # 100.67 on average
    assert (fix_colour(np.full_like(third, 7), third, "adain") == 101).all()


def test_back_projection_makes_the_average_agree_with_the_input_and_keeps_finer_detail():
    rng = np.random.default_rng(5)
    coarse = gaussian_filter(rng.uniform(0, 255, (12, 20, 3)), (2, 2, 0), mode="nearest")
    lq = (128 + 0.8 * (coarse - coarse.mean())).round().astype(np.uint8)
    detail = 20 * (-1) ** np.indices((48, 80)).sum(0)[..., None]  # averages to nothing over an input pixel
    image = (lq.repeat(4, 0).repeat(4, 1) * 0.5 + 60 + detail).astype(np.uint8)
    fixed = fix_colour(image, lq, "back_projection").astype(float)
    # the same in NumPy, SciPy and OpenCV, whose bicubic kernel is PyTorch's
    error = gaussian_filter(lq - image.reshape(12, 4, 20, 4, 3).mean((1, 3)), (1, 1, 0), mode="nearest", radius=3)
    enlarged = cv2.resize(error.astype(np.float32), (80, 48), interpolation=cv2.INTER_CUBIC)
    np.testing.assert_allclose(fixed, np.clip(image + enlarged, 0, 255), atol=0.51)
    before, after = (np.abs(x.reshape(12, 4, 20, 4, 3).mean((1, 3)) - lq).mean() for x in (image, fixed))
    assert after < 0.2 * before
    np.testing.assert_array_equal(fix_colour(fixed.astype(np.uint8), lq, "none"), fixed)


def test_low_frequencies_are_five_dilated_filters():
    line = np.ones(1)
    for spread in (1, 2, 4, 8, 16):
        taps = np.zeros(2 * spread + 1)
        taps[[0, spread, -1]] = 0.25, 0.5, 0.25
        line = np.convolve(line, taps)
    impulse = torch.zeros(1, 97, 97)
    impulse[0, 48, 48] = 1.0
    found = low_frequencies(impulse)[0].numpy()
    np.testing.assert_allclose(found[17:-17, 17:-17], np.outer(line, line), atol=1e-7)
    np.testing.assert_allclose(low_frequencies(torch.full((3, 40, 9), 7.0)), 7.0, rtol=1e-5)  # borders are repeated


def test_each_case_is_corrected_by_its_own_input_and_only_its_final_image():
    trace = ParsedTrace(None, ("", "", ""), (None,) * 3, ())
    rng = np.random.default_rng(3)
    cases = [Case(str(n), rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for n in range(3)]
    painted = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(2)]

    def restorer(given):
        return [RestoredImage(trace, (case.lq, None, [*painted, None][int(case.key)])) for case in given]

    settings = RestoreSettings("x", tile_px=8, model_upscale=4, overlap_px=2, colour="back_projection")
    results = restore_cases(restorer, cases, settings)
    for case, image, result in zip(cases, painted, results, strict=False):
        np.testing.assert_array_equal(result.image, fix_colour(image, case.lq, "back_projection"))
        np.testing.assert_array_equal(result.images[0], case.lq)
        assert not np.array_equal(result.image, image)
    assert results[2].image is None
