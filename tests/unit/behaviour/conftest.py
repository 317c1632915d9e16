"""A free port for process groups of this room's tests."""

import socket

import pytest


@pytest.fixture
def unused_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
