"use strict";
// A request that takes long says what it does, and for how long already. `data-wait` on the part of the page has the words.
const SOON = 300;
const waiting = new Map();
function tell() {
  const state = document.getElementById("state"), last = [...waiting.values()].pop();
  if (!last) { state.textContent = ""; return; }
  const seconds = Math.floor((Date.now() - last.since) / 1000);
  if (state.dataset.words !== last.words || !state.firstChild) {
    state.textContent = `${last.words}… `;  // read out once; the seconds are for the eye
    state.append(Object.assign(document.createElement("span"), { ariaHidden: "true" }));
  }
  state.dataset.words = last.words;
  state.lastChild.textContent = seconds ? `${seconds} s` : "";
}
document.addEventListener("htmx:beforeRequest", event => {
  const part = event.target.closest("[data-wait]");
  if (!part) return;
  const found = { words: part.dataset.wait, since: Date.now(), timer: 0 };
  found.timer = setTimeout(() => { waiting.set(event.detail.xhr, found); tell(); found.timer = setInterval(tell, 1000); }, SOON);
  event.detail.xhr.addEventListener("loadend", () => {
    clearTimeout(found.timer);
    clearInterval(found.timer);
    waiting.delete(event.detail.xhr);
    tell();
  });
});
