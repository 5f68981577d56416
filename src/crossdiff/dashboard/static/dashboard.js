"use strict";
// Figures, brushing, and what a point is about. All other parts of the pages work without this file.
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
  htmx.ajax("GET", `${table.dataset.path}?${params}`, { source: table, target: "#table", swap: "outerHTML" });
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
    if (holder.dataset.latent) showBriefs(canvas, holder);
  });
}

// While the pointer rests on a point, a box beside it says what the latent is about.
const PAUSE = 80;
function showBriefs(canvas, holder) {
  const box = document.createElement("div"), known = new Map();
  box.className = "brief-box";
  box.hidden = true;
  holder.after(box);
  let wanted = null;
  async function show(latent, at) {
    await new Promise(resolve => setTimeout(resolve, PAUSE));
    if (wanted !== latent) return;
    if (!known.has(latent)) {
      const headers = JSON.parse(document.body.getAttribute("hx-headers"));
      const answer = await fetch(`${holder.dataset.latent}${latent}/brief`, { headers });
      if (!answer.ok) return;
      known.set(latent, await answer.text());  // the server has escaped every text of the run
    }
    if (wanted !== latent) return;
    box.innerHTML = known.get(latent);
    box.hidden = false;
    const left = Math.min(at.clientX + 16, window.innerWidth - box.offsetWidth - 8);
    const below = at.clientY + 40, above = at.clientY - box.offsetHeight - 40;
    box.style.left = `${Math.max(8, left)}px`;
    box.style.top = `${below + box.offsetHeight > window.innerHeight && above > 0 ? above : below}px`;
  }
  canvas.on("plotly_hover", event => {
    const latent = event.points[0] && event.points[0].customdata;
    if (!Number.isInteger(latent)) return;
    wanted = latent;
    show(latent, event.event);
  });
  canvas.on("plotly_unhover", () => { wanted = null; box.hidden = true; });
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

document.addEventListener("change", event => {
  const cloud = document.querySelector(".cloud");
  if (cloud && event.target.matches("[name=colour]")) drawCloud(cloud);
});
document.addEventListener("toggle", event => { if (event.target.matches("[data-draws]")) drawCharts(event.target); }, true);
document.documentElement.classList.remove("no-script");
drawCharts(document);
const cloud = document.querySelector(".cloud");
if (cloud && typeof Plotly !== "undefined") drawCloud(cloud);
