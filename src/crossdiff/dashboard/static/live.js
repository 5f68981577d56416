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

  function show(...children) {
    const result = document.getElementById("result");
    result.replaceChildren(...children);
    return result;
  }

  function problem(text) {
    show(element("p", { className: "problem", role: "alert" }, element("b", {}, "This did not work: "), text));
  }

  async function write(own, button) {
    const headers = JSON.parse(document.body.getAttribute("hx-headers"));
    const action = own.getAttribute("action"); // own.action is the button of that name
    const body = new URLSearchParams(new FormData(own, button));
    const buttons = [...own.querySelectorAll("button:not(:disabled)")];
    const cards = element("div", { className: "answers" });
    const stop = element("button", { type: "button", className: "stop", disabled: true }, "Stop");
    const state = element("p", { className: "note", role: "status" }, "The models are running. The first request also loads them.");
    const result = show(element("p", { className: "actions" }, stop, state), cards);
    for (const each of buttons) each.disabled = true;
    result.setAttribute("aria-busy", "true");
    result.scrollIntoView({ block: "nearest" });
    try {
      const answer = await fetch(action, { method: "POST", body, headers: { ...headers, accept: "application/x-ndjson", "HX-Request": "true" } });
      const kind = answer.headers.get("content-type") || "";
      if (!kind.startsWith("application/x-ndjson")) {
        const message = await answer.text();
        if (kind.startsWith("text/html")) result.innerHTML = message; // the server has escaped it
        else problem(message);
        return;
      }
      let address = "";
      for await (const line of lines(answer.body)) {
        if (line.running) {
          stop.disabled = false;
          stop.onclick = () => {
            stop.disabled = true;
            state.textContent = "Stopping. Both models read what has been written.";
            fetch(`${action}/stop/${line.running}`, { method: "POST", headers });
          };
        } else if (line.problem) {
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
        if (document.activeElement === document.body) document.getElementById("result").focus({ preventScroll: true });
      } else if (!result.querySelector(".problem")) {
        problem("The connection to the server was lost. What you typed is still here; try again.");
      }
    } catch (error) {
      console.error(error);
      problem("The server cannot be reached. What you typed is still here; try again.");
    } finally {
      result.removeAttribute("aria-busy");
      for (const each of buttons) each.disabled = false;
    }
  }

  // Before htmx, which would wait for the complete answer.
  document.addEventListener("submit", event => {
    const own = event.target, button = event.submitter;
    if (own !== form() || !button || !/^(answer-|steer$)/.test(button.value)) return;
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
