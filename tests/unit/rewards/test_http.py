"""Rewards that another process computes: the bits of the local ones, and failures that stay with their rollouts."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from realsr_hpc.commands import serve_rewards
from realsr_hpc.config.learning import RewardsConfig, RewardTerm
from realsr_hpc.config.load import RecipeError, compose_one
from realsr_hpc.paths import project_root
from realsr_hpc.records import JPEG, Blur, ResizeTo
from realsr_hpc.rewards import serving
from realsr_hpc.rewards.exchange import received, sent
from realsr_hpc.rewards.http import ANSWER_BYTES, PATIENCE
from realsr_hpc.rewards.mixture import RewardMixture, build_reward
from tests.judge import judge

from .conftest import make_candidate, make_trace

TERMS = "rewards.terms"
SERVED = [
    "recipe=grpo_tiny",
    f"+{TERMS}.fidelity.options.degradation=known",
    f"+{TERMS}.truth={{kind: fidelity, options: {{reference: gt, metric: ssim}}}}",
    f"+{TERMS}.niqe={{kind: generation, options: {{expert: niqe}}}}",
]


@contextmanager
def process(*command: str, lines: int = 1) -> Iterator[list[str]]:
    """A program that prints so many addresses once it listens."""
    running = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    try:
        assert running.stdout is not None
        yield [running.stdout.readline().strip() for _ in range(lines)]
    finally:
        running.terminate()
        running.wait(20)
        running.stdout.close()  # pyright: ignore[reportOptionalMemberAccess]


def asking(url: str, kind: str = "format", **options: Any) -> RewardTerm:
    quick = {"pause_s": 0.01, "retries": 1, "read_timeout_s": 1.0}
    return RewardTerm(kind=kind, options={"expert": "http", "url": url, **quick, **options})  # pyright: ignore[reportArgumentType]


def test_a_rollout_comes_back_as_it_was_sent(photograph):
    kernel = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    operators = (Blur(kernel), ResizeTo(48, "area"), JPEG(37))
    changes = {"gt": photograph[::-1].copy(), "operators": operators, "index": 2**40, "member": 3, "key": "ä/\x01"}
    one = make_candidate(photograph, make_trace(texts=("a", None, "\u2603 \ud800")), **changes)
    two = make_candidate(None, make_trace(images=(None,) * 3, faults=("cut",)), label=None, scene=None)
    for ours, theirs in zip([one, two], received(sent([one, two])), strict=True):
        np.testing.assert_equal(asdict(theirs), asdict(ours))
    returned = received(sent([one]))[0].operators
    assert returned is not None and returned[1:] == operators[1:]
    assert isinstance(returned[0], Blur) and returned[0].kernel.dtype == np.float32


def test_served_terms_give_the_bits_of_local_ones(photograph, other_photograph, monkeypatch):
    known = (Blur(np.full((3, 3), 1 / 9, np.float32)), ResizeTo(len(photograph) // 4, "bicubic"), JPEG(60))
    shown = [photograph, other_photograph[: len(photograph), : len(photograph)], photograph[:, ::-1].copy()]
    items = [make_candidate(image, gt=photograph, operators=known, member=n) for n, image in enumerate(shown)]
    items += [make_candidate(None), make_candidate(photograph, make_trace(faults=("x",), texts=("lion", None, "")))]
    terms = compose_one(SERVED).rewards.terms
    monkeypatch.setenv("REALSR_TEST_SECRET", "only for us")
    command = ["-m", "realsr_hpc.commands", "serve-rewards", *SERVED, "port=0", "token_env=REALSR_TEST_SECRET"]
    with process(*command, lines=len(terms)) as addresses:
        urls = {url.rpartition("/")[2]: url for url in addresses}
        assert urls.keys() == terms.keys()
        for batch_size in (1, 2):
            with_token = {"token_env": "REALSR_TEST_SECRET", "read_timeout_s": 60.0}
            elsewhere = {name: asking(urls[name], term.kind, **with_token) for name, term in terms.items()}
            ours = RewardMixture(RewardsConfig(terms=terms, batch_size=batch_size)).score(items)
            theirs = RewardMixture(RewardsConfig(terms=elsewhere, batch_size=batch_size)).score(items)
            assert theirs.failures == ours.failures == dict.fromkeys(terms, 0)
            for name, column in ours.breakdown.items():
                assert 0 < column[0] <= 1 and np.array_equal(column, theirs.breakdown[name]), name
        scores, broken = build_reward("x", asking(urls["format"])).score_counted(items)
        assert broken.all() and not scores.any(), "without the secret nothing is scored"


def answers(rollouts: list[dict[str, Any]]) -> tuple[int, bytes]:
    """0.5 a rollout, but by its key something else."""
    keys = {item["key"] for item in rollouts}
    if "slow" in keys:
        time.sleep(1.5)
    bodies = {"garbage": b"<html>", "count": b'{"scores": [0.5, 0.5, 0.5]}', "text": b'{"scores": ["0.5"]}'}
    bodies |= {"outside": b'{"scores": [7.5]}', "nan": b'{"scores": [NaN]}', "none": b'{"scores": [null]}'}
    odd = sorted(keys & bodies.keys())
    scores = json.dumps({"scores": [0.5] * len(rollouts)}).encode()
    return 500 if "500" in keys else 200, bodies[odd[0]] if odd else scores


ODD = ("slow", "500", "garbage", "count", "text", "outside", "nan", "none")


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_failing_call_fails_its_rollout_alone(batch_size):
    keys = ["fine", ODD[0], "fine", *ODD[1:4], "fine", *ODD[4:], "fine"]
    items = [make_candidate(None, key=key) for key in keys]
    with judge(answers) as (url, asked):
        config = RewardsConfig(terms={"judge": asking(url, at_once=1)}, batch_size=batch_size)
        scored = RewardMixture(config).score(items)
        assert scored.breakdown["judge"].tolist() == [0.5 if key == "fine" else 0.0 for key in keys]
        assert scored.failures == {"judge": len(ODD)}
        if batch_size == 1:
            assert asked.count("fine") == 4 and asked.count("slow") == 2, "only a failed call is tried again"
            assert asked.count("500") == 1 + 1 and asked.count("garbage") == 1


def test_a_judge_that_is_away_is_found_again_when_it_is_back():
    items = [make_candidate(None, key=str(number)) for number in range(PATIENCE + 4)]
    with judge(answers) as (url, asked):
        reward = build_reward("judge", asking(url, at_once=1))
        assert not reward.score_batches([[item] for item in items])[0][1].any() and len(asked) == len(items)
    away = time.monotonic()
    assert all(broken.all() for _, broken in reward.score_batches([[item] for item in items]))
    assert time.monotonic() - away < 5
    with judge(answers, int(url.split(":")[2].split("/")[0])) as (_, asked):
        assert not any(broken.any() for _, broken in reward.score_batches([[item] for item in items]))
        assert len(asked) == len(items)


def test_a_hanging_judge_is_not_waited_for_by_every_rollout():
    items = [make_candidate(None, key="slow") for _ in range(6 * PATIENCE)]
    with judge(answers) as (url, asked):
        reward = build_reward("judge", asking(url, at_once=4, read_timeout_s=0.1))
        assert all(broken.all() for _, broken in reward.score_batches([[item] for item in items]))
        assert PATIENCE <= len(asked) <= 2 * PATIENCE + 4


@contextmanager
def listening(reply: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that gives each connection to `reply`; its address."""

    def listen(server: socket.socket) -> None:
        with suppress(OSError):  # closed: the test is over
            while True:
                threading.Thread(target=reply, args=(server.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=listen, args=(server,), daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/judge"


@contextmanager
def trickling(kind: str) -> Iterator[str]:
    """A judge that sends sound answers, from their head or their body on a byte every 0.1 s; its address."""
    body = b'{"scores": [0.5]}'
    length = {"no length": b"\r\n", "chunked": b"Transfer-Encoding: chunked\r\n\r\n11\r\n"}
    head = b"HTTP/1.1 200 OK\r\n" + length.get(kind, b"Content-Length: 17\r\n\r\n")
    at_once = 5 if kind == "head" else len(head) + 1

    def reply(asked: socket.socket) -> None:
        with asked, suppress(OSError):
            asked.recv(1 << 16)
            asked.sendall((head + body)[:at_once])
            for byte in (head + body)[at_once:] + b"\r\n0\r\n\r\n" * (kind == "chunked"):
                time.sleep(0.1)
                asked.sendall(bytes([byte]))

    with listening(reply) as url:
        yield url


@pytest.mark.parametrize("kind", ["head", "body", "no length", "chunked"])
def test_an_answer_that_trickles_in_is_given_the_time_of_one_answer(kind):
    with trickling(kind) as url:
        quick, patient = ({"retries": 0, "read_timeout_s": seconds} for seconds in (0.3, 30.0))
        scores, broken = build_reward("judge", asking(url, **quick)).score_counted([make_candidate(None)])
        assert broken.all() and not scores.any()
        if kind == "body":
            scores, broken = build_reward("judge", asking(url, **patient)).score_counted([make_candidate(None)])
            assert scores.tolist() == [0.5] and not broken.any()


BROKEN = {
    "closes": b"",
    "closes within the head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "closes within the body": b'HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n{"scores"',
    "closes within a chunk": b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n11\r\n{"sco',
    "speaks another protocol": b"220 mail ready\r\n",
    "redirects": b"HTTP/1.1 302 Found\r\nLocation: {elsewhere}\r\nContent-Length: 0\r\n\r\n",
    "redirects for good": b"HTTP/1.1 308 Permanent Redirect\r\nLocation: {elsewhere}\r\nContent-Length: 0\r\n\r\n",
    "serves a page": b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 13\r\n\r\n<html></html>",
    "packs what is not packed": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n{{}}",
    "answers without a body": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "is not there": b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    "has nothing to say": b"HTTP/1.1 204 No Content\r\n\r\n",
    "has a head without end": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_judge_that_breaks_the_protocol_fails_its_rollout_alone(kind, caplog):
    """Each in no more time than its retries take; nobody follows where a judge points to."""
    with judge(answers) as (elsewhere, asked):

        def reply(connection: socket.socket) -> None:
            with connection:
                connection.settimeout(0.2)
                with suppress(OSError):
                    while connection.recv(1 << 16):
                        pass
                with suppress(OSError):
                    connection.sendall(BROKEN[kind].replace(b"{elsewhere}", elsewhere.encode()))

        with listening(reply) as url:
            began = time.monotonic()
            scores, broken = build_reward("x", asking(url)).score_counted([make_candidate(None), make_candidate(None)])
        assert broken.all() and not scores.any() and not asked
    assert time.monotonic() - began < 10 and url in caplog.text and "Traceback" not in caplog.text


def test_no_proxy_stands_between_a_run_and_its_judge(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with judge(answers) as (url, asked):
        scores, broken = build_reward("judge", asking(url)).score_counted([make_candidate(None, key="fine")])
    assert scores.tolist() == [0.5] and not broken.any() and asked == ["fine"]


@contextmanager
def endless(kind: str) -> Iterator[tuple[str, list[int]]]:
    """A judge whose answers never end; its address, and the bytes that each connection took of it."""
    packed = gzip.compress(bytes(2**26))
    length = {"length": f"Content-Length: {10**12}\r\n", "chunked": "Transfer-Encoding: chunked\r\n"}
    length |= {"packed": f"Content-Encoding: gzip\r\nContent-Length: {len(packed)}\r\n"}
    head = f"HTTP/1.1 {'500 No' if kind == 'refusal' else '200 OK'}\r\n{length.get(kind, '')}\r\n".encode()
    piece = {"chunked": b"10000\r\n" + b" " * 2**16 + b"\r\n", "packed": packed}.get(kind, b" " * 2**16)
    taken: list[int] = []

    def reply(asked: socket.socket) -> None:
        taken.append(0)
        place = len(taken) - 1
        with asked, suppress(OSError):
            asked.recv(1 << 16)
            asked.sendall(head)
            while True:
                asked.sendall(piece)
                taken[place] += len(piece)

    with listening(reply) as url:
        yield url, taken


@pytest.mark.parametrize("kind", ["length", "no length", "chunked", "packed", "refusal"])
def test_an_answer_that_never_ends_is_read_so_far_and_fails_its_rollout(kind, caplog):
    with endless(kind) as (url, taken):
        reward = build_reward("judge", asking(url, read_timeout_s=60.0))
        began = time.monotonic()
        tracemalloc.start()
        scores, broken = reward.score_counted([make_candidate(None)])
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert broken.all() and not scores.any() and time.monotonic() - began < 30
    assert len(taken) == 1 and taken[0] < ANSWER_BYTES + 2**24, "what the sockets hold comes on top"
    assert held < 8 * ANSWER_BYTES and "answer: more than 4 MiB" in caplog.text


def test_a_request_that_never_ends_is_not_kept(monkeypatch):
    monkeypatch.setattr(serving, "REQUEST_BYTES", 1000)
    asked, answered = [0], []

    async def receive() -> dict[str, Any]:
        asked[0] += 1
        return {"type": "http.request", "body": bytes(300), "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        answered.append(message)

    scope = {"type": "http", "method": "POST", "path": "/terms/format", "headers": [], "query_string": b""}
    app = serving.application({"format": build_reward("format", RewardTerm(kind="format"))})
    asyncio.run(app(scope, receive, send))  # pyright: ignore[reportArgumentType]
    assert asked == [4] and answered[0]["status"] == 413 and b"rewards.batch_size" in answered[1]["body"]


def test_the_documented_judge_judges(photograph, tmp_path):
    page = (project_root() / "docs" / "judge.md").read_text(encoding="utf-8")
    program = tmp_path / "judge.py"
    program.write_text(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], encoding="utf-8")
    request = json.loads(re.findall(r"```json\n(.*?)```", page, re.DOTALL)[0])
    assert request["rollouts"][0].keys() == json.loads(sent([make_candidate(photograph)]))["rollouts"][0].keys()
    with process(str(program)) as [url]:
        reward = build_reward("judge", asking(url, "generation"))
        scores, broken = reward.score_counted([make_candidate(photograph), make_candidate(None)])
    assert scores[0] == pytest.approx(1 - abs(photograph.mean() / 255 - 0.5)) and scores[1] == 0 and not broken.any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("url: judge.org/x", "no http or https address"),
        ("url: 'ftp://127.0.0.1/x'", "no http or https address"),
        ("url: 'http://127.0.0.1:99999/x'", "[Pp]ort out of range"),
        ("url: 'http://me:secret@127.0.0.1/x'", "token_env"),
        ("url: 'http://10.0.0.7:8090/x'", "allow_remote=true"),
        ("url: 'http://127.0.0.1.evil.org/x'", "allow_remote=true"),
        ("url: 'http://127.0.0.1/x', pause_s: 0", "pause_s=0"),
        ("url: 'http://127.0.0.1/x', timeout: 3", "timeout=3.*Valid options: expert, url"),
        ("retries: 3", "url=.*Field required"),
    ],
)
def test_a_wrong_address_is_refused_with_the_recipe(options, said):
    with pytest.raises(RecipeError, match=rf"rewards.terms.generation.options \(kind generation\):.*{said}"):
        compose_one(["recipe=grpo_tiny", f"{TERMS}.generation.options={{expert: http, {options}}}"])


def test_sound_addresses_and_the_kinds_own_options_are_taken():
    for url in ("http://localhost:1/x", "http://[::1]:8090/t", "https://127.0.0.2/"):
        options = f"{{expert: http, url: '{url}', metrics: [musiq], stripe_guard: false}}"
        compose_one(["recipe=grpo_tiny", f"{TERMS}.generation.options={options}"])
    remote = "{expert: http, url: 'http://gpu7:8090/x', allow_remote: true}"
    compose_one(["recipe=grpo_tiny", f"{TERMS}.format.options={remote}"])
    with pytest.raises(ValueError, match="token_env=NO_SUCH_NAME: .*holds no secret"):
        build_reward("judge", asking("http://127.0.0.1:1/", token_env="NO_SUCH_NAME"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["recipe=grpo_tiny", "terms=format,sharpness"],
            "terms=sharpness: is not one of the recipe's; to serve: format",
        ),
        (["terms=format"], "recipe=NAME is needed"),
        (["recipe=grpo_tiny", "port=65536"], "port=65536"),
        (["recipe=grpo_tiny", "host=127.0.0.1", "device=tpu"], "device=tpu"),
        (
            ["recipe=grpo_tiny", f"{TERMS}.format.options={{expert: http, url: 'http://[::1]/'}}", "terms=format"],
            "itself",
        ),
    ],
)
def test_serving_what_is_not_there_is_refused_in_a_line(words, said, capsys):
    assert serve_rewards.main(words) == 2
    assert said in capsys.readouterr().err
