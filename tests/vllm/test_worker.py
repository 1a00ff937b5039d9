"""What a worker's process holds, and which of its steps are judged."""

from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams, envs

from bi_compile import HostError
from bi_compile.vllm.shared import attribute, environment, shared
from bi_compile.vllm.steps import Steps

SPLIT = "VLLM_CPU_ATTN_SPLIT_KV"


def step(new: dict[str, SamplingParams], tokens: dict[str, int], finished: set[str] = frozenset()) -> Any:  # type: ignore[assignment]
    """A SchedulerOutput, of which only this much is looked at."""
    requests = [
        SimpleNamespace(req_id=name, sampling_params=asked, pooling_params=None, mm_features=[], prompt_embeds=None)
        for name, asked in new.items()
    ]
    return SimpleNamespace(
        scheduled_new_reqs=requests,
        num_scheduled_tokens=tokens,
        total_num_scheduled_tokens=sum(tokens.values()),
        finished_req_ids=finished,
    )


def test_a_step_is_judged_when_its_requests_ask_for_something_new() -> None:
    steps, greedy, seeded = Steps(), SamplingParams(temperature=0), SamplingParams(temperature=0.7, seed=3)
    assert steps.is_new(step({"a": greedy}, {"a": 7}))
    assert steps.is_new(step({}, {"a": 1})), "its first token by itself"
    assert not steps.is_new(step({}, {"a": 1}))
    assert not steps.is_new(step({"b": greedy}, {"b": 20}, finished={"a"}))
    assert steps.is_new(step({"c": greedy}, {"b": 1, "c": 3})), "together"
    assert steps.is_new(step({"d": seeded}, {"d": 3}, finished={"b", "c"}))
    assert steps.is_new(step({}, {"d": 1}))
    assert not steps.is_new(step({}, {})), "nothing runs"


def test_what_is_shared_lives_as_long_as_any_of_its_users() -> None:
    owner, made = SimpleNamespace(value=1), []

    def make() -> contextlib.AbstractContextManager[None]:
        made.append(1)
        return attribute(owner, "value", 2)

    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(shared("test", make))
    second.enter_context(shared("test", make))
    first.close()
    assert owner.value == 2 and len(made) == 1
    second.close()
    assert owner.value == 1


def test_a_variable_that_vllm_has_read_already_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SPLIT, raising=False)
    envs.enable_envs_cache()
    try:
        with environment(SPLIT, "0", "a test"):
            assert envs.VLLM_CPU_ATTN_SPLIT_KV is False
        assert envs.VLLM_CPU_ATTN_SPLIT_KV is True and SPLIT not in os.environ
    finally:
        envs.disable_envs_cache()


def test_a_variable_that_vllm_does_not_read_again_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs, SPLIT, True, raising=False)  # as a module that took the value over would have it
    sentence = f"{SPLIT} stays True in this process although {SPLIT}=0 is set, and a test"
    with pytest.raises(HostError, match=sentence), environment(SPLIT, "0", "a test"):
        pass
