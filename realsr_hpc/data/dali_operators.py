"""Two implementations of the degradation graph's operators: DALI's own, for a GPU, and calls of `realsr_hpc.pixels`.

Both classes have the same methods and read the same arrays (`graph_inputs.py`): a blur is (way, kernel, column), a
resize is the output of `resize_sources`, noise is (field, row). DALI's own operators also run on a CPU, where they take
two to ten times as long; the tests compare the two implementations there. Images are float32 [h, w, 3] on 0..255 unless
a docstring says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.math as dmath
import nvidia.dali.types as types
from nvidia.dali.pipeline import do_not_convert

from realsr_hpc import pixels
from realsr_hpc.data.degradation import RESIZE_MODES
from realsr_hpc.data.graph_inputs import NOTHING, SEPARABLE


class HostOperators:
    """OpenCV and NumPy: one Python call for all operations between two JPEGs.

    map_samples: distributes the samples of a batch, e.g. over threads.
    """

    reads_tables = False

    def __init__(self, map_samples: Callable[..., Iterable] = map) -> None:
        self.sources: list[str] = []
        """Names of what is fed."""
        self._map = map_samples

    def array(self, name, layout=None):
        """One array per sample. It is not copied: the caller keeps it alive until the batch is done."""
        self.sources.append(name)
        return fn.external_source(name=name, layout=layout, no_copy=True)

    numbers = array

    def resize_sources(self, number):
        """Source side, target side and mode of resize `number`."""
        return (self.numbers(f"resize{number}"),)

    def stage(self, x, blur, resize, noise):
        """Blur, resize and add noise; uint8."""
        return self._call(_stage_to_bytes, x, *blur, *resize, *noise)

    def end(self, x, resize, sinc):
        """Resize and apply the final sinc filter; uint8."""
        return self._call(_end, x, *resize, *sinc)

    def stage_and_end(self, x, blur, resize, noise, last_resize, sinc):
        """`stage` followed by `end`, clamped to 0..255 in between but not rounded to bytes."""
        return self._call(_stage_and_end, x, *blur, *resize, *noise, *last_resize, *sinc)

    def sharpened(self, x):
        """Unsharp mask of a uint8 image; float32 on 0..255."""
        return self._call(_sharpened, x)

    def to_bytes(self, x):
        """Clamp and round to uint8."""
        return self._call(pixels.to_bytes, x)

    # Without this, DALI would convert the called functions as it does the graph's conditionals: a fifth slower.
    @do_not_convert
    def _call(self, function: Callable, *inputs):
        def batch(*columns):
            return list(self._map(function, *columns))

        return fn.python_function(*inputs, function=batch, batch_processing=True, output_layouts="HWC")


def _stage(image, way, kernel, column, resize, field, noising):
    x = _resized(_filtered(_floats(image), way, kernel, column), resize)
    return pixels.noised(x, field, float(noising[0]), poisson=bool(noising[1]), gray=bool(noising[2]))


def _stage_to_bytes(image, *arrays):
    return pixels.to_bytes(_stage(image, *arrays))


def _end(image, resize, way, kernel, column):
    return pixels.to_bytes(_filtered(_resized(_floats(image), resize), way, kernel, column))


def _stage_and_end(image, way, kernel, column, resize, field, noising, *end):
    return _end(np.clip(_stage(image, way, kernel, column, resize, field, noising), 0.0, 255.0), *end)


def _sharpened(image):
    return pixels.sharpened(_floats(image))


def _filtered(x, way, kernel, column):
    if way[0] == NOTHING:
        return x
    return pixels.filtered_separably(x, kernel, column) if way[0] == SEPARABLE else pixels.filtered(x, kernel)


def _resized(x, row):
    return pixels.resized(x, int(row[1]), RESIZE_MODES[row[2]])


def _floats(image):
    return image.astype(np.float32, copy=False)


class DALIOperators:
    """DALI's own operators on one device. Resizes are weighted sums of rows, because DALI lacks some of the modes."""

    reads_tables = True

    def __init__(self, device: str) -> None:
        self.sources: list[str] = []
        """Names of what is fed."""
        self._device = device

    def numbers(self, name):
        """Parameters of a sample, which stay on the host."""
        self.sources.append(name)
        return fn.external_source(name=name)

    def array(self, name, layout=None):
        """An array of a sample, on the device."""
        self.sources.append(name)
        source = fn.external_source(name=name, layout=layout)
        return source.gpu() if self._device == "gpu" else source

    def resize_sources(self, number):
        """Sides and mode, the table's rows and weights."""
        return self.numbers(f"resize{number}"), self.numbers(f"rows{number}"), self.array(f"weights{number}")

    def stage(self, x, blur, resize, noise):
        """Blur, resize and add noise; uint8."""
        return self.to_bytes(self._stage(x, blur, resize, noise))

    def end(self, x, resize, sinc):
        """Resize and apply the final sinc filter; uint8."""
        return self.to_bytes(self.filtered(self.resized(_to_float(x), *resize), *sinc))

    def stage_and_end(self, x, blur, resize, noise, last_resize, sinc):
        """`stage` followed by `end`, clamped to 0..255 in between but not rounded to bytes."""
        return self.end(_clamp(self._stage(x, blur, resize, noise)), last_resize, sinc)

    def _stage(self, x, blur, resize, noise):
        return self.noised(self.resized(self.filtered(_to_float(x), *blur), *resize), *noise)

    def filtered(self, x, way, kernel, column):
        """Filter as `kernel_inputs` chose: with a 2-D kernel, with a row and a column, or not at all."""
        if way[0] == NOTHING:
            y = x
        elif way[0] == SEPARABLE:
            y = _correlate(_correlate(x, kernel), column)
        else:
            y = _correlate(x, kernel)
        return y

    def resized(self, x, row, index, weights):
        """Resize without antialiasing, as PyTorch's interpolate; the same size leaves the image unchanged."""
        if row[0] == row[1]:
            y = x
        else:
            # sides s -> t: [s, s, 3] -> [t, s, 3], transposed [s, t, 3] -> [t, t, 3], transposed back
            y = _gather_rows(x, index, weights, row[0], row[1], row[0])
            y = _gather_rows(fn.transpose(y, perm=[1, 0, 2]), index, weights, row[0], row[1], row[1])
            y = fn.reshape(fn.transpose(y, perm=[1, 0, 2]), layout="HWC")
        return y

    def noised(self, x, field, row):
        """Add noise as `pixels.noised` does, with DALI's operators."""
        if row[1] > 0:
            if row[2] > 0:
                red, green, blue = pixels.LUMA
                # gray noise: its variance follows the luma [H, W, 1], broadcast over the channels
                value = _clamp(x[:, :, 0:1] * red + x[:, :, 1:2] * green + x[:, :, 2:3] * blue)
            else:
                value = _clamp(x)
            y = x + dmath.sqrt(value * (255.0 / _photons(value))) * (row[0] * field)
        else:
            y = x + row[0] * field
        return fn.reshape(y, layout="HWC")

    def sharpened(self, x):
        """Unsharp mask of a uint8 image; float32 on 0..255."""
        line = pixels.usm_line()
        row, column = (types.Constant(axis, device=self._device) for axis in (line[None, :], line[:, None]))
        x = _to_float(x)
        residual = x - _correlate(_correlate(x, row), column)  # pyright: ignore[reportOperatorIssue]
        # sharpen only where the residual is large; the mask is blurred so that its borders do not show
        mask = fn.cast(dmath.abs(residual) > pixels.USM_THRESHOLD, dtype=types.FLOAT)  # pyright: ignore[reportAttributeAccessIssue]
        soft = _correlate(_correlate(fn.reshape(mask, layout="HWC"), row), column)
        return fn.reshape(x + soft * (_clamp(x + pixels.USM_AMOUNT * residual) - x), layout="HWC")

    def to_bytes(self, x):
        """Clamp and round to uint8; DALI's cast does both."""
        return fn.reshape(fn.cast(x, dtype=types.UINT8), layout="HWC")  # pyright: ignore[reportAttributeAccessIssue]


