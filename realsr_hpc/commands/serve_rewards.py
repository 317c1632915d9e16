"""Serve a recipe's rewards to runs elsewhere: realsr-hpc serve-rewards recipe=NAME [section.field=value ...]

terms=NAME,...     which of the recipe's rewards; default: all that the recipe computes itself
host=127.0.0.1     address to listen on; for requests from other machines set another one, and token_env
port=8090          0 chooses a free port; the address is printed
device=auto        device of the rewards' networks: auto, cpu or cuda
token_env=NAME     environment variable with a secret that callers must send

A run uses a served term with expert=http and the printed address as url (docs/judge.md). Stops with Ctrl-C.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping

from realsr_hpc.config.arguments import read_count, read_with_overrides
from realsr_hpc.config.learning import RewardTerm
from realsr_hpc.config.reward_options import is_elsewhere

DEFAULTS: dict[str, str | None] = {
    "recipe": None,
    "terms": None,
    "host": "127.0.0.1",
    "port": "8090",
    "device": "auto",
    "token_env": None,
}


def main(arguments: list[str]) -> int:
    """Exit code: 0 stopped, 2 wrong usage."""
    try:
        given, overrides = read_with_overrides(arguments, DEFAULTS, __doc__, sections_only=True)
        terms = chosen_terms(given, overrides)
        port = read_count(given, "port")
        from realsr_hpc.rewards.http import token
        from realsr_hpc.rewards.serving import application, listen, serve

        secret = token(given["token_env"], "token_env") if given["token_env"] else None
        rewards = built(terms, str(given["device"]))
        where = listen(str(given["host"]), port)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S")
    host, port = where.getsockname()[:2]
    for name in rewards:
        print(f"http://{f'[{host}]' if ':' in host else host}:{port}/terms/{name}", flush=True)
    serve(application(rewards, secret), where)
    return 0


def chosen_terms(given: Mapping[str, str | None], overrides: list[str]) -> dict[str, RewardTerm]:
    """The terms to serve. Raises ValueError for a term that is missing or itself computed by another process."""
    from realsr_hpc.config.load import compose_one

    if not given["recipe"]:
        raise ValueError("recipe=NAME is needed: its rewards are served")
    terms = compose_one([f"recipe={given['recipe']}", *overrides]).rewards.terms
    own = [name for name, term in terms.items() if not is_elsewhere(term)]
    names = given["terms"].split(",") if given["terms"] else own
    for name in names:
        if name not in own:
            why = "asks another process itself (expert=http)" if name in terms else "is not one of the recipe's"
            raise ValueError(f"terms={name}: {why}; to serve: {', '.join(own) or 'none'}")
    if not names:
        raise ValueError(f"recipe={given['recipe']}: has no reward to serve")
    return {name: terms[name] for name in names}


def built(terms: Mapping[str, RewardTerm], device: str) -> dict:
    """The rewards on their device."""
    from realsr_hpc.parallel import backend
    from realsr_hpc.rewards.mixture import build_reward

    where = backend.chosen_device("device", device, backend.device())
    return {name: build_reward(name, term, where) for name, term in terms.items()}
