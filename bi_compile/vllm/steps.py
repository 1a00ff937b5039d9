"""Which steps of a worker are like none before: they may run operators that no earlier one ran."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Steps:
    """The kinds of requests that a worker has answered together, told from vLLM's `SchedulerOutput`.

    A request's kind is what it asks for otherwise than by default (top_p, a seed, prompt_logprobs, images) and whether a step
    computes several of its tokens or one. A step like the last one costs no look at its requests.
    """

    def __init__(self) -> None:
        self._running: dict[str, Any] = {}
        self._seen: set[Any] = set()
        self._steady = False

    def is_new(self, scheduled: Any) -> bool:
        """Whether no step before had requests of these kinds together."""
        tokens = scheduled.num_scheduled_tokens
        decodes = scheduled.total_num_scheduled_tokens == len(tokens)
        same = not scheduled.scheduled_new_reqs and not scheduled.finished_req_ids
        if (same and decodes and self._steady) or not tokens:
            return False
        for finished in scheduled.finished_req_ids:
            self._running.pop(finished, None)
        for request in scheduled.scheduled_new_reqs:
            self._running[request.req_id] = _kind(request)
        kinds = frozenset((self._running.get(request), n > 1) for request, n in tokens.items())
        new = kinds not in self._seen
        self._seen.add(kinds)
        self._steady = decodes
        return new


def _kind(request: Any) -> Any:
    asked = [_asked(params) for params in (request.sampling_params, request.pooling_params) if params is not None]
    return (*asked, bool(request.mm_features), request.prompt_embeds is not None)


def _asked(params: Any) -> frozenset[tuple[str, bool]]:
    kind: Callable[[], Any] = type(params)
    default = _default(kind)
    values = ((name, getattr(params, name)) for name in params.__struct_fields__)
    return frozenset((name, bool(value)) for name, value in values if value != getattr(default, name))


@functools.cache
def _default(kind: Callable[[], Any]) -> Any:
    return kind()
