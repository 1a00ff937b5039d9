"use strict";
// A list of any length of which only the rows in sight are in the page. All rows have one height.

function virtualList(box, height, draw) {
  const space = el("div.space");
  box.replaceChildren(space);
  const list = { items: [], first: -1, last: -1 };
  const paint = (anew) => {
    const first = Math.max(0, Math.floor(box.scrollTop / height) - 8);
    const last = Math.min(list.items.length, Math.ceil((box.scrollTop + box.clientHeight) / height) + 8);
    if (!anew && first === list.first && last === list.last) return;
    list.first = first;
    list.last = last;
    const rows = [];
    for (let i = first; i < last; i++) {
      const row = draw(list.items[i], i);
      row.style.top = `${i * height}px`;
      row.style.height = `${height}px`;
      rows.push(row);
    }
    space.replaceChildren(...rows);
  };
  list.show = (items) => {
    list.items = items;
    space.style.height = `${items.length * height}px`;
    if (box.scrollTop > items.length * height) box.scrollTop = 0;
    paint(true);
  };
  list.repaint = () => paint(true);
  list.reveal = (i) => {
    const top = i * height;
    if (top < box.scrollTop || top + height > box.scrollTop + box.clientHeight) box.scrollTop = Math.max(0, top - box.clientHeight / 2);
    paint(true);
  };
  box.addEventListener("scroll", () => paint(false), { passive: true });
  new ResizeObserver(() => paint(true)).observe(box);
  return list;
}
