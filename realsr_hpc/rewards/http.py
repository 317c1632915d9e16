"""A reward that another process computes: rollouts go to its URL, scores come back (exchange.py, docs/judge.md).

Calls have time-outs and are retried with growing pauses. A call that fails is a failure of its rollouts alone: of a
batch each rollout is then asked for by itself. While the other process is away the next calls are tried once each, so
that a step does not wait for all their pauses; after `PATIENCE` silent ones in a row the rest of the scoring is not
asked for. The next scoring asks again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import urllib3

from realsr_hpc.config.reward_options import HttpOptions
from realsr_hpc.records import Candidate
from realsr_hpc.rewards.base import NotAnswered, Reward
from realsr_hpc.rewards.exchange import scores_of, sent

logger = logging.getLogger(__name__)
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line a retry, beside ours a call

RETRIED = (429, 500, 502, 503, 504)
PATIENCE = 8
"""Calls without any answer, one after another, after which a scoring goes on without the other process."""
LONGEST_PAUSE_S = 30.0


class HttpReward(Reward):
    """Scores in [0, 1] from a URL."""

    def __init__(self, name: str, options: HttpOptions, *, needs_image: bool):
        """Nothing is asked yet: the other process may start later. ValueError: `token_env` names no variable."""
        self.name, self.options, self.needs_image = name, options, needs_image
        wait = urllib3.Timeout(connect=options.connect_timeout_s, read=options.read_timeout_s)
        # no proxies: PoolManager reads none from the environment
        self._pool = urllib3.PoolManager(maxsize=options.at_once, block=True, timeout=wait)
        self._headers = {"Content-Type": "application/json", **_authorization(name, options.token_env)}
        self._failed, self._silent = False, 0

    def score_batches(self, batches: Sequence[Sequence[Candidate]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Some batches on their way together."""
        self._failed, self._silent = False, 0
        with ThreadPoolExecutor(self.options.at_once) as threads:
            scored = list(threads.map(self.score_counted, batches))
        if self._silent >= PATIENCE:
            logger.warning("rewards.terms.%s: %s is silent; the rest was not asked for", self.name, self.options.url)
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
        """Body of the answer. ValueError: it has another status than 200."""
        try:
            reply = self._pool.request(
                "POST",
                self.options.url,
                body=document,
                headers=self._headers,
                redirect=False,
                retries=self._retries(),
            )
        except urllib3.exceptions.HTTPError:
            self._silent += 1
            raise
        self._silent = 0
        if reply.status != 200:
            raise ValueError(f"status {reply.status}: {reply.data[:200].decode(errors='replace')}")
        return reply.data

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
