"""Each pixel operator of DALI and of `pixels`, then the whole chain, against SciPy, PyTorch and NumPy."""

import importlib.util
import io
import sys
from pathlib import Path

import numpy as np
import nvidia.dali.fn as fn
import pytest
from nvidia.dali import pipeline_def
from PIL import Image

from realsr_hpc import pixels
from realsr_hpc.data import dali_pipeline
from realsr_hpc.data.dali_operators import DALIOperators, HostOperators
from realsr_hpc.data.dali_pipeline import DegradationPipeline
from realsr_hpc.data.decoding import decode_image
from realsr_hpc.data.degradation import (
    PRESETS,
    RESIZE_MODES,
    DegradationParameters,
    StageParameters,
    Stream,
    generator,
    noise_field,
    sample_degradation,
)
from realsr_hpc.data.graph_inputs import (
    NOTHING,
    SEPARABLE,
    WHOLE,
    DegradationInput,
    kernel_inputs,
    noise_row,
    resize_row,
    table_inputs,
)
from realsr_hpc.data.kernels import SHAPES, KernelParameters, build_factors, build_kernel
from realsr_hpc.paths import project_root

spec = importlib.util.spec_from_file_location("reference", Path(__file__).with_name("reference.py"))
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)

PHOTOGRAPHS = project_root() / "recipes/assets/photographs"
DALI = DALIOperators("cpu")


@pytest.fixture(scope="module")
def image():
    """float32 [128, 128, 3] on 0..255, levels of 8 bits."""
    return decode_image(PHOTOGRAPHS / "china_roof.jpg")[40:168, 60:188].astype(np.float32)


def run_all(operator, samples):
    """Apply a graph function to samples, each a tuple of its inputs, in one batch; 3-d inputs are images."""

    columns = [[np.asarray(x) for x in column] for column in zip(*samples, strict=True)]

    def source(values):
        return fn.external_source(lambda: values, layout="HWC" if values[0].shape[2:] == (3,) else None)

    @pipeline_def(
        batch_size=len(samples), num_threads=1, device_id=None, enable_conditionals=True, prefetch_queue_depth=1
    )
    def graph():
        return operator(*[source(values) for values in columns])

    pipeline = graph()
    pipeline.build()
    found = pipeline.run()[0]
    return [np.array(found.at(i)) for i in range(len(samples))]


def random_kernel(rng):
    shape = rng.choice([*SHAPES, "sinc"])
    size_px = int(rng.choice(range(7, 22, 2)))
    sigma_y = 1.0 if shape.endswith("_iso") or shape == "iso" else rng.uniform(0.2, 3)
    beta = 1.0 if shape in ("iso", "aniso") else rng.uniform(0.5, 2)
    return KernelParameters(shape, size_px, 1.0, sigma_y, rng.uniform(-3, 3), beta, rng.uniform(1, 3))


def test_filters_equal_scipys_for_random_kernels_every_way(image):
    """Equal within 1e-3 of 255, also for images smaller than the kernel, whose border is reflected several times."""
    samples, expected = [], []
    for number in range(16):
        rng = generator(1, number, Stream.NOISE)
        parameters = random_kernel(rng) if number else None
        crop = np.ascontiguousarray(image[: rng.integers(9, 128), :40]) if number % 2 else image
        samples.append((crop, *kernel_inputs("", parameters).values()))
        expected.append(reference.filter2d(crop, build_kernel(parameters)))
        kernel, column = build_factors(parameters)
        by_host = pixels.filtered_separably(crop, kernel, column) if column.size > 1 else pixels.filtered(crop, kernel)
        np.testing.assert_allclose(by_host, expected[-1], atol=1e-3)
    for by_dali, truth in zip(run_all(DALI.filtered, samples), expected, strict=True):
        np.testing.assert_allclose(by_dali, truth, atol=1e-3)
    assert {int(way[0]) for _, way, *_ in samples} == {NOTHING, SEPARABLE, WHOLE}


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_resizes_to_random_sides_equal_pytorchs(image, mode):
    """Equal within 0.01 of 255: the float32 positions of the source rows differ in their last digit."""
    sides = [8, 64, 128, 190, *map(int, generator(2, 0, Stream.NOISE).integers(9, 192, 4))]
    samples = [(image, resize_row(mode, 128, side), *table_inputs("", mode, 128, side).values()) for side in sides]
    for side, by_dali in zip(sides, run_all(DALI.resized, samples), strict=True):
        expected = reference.resize(image, mode, side)
        assert expected.shape == (side, side, 3)
        np.testing.assert_allclose(by_dali, expected, atol=1e-2)
        np.testing.assert_allclose(pixels.resized(image, side, mode), expected, atol=1e-2)


