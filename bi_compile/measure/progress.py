"""How a measurement says how far it is: it calls a function, and knows of no terminal."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]
"""Called with what is being done and the part that is done, from 0 to 1."""


def quiet(what: str, done: float) -> None:
    """Says nothing."""
