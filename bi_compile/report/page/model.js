"use strict";
// The data, unpacked, and the questions that every view asks of it.

const OBJECTIONS = ["variant", "mixes rows", "unproven"];
const model = { data: null, graphs: [], entries: [] };

async function unpack() {
  const packed = Uint8Array.from(atob(document.getElementById("data").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const data = (model.data = await new Response(stream).json());
  model.graphs = data.graphs;
  for (const graph of data.graphs) {
    graph.short = graph.name.replace(/^graph_/, "");
    graph.before = graph.before.map((n) => (typeof n === "number" ? graph.nodes[n] : n));
    for (const side of ["nodes", "before"]) graph[side + "At"] = new Map(graph[side].map((n) => [n.name, n]));
  }
  // the graphs that run first: they are what was judged
  for (const graph of [...data.graphs].sort((a, b) => Boolean(b.certificate) - Boolean(a.certificate))) {
    for (const node of graph.nodes) model.entries.push(entry(graph, "nodes", node));
    // what a pass took out is no longer in the graph that was handed on, and is looked for all the same
    for (const node of graph.before) if (node.by) model.entries.push(entry(graph, "before", node));
  }
}

function entry(graph, side, node) {
  const place = ownFrame(node);
  const e = {
    graph, side, node,
    verdict: node.by ? "taken out" : node.verdict || "not judged here",
    pass: node.by ? node.pass : node.made ? node.made.pass : "",
    operator: node.op === "placeholder" ? "input" : node.op === "output" ? "output" : node.op === "get_attr" ? "constant" : node.operator,
    file: place ? place[0] : "",
    line: place ? place[1] : 0,
  };
  e.called = `${node.name}\n${e.operator}`.toLowerCase();
  e.text = [node.name, e.operator, e.verdict, e.pass, node.value, node.layer || "", node.input || "", e.file, place ? place[3] : "",
    node.made ? node.made.operator : "", (node.by || []).join(" "), reasonOf(node)].join("\n").toLowerCase();
  return e;
}

const stackOf = (node) => model.data.stacks[node.stack].map((i) => model.data.frames[i]);
const ownFrame = (node) => stackOf(node)[node.own];
const reasonOf = (node) => (node.reason === undefined ? "" : model.data.reasons[node.reason]);
const kind = (verdict) => (OBJECTIONS.includes(verdict) ? "objection" : { "row-local": "row-local", replaced: "replaced", trusted: "trusted", "taken out": "taken" }[verdict] || "none");
const tail = (file) => file.split("/").slice(-2).join("/");
const count = (things, of) => things.reduce((m, x) => m.set(of(x), (m.get(of(x)) || 0) + 1), new Map());
const plural = (n, what) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;

// An element: el("a.name", {title: "…"}, "text", child, …). What is given as text stays text.
function el(what, attributes = {}, ...children) {
  const [tag, ...classes] = what.split(".");
  const found = document.createElement(tag || "div");
  if (classes.length) found.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes))
    if (key.startsWith("on")) found.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== false) found.setAttribute(key, value === true ? "" : value);
  found.append(...children.flat().filter((c) => c !== null && c !== undefined && c !== false));
  return found;
}

const pill = (verdict) => el(`span.pill.c-${kind(verdict)}`, {}, verdict);

function table(heads, rows, go) {
  const numbers = heads.map((h) => h.endsWith("#"));
  return el("table", {},
    el("thead", {}, el("tr", {}, heads.map((h, i) => el(numbers[i] ? "th.n" : "th", {}, h.replace(/#$/, ""))))),
    el("tbody", {}, rows.map((cells, r) => {
      const row = el(go ? "tr.go" : "tr", go ? { tabindex: 0, onclick: () => go(r), onkeydown: (e) => e.key === "Enter" && go(r) } : {});
      row.append(...cells.map((c, i) => el(numbers[i] ? "td.n" : "td", {}, c === null ? "" : c)));
      return row;
    })));
}
