"""An MLflow server on a PostgreSQL of its own, as slurm/mlflow_server.sh starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from realsr_hpc.launch.environment import reserved_port
from realsr_hpc.paths import project_root

SCRIPT = str(project_root() / "slurm" / "mlflow_server.sh")


class Server:
    """Up when made; `uri` stays the same whatever happens to it."""

    def __init__(self, root: Path) -> None:
        self.port = reserved_port()
        self.root = root
        self._environment = {**os.environ, "MLFLOW_ROOT": str(root), "PORT": str(self.port), "PYTHON": sys.executable}
        self.uri = self.up()

    def up(self) -> str:
        """Start it, or start it again with all its runs."""
        up = subprocess.run([SCRIPT, "up"], env=self._environment, capture_output=True, text=True, check=False)
        assert up.returncode == 0, up.stdout + up.stderr
        return up.stdout.strip().partition("=")[2]

    def kill(self) -> None:
        """SIGKILL, in the middle of whatever it does, and until it is gone; its database goes on."""
        server, deadline = int((self.root / "server.pid").read_text()), time.time() + 180
        with suppress(ProcessLookupError):
            os.killpg(server, signal.SIGKILL)
            while time.time() < deadline:
                os.kill(server, 0)
                time.sleep(0.1)

    def down(self) -> None:
        """Nothing of it is left."""
        subprocess.run([SCRIPT, "down"], env=self._environment, check=True)


@contextmanager
def running(root: Path) -> Iterator[Server]:
    """A server in a folder that it makes, gone afterwards."""
    server = Server(root)
    try:
        yield server
    finally:
        server.down()
