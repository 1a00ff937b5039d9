"use strict";
// A node's neighbourhood: what it is computed from and what is computed from it, laid out by dagre.

const MOST = 60;

function neighbourhood(graph, side, node, hops) {
  const at = graph[side + "At"];
  const users = userTable(graph, side);
  const found = new Map([[node.name, node]]);
  let left = 0;
  for (const step of [(n) => n.inputs.map((i) => at.get(i)), (n) => users.get(n.name) || []]) {
    let ring = [node];
    for (let hop = 0; hop < hops; hop++) {
      const next = [];
      for (const n of ring)
        for (const m of step(n))
          if (m && !found.has(m.name)) {
            if (found.size >= MOST) left++;
            else { found.set(m.name, m); next.push(m); }
          }
      ring = next;
    }
  }
  return { nodes: [...found.values()], left };
}

function userTable(graph, side) {
  const key = side + "Users";
  if (!graph[key]) {
    graph[key] = new Map();
    for (const n of graph[side]) for (const i of n.inputs) graph[key].has(i) ? graph[key].get(i).push(n) : graph[key].set(i, [n]);
  }
  return graph[key];
}

const SVG = "http://www.w3.org/2000/svg";
function svg(tag, attributes, ...children) {
  const found = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
  found.append(...children);
  return found;
}

function picture(graph, side, node, hops, go) {
  const { nodes, left } = neighbourhood(graph, side, node, hops);
  const g = new dagre.graphlib.Graph();
  g.setGraph({ rankdir: "TB", nodesep: 16, ranksep: 30, marginx: 12, marginy: 12 });
  g.setDefaultEdgeLabel(() => ({}));
  const label = (n) => clip(n.op === "placeholder" ? n.input || n.name : n.op === "call_function" ? shortOperator(n.operator) : n.name, 34);
  for (const n of nodes) g.setNode(n.name, { width: Math.max(90, 7.4 * Math.max(label(n).length, 0.88 * clip(n.value, 34).length) + 22), height: 40 });
  for (const n of nodes) for (const i of n.inputs) if (g.hasNode(i)) g.setEdge(i, n.name);
  dagre.layout(g);
  const size = g.graph();
  const drawing = svg("svg", { width: size.width, height: size.height, viewBox: `0 0 ${size.width} ${size.height}`, role: "img", "aria-label": `neighbourhood of ${node.name}` });
  drawing.append(svg("defs", {}, svg("marker", { id: "tip", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" }, svg("path", { d: "M0 1 L7 4 L0 7" }))));
  for (const e of g.edges()) {
    const points = g.edge(e).points.map((p) => `${p.x.toFixed(1)} ${p.y.toFixed(1)}`);
    drawing.append(svg("path", { d: `M${points.join(" L")}`, "marker-end": "url(#tip)" }));
  }
  for (const n of nodes) {
    const p = g.node(n.name), verdict = n.by ? "taken out" : n.verdict;
    const box = svg("g", { class: n === node ? "node me" : "node", transform: `translate(${p.x - p.width / 2} ${p.y - p.height / 2})`, tabindex: 0, "data-node": n.name },
      svg("title", {}, `${n.name}: ${n.operator}\n${n.value}${verdict ? `\n${verdict}` : ""}`),
      svg("rect", { width: p.width, height: p.height, rx: 8 }),
      svg("rect", { width: 4, height: p.height - 16, x: 6, y: 8, rx: 2, style: `stroke:none;fill:var(--${kind(verdict) === "none" ? "line" : kind(verdict)})` }),
      svg("text", { x: 17, y: 17 }, label(n)), svg("text", { x: 17, y: 32, class: "v" }, clip(n.value, 34)));
    box.addEventListener("click", () => go(n));
    box.addEventListener("keydown", (e) => e.key === "Enter" && go(n));
    drawing.append(box);
  }
  return { drawing, left };
}

const clip = (text, n) => (text.length > n ? text.slice(0, n - 1) + "…" : text);
const shortOperator = (operator) => operator.replace(/\.default$/, "").replace(/^<built-in function (\w+)>$/, "$1");
