"""The second device itself: a test of it can fail only where an accelerator would."""

from __future__ import annotations

import pytest

from tests.distributed.launcher import run_ranks


def faults() -> dict[str, str]:
    """What an accelerator refuses: name of the case -> error, or that there was none."""
    import torch
    import torch.nn.functional as F

    from tests.second_device.far import far_device

    with far_device() as device:
        far, near = torch.arange(6.0, device=device), torch.arange(6.0)
        index = torch.arange(3, device=device)
        cases = {
            "two devices in one sum": lambda: far + near,
            "a far number in a near sum": lambda: near + far[0],
            "numpy": lambda: far.numpy(),
            "a far index into a near tensor": lambda: near[index],
            "near values into a far tensor": lambda: far.index_put_((index,), near[:3]),
            "concatenation": lambda: torch.cat([far, near]),
            "a near number in a concatenation": lambda: torch.stack([far[0], near[0]]),
            "a near mask": lambda: far.masked_fill(near > 1, 0.0),
            "a near table": lambda: F.embedding(index, near[:, None]),
            "a near matrix": lambda: far[:3] @ near.view(3, 2),
            "a CPU generator": lambda: torch.rand(3, device=device, generator=torch.Generator()),
            "a near tensor written to": lambda: near.add_(far),
        }
        found = {}
        for name, case in cases.items():
            try:
                case()
                found[name] = "no error"
            except (RuntimeError, TypeError) as error:
                found[name] = str(error)
    return found


def allowed() -> dict[str, list[float]]:
    """What an accelerator takes, far, and the same computed near."""
    import torch

    from tests.second_device.far import far_device

    def both(device: torch.device) -> dict[str, torch.Tensor]:
        x = torch.linspace(-1, 1, 12, device=device).view(3, 4)
        weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0], [0.0, 1.0], [2.0, 2.0]], device=device))
        (x @ weight).softmax(-1)[:, 0].log().sum().backward()
        changed = x.clone()
        changed[1].add_(1.0)  # through a view
        changed[torch.tensor([0, 2])] = torch.tensor(0.25)  # index and number of the CPU
        return {
            "gradient": weight.grad,
            "view": changed,
            "a number of the CPU": x * torch.tensor(3.0),
            "from NumPy": torch.from_numpy(x.cpu().numpy()).to(device),
            "like": torch.zeros_like(x) + x.new_ones(4),
        }

    with far_device() as device:
        far, near = both(device), both(torch.device("cpu"))
        assert all(tensor.device.type == "far" for tensor in far.values())
        assert all(far[name].tolist() == near[name].tolist() for name in near)
        return {name: tensor.flatten().tolist() for name, tensor in near.items()}


def test_what_an_accelerator_refuses_is_refused():
    [found] = run_ranks(1, faults)
    assert all("device" in error or "not supported" in error for error in found.values()), found


def test_what_it_computes_is_what_the_cpu_computes():
    [found] = run_ranks(1, allowed)
    assert found["gradient"] != pytest.approx([0.0] * 8) and found["view"][:4] == [0.25] * 4
