"""A second device, `far`, on a machine that has none: tensors in host memory that torch believes to be elsewhere.

Its kernels are the CPU's, so its numbers are the CPU's, bit for bit. What it adds are the errors of a real accelerator:
tensors of two devices that meet, an index on the wrong one, `.numpy()` of a far tensor, a CPU generator that is to draw
far numbers. Streams, asynchrony and memory limits are not imitated.

    with far_device():
        torch.arange(3, device="far") + torch.arange(3)      # RuntimeError, as on a GPU

Registering a device type holds for the whole process: use it in a process of its own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "far"
COPIES = {"_to_copy", "copy_", "_copy_from", "copy"}
"""Operators that may read one device and write the other."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
"""Their indices may also be on the CPU; an indexed tensor on the CPU takes none from afar."""
NUMBERS_TAKEN = {"fill_", "fill", "masked_fill", "masked_fill_", *INDEXING}
"""Operators beside the pointwise ones that take a number, a tensor without dimensions, from the CPU."""

CONSTRUCTORS = (
    "arange.default", "arange.start", "arange.start_step", "linspace.default", "eye.default", "randperm.default",
    "empty_strided.default", "_copy_from.default", "_local_scalar_dense.default",
)  # fmt: skip
"""Factories whose own way is to make an empty tensor larger, and what `torch.tensor` goes through past the fallback."""


class FarTensor(torch.Tensor):
    """A tensor of the device `far`: torch sees its shape alone, `host` holds its numbers."""

    host: Tensor
    made = 0
    """How many there were in this process."""

    @staticmethod
    def __new__(cls, host: Tensor) -> FarTensor:
        """Of a CPU tensor, whose memory it shares."""
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=torch.device(NAME, 0),
        )
        made.host = host
        FarTensor.made += 1
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """As torch's: the same memory, no history."""
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        if isinstance(other, FarTensor):
            torch.Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        elif self.shape != other.shape:
            raise NotImplementedError(f"data that moves to the CPU keeps its shape {self.shape}, not {other.shape}")
        self.host = other.host if isinstance(other, FarTensor) else other.detach()
        self.__dict__["near"] = not isinstance(other, FarTensor)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """`far`, unless its `data` was moved to the CPU."""
        return torch.device("cpu") if self.__dict__.get("near") else torch.device(NAME, 0)

    def tolist(self) -> Any:
        """Copied to the CPU first, as of a GPU's tensor."""
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved as the CPU's tensor."""
        return self.host.__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:
        return f"far({self.host!r})"


class _Seen:
    """The tensors of one call."""

    def __init__(self) -> None:
        self.far: list[FarTensor] = []
        self.near: list[Tensor] = []

    def host(self, value: Any) -> Any:
        """An argument as the CPU's kernel takes it."""
        if isinstance(value, FarTensor):
            (self.near if value.__dict__.get("near") else self.far).append(value)
            return value.host
        if isinstance(value, Tensor):
            self.near.append(value)
        elif isinstance(value, torch.device):
            return torch.device("cpu") if value.type == NAME else value
        elif isinstance(value, (list, tuple)):
            return type(value)([self.host(item) for item in value])
        return value


def compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on the host; its result is far if its tensors or the device that it names are."""
    seen = _Seen()
    host_args = [seen.host(value) for value in args]
    host_kwargs = {name: seen.host(value) for name, value in kwargs.items()}
    name = func._overloadpacket.__name__
    goes_far = _goes_far(name, args, kwargs, seen.far)
    _check(func, name, args, kwargs, seen, goes_far)
    if name == "_copy_from":  # what copies between devices, which for the CPU's kernels are one
        host_args[1].copy_(host_args[0])
        return args[1]
    result = func(*host_args, **host_kwargs)
    known = {id(tensor.host): tensor for tensor in [*seen.far, *seen.near] if isinstance(tensor, FarTensor)}
    return _out(result, known, goes_far) if known or goes_far else result


def _goes_far(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], far: list[Any]) -> bool:
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"]).type == NAME
    if name == "copy_":
        return isinstance(args[0], FarTensor)
    return bool(far)


def _out(result: Any, known: dict[int, FarTensor], goes_far: bool) -> Any:
    if isinstance(result, (list, tuple)):
        return type(result)([_out(item, known, goes_far) for item in result])
    if not isinstance(result, Tensor):
        return result
    if (same := known.get(id(result))) is not None:
        if same.shape != result.shape or same.stride() != result.stride():
            raise NotImplementedError("an operator that changes a far tensor's shape in place")
        return same
    return FarTensor(result) if goes_far else result


def _check(func: Any, name: str, args: Any, kwargs: Any, seen: _Seen, goes_far: bool) -> None:
    generator = kwargs.get("generator")
    if goes_far and generator is not None and generator.device.type != NAME:
        raise RuntimeError(f"{name}: Expected a '{NAME}' device type for generator but found '{generator.device}'")
    if not seen.far or not seen.near or name in COPIES or func.namespace == "c10d":
        return
    if name in INDEXING and isinstance(args[0], FarTensor) and all(_may_meet(value) for value in args[2:]):
        return
    takes_numbers = torch.Tag.pointwise in func.tags or name in NUMBERS_TAKEN
    if takes_numbers and all(tensor.dim() == 0 for tensor in seen.near) and _is_far(args[0], name):
        return
    raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found {NAME}:0 and cpu")


def _may_meet(value: Any) -> bool:
    return not isinstance(value, Tensor) or isinstance(value, FarTensor) or value.dim() == 0


def _is_far(first: Any, name: str) -> bool:
    """What an operator writes in place must be far; the others may begin with the number."""
    return not name.endswith("_") or isinstance(first, FarTensor)


_REGISTERED: list[torch.library.Library] = []
"""Registrations hold as long as somebody holds them."""


def _kernel(func: Any, *args: Any, **kwargs: Any) -> Any:
    return compute(func, args, kwargs)


@contextlib.contextmanager
def far_device() -> Iterator[torch.device]:
    """The device; registered with torch for the rest of the process.

    What tensors themselves do not lead to `compute`, factories that are given a device, torch's fallback for it does.
    """
    if not _REGISTERED:
        _setup_privateuseone_for_python_backend(NAME)
        getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16]  # autocast's scopes ask
        everything, factories = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
        everything.fallback(_kernel, "PrivateUse1")
        for name in CONSTRUCTORS:
            overload = torch.ops.aten
            for part in name.split("."):
                overload = getattr(overload, part)
            factories.impl(name.removesuffix(".default"), functools.partial(_kernel, overload), "PrivateUse1")
        _REGISTERED.extend([everything, factories])
    yield torch.device(NAME, 0)
