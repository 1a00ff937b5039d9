"""The passes in order over one graph, then the audit.

A graph comes more than once where the face allows it: as captured ("captured"), where a composite operator is still whole;
after the compiler's own decompositions but before passes that the host has ("post_grad"); and as it is about to be lowered
("final"), after every decomposition and fusion. The audit judges the last one.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from . import cache_key
from .audit import certificate, measured
from .audit.inputs import BatchInput
from .audit.report import Finding, Report, audit
from .audit.spec import Knowledge
from .dump import Dump
from .errors import OptionError
from .options import Options
from .passes import PASSES
from .resolve import check_trust, resolve
from .rewrite.fx_utils import held_graphs
from .rewrite.splice import Change, Decompositions, rewrite
from .table import Table
from .targets import Target, for_device, get_target

log = logging.getLogger("bi_compile")


@dataclasses.dataclass
class Summary:
    """What a pipeline has done so far, over all its graphs."""

    graphs: int = 0
    nodes: int = 0
    seconds: float = 0.0
    """Passes and audit."""
    audit_seconds: float = 0.0
    replaced: Counter[str] = dataclasses.field(default_factory=Counter)
    left: Counter[str] = dataclasses.field(default_factory=Counter)
    """Operators that the audit objects to."""
    trusted: dict[str, str] = dataclasses.field(default_factory=dict)

    def line(self) -> str:
        """One line for a log."""

        def listed(counts: Mapping[str, int]) -> str:
            return ", ".join(f"{n} {op}" for op, n in sorted(counts.items())) or "none"

        return (
            f"{self.graphs} graphs, {self.nodes} nodes: replaced {listed(self.replaced)}; left {listed(self.left)}; "
            f"trusted {', '.join(sorted(self.trusted)) or 'none'}; passes and audit took {self.seconds:.2f} s"
        )


def devices_of(graph: fx.Graph) -> Counter[str]:
    """How many tensors of a graph lie on each type of device."""
    return Counter(
        leaf.device.type
        for node in graph.nodes
        for leaf in pytree.tree_leaves(node.meta.get("val"))
        if isinstance(leaf, torch.Tensor)
    )


class Pipeline:
    """Passes, audit and dump with one set of options; use it for every graph of one compilation.

    Raises:
        OptionError, TableError: as `resolve` and `Table` do.
    """

    def __init__(self, options: Options) -> None:
        self.resolved = resolve(options)
        self.options = options
        self.passes = self.resolved.passes
        self.summary = Summary()
        self._dump = Dump(options.dump_dir)
        self._warned: set[str] = set()
        if options.target:
            # raises where the passes do not go together; not kept, as what a library registers until the first graph belongs in it
            Table(self.passes, options.target)

    @functools.cache  # noqa: B019 - a pipeline lives as long as the process
    def knowledge(self, target: str) -> Knowledge:
        """The tables for the target of that name. Raises TableError where the passes do not go together."""
        return Knowledge(get_target(target), Table(self.passes, target), Table(PASSES, target), self.options.trust)

    def target_of(self, graph: fx.Graph) -> Target:
        """The target of the options, or that of the device on which the graph's tensors lie."""
        if self.resolved.target is not None:
            return self.resolved.target
        devices = devices_of(graph)
        # a graph for an accelerator may hold a few tensors of the host
        found = [d for d, _ in devices.most_common() if d != "cpu"] or ["cpu"]
        return for_device(found[0], compiled=self.options.inner == "inductor")

    def rewrite(
        self,
        graph: fx.Graph,
        stage: str,
        decompositions: Decompositions | None = None,
        target: Target | None = None,
    ) -> list[Change]:
        """Run every pass over `graph` and the graphs that it holds, in order; changes them in place.

        target: the graph's, for a caller that has found it.
        """
        from .rewrite import (
            fallbacks,
            patterns,  # imports Inductor, which takes a second, and which compiles the graph in any case
        )

        fallbacks.tell_inductor()

        start = time.perf_counter()
        target = target or self.target_of(graph)
        known = self.knowledge(target.name)
        dumped = self._dump.begin(stage, graph)
        changes: list[Change] = []
        subgraphs = list(held_graphs(graph))
        for p in self.passes:
            began = time.perf_counter()
            done = [
                change
                for g in (graph, *(held.graph for held in subgraphs))
                for change in patterns.replace(g, p, stage) + rewrite(g, known.table, p.name, decompositions)
            ]
            changes += done
            if dumped and done:
                dumped.after(p.name, graph, done, time.perf_counter() - began)
        if stage == "final" and target.before_codegen is not None:
            target.before_codegen(graph)
        for held in subgraphs:
            held.recompile()
        self.summary.replaced.update(c.operator for c in changes)
        if dumped:
            dumped.end(graph)
        self.summary.seconds += time.perf_counter() - start
        return changes

    def audit(
        self,
        graph: fx.Graph,
        extra_trust: Mapping[str, str] | None = None,
        target: Target | None = None,
        batch: Sequence[BatchInput] | None = None,
    ) -> Report:
        """Judge `graph`, which is about to run; stops or warns as `on_unproven` says.

        target: the graph's, for a caller that has found it.
        batch: the inputs that carry the batch; None: those that the option names, else what symbols say.

        Raises:
            AuditError: something is left, and on_unproven is "error".
        """
        start = time.perf_counter()
        check_trust(self.options.trust)
        known = self.knowledge((target or self.target_of(graph)).name)
        if extra_trust:
            known = dataclasses.replace(known, trust={**extra_trust, **known.trust})
        report = audit(graph, known, self.options.batch if batch is None else batch)
        if self.resolved.probe is not None:
            report = self._measured(self.resolved.probe, report, graph, known.target)
        self.summary.audit_seconds += time.perf_counter() - start
        self.summary.graphs += 1
        self.summary.nodes += len(report.findings)
        self.summary.left.update(f.operator for f in report.objections)
        self.summary.trusted.update({f.operator: f.reason for f in report.findings if f.verdict.value == "trusted"})
        self.certify(report, known)
        self.summary.seconds += time.perf_counter() - start
        if self.options.on_unproven == "error":
            report.raise_objections()
        for finding in report.objections:
            self._warn(finding)
        return report

    def _measured(self, data: Mapping[str, Any], report: Report, graph: fx.Graph, target: Target) -> Report:
        """The report with what the probe file says. Raises OptionError: it was measured on another device."""
        if data["device"] != target.device:
            raise OptionError(
                f"probe={self.options.probe!r} was measured on {data['device']!r}, and this graph runs on {target.device!r}: "
                "name a file of that device"
            )
        return measured.apply(data, report, graph, native=self.options.inner != "inductor")

    def certify(self, report: Report, known: Knowledge) -> None:
        """Put the certificate of the graph that came last into the dump, and into PyTorch's structured trace; where there is none, nothing."""
        if self._dump.last is not None:
            self._dump.last.write("audit.json", json.dumps(self.certificate(report, known), indent=1))

    def certificate(self, report: Report, known: Knowledge) -> dict[str, object]:
        """What `bi-compile audit` prints and compares."""
        return certificate.make(
            report,
            passes={p.name: cache_key.pass_digest(p) for p in self.passes},
            source=cache_key.source_digest(),
            trust=known.trust,
            batch=self.options.batch,
            native=known.target.native(),
        )

    def _warn(self, finding: Finding) -> None:
        if finding.operator not in self._warned:
            self._warned.add(finding.operator)
            log.warning("bi_compile: not batch-invariant: %s", finding)
            warnings.warn(f"bi_compile: not batch-invariant: {finding}", stacklevel=2)

    def uuid(self) -> str:
        """A digest of the passes' source, this package's source, the options and torch's version; a cache key."""
        return cache_key.digest(self.resolved)
