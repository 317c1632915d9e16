"""Kernels against SciPy, OpenCV and a numerical integral."""

import math

import cv2
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from realsr_hpc.data.kernels import SHAPES, KernelParameters, build_factors, build_kernel


def _quadratic_form(p: KernelParameters) -> np.ndarray:
    """x^T C^-1 x with the covariance built from its rotation, as BasicSR does."""
    rotation = np.array([[math.cos(p.rotation), -math.sin(p.rotation)], [math.sin(p.rotation), math.cos(p.rotation)]])
    covariance = rotation @ np.diag([p.sigma_x**2, p.sigma_y**2]) @ rotation.T
    axis = np.arange(p.size_px) - p.size_px // 2
    grid = np.stack(np.meshgrid(axis, axis), axis=-1)
    return np.einsum("yxi,ij,yxj->yx", grid, np.linalg.inv(covariance), grid)


@pytest.mark.parametrize(("size_px", "sigma"), [(7, 0.3), (15, 1.7), (21, 3.0)])
def test_isotropic_gaussian_equals_opencv(size_px, sigma):
    line = cv2.getGaussianKernel(size_px, sigma)
    kernel = build_kernel(KernelParameters("iso", size_px, sigma, sigma))
    np.testing.assert_allclose(kernel, line @ line.T, atol=1e-6)


def test_anisotropic_gaussian_equals_scipy_density():
    p = KernelParameters("aniso", 21, 2.7, 0.8, rotation=0.6)
    turn = np.array([[math.cos(0.6), -math.sin(0.6)], [math.sin(0.6), math.cos(0.6)]])
    density = multivariate_normal(cov=turn @ np.diag([2.7**2, 0.8**2]) @ turn.T)
    axis = np.arange(21) - 10
    expected = density.pdf(np.stack(np.meshgrid(axis, axis), axis=-1))
    np.testing.assert_allclose(build_kernel(p), expected / expected.sum(), atol=1e-6)


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.2])
def test_generalised_and_plateau_follow_their_definitions(beta):
    for shape, value in (
        ("gen_aniso", lambda q: np.exp(-0.5 * q**beta)),
        ("plateau_aniso", lambda q: 1 / (q**beta + 1)),
    ):
        p = KernelParameters(shape, 13, 1.9, 0.7, rotation=-1.1, beta=beta)
        expected = value(_quadratic_form(p))
        np.testing.assert_allclose(build_kernel(p), expected / expected.sum(), atol=1e-6)


@pytest.mark.parametrize(("size_px", "omega"), [(7, math.pi), (21, math.pi / 5)])
def test_sinc_is_the_inverse_transform_of_a_disc(size_px, omega):
    """h(r) = 1/(2 pi) integral_0^omega w J0(w r) dw, J0 as a mean of cosines."""
    axis = np.arange(size_px) - size_px // 2
    radius = np.hypot(*np.meshgrid(axis, axis))
    frequencies = (np.arange(400) + 0.5) * omega / 400
    angles = (np.arange(100) + 0.5) * math.pi / 100
    values, places = np.unique(radius, return_inverse=True)
    bessel = np.cos(np.outer(values, np.sin(angles))[:, None, :] * frequencies[:, None]).mean(-1)
    profile = (bessel * frequencies).sum(-1)
    expected = profile[places].reshape(radius.shape)
    np.testing.assert_allclose(
        build_kernel(KernelParameters("sinc", size_px, omega=omega)), expected / expected.sum(), atol=3e-5
    )


def test_every_kernel_sums_to_one_and_is_symmetric_about_its_centre():
    for shape in (*SHAPES, "sinc"):
        kernel = build_kernel(KernelParameters(shape, 11, 1.3, 2.1, 0.4, 1.5, 2.0))
        assert kernel.dtype == np.float32
        assert abs(kernel.sum() - 1) < 1e-5
        np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-7)


def test_factors_in_turn_are_the_kernel():
    for shape in (*SHAPES, "sinc"):
        p = KernelParameters(shape, 11, 1.3, 1.3, 0.0, 1.0 if shape == "iso" else 1.5, 2.0)
        kernel, column = build_factors(p)
        assert (kernel.shape, column.shape) == (((1, 11), (11, 1)) if shape == "iso" else ((11, 11), (1, 1)))
        np.testing.assert_allclose(kernel * column, build_kernel(p), atol=1e-7)
    assert build_factors(None)[0] == build_factors(None)[1] == 1


def test_even_side_is_refused():
    with pytest.raises(ValueError, match="size_px of a kernel is 8"):
        build_kernel(KernelParameters("iso", 8, 1.0, 1.0))
