"use strict";
// Sorting: a column's own figures, which stand in data-value; without this the tables read as they are.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "sort by this column";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => {
        const cell = row.cells[column];
        const value = cell.dataset.value;
        return value === undefined ? cell.textContent : Number(value);
      };
      const missing = (row) => row.cells[column].textContent === "-";
      const order = (a, b) => {
        if (missing(a) !== missing(b)) return missing(a) ? 1 : -1;
        const x = key(a), y = key(b);
        const numbers = typeof x === "number" && typeof y === "number";
        const less = numbers ? x - y : String(x).localeCompare(String(y));
        return down ? -less : less;
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}
