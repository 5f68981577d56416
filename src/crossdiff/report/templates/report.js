"use strict";
const buttons = ["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"];
// On a narrow screen the buttons would cover the legend, and fingers scroll rather than zoom.
const roomy = window.matchMedia("(min-width: 700px)").matches;
const canvases = [];
for (const chart of document.querySelectorAll(".chart")) {
  const canvas = chart.querySelector(".canvas");
  const figure = JSON.parse(chart.querySelector("script").textContent);
  const displayModeBar = canvas.classList.contains("zooms") && roomy && "hover";
  Plotly.newPlot(canvas, figure.data, figure.layout, { responsive: true, displaylogo: false, displayModeBar, modeBarButtons: [buttons] });
  canvases.push(canvas);
  tell(canvas);
}
// Shows the values of a mark in a box of the page: under the pointer, on a tap, or for the arrow keys once the figure has the focus.
function tell(canvas) {
  const tip = document.createElement("div");
  tip.className = "token-tip";
  tip.setAttribute("role", "status");
  tip.hidden = true;
  canvas.after(tip);
  canvas.classList.add("told");
  canvas.tabIndex = 0;
  canvas.setAttribute("aria-label", `${canvas.getAttribute("aria-label")} Left and right move between marks, up and down between groups.`);
  let trace = 0, at = -1;
  const hide = () => { tip.hidden = true; };
  // Plotly's tables of a group: its places and texts.
  const marks = () => canvas._fullData[trace];
  function show() {
    const { x, y, text, customdata } = marks(), { xaxis, yaxis } = canvas._fullLayout;
    const box = canvas.getBoundingClientRect(), room = document.documentElement;
    const lines = (customdata || text)[at];
    tip.textContent = lines.replaceAll("<br>", "\n").replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
    tip.hidden = false;
    const left = box.left + xaxis._offset + xaxis.d2p(x[at]), top = box.top + yaxis._offset + yaxis.d2p(y[at]);
    tip.style.left = `${Math.max(8, Math.min(left + 12, room.clientWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.max(8, top - tip.offsetHeight - 12)}px`;
  }
  canvas.on("plotly_hover", event => {
    [trace, at] = [event.points[0].curveNumber, event.points[0].pointNumber];
    show();
  });
  canvas.on("plotly_unhover", hide);
  // Plotly keeps taps for dragging, so the mark nearest to the finger is found here: at most 30 pixels away, of bars by x alone.
  canvas.addEventListener("pointerup", event => {
    if (event.pointerType !== "touch") return;
    const { xaxis, yaxis } = canvas._fullLayout, box = canvas.getBoundingClientRect();
    const left = event.clientX - box.left - xaxis._offset, top = event.clientY - box.top - yaxis._offset;
    let least = 30, found = null;
    canvas._fullData.forEach(({ x, y, type, visible }, number) => {
      for (let i = 0; i < x.length; i++) {
        if (visible !== true || (type === "bar" && !y[i])) continue;
        const far = Math.hypot(xaxis.d2p(x[i]) - left, type === "bar" ? 0 : yaxis.d2p(y[i]) - top);
        if (far < least) [least, found] = [far, [number, i]];
      }
    });
    if (found) { [trace, at] = found; show(); } else hide();
  });
  canvas.addEventListener("blur", hide);
  window.addEventListener("scroll", hide, { passive: true });
  canvas.addEventListener("keydown", event => {
    const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key], group = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") hide();
    if (!way && !group) return;
    event.preventDefault();
    const n = canvas._fullData.length;
    if (group) [trace, at] = [(trace + group + n) % n, -1];
    // Marks in the order of their places, whatever their order in the data; empty bars are passed over.
    const { x, y, type } = marks(), order = [...x.keys()].filter(i => type !== "bar" || y[i]).sort((a, b) => x[a] - x[b] || y[a] - y[b]);
    if (!order.length) return;
    const place = at < 0 ? (way === -1 ? order.length - 1 : 0) : (order.indexOf(at) + (way || 0) + order.length) % order.length;
    at = order[place];
    show();
  });
}
// Paper is narrower than most windows, so figures are drawn at half a sheet's width while printing; and what is folded is printed.
let unfolded = [];
window.addEventListener("beforeprint", () => {
  unfolded = [...document.querySelectorAll(".fold:not([open])")];
  for (const line of unfolded) line.open = true;
  for (const canvas of canvases) Plotly.relayout(canvas, { width: 330, autosize: false });
});
window.addEventListener("afterprint", () => {
  for (const line of unfolded) line.open = false;
  for (const canvas of canvases) Plotly.relayout(canvas, { width: null, autosize: true });
});
// A link to a concept or latent unfolds what hides its card.
function unfold() {
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let node = target; node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
  if (target) target.scrollIntoView();
}
window.addEventListener("hashchange", unfold);
unfold();
