"""The plots of docs/use/cost.md, still-differs.md and reinforcement-learning.md, from the measurements in docs/data/: `make plots`.

Each CSV begins with a comment that says what was measured, on which device and when; it stands under the plot too. The
pictures have no background and a mid grey for text, so that they can be read on a light and on a dark page.
"""

from __future__ import annotations

import csv
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

DOCS = Path(__file__).parent
GREY = "#7d7d7d"
COLOURS = ("#d9730d", "#2f80ed", "#1f9d6a")  # told apart by those who see no red, and on black and white grounds
pyplot.rcParams |= {
    "svg.hashsalt": "bi-compile",  # the same data gives the same file
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.labelcolor": GREY,
    "svg.fonttype": "none",  # text stays text: smaller, and a reader can search it
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 11,
}


def read(name: str) -> tuple[str, list[dict[str, str]]]:
    """What a file of docs/data says of itself, and its rows."""
    said, *lines = (DOCS / "data" / f"{name}.csv").read_text().splitlines()
    return said.removeprefix("# "), list(csv.DictReader(lines))


def grouped(rows: list[dict[str, str]], key: str) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found


def save(name: str, figure: Any, said: str) -> None:
    figure.text(0.01, -0.02, textwrap.fill(said, 160), fontsize=8, va="top", color=GREY)
    figure.savefig(
        DOCS / "pictures" / f"{name}.svg", transparent=True, bbox_inches="tight", metadata={"Date": None, "Title": said}
    )
    pyplot.close(figure)


def decode_steps() -> None:
    """Ratio by batch; shaded from the batch on in which the other's row differs."""
    said, rows = read("decode_steps")
    models = grouped(rows, "model")
    figure, axes = pyplot.subplots(1, len(models), figsize=(9, 3.2), sharey=True, layout="constrained")
    for axis, (model, points) in zip(axes, models.items(), strict=True):
        batches = [int(p["batch"]) for p in points]
        axis.plot(batches, [float(p["ratio"]) for p in points], "o-", color=COLOURS[1])
        varies = [b for b, p in zip(batches, points, strict=True) if p["varies"] == "1"]
        if varies:
            axis.axvspan(varies[0], batches[-1], color=COLOURS[0], alpha=0.2, lw=0)
            axis.text(batches[-1], 0.05, "Inductor's row differs ", color=COLOURS[0], ha="right")
        axis.axhline(1, color=GREY, lw=0.8, ls=":")
        axis.set_xscale("log", base=2)
        axis.set_xticks(batches, map(str, batches))
        axis.set_ylim(0, 1.3)
        axis.set_title(model, fontsize=11)
        axis.set_xlabel("batch")
    axes[0].set_ylabel("Inductor's time / ours")
    save("decode_steps", figure, said)


def vllm_throughput() -> None:
    """Tokens per second by the number of requests."""
    said, rows = read("vllm_throughput")
    figure, axis = pyplot.subplots(figsize=(9, 3.6), layout="constrained")
    for colour, mark, (mode, points) in zip(COLOURS, "osD", grouped(rows, "mode").items(), strict=True):
        requests = [int(p["requests"]) for p in points]
        tokens = [float(p["tokens_per_second"]) for p in points]
        axis.plot(requests, tokens, f"{mark}-", color=colour, label=mode)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=10)
    axis.set_xticks(requests, map(str, requests))
    axis.set_xlabel("requests at once")
    axis.set_ylabel("tokens per second")
    axis.legend(frameon=False)
    save("vllm_throughput", figure, said)


def equal_answers() -> None:
    """The share of answers that are equal up to a token: their tokens, and the logprobs of these."""
    said, rows = read("equal_answers")
    figure, axis = pyplot.subplots(figsize=(9, 3.2), layout="constrained")
    lines = (("equal_tokens", "tokens", "-"), ("equal_logprobs", "logprobs", ":"))
    for colour, (mode, points) in zip(COLOURS, grouped(rows, "mode").items(), strict=False):
        for column, what, dashes in lines:
            shares = [int(p[column]) / int(p["of"]) for p in points]
            positions = [int(p["position"]) for p in points]
            axis.step(positions, shares, dashes, where="post", color=colour, lw=2, label=f"{mode}: {what}")
    axis.set_ylim(0, 1.05)
    axis.set_xlabel("position in the answer, tokens")
    axis.set_ylabel("share of answers equal so far")
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.12, 0.03))
    save("equal_answers", figure, said)


def rl_on_cpu() -> None:
    """How far the trainer is from the rollout, step by step."""
    said, rows = read("rl_on_cpu")
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, column, what in zip(
        axes, ("ratio", "kl"), ("largest |importance ratio - 1|", "KL divergence"), strict=True
    ):
        for colour, mark, (mode, points) in zip(COLOURS, "os", grouped(rows, "mode").items(), strict=False):
            steps = [int(float(p["step"])) + 1 for p in points]
            axis.plot(
                steps, [float(p[column]) for p in points], f"{mark}-", ms=4, color=colour, label=f"{mode} the pass"
            )
        axis.set_xlabel("step")
        axis.set_ylabel(what)
        axis.set_ylim(bottom=min(0, *(float(p[column]) for p in rows)) - 0.02 * max(float(p[column]) for p in rows))
    axes[0].legend(frameon=False)
    save("rl_on_cpu", figure, said)


if __name__ == "__main__":
    equal_answers()
    if (DOCS / "data" / "rl_on_cpu.csv").exists():  # examples/rl_on_cpu.py --csv
        rl_on_cpu()
    decode_steps()
    vllm_throughput()