def test_jpeg_equals_opencv_and_pillow(image):
    """Bytes equal OpenCV's; Pillow's decoder may differ by one level where it upsamples colour."""
    qualities = (30, 47, 75, 95)
    samples = [(image.astype(np.uint8), np.int32(quality)) for quality in qualities]
    for quality, found in zip(qualities, run_all(dali_pipeline._jpeg, samples), strict=True):
        np.testing.assert_array_equal(found, np.round(reference.jpeg(image / 255, quality) * 255))
        held = io.BytesIO()
        Image.fromarray(image.astype(np.uint8)).save(held, "JPEG", quality=quality)
        assert np.abs(found.astype(int) - np.asarray(Image.open(held))).max() <= 1


def test_sharpening_equals_basicsrs(image):
    by_dali = run_all(DALI.sharpened, [(image.astype(np.uint8),)])[0]
    expected = reference.usm_sharpen(image / 255) * 255
    assert np.abs(expected - image).max() > 12
    # A residual on the threshold may fall on either side of it; its mask is blurred wide.
    np.testing.assert_allclose(by_dali, expected, atol=0.05)
    np.testing.assert_allclose(pixels.sharpened(image), expected, atol=0.05)


def test_bytes_are_clamped_and_rounded():
    values = np.random.default_rng(0).uniform(-20, 280, (64, 64, 3)).astype(np.float32)
    expected = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(pixels.to_bytes(values), expected)
    np.testing.assert_array_equal(run_all(DALI.to_bytes, [(values,)])[0], expected)


def stage(**changes):
    fields = dict(
        blur=None, resize="keep", resize_factor=1.0, resize_mode="bilinear", side_px=128,
        noise="gaussian", noise_level=10.0, gray=False, jpeg_quality=95,
    )  # fmt: skip
    return StageParameters(**{**fields, **changes})


def noised(image, fields, stages):
    """The results of DALI's operators and of pixels.py's; clamped as the later conversion to bytes does."""
    samples = [(image, field, noise_row(noisy)) for field, noisy in zip(fields, stages, strict=True)]
    by_host = [
        pixels.noised(image, field, noisy.noise_level, poisson=noisy.noise == "poisson", gray=noisy.gray)
        for field, noisy in zip(fields, stages, strict=True)
    ]
    return [[np.clip(found, 0, 255) for found in way] for way in (run_all(DALI.noised, samples), by_host)]


def test_noise_equals_numpy_for_random_levels(image):
    stages, fields = [], []
    for number in range(12):
        rng = generator(3, number, Stream.NOISE)
        noise = "gaussian" if number % 2 else "poisson"
        level = rng.uniform(1, 30) if number % 2 else rng.uniform(0.05, 3)
        stages.append(stage(noise=noise, noise_level=level, gray=number % 3 == 0))
        fields.append(noise_field(rng, stages[-1]))
    for way in noised(image, fields, stages):
        for found, field, noisy in zip(way, fields, stages, strict=True):
            np.testing.assert_allclose(found, reference.add_noise(image / 255, field, noisy) * 255, atol=2e-3)


