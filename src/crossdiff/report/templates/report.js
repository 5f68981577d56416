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
}
// Paper is narrower than most windows, so figures are drawn at half a sheet's width while printing.
window.addEventListener("beforeprint", () => {
  for (const canvas of canvases) Plotly.relayout(canvas, { width: 330, autosize: false });
});
window.addEventListener("afterprint", () => {
  for (const canvas of canvases) Plotly.relayout(canvas, { width: null, autosize: true });
});
// A link to a latent unfolds the section that hides its card.
function unfold() {
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let node = target; node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
  if (target) target.scrollIntoView();
}
window.addEventListener("hashchange", unfold);
unfold();
