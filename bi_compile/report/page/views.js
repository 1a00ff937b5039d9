"use strict";
// The other views: overview, before and after, uncompiled, certificate, bisection.

function showOverview(main) {
  const judged = model.entries.filter((e) => e.node.verdict);
  const found = judged.filter((e) => kind(e.verdict) === "objection");
  const stopped = model.graphs.filter((g) => g.state === "stopped");
  const good = !found.length && !stopped.length && judged.length;
  const pick = (filters) => () => { for (const k in asked) asked[k] = ""; Object.assign(asked, filters); nodesView.chosen = null; show("nodes"); };
  const numbers = count(judged, (e) => e.verdict);
  const taken = model.entries.filter((e) => e.verdict === "taken out");
  const tiles = [["row-local", numbers.get("row-local") || 0, "row-local by nature"], ["replaced", numbers.get("replaced") || 0, "invariant operators of bi-compile"], ["trusted", numbers.get("trusted") || 0, "trusted, with a reason"], ["", found.length, "refused"]];
  const heading = good ? "Batch-invariant" : found.length ? "Not batch-invariant" : stopped.length ? "The compilation stopped" : "Nothing was judged";
  const targets = [...new Set(model.graphs.map((g) => g.target).filter(Boolean))].join(", ");
  const lede = `${plural(model.graphs.length, "graph")}${targets ? ` for ${targets}` : ""}, ${plural(judged.length, "judged node")}. ` +
    (good ? "A row of every result is, bit for bit, a function of the same row of the inputs." : found.length ? "These nodes keep the graph from it:" : stopped.length ? `${stopped.map((g) => g.name).join(", ")} was never judged.` : "");
  const page = el("div.page", {}, el(`p.verdict.${good ? "good" : "bad"}`, { id: "verdict" }, heading), el("p.lede", {}, lede));
  if (found.length) page.append(grouped("Refused", "", found, pick));
  page.append(
    el("div.tiles", {}, tiles.map(([verdict, n, what]) => el("button.tile", { onclick: verdict ? pick({ verdict }) : pick(found.length ? { verdict: found[0].verdict } : {}) }, el("b", { class: n && !verdict ? "c-objection" : verdict && n ? `c-${kind(verdict)}` : "" }, n.toLocaleString("en")), el("span", {}, what)))),
    el("div.bar", { title: "the judged nodes by verdict" }, [["replaced", numbers.get("replaced")], ["trusted", numbers.get("trusted")], ["objection", found.length], ["row-local", numbers.get("row-local")]].filter(([, n]) => n).map(([k, n]) => el(`i.b-${k}`, { style: `flex:${n}` }))));
  const groups = [...count(taken, (e) => [e.pass, e.graph.short, e.operator, countedNames(e.node.by)].join("\t"))].map(([key, n]) => [...key.split("\t"), n]);
  page.append(el("div.card", {}, el("h2", {}, "Replaced"), groups.length
    ? table(["pass", "graph", "operator", "replaced by", "count#"], groups.map(([pass, graph, operator, by, n]) => [pass, graph, el("code", {}, operator), el("code", {}, by), String(n)]), (r) => pick({ pass: groups[r][0], graph: groups[r][1], operator: groups[r][2] })())
    : el("p", {}, "Nothing was replaced in these graphs.")));
  const trusted = judged.filter((e) => e.verdict === "trusted");
  if (trusted.length) page.append(grouped("Trusted", "Native operators that the target, or you, declare invariant.", trusted, pick));
  page.append(el("div.card", {}, el("h2", {}, "Graphs"), table(["graph", "target", "verdict", "nodes#", "replaced#", "refused#", "passes, ms#"],
    model.graphs.map((g) => [el("code", {}, g.name), g.target, el(`span.pill.${g.state === "invariant" ? "c-good" : g.state === "handed on" ? "c-none" : "c-objection"}`, { title: g.state === "handed on" ? "judged in the graph that runs" : "" }, g.state),
      String(g.nodes.length), String(g.passes.reduce((n, p) => n + p.count, 0)), g.certificate ? String(g.nodes.filter((n) => kind(n.verdict) === "objection").length) : "", g.passes.reduce((t, p) => t + p.ms, 0).toFixed(1)]),
    (r) => pick({ graph: model.graphs[r].short })())));
  main.replaceChildren(page);
}

const countedNames = (by) => [...count(by || [], (x) => x)].map(([name, n]) => (n === 1 ? name : `${n} ${name}`)).join(", ");

