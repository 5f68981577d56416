"use strict";
// Figures, brushing and keys. All other parts of the pages work without this file.
const roomy = window.matchMedia("(min-width: 700px)").matches;
const webgl = (() => { const c = document.createElement("canvas"); return !!(c.getContext("webgl2") || c.getContext("webgl")); })();
const MOST_SVG = 4000;

function config() { return { responsive: true, displaylogo: false, displayModeBar: false, doubleClick: "reset" }; }

// A filter of a column between two ends. An end at the edge of the figure is open, because values beyond it are drawn there.
function between(column, ends, holder) {
  const [low, high] = [Math.min(...ends), Math.max(...ends)];
  const open = (value, edge, sign) => edge !== undefined && sign * (value - Number(edge)) >= 0;
  const from = open(low, holder.dataset.low, -1) ? "" : low.toPrecision(3);
  const to = open(high, holder.dataset.high, 1) ? "" : high.toPrecision(3);
  return from || to ? `${column}:${from}:${to}` : null;
}

function filterTable(holder, range) {
  const table = document.getElementById("table");
  if (!table) return;
  const columns = [holder.dataset.x, holder.dataset.y].filter(Boolean);
  const params = new URLSearchParams(location.search);
  const kept = params.getAll("f").filter(each => !columns.includes(each.split(/[:=]/)[0]));
  if (range) {
    for (const [column, ends] of [[holder.dataset.x, range.x], [holder.dataset.y, range.y]]) {
      const added = column && ends && between(column, ends, holder);
      if (added) kept.push(added);
    }
  }
  params.delete("f");
  params.delete("page");
  for (const each of kept) params.append("f", each);
  htmx.ajax("GET", `${table.dataset.path}?${params}`, { target: "#table", swap: "outerHTML" });
}

function draw(canvas, figure, holder) {
  if (holder) {
    figure.layout.dragmode = roomy ? "select" : false;
    figure.layout.selectdirection = holder.dataset.y ? "any" : "h";
    for (const axis of ["xaxis", "yaxis"]) if (figure.layout[axis]) figure.layout[axis].fixedrange = true;
  }
  return Plotly.newPlot(canvas, figure.data, figure.layout, config()).then(() => {
    if (!holder || canvas.dataset.bound) return;
    canvas.dataset.bound = "yes";
    canvas.on("plotly_selected", event => { if (event && event.range) filterTable(holder, event.range); });
    canvas.on("plotly_deselect", () => filterTable(holder, null));
    canvas.on("plotly_click", event => {
      const latent = event.points[0] && event.points[0].customdata;
      if (holder.dataset.latent && Number.isInteger(latent)) location.href = holder.dataset.latent + latent;
    });
  });
}

function drawCharts(root) {
  if (typeof Plotly === "undefined") return;
  for (const chart of root.querySelectorAll(".chart")) {
    const canvas = chart.querySelector(".canvas"), inline = chart.querySelector("script[type='application/json']");
    const folded = canvas.closest("details:not([open])");
    if (!inline || canvas.dataset.drawn || folded) continue;
    canvas.dataset.drawn = "yes";
    draw(canvas, JSON.parse(inline.textContent), chart.closest(".brush"));
  }
}

async function drawCloud(canvas) {
  const colour = document.querySelector("[name=colour]:checked");
  const headers = JSON.parse(document.body.getAttribute("hx-headers"));
  const answer = await fetch(`${canvas.dataset.src}?colour=${colour ? colour.value : "verdict"}`, { headers });
  if (!answer.ok) { canvas.textContent = "The points could not be loaded. Reload the page."; return; }
  const figure = await answer.json();
  if (!webgl) {
    // Without WebGL each point is an SVG shape, of which a page can hold a few thousand.
    for (const trace of figure.data) {
      trace.type = "scatter";
      const step = Math.ceil(trace.x.length / MOST_SVG);
      if (step > 1) {
        const thin = list => Array.isArray(list) ? list.filter((_, index) => index % step === 0) : list;
        for (const key of ["x", "y", "customdata"]) trace[key] = thin(trace[key]);
        trace.marker.color = thin(trace.marker.color);
        trace.name += `, every ${step}th shown`;
      }
    }
  }
  await draw(canvas, figure, canvas);
  canvas.dataset.drawn = "yes";
}

function rows() { return [...document.querySelectorAll("#table tbody tr[data-href]")]; }
function move(step) {
  const link = document.querySelector(`a[rel=${step > 0 ? "next" : "prev"}]`);
  const all = rows();
  if (!all.length) { if (link) link.click(); return; }
  const at = all.findIndex(row => row.classList.contains("current"));
  const next = all[Math.min(all.length - 1, Math.max(0, at + step))];
  all.forEach(row => row.classList.toggle("current", row === next));
  next.querySelector("a").focus();
  next.scrollIntoView({ block: "nearest" });
}
function focusOn(id) { const field = document.getElementById(id); if (field) { field.focus(); field.select(); } }
function toggleKeys() {
  const list = document.getElementById("keys"), button = document.querySelector("[data-keys]");
  list.hidden = !list.hidden;
  button.setAttribute("aria-expanded", String(!list.hidden));
}
const follow = (key, otherwise) => {
  const link = document.querySelector(`.bar [data-key=${key}]`);
  if (link || otherwise) location.href = link ? link.href : otherwise;
};
const KEYS = {
  "/": () => focusOn("search"), g: () => focusOn("goto"), j: () => move(1), k: () => move(-1), "?": toggleKeys,
  h: () => follow("h", "/"), l: () => follow("l"),
};
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select")) return;
  const action = KEYS[event.key];
  if (action) { event.preventDefault(); action(); }
});
document.addEventListener("click", event => {
  if (event.target.closest("[data-keys]")) { toggleKeys(); return; }
  const row = event.target.closest("tr[data-href]");
  if (row && !event.target.closest("a") && !String(window.getSelection())) location.href = row.dataset.href;
});
document.addEventListener("change", event => {
  const cloud = document.querySelector(".cloud");
  if (cloud && event.target.matches("[name=colour]")) drawCloud(cloud);
});
document.addEventListener("toggle", event => { if (event.target.matches("[data-draws]")) drawCharts(event.target); }, true);
document.documentElement.classList.remove("no-script");
drawCharts(document);
const cloud = document.querySelector(".cloud");
if (cloud && typeof Plotly !== "undefined") drawCloud(cloud);
