"use strict";
// Tabs, theme, keys.

const VIEWS = {
  overview: ["Overview", showOverview], nodes: ["Nodes", showNodes], changes: ["Before and after", showCompare],
  uncompiled: ["Uncompiled", showUncompiled], certificate: ["Certificate", showCertificate], bisection: ["Bisection", showBisection],
};
let current = "";

function views() {
  const there = { uncompiled: model.entries.some((e) => e.node.op === "uncompiled"), certificate: model.graphs.some((g) => g.certificate), bisection: Boolean(model.data.bisection) };
  return Object.keys(VIEWS).filter((name) => there[name] !== false);
}

function show(name) {
  current = name;
  if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
  for (const tab of document.querySelectorAll("#tabs button")) tab.setAttribute("aria-selected", String(tab.dataset.view === name));
  VIEWS[name][1](document.getElementById("main"));
}

function theme(next) {
  document.documentElement.dataset.theme = next;
  try { localStorage.setItem("bi-compile-theme", next); } catch { /* a page without storage forgets it */ }
}

function keys(event) {
  const typing = event.target.matches("input, select, textarea");
  if (event.key === "Escape" && typing) return event.target.blur();
  if (typing && !(event.target.id === "search" && ["ArrowDown", "ArrowUp"].includes(event.key))) return;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const tabs = views(), number = Number(event.key);
  const does = {
    "/": () => { if (current !== "nodes") show("nodes"); const s = document.getElementById("search"); s.focus(); s.select(); },
    j: () => current === "nodes" && move(1), k: () => current === "nodes" && move(-1),
    ArrowDown: () => current === "nodes" && move(1), ArrowUp: () => current === "nodes" && move(-1),
    n: () => current === "changes" && change(1), p: () => current === "changes" && change(-1),
    t: () => document.getElementById("theme").click(), "?": () => document.getElementById("keys").showModal(),
  }[event.key] || (number >= 1 && number <= tabs.length ? () => show(tabs[number - 1]) : null);
  if (!does || document.getElementById("keys").open) return;
  if (["ArrowDown", "ArrowUp"].includes(event.key) && current !== "nodes") return;
  event.preventDefault();
  does();
}

(async () => {
  let stored = null;
  try { stored = localStorage.getItem("bi-compile-theme"); } catch { /* as above */ }
  document.documentElement.dataset.theme = stored || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  document.getElementById("theme").onclick = () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  document.getElementById("help").onclick = () => document.getElementById("keys").showModal();
  try {
    await unpack();
  } catch (error) {
    document.querySelector(".wait").textContent = `This page cannot be unpacked here (${error.message}): it needs a browser of 2023 or newer.`;
    throw error;
  }
  document.getElementById("tabs").append(...views().map((name, i) => el("button", { role: "tab", "data-view": name, title: `key ${i + 1}`, onclick: () => show(name) }, VIEWS[name][0])));
  document.addEventListener("keydown", keys);
  const asked_for = location.hash.slice(1);
  show(views().includes(asked_for) ? asked_for : "overview");
  document.documentElement.dataset.ready = "yes";
})();
