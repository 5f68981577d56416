// The widget of a run. Python reads prompts (the message {prompt, asks}) and sets `reading`; everything else happens here.
const make = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};
const number = value => (value === 0 ? "0" : Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3)).replace("-", "\u2212");
const sign = ({ verdict, glyph, colour }) => {
  const mark = make("span", { className: "sign", textContent: glyph, ariaHidden: "true" });
  mark.style.color = colour;
  return verdict ? [mark, ` ${verdict}`] : [];
};

function render({ model, el }) {
  const identity = Math.random().toString(36).slice(2);
  const prompt = make("textarea", { ariaLabel: "Prompt", placeholder: "A prompt for both models", value: model.get("prompt") });
  const asks = make("input", { type: "checkbox", checked: model.get("asks") });
  const button = make("button", { type: "submit", textContent: "Read" });
  const form = make("form", {}, prompt, button, make("label", {}, asks, " as a user\u2019s question (otherwise as plain text)"));
  const status = make("p", { className: "note", role: "status" });
  const error = make("p", { className: "error", role: "alert" });
  const choice = make("select", { id: `show-${identity}` });
  const other = make("input", { type: "number", min: 0, placeholder: "number", ariaLabel: "Number of a latent" });
  const choose = make("div", { className: "choose", hidden: true },
    make("label", { htmlFor: choice.id, textContent: "Show" }), choice, make("label", {}, "or latent ", other));
  const about = make("p", { className: "note" });
  const text = make("p", { className: "context", dir: "ltr" });
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", "Text, token by token. Arrow keys move, Enter shows the latents of a token.");
  const panel = make("div", { className: "latents", ariaLive: "polite" });
  el.classList.add("crossdiff");
  el.append(form, status, error, choose, about, text, panel);
  let shown = "", chosen = -1;

  // The value of what is shown on every token, and the value of the strongest tint.
  function valuesOf(reading, what) {
    const [kind, own] = what.split(" "), values = new Array(reading.texts.length).fill(0);
    if (kind === "measure") reading.measure.forEach((value, at) => { values[at] = value; });
    else {
      const members = new Set(kind === "concept" ? model.get("choices").find(each => each.number === Number(own)).members : [Number(own)]);
      reading.latent.forEach((latent, i) => { if (members.has(latent)) values[reading.token[i]] += reading.v[i]; });
    }
    const peak = Math.max(...values.map(Math.abs));
    const known = kind === "latent" ? reading.latents[own]?.largest ?? 0 : 0;
    return { values, peak, known, highest: Math.max(peak, known) };
  }
  function describe(reading, what, { values, peak, known }) {
    const [kind, own] = what.split(" ");
    about.replaceChildren();
    if (kind === "concept") {
      const each = model.get("choices").find(each => each.number === Number(own));
      about.append(`concept ${own}: ${each.name} \u00b7 `, ...sign(each), " \u00b7 the sum of its latents here");
    } else if (kind === "latent") {
      const each = reading.latents[own];
      about.append(`latent ${own}`, ...(each?.verdict ? [" \u00b7 ", ...sign(each)] : []), each?.label ? ` \u00b7 ${each.label}` : "");
    } else about.append("your own measure");
    const at = values.findIndex(value => Math.abs(value) === peak);
    about.append(peak ? ` \u00b7 strongest here ${number(values[at])}, on \u00ab${reading.texts[at]}\u00bb` : " \u00b7 0 on this text");
    if (peak && known) about.append(number(peak) === number(known) ? ", as strong as on the analysed text" : peak > known ? `, above the ${number(known)} of the analysed text` : `, ${Math.round(100 * peak / known)}% of its largest on the analysed text`);
    about.append(known ? ". The tint is relative to the largest known value." : ". The tint is relative to the largest value on this text.");
  }
  function draw() {
    const reading = model.get("reading"), found = valuesOf(reading, shown);
    describe(reading, shown, found);
    text.replaceChildren();
    reading.pieces.forEach((piece, place) => {
      if (piece.begins_line) text.append(make("br"));
      if (piece.speaker) text.append(make("span", { className: `speaker ${piece.speaker}`, textContent: piece.speaker }));
      const own = found.values.slice(piece.first, piece.first + piece.n), value = own.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a));
      const token = make("span", { className: piece.classes, textContent: piece.text, tabIndex: piece.first === Math.max(chosen, 0) ? 0 : -1 });
      if (value) token.classList.add(`${value > 0 ? "a" : "n"}${Math.min(model.get("levels"), Math.max(1, Math.ceil(model.get("levels") * Math.abs(value) / found.highest)))}`);
      if (value && Math.abs(value) === found.peak) token.classList.add("peak");
      if (piece.first === chosen) token.classList.add("chosen");
      token.title = `${number(value)}, token id ${reading.ids.slice(piece.first, piece.first + piece.n).join(", ")}, position ${piece.first}`;
      token.dataset.first = piece.first;
      token.setAttribute("role", "button");
      text.append(token);
      if (piece.ends_line) text.append(make("br"));
    });
  }
  // The latents of the token that was clicked, the strongest first.
  function list() {
    const reading = model.get("reading"), piece = reading.pieces.find(each => each.first === chosen);
    panel.replaceChildren();
    if (!piece) return;
    const rows = reading.token.flatMap((at, i) => (at >= chosen && at < chosen + piece.n ? [[reading.latent[i], reading.v[i]]] : []));
    rows.sort((a, b) => b[1] - a[1]);
    panel.append(make("p", { className: "note", textContent: rows.length
      ? `${rows.length} latents are active on \u00ab${piece.text}\u00bb, the strongest first. Click on one to show it on the text.`
      : `No latent is active on \u00ab${piece.text}\u00bb, or the token was left out in training.` }));
    if (!rows.length) return;
    const body = make("tbody");
    for (const [latent, v] of rows) {
      const each = reading.latents[latent], link = make("button", { type: "button", className: "link", textContent: `latent ${latent}` });
      link.onclick = () => show(`latent ${latent}`);
      body.append(make("tr", {}, make("td", {}, link), make("td", {}, number(v)), make("td", {}, ...sign(each)), make("td", {}, each.label)));
    }
    const head = make("tr", {}, ...["latent", "value", "verdict", "meaning"].map(name => make("th", { scope: "col", textContent: name })));
    panel.append(make("table", { className: "slim" }, make("thead", {}, head), body));
  }
  function offer() {
    const reading = model.get("reading"), strongest = new Map();
    reading.latent.forEach((latent, i) => strongest.set(latent, Math.max(strongest.get(latent) ?? 0, reading.v[i])));
    const group = (label, options) => options.length ? [make("optgroup", { label }, ...options.map(([value, name]) => make("option", { value, textContent: name })))] : [];
    const latents = [...strongest].sort((a, b) => b[1] - a[1]).slice(0, 50);
    const says = each => [each.verdict, each.label ?? each.name].filter(Boolean).join(", ");
    choice.replaceChildren(
      ...group("Your own", reading.measure ? [["measure", "your own measure"]] : []),
      ...group("Latents that are strongest here", latents.map(([latent]) => [`latent ${latent}`, `latent ${latent}: ${says(reading.latents[latent])}`])),
      ...group("Concepts", model.get("choices").map(each => [`concept ${each.number}`, `concept ${each.number}: ${says(each)}`])));
    other.max = model.get("n_latents") - 1;
  }
  function show(what) {
    if (![...choice.options].some(option => option.value === what)) choice.append(make("option", { value: what, textContent: what }));
    shown = choice.value = what;
    draw();
  }
  function pick(token) {
    chosen = Number(token.dataset.first);
    draw();
    list();
    text.querySelector(".chosen").focus();
  }
  function read() {
    const reading = model.get("reading");
    button.disabled = false;
    status.textContent = "";
    if (!reading.pieces) return;
    prompt.value = model.get("prompt") || prompt.value;
    error.textContent = "";
    choose.hidden = false;
    chosen = -1;
    offer();
    const kept = [...choice.options].some(option => option.value === shown);
    if (choice.options.length) show(kept ? shown : choice.options[0].value);
    else { about.textContent = "No latent is active on this text."; text.replaceChildren(); }
    panel.replaceChildren(make("p", { className: "note", textContent: "Click on a token for its latents." }));
  }
  function refuse() {
    if (!model.get("error")) return;
    button.disabled = false;
    status.textContent = "";
    error.textContent = model.get("error");
  }
  form.onsubmit = event => {
    event.preventDefault();
    button.disabled = true;
    error.textContent = "";
    status.textContent = "Both models read the prompt. The first time, they are loaded.";
    model.send({ prompt: prompt.value, asks: asks.checked });
  };
  prompt.onkeydown = event => {
    event.stopPropagation(); // the notebook has keys of its own
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); form.requestSubmit(); }
  };
  choice.onchange = () => show(choice.value);
  other.onkeydown = event => event.stopPropagation();
  other.onchange = () => { if (other.value !== "" && other.checkValidity()) show(`latent ${Number(other.value)}`); else other.reportValidity(); };
  text.onclick = event => { const token = event.target.closest(".t"); if (token) pick(token); };
  text.onkeydown = event => {
    const tokens = [...text.querySelectorAll(".t")], at = tokens.indexOf(event.target.closest(".t"));
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (at >= 0 && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); event.stopPropagation(); pick(tokens[at]); }
    else if (tokens[to]) {
      event.preventDefault();
      event.stopPropagation();
      tokens[at].tabIndex = -1;
      tokens[to].tabIndex = 0;
      tokens[to].focus();
    }
  };
  model.on("change:reading", read);
  model.on("change:error", refuse);
  read();
  refuse();
  return () => { model.off("change:reading", read); model.off("change:error", refuse); };
}

export default { render };
