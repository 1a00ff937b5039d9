"""The demonstration: the real model, how changed words are marked, what its counts say."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from bi_compile.cli.demo import dialogue
from bi_compile.demo.show import QUESTIONS, Case, Outcome, Row, read, words
from bi_compile.measure.models import smollm2
from bi_compile.measure.process import run_module


@pytest.mark.xdist_group("second engine")
def test_a_real_model_gives_real_words_the_same_in_company(tmp_path: Path) -> None:
    """`make demo` itself shows that they differ without the pass, and says so if they do not."""
    asked = list(QUESTIONS[1:6])
    plan = {
        "model": str(smollm2(tmp_path / "model")),
        "dtype": "bfloat16",
        "max_model_len": 128,
        "questions": asked,
        "batches": [2, 5],
        "tokens": 10,
        "compilation_config": {"custom_passes": ["bi_ascend"]},
    }
    result, _ = run_module("bi_compile.measure.requests", plan)
    assert [(batch["logprobs"], batch["tokens"]) for batch in result["batches"].values()] == [(0, 0)] * 2
    alone, together = result["texts"]
    assert alone == together
    assert alone[QUESTIONS.index("What is photosynthesis?") - 1].startswith("Photosynthesis is")


def test_the_words_that_changed_are_marked() -> None:
    pieces = words("The sky is blue, and so on.", "The sky is\n\ngreen, and so it was.")
    assert pieces == [("The sky is\n\n", False), ("green, ", True), ("and so ", False), ("it was.", True)]
    assert words("", "") == [] and words("a", "") == [] and words("a b", "a b") == [("a b", False)]
    assert words("", "a") == [("a", True)]


def test_a_question_is_shown_where_any_answer_changed() -> None:
    def side(*texts: tuple[str, str]) -> Outcome:
        result = {"requests": 3, "texts": [*zip(*texts, strict=True)], "batches": {"3": {"logprobs": 2, "tokens": 1}}}
        return Outcome(*read(result), seconds=1.0, texts=texts)

    row = Row(
        Case("vLLM", "", "", {}, {}),
        side(("a", "a"), ("a b", "a c"), ("a", "a")),
        side(("x", "x"), ("y", "y"), ("z", "w")),
    )
    assert (row.without.differ, row.without.text) == (2, "logprobs 2 of 3, text 1 of 3")
    changed = row.changed
    assert [answer.question for answer in changed] == list(QUESTIONS[1:3])
    with (console := Console(width=100)).capture() as printed:
        for answer in changed:
            console.print(dialogue(answer))
    text = printed.get()
    assert "in a batch" in text and "a [c]" in text and "with the pass, alone and in a batch" in text and "[w]" in text
