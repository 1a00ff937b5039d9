"use strict";
// The view "Nodes": search and filters, the list, and all that is known of one node.

const FILTERS = {
  graph: (e) => e.graph.short, verdict: (e) => e.verdict, pass: (e) => e.pass, operator: (e) => e.operator, file: (e) => tail(e.file),
};
const asked = { text: "", graph: "", verdict: "", pass: "", operator: "", file: "" };
const nodesView = { list: null, found: [], chosen: null, hops: 1 };

function showNodes(main) {
  const search = el("input", { id: "search", type: "text", placeholder: "search: operator, name, layer, shape, reason, line of code   ( / )", "aria-label": "search the nodes", autocomplete: "off", spellcheck: "false" });
  search.value = asked.text;
  search.addEventListener("input", () => { asked.text = search.value; findNodes(); });
  const counts = el("span.count", { id: "found", role: "status" });
  const selects = Object.entries(FILTERS).map(([name, of]) => {
    const of_all = [...count(model.entries, of)].filter(([value]) => value).sort((a, b) => (name === "graph" ? 0 : b[1] - a[1]));
    const select = el("select", { "aria-label": name, "data-filter": name },
      el("option", { value: "" }, `${name}: all`), of_all.map(([value, n]) => el("option", { value }, `${value}  (${n})`)));
    select.value = asked[name];
    select.addEventListener("change", () => { asked[name] = select.value; findNodes(); });
    return select;
  });
  const clear = el("button", { id: "clear", onclick: () => { for (const k in asked) asked[k] = ""; show("nodes"); } }, "clear");
  const box = el("div.list", { id: "list", role: "listbox", tabindex: 0, "aria-label": "nodes" });
  const right = el("section.right", { id: "detail", "aria-label": "the chosen node" });
  main.replaceChildren(el("div.split", {}, el("section.left", {}, el("div.filters", {}, search, selects, clear, counts), box), right));
  nodesView.list = virtualList(box, 46, nodeRow);
  findNodes();
}

function findNodes() {
  const words = asked.text.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = Object.entries(FILTERS).filter(([name]) => asked[name]);
  nodesView.found = model.entries.filter((e) => words.every((w) => e.text.includes(w)) && wanted.every(([name, of]) => of(e) === asked[name]));
  // what is called so comes before what only mentions it
  const called = (e) => words.every((w) => e.called.includes(w));
  if (words.length) nodesView.found = [...nodesView.found.filter(called), ...nodesView.found.filter((e) => !called(e))];
  document.getElementById("found").textContent = `${nodesView.found.length.toLocaleString("en")} of ${plural(model.entries.length, "node")}`;
  for (const select of document.querySelectorAll("[data-filter]")) select.classList.toggle("on", Boolean(asked[select.dataset.filter]));
  if (!nodesView.found.includes(nodesView.chosen)) nodesView.chosen = nodesView.found.find((e) => e.node.op === "call_function") || nodesView.found[0] || null;
  nodesView.list.show(nodesView.found);
  if (!nodesView.found.length) document.querySelector("#list .space").replaceChildren(el("p.empty", {}, "Nothing is found: another word, or fewer filters."));
  detail();
}

function nodeRow(e, i) {
  const row = el("div.row", { role: "option", "aria-selected": String(e === nodesView.chosen), "data-i": i, title: reasonOf(e.node) });
  row.append(el(`span.dot.${kind(e.verdict)}${["taken", "none"].includes(kind(e.verdict)) ? "" : `.b-${kind(e.verdict)}`}`),
    el("span.two", {}, el("code", {}, shortOperator(e.operator)), el("small", {}, e.node.input || e.node.name)),
    el("span.two", {}, el("small", {}, e.node.value), el("small", {}, e.verdict)),
    el("span.two", {}, el("small", {}, e.node.layer || ""), el("small", {}, e.file ? `${e.file.split("/").pop()}:${e.line}` : "")));
  row.addEventListener("click", () => choose(e));
  return row;
}

function choose(e, reveal) {
  nodesView.chosen = e;
  if (reveal) nodesView.list.reveal(nodesView.found.indexOf(e));
  else nodesView.list.repaint();
  detail();
}

function move(by) {
  const at = nodesView.found.indexOf(nodesView.chosen);
  const next = nodesView.found[Math.min(nodesView.found.length - 1, Math.max(0, at + by))];
  if (next) choose(next, true);
}

// From anywhere: the node's own entry, whatever the filters hide
function goTo(graph, side, node) {
  const found = model.entries.find((e) => e.graph === graph && e.node === node) || entry(graph, side, node);
  if (current !== "nodes" || !nodesView.found.includes(found)) {
    for (const k in asked) asked[k] = "";
    asked.graph = graph.short;
    nodesView.chosen = found;
    show("nodes");
  }
  choose(found, nodesView.found.includes(found));
}

