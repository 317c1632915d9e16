"""A reward that another process computes: rollouts go to its URL, scores come back (exchange.py, docs/judge.md).

Calls are retried with growing pauses and have time-outs, which hold for a whole answer, however slowly it trickles in;
of one that never ends `ANSWER_BYTES` are read. A call that fails is a failure of its rollouts alone: of a batch each
rollout is then asked for by itself. While the other process is away the next calls are tried once each, so that a step
does not wait for all their pauses; after `PATIENCE` silent ones in a row the rest of the scoring is not asked for. The
next scoring asks again.
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
from typing import Any

import numpy as np
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from realsr_hpc.config.reward_options import HttpOptions
from realsr_hpc.records import Candidate
from realsr_hpc.rewards.base import NotAnswered, Reward
from realsr_hpc.rewards.exchange import scores_of, sent
from realsr_hpc.vlcot.sequence import FIELDS

logger = logging.getLogger(__name__)
logging.getLogger("urllib3").setLevel(logging.ERROR)  # lines a retry, beside ours a call

RETRIED = (429, 500, 502, 503, 504)
PATIENCE = 8
"""Calls without any answer, one after another, after which a scoring goes on without the other process."""
LONGEST_PAUSE_S = 30.0
ANSWER_BYTES = 4 * 2**20
"""Longest body of an answer, unpacked: the scores of a hundred thousand rollouts."""


class TooLong(ValueError):
    """A body of more than `ANSWER_BYTES`."""


class _Connection(HTTPConnection):
    """One whose whole answer must be there in the time that urllib3 gives to each of its pieces."""

    def getresponse(self) -> Any:
        """As urllib3's, the body included. TimeoutError: it came too slowly."""
        return _in_time(self, super().getresponse)


class _SecureConnection(HTTPSConnection):
    """The same over TLS."""

    def getresponse(self) -> Any:
        """As `_Connection`'s."""
        return _in_time(self, super().getresponse)


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls: Any = _Connection


class _SecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls: Any = _SecureConnection


def _in_time(connection: Any, answer: Callable[[], Any]) -> Any:
    """What `answer` reads from the connection, which is cut when the read time-out has passed. TimeoutError then."""
    own, late = connection.sock, threading.Event()

    def cut() -> None:
        late.set()
        with suppress(OSError):
            socket.socket.shutdown(own, socket.SHUT_RDWR)  # wakes whoever reads from it

    timer = threading.Timer(connection.timeout, cut)
    timer.daemon = True
    timer.start()
    try:
        reply = _whole(answer())
    except (OSError, HTTPException, urllib3.exceptions.HTTPError):
        if not late.is_set():
            raise
    else:
        if not late.is_set():  # else a body without a length may be cut in the middle
            return reply
    finally:
        timer.cancel()
    raise TimeoutError("the answer came too slowly")


def _whole(reply: Any) -> urllib3.HTTPResponse:
    """The answer with its body in memory. TooLong."""
    body = reply.read(ANSWER_BYTES + 1)
    if len(body) > ANSWER_BYTES:
        raise TooLong(f"answer: more than {ANSWER_BYTES // 2**20} MiB")
    return urllib3.HTTPResponse(body, reply.headers, reply.status, preload_content=False, decode_content=False)


class HttpReward(Reward):
    """Scores in [0, 1] from a URL."""

    def __init__(self, name: str, options: HttpOptions, *, needs_image: bool, judges: tuple[str, ...] = FIELDS):
        """Nothing is asked yet: the other process may start later. ValueError: `token_env` names no variable."""
        self.name, self.options = name, options
        self.needs_image, self.judges = needs_image, judges
        wait = urllib3.Timeout(connect=options.connect_timeout_s, read=options.read_timeout_s)
        # no proxies: PoolManager reads none from the environment
        self._pool = urllib3.PoolManager(maxsize=options.at_once, block=True, timeout=wait)
        self._pool.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}
        self._headers = {"Content-Type": "application/json", **_authorization(name, options.token_env)}
        self._failed, self._silent = False, 0

    def score_batches(self, batches: Sequence[Sequence[Candidate]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Some batches on their way together."""
        self._failed, self._silent = False, 0
        with ThreadPoolExecutor(self.options.at_once) as threads:
            scored = list(threads.map(self.score_counted, batches))
        if self._silent >= PATIENCE:
            logger.warning(
                "rewards.terms.%s: %s does not answer; the rest of the step is not sent", self.name, self.options.url
            )
        return scored

    def compute(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """Scores [n] in [0, 1], NaN where the other process could not score. Raises NotAnswered."""
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
        """Body of the answer. ValueError: it has another status than 200, or is too long."""
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
            allowed_methods=None,  # scoring twice does no harm
            backoff_factor=self.options.pause_s,
            backoff_max=LONGEST_PAUSE_S,
            raise_on_status=False,
            respect_retry_after_header=False,  # somebody else's hour is not waited for
        )


def _authorization(name: str, variable: str | None) -> dict[str, str]:
    if variable is None:
        return {}
    return {"Authorization": f"Bearer {token(variable, f'rewards.terms.{name}.options.token_env')}"}


def token(variable: str, field: str) -> str:
    """The secret in an environment variable. Raises ValueError naming the field where there is none."""
    secret = os.environ.get(variable, "").strip()
    if not secret or not secret.isascii() or not secret.isprintable():
        raise ValueError(f"{field}={variable}: this environment variable holds no secret of ASCII characters; set it")
    return secret
