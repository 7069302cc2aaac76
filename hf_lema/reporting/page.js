// Draws the figures in the colours of the page's theme and sorts tables. Names beginning with "$" are colours of page.css.
"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 640px)");

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

  function coloured(value) {
    if (typeof value === "string") return /^\$[a-z]+\d*$/.test(value) ? colour(value.slice(1)) : value;
    if (Array.isArray(value)) return value.map(coloured);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, coloured(item)]));
  }

  // Room for the names at the ends of curves; on a phone there is none, and the legend has to do.
  function endWidth(annotations) {
    const lengths = annotations.filter((item) => item.name === "end").map((item) => item.text.length);
    return lengths.length ? 14 + 7.2 * Math.max(...lengths) : 16;
  }

  function layoutOf(figure) {
    const layout = coloured(figure.layout);
    layout.annotations = (layout.annotations || []).filter((item) => !(narrow.matches && item.name === "end"));
    const axis = { gridcolor: colour("grid"), linecolor: colour("grid"), zerolinecolor: colour("grid"), automargin: true };
    for (const name of ["xaxis", "yaxis", "yaxis2"]) {
      if (layout[name] || name !== "yaxis2") layout[name] = { ...axis, ...layout[name] };
    }
    if (narrow.matches && layout.yaxis.tickmode !== "array") layout.xaxis.nticks = 6;
    return {
      ...layout,
      autosize: true,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: narrow.matches ? 12 : 13, color: colour("ink") },
      margin: { l: 8, r: endWidth(layout.annotations), t: 34, b: 8 },
      hoverlabel: { bgcolor: colour("card"), bordercolor: colour("muted"), font: { color: colour("ink") } },
      legend: { orientation: "h", x: 0, y: 0, yref: "container", yanchor: "bottom", itemwidth: 40, ...layout.legend },
      modebar: { color: colour("muted"), activecolor: colour("accent"), bgcolor: "rgba(0,0,0,0)" },
    };
  }

  function draw() {
    for (const [id, figure] of Object.entries(figures)) {
      // On a phone a legend takes a line for each entry.
      const entries = figure.data.filter((trace) => trace.showlegend !== false).length;
      const element = document.getElementById(id);
      element.style.height = Number(element.dataset.heightPx) + (narrow.matches ? 16 * entries : 0) + "px";
      Plotly.react(element, coloured(figure.data), layoutOf(figure), {
        responsive: true,
        displaylogo: false,
        displayModeBar: narrow.matches ? false : "hover",
        // A list of what may be there: plotly 7 has a button that uploads the chart, and nothing leaves this page.
        modeBarButtons: [["toImage"], ["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
        showSendToCloud: false,
        plotlyServerURL: "",
      });
    }
  }

  function sort(table, column, button) {
    const head = button.closest("th");
    const descending = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows];
    const value = (row) => row.cells[column].dataset.value;
    rows.sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      if (a === "" || b === "") return (a === "") - (b === ""); // what has no figure stays last, both ways
      const difference = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
      return descending ? -difference : difference;
    });
    table.tBodies[0].append(...rows);
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    table.querySelectorAll("thead button").forEach((button, column) => {
      button.addEventListener("click", () => sort(table, column, button));
    });
  }
  draw();
  dark.addEventListener("change", draw);
  narrow.addEventListener("change", draw);
})();
