"use strict";
// `s` stars what is shown, or the current row of a list. A file of notes is read into the form that merges it.
(() => {
  async function starRow(row) {
    const table = row.closest("[data-of]");
    if (!table) return;
    const own = row.querySelector(".star"), on = own !== null && own.textContent === "★";
    const headers = { ...JSON.parse(document.body.getAttribute("hx-headers")), accept: "application/json" };
    const body = new URLSearchParams({ star: on ? "no" : "yes", of: table.dataset.of });
    const state = document.getElementById("state");
    try {
      const answer = await fetch(`${row.dataset.href.split("?")[0]}/notes`, { method: "POST", headers, body });
      if (!answer.ok) throw new Error(answer.status === 409 ? "The results were replaced. Reload the page." : "The star was not saved.");
      const note = await answer.json(), link = row.querySelector("a");
      if (own) own.remove();
      const others = note.label || note.comment || note.lists.length;
      if (note.star || others) {
        const mark = Object.assign(document.createElement("span"), { className: note.star ? "star" : "star noted", title: note.star ? "starred" : "noted", textContent: note.star ? "★" : "✎" });
        link.after(" ", mark);
      }
      state.textContent = note.star ? "Starred." : "The star was removed.";
    } catch (error) {
      state.textContent = error instanceof TypeError ? "The server cannot be reached, so the star was not saved." : error.message;
    }
    setTimeout(() => { state.textContent = ""; }, 4000);
  }

  document.addEventListener("keydown", event => {
    if (event.key !== "s" || event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, textarea, select")) return;
    const button = document.querySelector("[data-star]"), row = document.querySelector(".latents tr.current");
    if (button) button.click();
    else if (row) starRow(row);
    else return;
    event.preventDefault();
  });

  // The part of the page that was focused is replaced when a note is saved.
  document.addEventListener("htmx:afterSwap", event => {
    const now = document.getElementById("my-note");
    if (!now || event.target.id !== "my-note") return;
    const again = now.querySelector(".problem") ? now.querySelector("[name=comment]") : now.querySelector("[data-star]");
    if (document.activeElement === document.body) again.focus({ preventScroll: true });
  });

  document.addEventListener("change", async event => {
    const input = event.target.closest("[data-reads]");
    if (input && input.files.length) document.getElementById(input.dataset.reads).value = await input.files[0].text();
  });
})();
