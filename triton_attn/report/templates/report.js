"use strict";
// Sort a table by a click on, or Enter in, the title of a column: numbers as numbers, "not run" last.
const units = { ns: 1e-9, "\u00b5s": 1e-6, ms: 1e-3, s: 1 };
function value(cell) {
  const text = cell.textContent.trim();
  const found = /^(-?[\d.]+)(?:e([+-]?\d+))?\s*(%|\u00d7|ns|\u00b5s|ms|s)?/.exec(text);
  return found ? Number(found[1]) * 10 ** Number(found[2] || 0) * (units[found[3]] || 1) : text;
}
function compare(a, b) {
  const numbers = (typeof a === "number") - (typeof b === "number");
  if (numbers) return -numbers;
  return typeof a === "number" ? a - b : a.localeCompare(b);
}
for (const table of document.querySelectorAll("table")) {
  const titles = [...table.querySelectorAll("thead th")];
  titles.forEach((title, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...title.childNodes);
    title.append(button);
    title.scope = "col";
    button.addEventListener("click", () => {
      const down = title.getAttribute("aria-sort") === "ascending";
      titles.forEach((other) => other.removeAttribute("aria-sort"));
      title.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => [value(row.cells[column]), row]);
      rows.sort(([a], [b]) => (down && typeof a === typeof b ? compare(b, a) : compare(a, b)));
      body.append(...rows.map(([, row]) => row));
    });
  });
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
