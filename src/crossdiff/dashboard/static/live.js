"use strict";
// Answers while they are written, with a button that stops them. Without this file an answer comes at once when it is complete.
(() => {
  const form = () => document.querySelector("form.live");
  const element = (tag, properties, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };

  async function* lines(body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      for (const part of parts) yield JSON.parse(part);
    }
  }

  // A problem stands above what is shown, which stays.
  function problem(text) {
    const told = element("p", { className: "problem", role: "alert" }, element("b", {}, "This did not work: "), text);
    document.getElementById("problem").replaceChildren(told);
  }

  // A new form is put in place of the one that was sent: the focus goes to the new empty message, or back to the field that had
  // it. New messages move the buttons, so for a moment these take no click, which would be the second of a double click.
  const SETTLING = 600;
  let sent = "read", before = null;
  const buttonOf = action => form().querySelector(`button[value="${action}"]:not(.unseen)`);

  document.addEventListener("htmx:beforeSwap", event => {
    if (event.detail.target.id !== "live" || !form()) return;
    const field = document.activeElement, live = document.getElementById("live"), isHere = live.contains(field);
    const number = isHere && field.name ? [...document.getElementsByName(field.name)].indexOf(field) : -1;
    before = {
      takesFocus: isHere || field.contains(live), // a click on a disabled button leads to what is around it
      field: number >= 0 && field.tagName !== "BUTTON" ? { name: field.name, number } : null,
    };
  });

  document.addEventListener("htmx:afterSettle", event => {
    if (event.target.id !== "live" || !before || !form()) return;
    const message = [...form().querySelectorAll("[name=content]")].pop();
    const isNext = /^(answer-chat|answer-base|add)$/.test(sent) && message.value === "" && message.checkVisibility();
    const again = before.field && document.getElementsByName(before.field.name)[before.field.number];
    const button = buttonOf(sent) || buttonOf("add"); // one that removes may be gone
    if (before.takesFocus) (isNext ? message : again || button).focus({ preventScroll: true });
    const own = form();
    own.classList.add("settling");
    setTimeout(() => own.classList.remove("settling"), SETTLING);
    before = null;
  });

  async function write(own, button) {
    const headers = JSON.parse(document.body.getAttribute("hx-headers"));
    const action = own.getAttribute("action"); // own.action is the button of that name
    const body = new URLSearchParams(new FormData(own, button));
    const buttons = [...own.querySelectorAll("button:not(:disabled)")];
    const cards = element("div", { className: "answers partial" });
    const stop = element("button", { type: "button", className: "stop", disabled: true }, "Stop");
    const line = own.querySelector(".wait"), state = line.querySelector("[role=status]"), words = state.textContent;
    const result = document.getElementById("result");
    line.prepend(stop);
    line.classList.add("running");
    result.querySelector(".partial")?.remove();
    result.prepend(cards); // what was shown stays below until the new result is complete
    for (const each of buttons) each.disabled = true;
    result.setAttribute("aria-busy", "true");
    if (window.matchMedia("(pointer: coarse)").matches) result.scrollIntoView({ block: "nearest" });
    try {
      const answer = await fetch(action, { method: "POST", body, headers: { ...headers, accept: "application/x-ndjson", "HX-Request": "true" } });
      const kind = answer.headers.get("content-type") || "";
      if (!kind.startsWith("application/x-ndjson")) {
        const message = await answer.text();
        if (kind.startsWith("text/html")) document.getElementById("problem").innerHTML = message; // the server has escaped it
        else problem(message);
        return;
      }
      let address = "", failed = false;
      for await (const line of lines(answer.body)) {
        if (line.running) {
          stop.disabled = false;
          stop.onclick = () => {
            stop.disabled = true;
            state.textContent = "Stopping. Both models read what has been written.";
            fetch(`${action}/stop/${line.running}`, { method: "POST", headers });
          };
        } else if (line.problem) {
          failed = true;
          problem(line.problem);
        } else if (line.address) {
          address = line.address;
        } else {
          if (!stop.disabled) state.textContent = "The model is writing.";
          while (cards.children.length <= line.answer) {
            cards.append(element("article", { className: "card" }, element("h3", {}, line.name), element("p", { className: "being-written" })));
          }
          cards.children[line.answer].lastChild.textContent = line.text;
        }
      }
      if (address) {
        await htmx.ajax("GET", address, { target: "#live", swap: "outerHTML" });
      } else if (!failed) {
        problem("The connection to the server was lost. What you typed is still here; try again.");
      }
    } catch (error) {
      console.error(error);
      problem("The server cannot be reached. What you typed is still here; try again.");
    } finally {
      result.removeAttribute("aria-busy");
      if (!cards.textContent) cards.remove();
      stop.remove();
      line.classList.remove("running");
      state.textContent = words;
      for (const each of buttons) each.disabled = false;
      if (document.activeElement === document.body && button.isConnected) button.focus({ preventScroll: true });
    }
  }

  // Before htmx, which would wait for the complete answer.
  document.addEventListener("submit", event => {
    const own = event.target, button = event.submitter;
    if (own !== form() || !button) return;
    sent = button.value;
    document.getElementById("problem").replaceChildren();
    if (!/^(answer-|steer$)/.test(sent)) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    write(own, button);
  }, true);

  document.addEventListener("input", event => {
    const slider = document.querySelector("[data-slides]");
    if (!slider) return;
    const field = slider.form.elements[slider.dataset.slides];
    if (event.target === slider) field.value = slider.value;
    else if (event.target === field) slider.value = field.value;
  });

  document.addEventListener("htmx:afterSettle", event => {
    if (event.target.id !== "token") return;
    const [, text, shown] = event.detail.pathInfo.requestPath.match(/(.*\/)(\d+)$/);
    for (const token of document.querySelectorAll(".strip a")) {
      const [, own, first] = token.getAttribute("href").match(/(.*\/)(\d+)$/), past = Number(shown) - Number(first);
      if (own === text && past >= 0 && past < Number(token.dataset.tokens)) token.setAttribute("aria-current", "true");
      else token.removeAttribute("aria-current");
    }
    event.target.scrollIntoView({ block: "nearest" });
  });
})();