def test_noise_has_the_stated_mean_and_variance():
    flat = np.full((128, 128, 3), 127.5, np.float32)
    flat[0, 0], flat[0, 1] = 0.0, 255.0  # all 256 levels spanned: 256 photons
    stages = [stage(noise_level=12.0), stage(noise="poisson", noise_level=1.5)]
    variances = [12.0**2, 255**2 * 1.5**2 * 0.5 / 256]
    fields = [noise_field(generator(0, 1, Stream.NOISE), noisy) for noisy in stages]
    for way in noised(flat, fields, stages):
        for found, variance in zip(way, variances, strict=True):
            found = found[1:]
            assert abs(found.mean() - 127.5) < 5 * np.sqrt(variance / found.size)
            assert abs(found.var() / variance - 1) < 0.03


def inputs(crop, samples, preset="realesrgan", gt_size_px=128):
    drawn = [sample_degradation(generator(5, i, Stream.DEGRADATION), PRESETS[preset], gt_size_px, 4) for i in samples]
    return [DegradationInput(crop, p, generator(5, i, Stream.NOISE)) for i, p in zip(samples, drawn, strict=True)]


OPERATORS = {"host": HostOperators, "dali": lambda: DALIOperators("cpu")}


@pytest.fixture(scope="module", params=OPERATORS)
def chain(request):
    """The graph as it runs on a CPU, and on a CPU with the operators of a GPU."""
    return DegradationPipeline(24, 128, 4, usm_sharpen_gt=False, operators=OPERATORS[request.param]())


def fields_of(index, parameters: DegradationParameters):
    rng = generator(5, index, Stream.NOISE)
    return noise_field(rng, parameters.first), noise_field(rng, parameters.second)


def test_whole_chain_equals_the_reference(chain, image):
    """Most images are equal in every byte; a level that rounds differently before a JPEG changes its block slightly."""
    batch = inputs(image.astype(np.uint8), range(24))
    lq, gt = chain.run(batch)
    np.testing.assert_array_equal(gt[0], image.astype(np.uint8))
    assert len({x.parameters.jpeg_last for x in batch}) == 2
    means = []
    for i, x in enumerate(batch):
        expected = reference.degrade(image / 255, x.parameters, fields_of(i, x.parameters), 32)
        means.append(np.abs(lq[i].astype(int) - expected).mean())
    assert max(means) < 1.5
    assert sum(mean == 0 for mean in means) >= 12


def test_a_sharpened_and_resized_truth_is_the_same_by_either_operators(image):
    batches = (inputs(np.tile(image, (2, 2, 1)).astype(np.uint8), range(8)) for _ in OPERATORS)
    (lq, gt), (other_lq, other_gt) = (
        DegradationPipeline(8, 128, 4, usm_sharpen_gt=True, operators=make()).run(batch)
        for make, batch in zip(OPERATORS.values(), batches, strict=True)
    )
    assert np.abs(gt.astype(int) - other_gt).max() <= 1
    assert np.abs(lq.astype(int) - other_lq).mean() < 0.2


def test_dali_leaves_no_generated_source_behind(chain):
    files = [module.__file__ for name, module in sys.modules.items() if name.startswith("__autograph_generated")]
    assert files and not any(Path(file).exists() for file in files)


def test_bytes_do_not_depend_on_batch_place_or_threads(image):
    crop = image.astype(np.uint8)
    lq, gt = DegradationPipeline(6, 128, 4, usm_sharpen_gt=False).run(inputs(crop, range(6)))
    turned, _ = DegradationPipeline(3, 128, 4, usm_sharpen_gt=False, num_threads=2).run(inputs(crop, [5, 4, 0]))
    np.testing.assert_array_equal(turned, lq[[5, 4, 0]])
    np.testing.assert_array_equal(gt[0], gt[5])


def test_truth_is_resized_with_antialiasing():
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    _, gt = DegradationPipeline(1, 128, 4, usm_sharpen_gt=False).run(inputs(stripes, [0]))
    assert np.abs(gt[0, 8:-8, 8:-8].astype(int) - 127).max() <= 2