def _correlate(x, kernel):
    return fn.filter(x, kernel, border="reflect_101")


def _gather_rows(x, index, weights, source, target, width):
    """[source, width, 3] -> [target, width, 3]: weighted sums of `count` source rows each.

    index: source rows [count, target]; weights: [count, target, 1].
    """
    count = index.shape(dtype=types.INT32)[0]  # pyright: ignore[reportAttributeAccessIssue]
    # rows as frames [source, 3 width], gathered to [count x target, 3 width], then [count, target, 3 width] x weights
    x = fn.reshape(x, shape=fn.stack(source, width * 3), layout="FC")
    x = fn.sequence_rearrange(x, new_order=fn.reshape(index, shape=[-1]))
    x = fn.reshape(x, shape=fn.stack(count, target, width * 3), layout="TFC") * weights
    return fn.reshape(fn.reductions.sum(x, axes=[0]), shape=fn.stack(target, width, 0 * width + 3), layout="HWC")


def _photons(value):
    """`pixels.photons` of the image, with DALI's operators."""
    highest = fn.reductions.max(value, axes=[0, 1, 2])
    lowest = fn.reductions.min(value, axes=[0, 1, 2])
    span = dmath.floor(highest + 0.5) - dmath.floor(lowest + 0.5)  # pyright: ignore[reportOperatorIssue]
    return dmath.fpow(2.0, dmath.ceil(dmath.log2(span + 1.0)))


def _clamp(x):
    return dmath.clamp(x, 0.0, 255.0)


def _to_float(x):
    return fn.cast(x, dtype=types.FLOAT)  # pyright: ignore[reportAttributeAccessIssue]
