"use strict";
// The headings of tables with the class "sortable" become buttons; without a script the tables keep their order.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const written = [...body.rows];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      // numbers: largest first, then smallest first; names the other way round; the third click restores the page's order
      const first = head.classList.contains("num") ? "descending" : "ascending";
      const second = first === "descending" ? "ascending" : "descending";
      const now = before === null ? first : before === first ? second : null;
      if (now !== null) head.setAttribute("aria-sort", now);
      body.append(...(now === null ? written : sorted(written, column, now)));
    });
  });
}

function sorted(rows, column, direction) {
  const sign = direction === "ascending" ? 1 : -1;
  const keys = new Map(rows.map((row) => [row, key(row.cells[column])]));
  return [...rows].sort((a, b) => compare(keys.get(a), keys.get(b), sign));
}

function key(cell) {
  const shown = (cell.querySelector(".value") || cell).textContent.trim();
  const number = Number.parseFloat(shown.replaceAll(",", ""));
  return cell.classList.contains("num") ? number : shown;
}

function compare(a, b, sign) {
  if (typeof a === "string") return sign * a.localeCompare(b, undefined, { numeric: true });
  // cells without a number come last in both directions
  if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
  return sign * (a - b);
}
