"use strict";
// Keys, and rows that open on a click.
function rows() { return [...document.querySelectorAll(".latents tbody tr[data-href]")]; }
function move(step) {
  const link = document.querySelector(`.steps a[rel=${step > 0 ? "next" : "prev"}]`);
  if (link) { link.click(); return; }
  const all = rows();
  if (!all.length) return;
  const at = all.findIndex(row => row.classList.contains("current"));
  mark(all[Math.min(all.length - 1, Math.max(0, at + step))]);
}
function mark(current) {
  rows().forEach(row => row.classList.toggle("current", row === current));
  current.querySelector("a").focus({ preventScroll: true });
  current.scrollIntoView({ block: "nearest" });
}
// A list that was reached from one of its pages begins at the row of that page.
const left = location.hash.startsWith("#row-") && document.getElementById(location.hash.slice(1));
if (left) mark(left);
function focusOn(id) { const field = document.getElementById(id); if (field) { field.focus(); field.select(); } }
function showKeys(shown) {
  const list = document.getElementById("keys"), button = document.querySelector("[data-keys]");
  list.hidden = !shown;
  button.setAttribute("aria-expanded", String(shown));
}
// The list names the keys that work on this page.
function toggleKeys() {
  for (const entry of document.querySelectorAll("[data-needs]")) entry.hidden = !document.querySelector(entry.dataset.needs);
  showKeys(document.getElementById("keys").hidden);
}
// The link of the key that is nearest to the content: one in the page before one in its bar.
function follow(key) {
  const link = document.querySelector(`main [data-key=${key}]`) || document.querySelector(`.bar [data-key=${key}]`);
  if (link) location.href = link.href;
}
// Escape closes one thing: the list of keys, else what was unfolded around the focus or last, else the field is left.
function close() {
  const list = document.getElementById("keys"), focused = document.activeElement;
  if (!list.hidden) { showKeys(false); return; }
  const unfolded = [...document.querySelectorAll("details[open]")];
  const around = focused && focused.closest("details[open]");
  if (focused && focused.matches("input, textarea, select")) { focused.blur(); return; }
  const last = around || unfolded.pop();
  if (last) { last.open = false; last.querySelector("summary").focus(); }
}
const KEYS = {
  "/": () => focusOn("search"), g: () => focusOn("goto"), j: () => move(1), k: () => move(-1), "?": toggleKeys,
  h: () => follow("h"), l: () => follow("l"), u: () => follow("u"),
};
document.addEventListener("keydown", event => {
  if (event.defaultPrevented) return;
  if (event.key === "Escape") { close(); return; }
  const form = event.target.closest("form");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && form) {
    event.preventDefault();
    form.requestSubmit(form.querySelector("button.main") || form.querySelector("button:not([type=button])"));
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select")) return;
  const action = KEYS[event.key];
  if (action) { event.preventDefault(); action(); }
});
document.addEventListener("click", event => {
  if (event.target.closest("[data-keys]")) { toggleKeys(); return; }
  const row = event.target.closest("tr[data-href]");
  if (row && !event.target.closest("a") && !String(window.getSelection())) location.href = row.dataset.href;
});
