"""Serves rewards over HTTP: POST /terms/NAME scores rollouts, GET / lists the terms (exchange.py, docs/judge.md)."""

from __future__ import annotations

import hmac
import logging
import socket
from collections.abc import Mapping
from threading import Lock

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from realsr_hpc.rewards.base import Reward
from realsr_hpc.rewards.exchange import VERSION, answer, received

REQUEST_BYTES = 2**30
"""Largest request: enough for a few hundred rollouts with images of 1024 px."""
logger = logging.getLogger(__name__)


def application(terms: Mapping[str, Reward], secret: str | None = None) -> Starlette:
    """The web application. Batches are scored one at a time.

    secret: requests without it as bearer token are refused (401); None: all are accepted.
    """
    busy = Lock()

    async def listing(request: Request) -> JSONResponse:
        if not _knows(request, secret):
            return _refused(401, "Authorization: Bearer TOKEN is missing or wrong")
        return JSONResponse({"version": VERSION, "terms": sorted(terms)})

    async def score(request: Request) -> JSONResponse:
        name = request.path_params["name"]
        if not _knows(request, secret):
            return _refused(401, "Authorization: Bearer TOKEN is missing or wrong")
        if name not in terms:
            return _refused(404, f"no term {name!r} is served; served: {', '.join(sorted(terms))}")
        document = await _body(request)
        if document is None:
            return _refused(413, f"more than {REQUEST_BYTES} bytes; send smaller batches (rewards.batch_size)")
        return await run_in_threadpool(_scored, terms[name], document, busy)

    return Starlette(routes=[Route("/", listing), Route("/terms/{name}", score, methods=["POST"])])


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 chooses a free port. Raises ValueError if the address cannot be bound."""
    if port > 65535:
        raise ValueError(f"port={port}: ports end at 65535; name a free one, or port=0 for any")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(f"host={host} port={port}: {error}; name a free port, or port=0 for any") from None


def serve(app: Starlette, where: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM; requests in progress are still answered."""
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[where])


def _knows(request: Request, secret: str | None) -> bool:
    given = request.headers.get("authorization", "")
    return secret is None or hmac.compare_digest(given.encode(), f"Bearer {secret}".encode())


async def _body(request: Request) -> bytes | None:
    """The request's body; None if it exceeds REQUEST_BYTES."""
    document = bytearray()
    async for piece in request.stream():
        document += piece
        if len(document) > REQUEST_BYTES:
            return None
    return bytes(document)


def _scored(reward: Reward, document: bytes, busy: Lock) -> JSONResponse:
    try:
        candidates = received(document)
    except ValueError as error:
        return _refused(400, str(error))
    with busy:
        return JSONResponse(answer(*reward.score_counted(candidates)))


def _refused(status: int, why: str) -> JSONResponse:
    logger.warning("%d: %s", status, why)
    return JSONResponse({"error": why}, status)