function grouped(title, said, entries, pick) {
  const groups = new Map();
  for (const e of entries) {
    const key = `${e.operator}\t${e.verdict}\t${reasonOf(e.node)}`;
    groups.has(key) ? groups.get(key).push(e) : groups.set(key, [e]);
  }
  const rows = [...groups.values()];
  return el("div.card", {}, el("h2", {}, title), said ? el("p", {}, said) : null,
    table(["operator", "verdict", "reason", "first at", "count#"], rows.map(([e, ...more]) => [el("code", {}, e.operator), pill(e.verdict), reasonOf(e.node), e.file ? el("code", { title: e.file }, `${tail(e.file)}:${e.line}`) : "", String(1 + more.length)]),
      (r) => pick({ operator: rows[r][0].operator, verdict: rows[r][0].verdict })()));
}

// -- before and after ------------------------------------------------------------------------------------------------

const compare = { graph: null, only: false, rows: [], list: null, at: -1 };

function showCompare(main) {
  const graphs = model.graphs.filter((g) => g.rows.length);
  if (!graphs.length) return main.replaceChildren(el("p.wait", {}, "There is no graph here with a before and an after."));
  if (!graphs.includes(compare.graph)) compare.graph = graphs.find((g) => g.passes.length) || graphs[0];
  const select = el("select", { id: "which", "aria-label": "graph" }, graphs.map((g, i) => el("option", { value: i }, `${g.name}  (${plural(g.passes.reduce((n, p) => n + p.count, 0), "replacement")})`)));
  select.value = String(graphs.indexOf(compare.graph));
  select.addEventListener("change", () => { compare.graph = graphs[select.value]; compare.at = -1; fillCompare(); });
  const only = el("label", {}, el("input", { type: "checkbox", id: "only", onchange: (e) => { compare.only = e.target.checked; fillCompare(); } }), " changes only");
  only.firstChild.checked = compare.only;
  const box = el("div.list", { id: "pairs", tabindex: 0 });
  main.replaceChildren(el("div.compare", {}, el("div.filters", {}, select, only, el("button", { id: "next", onclick: () => change(1) }, "next change (n)"), el("span.count", { id: "changes", role: "status" })), el("div.heads", {}, el("div", {}, "as it came"), el("div", {}, "as it was handed on")), box));
  compare.list = virtualList(box, 26, pairRow);
  fillCompare();
}

function fillCompare() {
  const g = compare.graph, rows = [];
  for (const [tag, i1, i2, j1, j2] of g.rows)
    for (let k = 0; k < Math.max(i2 - i1, j2 - j1); k++)
      rows.push({ a: i1 + k < i2 ? g.before[i1 + k] : null, b: j1 + k < j2 ? g.nodes[j1 + k] : null, changed: tag !== "equal", first: tag !== "equal" && k === 0 });
  const near = (i) => rows.slice(Math.max(0, i - 2), i + 3).some((r) => r.changed);
  compare.rows = compare.only ? rows.flatMap((r, i) => (near(i) ? [r] : i && near(i - 1) ? [{ skip: true }] : [])) : rows;
  compare.list.show(compare.rows);
  document.getElementById("changes").textContent = plural(rows.filter((r) => r.first).length, "change");
}

function pairRow(r) {
  if (r.skip) return el("div.pair.skip", {}, el("div", {}, "⋯"));
  const half = (n, side, mark) => {
    if (!n) return el("div.gone");
    const text = n.op === "call_function" ? `${shortOperator(n.operator)}(${n.arguments})` : `${n.op} ${n.input || ""}`;
    return el(r.changed ? `div.${mark}` : "div", { title: `${n.name} = ${text}\n${n.value}`, "data-node": n.name, onclick: () => goTo(compare.graph, side, n) }, el("b", {}, n.name), el("span.v", {}, ` ${n.value} `), text);
  };
  return el("div.pair", {}, half(r.a, "before", "cut"), half(r.b, "nodes", "add"));
}

function change(by) {
  const starts = compare.rows.flatMap((r, i) => (r.first ? [i] : []));
  if (!starts.length) return;
  compare.at = by > 0 ? starts.find((i) => i > compare.at) ?? starts[0] : starts.filter((i) => i < compare.at).pop() ?? starts[starts.length - 1];
  compare.list.reveal(compare.at);
  document.getElementById("changes").textContent = `${starts.indexOf(compare.at) + 1} of ${plural(starts.length, "change")}`;
}

// -- uncompiled, certificate -----------------------------------------------------------------------------------------

