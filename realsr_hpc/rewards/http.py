"""A reward that another process computes: rollouts are posted to its URL, scores returned (exchange.py, docs/judge.md).

Calls are retried with increasing pauses. Their time-outs limit the whole answer, and at most `ANSWER_BYTES` of it are
read. If the call for a batch fails, each of its rollouts is sent alone, so that one bad rollout does not fail the
others. After a failed call the next ones are not retried until one succeeds, so that a step does not wait for the
pauses of every call. After `PATIENCE` calls in a row without an answer, the rest of the step's rollouts are not sent.
The next step tries again.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException

import numpy as np
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from realsr_hpc.config.reward_options import HttpOptions
from realsr_hpc.records import Candidate
from realsr_hpc.rewards.base import NotAnswered, Reward
from realsr_hpc.rewards.exchange import scores_of, sent
from realsr_hpc.vlcot.sequence import FIELDS

logger = logging.getLogger(__name__)
logging.getLogger("urllib3").setLevel(logging.ERROR)  # it warns at each retry; this module logs each failed call

RETRIED = (429, 500, 502, 503, 504)
PATIENCE = 8
"""Calls in a row without an answer after which the rest of a step is not sent."""
LONGEST_PAUSE_S = 30.0
ANSWER_BYTES = 4 * 2**20
"""Largest body of an answer, decompressed: enough for the scores of a hundred thousand rollouts."""


class TooLong(ValueError):
    """A body of more than `ANSWER_BYTES`."""


class _Connection(HTTPConnection):
    """A connection whose read time-out limits the whole answer; in urllib3 it limits each read from the socket."""

    def getresponse(self) -> urllib3.HTTPResponse:
        """The response with its body. TimeoutError if it is not complete within the read time-out."""
        return _in_time(self, super().getresponse)


class _SecureConnection(HTTPSConnection):
    """The same over TLS."""

    def getresponse(self) -> urllib3.HTTPResponse:
        """As in `_Connection`."""
        return _in_time(self, super().getresponse)


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection  # pyright: ignore[reportAssignmentType]  urllib3's own class does not fit its type either


class _SecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _SecureConnection  # pyright: ignore[reportAssignmentType]


def _in_time(connection: HTTPConnection, answer: Callable[[], urllib3.HTTPResponse]) -> urllib3.HTTPResponse:
    """The result of `answer`, which reads from the connection. After the read time-out the connection is shut down and
    TimeoutError is raised."""
    own, limit_s, late = connection.sock, connection.timeout, threading.Event()
    assert limit_s is not None, "the pool sets both time-outs"

    def cut() -> None:
        late.set()
        with suppress(OSError):
            socket.socket.shutdown(own, socket.SHUT_RDWR)  # makes a blocked read return

    timer = threading.Timer(limit_s, cut)
    timer.daemon = True
    timer.start()
    try:
        reply = _whole(answer())
    except (OSError, HTTPException, urllib3.exceptions.HTTPError):
        if not late.is_set():
            raise
    else:
        if not late.is_set():  # else a body without Content-Length may be incomplete
            return reply
    finally:
        timer.cancel()
    raise TimeoutError("the answer came too slowly")


def _whole(reply: urllib3.HTTPResponse) -> urllib3.HTTPResponse:
    """The response with its body in memory. Raises TooLong."""
    body = reply.read(ANSWER_BYTES + 1)
    if len(body) > ANSWER_BYTES:
        raise TooLong(f"answer: more than {ANSWER_BYTES // 2**20} MiB")
    return urllib3.HTTPResponse(body, reply.headers, reply.status, preload_content=False, decode_content=False)


class HttpReward(Reward):
    """Scores in [0, 1] from a URL."""

    def __init__(self, name: str, options: HttpOptions, *, needs_image: bool, judges: tuple[str, ...] = FIELDS):
        """Does not connect yet, so the other process may start later. ValueError if `token_env` names no variable."""
        self.name, self.options = name, options
        self.needs_image, self.judges = needs_image, judges
        wait = urllib3.Timeout(connect=options.connect_timeout_s, read=options.read_timeout_s)
        # without proxies: PoolManager does not read them from the environment
        self._pool = urllib3.PoolManager(maxsize=options.at_once, block=True, timeout=wait)
        self._pool.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}
        self._headers = {"Content-Type": "application/json", **_authorization(name, options.token_env)}
        self._failed, self._silent = False, 0

    def score_batches(self, batches: Sequence[Sequence[Candidate]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """`score_counted` of each batch, with up to `at_once` calls in parallel."""
        self._failed, self._silent = False, 0
        with ThreadPoolExecutor(self.options.at_once) as threads:
            scored = list(threads.map(self.score_counted, batches))
        if self._silent >= PATIENCE:
            logger.warning(
                "rewards.terms.%s: %s does not answer; the rest of the step is not sent", self.name, self.options.url
            )
        return scored

    def compute(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """Scores [n] in [0, 1], NaN for rollouts that the other process could not score. Raises NotAnswered."""
        if self._silent >= PATIENCE:
            raise NotAnswered
        try:
            scores = scores_of(self._answer(sent(candidates)), len(candidates))
        except (urllib3.exceptions.HTTPError, ValueError) as error:
            self._failed = True
            logger.warning("rewards.terms.%s: %s: %s", self.name, self.options.url, error)
            raise NotAnswered from None
        self._failed = False
        return scores

    def _answer(self, document: bytes) -> bytes:
        """Body of the answer. ValueError if its status is not 200 or it is too long."""
        try:
            reply = self._pool.request(
                "POST",
                self.options.url,
                body=document,
                headers=self._headers,
                redirect=False,
                retries=self._retries(),
                preload_content=False,  # `_whole` reads it
                release_conn=True,
            )
        except TooLong:
            self._silent = 0
            raise
        except urllib3.exceptions.HTTPError:
            self._silent += 1
            raise
        self._silent = 0
        body = reply.data or b""  # urllib3 has None for an empty one
        if reply.status != 200:
            raise ValueError(f"status {reply.status}: {body[:200].decode(errors='replace')}")
        return body

    def _retries(self) -> urllib3.Retry:
        return urllib3.Retry(
            total=0 if self._failed else self.options.retries,
            status_forcelist=RETRIED,
            allowed_methods=None,  # also POST: scoring twice is harmless
            backoff_factor=self.options.pause_s,
            backoff_max=LONGEST_PAUSE_S,
            raise_on_status=False,
            respect_retry_after_header=False,  # it could ask for an hour
        )


def _authorization(name: str, variable: str | None) -> dict[str, str]:
    if variable is None:
        return {}
    return {"Authorization": f"Bearer {token(variable, f'rewards.terms.{name}.options.token_env')}"}


def token(variable: str, field: str) -> str:
    """The secret in an environment variable. Raises ValueError naming the field if the variable holds none."""
    secret = os.environ.get(variable, "").strip()
    if not secret or not secret.isascii() or not secret.isprintable():
        raise ValueError(f"{field}={variable}: this environment variable holds no secret of ASCII characters; set it")
    return secret
