"use strict";
(() => {
  const tip = document.getElementById("tip");
  const move = (event) => {
    const mark = event.target.closest ? event.target.closest("[data-t]") : null;
    tip.hidden = !mark;
    if (!mark) return;
    tip.textContent = mark.dataset.t;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(event.clientX + 12, innerWidth - width - 8)) + "px";
    tip.style.top = Math.max(4, event.clientY - height - 10) + "px";
  };
  document.addEventListener("pointermove", move);
  document.addEventListener("pointerdown", move);

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => {
        const cell = row.cells[column];
        return cell.dataset.v !== undefined ? Number(cell.dataset.v) : cell.tagName === "TD" && cell.textContent === "–" ? null : cell.textContent;
      };
      const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
      rows.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        const order = typeof a === "number" && typeof b === "number" ? a - b : String(b).localeCompare(String(a), undefined, { numeric: true });
        return up ? order : -order;
      });
      table.tBodies[0].append(...rows.map(([, row]) => row));
    }));
  }

  const tabs = [...document.querySelectorAll("[data-tab]")];
  const panels = [...document.querySelectorAll(".panels > .panel")];
  const choose = (number) => {
    tabs.forEach((tab, i) => tab.setAttribute("aria-pressed", String(i === number)));
    panels.forEach((panel, i) => { panel.hidden = i !== number; });
  };
  tabs.forEach((tab, i) => tab.addEventListener("click", () => choose(i)));
  if (tabs.length) choose(0);

  const search = document.querySelector("input[type=search]");
  if (search) search.addEventListener("input", () => {
    const wanted = search.value.toLowerCase();
    for (const row of document.querySelectorAll(".panels tbody tr")) {
      row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
    }
  });
})();