function showUncompiled(main) {
  const ran = model.entries.filter((e) => e.node.op === "uncompiled");
  main.replaceChildren(el("div.page", {}, el("h2", {}, "What ran without a graph"),
    ran.length ? table(["operator", "verdict", "reason", "first called at"], ran.map((e) => [el("code", {}, e.operator), pill(e.verdict), reasonOf(e.node), e.file ? el("code", { title: e.file }, `${tail(e.file)}:${e.line}`) : ""]), (r) => goTo(ran[r].graph, "nodes", ran[r].node))
      : el("p.lede", {}, "This dump holds none: only a vLLM engine writes down what its worker runs outside of compiled graphs.")));
}

function showCertificate(main) {
  const page = el("div.page", {}, el("h2", {}, "Certificates"), el("p.lede", {}, "Two runs with equal certificates ran the same program under the same rules. `bi-compile audit --check A B` compares them."));
  for (const g of model.graphs.filter((g) => g.certificate)) {
    const c = g.certificate, facts = (pairs) => el("dl", {}, pairs.flatMap(([k, v]) => [el("dt", {}, k), el("dd", {}, v)]));
    page.append(el("div.card", {}, el("h2", {}, el("code", {}, g.name), " ", el(`span.pill.${c.invariant ? "c-good" : "c-objection"}`, {}, c.invariant ? "batch-invariant" : "not batch-invariant")),
      facts([["target", c.target], ["graph", el("span.hash", {}, c.graph)], ["source of bi-compile", el("span.hash", {}, c.source)], ["batch", c.batch ? JSON.stringify(c.batch) : "dimension 0 of the inputs"], ["form", c.format]]),
      el("h3", {}, "Versions"), facts(Object.entries(c.versions)),
      el("h3", {}, "Trust given by the user"), Object.keys(c.trust).length ? facts(Object.entries(c.trust)) : el("p", {}, "none"),
      el("h3", {}, "Passes, in order"), facts(c.passes.map((p) => [p.name, el("span.hash", {}, p.uuid)]))));
  }
  main.replaceChildren(page);
}

// -- bisection -------------------------------------------------------------------------------------------------------

function showBisection(main) {
  const { steps, line } = model.data.bisection, W = 1060, H = 320, left = 60, bottom = 30;
  const top = Math.max(1, ...steps.map((s) => s.ulps || 0)), high = Math.log10(top + 1);
  const x = (i) => left + ((W - left - 10) * i) / Math.max(1, steps.length - 1);
  const y = (u) => H - bottom - ((H - bottom - 14) * Math.log10(u + 1)) / high;
  const drawing = svg("svg", { class: "curve", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "distance from operator to operator" });
  for (let p = 0; p <= Math.ceil(high); p++) {
    const u = p === 0 ? 0 : 10 ** p - 1;
    if (y(u) < 6) break;
    drawing.append(svg("line", { class: "grid", x1: left, x2: W - 10, y1: y(u), y2: y(u) }), svg("text", { x: left - 8, y: y(u) + 4, "text-anchor": "end" }, p === 0 ? "equal" : `1e${p}`));
  }
  drawing.append(svg("text", { x: left, y: H - 6 }, "first operator"), svg("text", { x: W - 10, y: H - 6, "text-anchor": "end" }, "output"),
    svg("path", { class: "path", d: steps.map((s, i) => `${i ? "L" : "M"}${x(i).toFixed(1)} ${y(s.ulps || 0).toFixed(1)}`).join("") }));
  steps.forEach((s, i) => drawing.append(svg("circle", { class: s.elements ? (s.ulps === null ? "nan" : "") : "zero", cx: x(i), cy: y(s.ulps || 0), r: steps.length > 400 ? 1.8 : 3 },
    svg("title", {}, `${s.operator} ${s.layer}\n${s.where}\n${s.elements} of ${s.of} elements, ${s.ulps === null ? "a NaN" : `at most ${s.ulps} ULP`}`))));
  const start = steps.findIndex((s) => s.elements), rest = start < 0 ? [] : steps.slice(start);
  main.replaceChildren(el("div.page", {}, el("h2", {}, "How far the row is from the row alone"), el("p.lede", {}, line), el("div.card", {}, el("p", {}, "Largest distance in units of the last place, operator by operator; the axis is logarithmic."), drawing),
    el("div.card", {}, el("h2", {}, "From the first operator that differs"), table(["operator", "layer", "line", "elements#", "max ULP#"], rest.slice(0, 200).map((s) => [el("code", {}, s.operator), s.layer, s.where, `${s.elements} of ${s.of}`, s.ulps === null ? "NaN" : s.ulps.toLocaleString("en")])))));
}