function detail() {
  const right = document.getElementById("detail"), e = nodesView.chosen;
  if (!e) return right.replaceChildren();
  const { graph, side, node } = e, at = graph[side + "At"];
  const link = (n) => el("a", { href: "#", onclick: (event) => { event.preventDefault(); goTo(graph, side, n); } }, n.input || n.name);
  const several = (nodes) => nodes.flatMap((n, i) => [i ? ", " : "", link(n)]);
  const facts = [];
  const fact = (name, value) => { if (value && (typeof value === "string" || value.length !== 0)) facts.push(el("dt", {}, name), el("dd", {}, value)); };
  const [kinds, ...sizes] = [node.value.replace(/\[.*$/, ""), node.value];
  if (node.op === "call_function" || node.op === "uncompiled") fact("operator", el("code", {}, node.operator));
  fact("called", node.input && el("code", {}, node.input));
  fact("dtype", kinds && node.value.includes("[") && el("code", {}, kinds));
  fact("shape", sizes[0] && el("code", {}, node.value.split(", ").length > 1 && (node.value.match(/\[/g) || []).length > 1 ? node.value : node.value.replace(/^[^[]*(?=\[)/, "")));
  fact("stride", node.stride && el("code", {}, node.stride));
  fact("batch dimension", batchOf(node));
  fact("arguments", node.arguments && el("code", {}, node.arguments));
  fact("replaced", node.made && [el("code", {}, node.made.operator), ` by the pass ${node.made.pass}`]);
  fact("replaced by", node.by && [el("code", {}, node.by.join(", ")), ` in the pass ${node.pass}`]);
  fact("layer", node.layer && el("code", {}, node.layer));
  fact("inputs", several(node.inputs.map((i) => at.get(i)).filter(Boolean)));
  fact("used by", several((userTable(graph, side).get(node.name) || []).slice(0, 40)));
  fact("graph", graph.name);
  right.replaceChildren(pill(e.verdict), el("h2", {}, node.name), el("p.why", {}, reasonOf(node) || unjudged(e)), el("dl", {}, facts), source(node));
  if (node.op !== "uncompiled") right.append(...around(graph, side, node));
}

function unjudged(e) {
  if (e.side === "before") return "It was in the graph as it came, and a pass put something else in its place.";
  return e.graph.state === "stopped" ? "The compilation stopped before this graph was judged." : "This graph was handed on; what became of it is judged in the graph that runs.";
}

function batchOf(node) {
  if (!node.rowsOut) return "";
  const ins = Object.entries(node.rowsIn).map(([name, dims]) => `${name}: ${dims.join(", ")}`).join("; ");
  const out = node.rowsOut.length ? `dimension ${node.rowsOut.join(", ")} of the result` : "none in the result";
  return ins ? `${out} (of its inputs, ${ins})` : out;
}

function source(node) {
  const stack = stackOf(node), box = el("div", { id: "source" });
  if (!stack.length) return box;
  const draw = (i) => {
    const [file, line, fn, code] = stack[i], lines = model.data.excerpts[file] || {};
    const shown = el("div.code");
    if (lines[line] === undefined) shown.append(el("div.here", {}, el("i", {}, String(line)), code || "the file is not here, or has changed since"));
    else for (let n = line - 6; n <= line + 6; n++) {
      if (lines[n] === undefined) continue;
      const row = el(n === line ? "div.here" : "div", {}, el("i", {}, String(n)));
      row.insertAdjacentHTML("beforeend", lines[n] || " "); // made by Pygments, which escapes
      shown.append(row);
    }
    const frames = stack.map(([f, l, name], k) => el("li", {}, el("button", { "aria-pressed": String(k === i), title: f, onclick: () => draw(k) }, `${tail(f)}:${l}  ${name}`)));
    box.replaceChildren(el("h3", {}, `${tail(file)}, line ${line}${fn ? `, in ${fn}` : ""}`), shown, stack.length > 1 ? el("ol.stack", { "aria-label": "the calls that led here" }, frames) : "");
  };
  draw(node.own);
  return box;
}

function around(graph, side, node) {
  const box = el("div.picture", { id: "picture" }), more = el("small.c-none");
  const hops = el("span.hops", { role: "group", "aria-label": "steps away" }, [1, 2, 3].map((n) => el("button", { "data-hops": n, onclick: () => draw(n) }, String(n))));
  const draw = (n) => {
    nodesView.hops = n;
    for (const button of hops.children) button.setAttribute("aria-pressed", String(button.dataset.hops === String(n)));
    const { drawing, left } = picture(graph, side, node, n, (m) => goTo(graph, side, m));
    box.replaceChildren(drawing);
    more.textContent = left ? `${plural(left, "more node")} not drawn` : "";
  };
  draw(nodesView.hops);
  return [el("h3", {}, "Neighbourhood, steps away:", hops), box, more];
}
