"""The command `bi-compile`: the one room that knows a terminal."""

from .app import app

__all__ = ["app"]
