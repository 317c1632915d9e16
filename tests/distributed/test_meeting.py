"""Where ranks meet: on the address they were given and nowhere else."""

from __future__ import annotations

import psutil

from tests.distributed.launcher import run_ranks
from tests.distributed.worlds import start, tiny_config


def addresses_heard() -> set[str]:
    """Addresses that this rank listens on."""
    import os

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # as launch.environment says to the ranks of a one-node job
    start(tiny_config({"tp": 2}))
    return {place.laddr.ip for place in psutil.Process().net_connections() if place.status == "LISTEN"}


def test_ranks_of_one_node_listen_on_loopback_alone() -> None:
    heard = run_ranks(2, addresses_heard)
    assert "127.0.0.1" in heard[0]
    assert set().union(*heard) <= {"127.0.0.1", "::1"}
