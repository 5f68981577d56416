"use strict";
// Shows what a title says, such as the value of a token or the meaning of a measure, on hover, on a tap and at the keyboard.
// Without this file the title itself is left. A text, or a part of the page with `data-tips`, which names it, is one stop of the
// Tab key; the arrow keys, Home and End move inside it, and Esc closes. A `.meaning` is a stop of its own.
(() => {
  const TEXT = ".context, [data-tips]", TITLED = ":is([title], [data-tip])";
  const TOKEN = `:is(${TEXT}) ${TITLED}, .meaning${TITLED}`;
  const tip = document.createElement("div");
  tip.id = "token-tip";
  tip.className = "token-tip";
  tip.setAttribute("role", "tooltip");
  tip.hidden = true;
  let shown = null, pointer = "";

  const tokenAt = node => node instanceof Element ? node.closest(TOKEN) : null;
  const tokensOf = text => [...text.querySelectorAll(TITLED)];
  const boxOf = token => token.getClientRects()[0] || token.getBoundingClientRect();

  function place() {
    if (!shown) return;
    const box = boxOf(shown), room = document.documentElement;
    const below = box.bottom + tip.offsetHeight <= room.clientHeight;
    tip.style.left = `${Math.max(8, Math.min(box.left, room.clientWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${below ? box.bottom : Math.max(0, box.top - tip.offsetHeight)}px`;
  }
  function hide() {
    if (!shown) return;
    shown.removeAttribute("aria-describedby");
    tip.hidden = true;
    shown = null;
  }
  function show(token) {
    hide();
    if (token.title) {
      token.dataset.tip = token.title;  // else the browser shows its own as well
      token.removeAttribute("title");
    }
    tip.textContent = token.dataset.tip;
    tip.hidden = false;
    shown = token;
    token.setAttribute("aria-describedby", tip.id);
    place();
  }
  function focusOn(token) {
    const text = token.closest(TEXT);
    if (text) for (const other of text.querySelectorAll(`${TITLED}[tabindex='0']`)) other.tabIndex = -1;
    token.tabIndex = 0;
    if (document.activeElement === token) show(token); else token.focus();
  }
  // One token of each text can be reached with Tab: the strongest, or the first.
  function prepare(text) {
    const tokens = tokensOf(text);
    if (!tokens.length || (text.dataset.roving && tokens.some(token => token.getAttribute("tabindex") === "0"))) return;
    text.dataset.roving = "yes";
    if (!text.matches("table, dl")) text.setAttribute("role", "group");
    text.setAttribute("aria-label", `${text.dataset.tips || "Text, token by token"}. Arrow keys move, Escape closes the value.`);
    for (const token of tokens) if (token.tabIndex >= 0) token.tabIndex = -1;
    (tokens.find(token => token.classList.contains("peak")) || tokens[0]).tabIndex = 0;
  }
  // The nearest token of the next line in one direction, -1 up or 1 down.
  function nearestLine(tokens, from, way) {
    const here = boxOf(from);
    let best = null, least = Infinity;
    for (const token of tokens) {
      const box = boxOf(token), down = way * (box.top - here.top);
      if (down < here.height * 0.8) continue;
      const distance = down * 1000 + Math.abs(box.left - here.left);
      if (distance < least) [best, least] = [token, distance];
    }
    return best;
  }
  function next(token, key) {
    const tokens = tokensOf(token.closest(TEXT)), at = tokens.indexOf(token);
    switch (key) {
      case "ArrowRight": return tokens[at + 1];
      case "ArrowLeft": return tokens[at - 1];
      case "Home": return tokens[0];
      case "End": return tokens[tokens.length - 1];
      case "ArrowDown": return nearestLine(tokens, token, 1);
      case "ArrowUp": return nearestLine(tokens, token, -1);
    }
    return null;
  }

  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && shown) { hide(); event.stopPropagation(); return; }
    const token = tokenAt(event.target), to = token && token.closest(TEXT) && next(token, event.key);
    if (to) { event.preventDefault(); focusOn(to); }
  }, true);
  document.addEventListener("focusin", event => { const token = tokenAt(event.target); if (token) focusOn(token); });
  document.addEventListener("focusout", event => { if (event.target === shown) hide(); });
  document.addEventListener("pointerover", event => {
    const here = `${event.clientX} ${event.clientY}`, moved = here !== pointer;
    pointer = here;
    // A text that scrolls under a pointer at rest, while the keyboard moves, shows nothing.
    const token = moved && event.pointerType !== "touch" && tokenAt(event.target);
    if (token && token !== shown) show(token);
  });
  document.addEventListener("pointermove", event => { pointer = `${event.clientX} ${event.clientY}`; }, { passive: true });
  document.addEventListener("pointerout", event => {
    if (event.pointerType === "touch" || !shown) return;
    const to = event.relatedTarget;
    if (to instanceof Node && (shown.contains(to) || tip.contains(to))) return;
    const focused = tokenAt(document.activeElement);
    if (focused && focused !== shown) show(focused); else if (!focused) hide();
  });
  document.addEventListener("click", event => {
    const token = tokenAt(event.target);
    if (token) focusOn(token);
  });
  document.addEventListener("pointerdown", event => { if (!tokenAt(event.target) && !tip.contains(event.target)) hide(); });
  window.addEventListener("scroll", place, { passive: true, capture: true });
  window.addEventListener("resize", place);

  document.body.append(tip);
  document.querySelectorAll(TEXT).forEach(prepare);
  new MutationObserver(changes => {
    for (const change of changes) for (const node of change.addedNodes) {
      if (shown && !shown.isConnected) hide();
      if (!(node instanceof Element) || node === tip) continue;
      node.querySelectorAll(TEXT).forEach(prepare);
      const text = node.closest(TEXT);
      if (text) prepare(text);
    }
  }).observe(document.body, { childList: true, subtree: true });
})();
