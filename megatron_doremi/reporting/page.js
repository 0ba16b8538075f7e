// Makes the report's charts interactive and its tables searchable and sortable. Without it the page is complete.
// vegaEmbed comes from the bundle that this file is put into (charts/render.py).
(() => {
  "use strict";
  const source = document.getElementById("charts");
  const charts = source ? JSON.parse(source.textContent) : {};
  const phone = window.matchMedia("(max-width: 640px)");

  function rows(chart) {
    return chart.values.map((values) =>
      Object.fromEntries(chart.columns.map((name, index) => [name, values[index]])));
  }

  async function draw(figure) {
    const chart = charts[figure.dataset.chart];
    const spec = { ...(phone.matches ? chart.narrow : chart.wide), datasets: { rows: rows(chart) } };
    const place = figure.querySelector(".live");
    try {
      // "ast" interprets expressions: the page's policy forbids generated code.
      await vegaEmbed(place, spec, {
        ast: true, actions: false, logLevel: 1, renderer: "svg", defaultStyle: false, tooltip: { disableDefaultStyle: true },
      });
      figure.classList.add("drawn");
    } catch (error) {
      // The still picture stays.
      figure.classList.remove("drawn");
      console.error(error);
    }
  }

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        seen.unobserve(entry.target);
        draw(entry.target);
      }
    }
  }, { rootMargin: "400px" });
  const figures = [...document.querySelectorAll("figure[data-chart]")];
  figures.forEach((figure) => seen.observe(figure));
  phone.addEventListener("change", () => figures.filter((each) => each.classList.contains("drawn")).forEach(draw));

  function number(cell) {
    const value = Number(cell.dataset.value);
    return cell.dataset.value === undefined || Number.isNaN(value) ? null : value;
  }

  function compare(a, b) {
    const x = number(a), y = number(b);
    if (x !== null && y !== null) return x - y;
    if (x !== null || y !== null) return x === null ? 1 : -1;
    return a.textContent.localeCompare(b.textContent);
  }

  function sort(table, header) {
    const column = header.cellIndex;
    const up = header.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    const body = table.tBodies[0];
    const sorted = [...body.rows].sort((a, b) => compare(a.cells[column], b.cells[column]) * (up ? 1 : -1));
    body.append(...sorted);
  }

  for (const block of document.querySelectorAll(".table[data-rows]")) {
    const table = block.querySelector("table");
    for (const header of table.tHead.rows[0].cells) {
      // No button element: Chromium does not repeat a header that holds one on every printed page.
      header.tabIndex = 0;
      header.classList.add("sortable");
      header.addEventListener("click", () => sort(table, header));
      header.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(table, header); });
    }
    if (Number(block.dataset.rows) < 15) continue;
    const search = document.createElement("input");
    search.type = "search";
    search.placeholder = "Search";
    search.setAttribute("aria-label", "Search this table");
    search.addEventListener("input", () => {
      const text = search.value.toLowerCase();
      for (const row of table.tBodies[0].rows) row.hidden = !row.textContent.toLowerCase().includes(text);
    });
    block.querySelector(".tools").prepend(search);
  }
})();
