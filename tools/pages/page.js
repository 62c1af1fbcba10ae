"use strict";
// What the viewer and the demo share: a trace (its messages: tools/trace.py), the player that shows
// it, and the switch between light and dark. Texts become text nodes, never HTML.

const BLANK = 65535;

function unpack(base64) {
  const bytes = Uint8Array.from(atob(base64 ?? ""), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Array.from({ length: bytes.length / 2 }, (_, i) => view.getUint16(2 * i, true));
}

// --- Traces --------------------------------------------------------------------------------------

class Trace {
  constructor(messages = []) {
    this.ids = []; // of the tokens, by their numbers
    this.texts = [];
    this.given = []; // a token's number or BLANK, by position
    this.steps = [];
    this.left = []; // masks in each state, the first one included
    this.expected = 0; // steps, those to come included, where that is known
    this.live = false; // more is to come
    messages.forEach((message) => this.push(message));
  }

  push(message) {
    for (const id of message.ids ?? []) this.ids.push(id);
    for (const text of message.texts ?? []) this.texts.push(text);
    if (message.given !== undefined) {
      this.given = unpack(message.given);
      this.grid = message.grid; // of a square: its columns, and the rows and columns of a box
      this.masked = this.given.map((token) => token === BLANK);
    } else {
      this.steps.push(this.read(message));
    }
    this.left.push(this.masked.filter(Boolean).length);
  }

  read(message) {
    const where = this.masked.flatMap((masked, i) => (masked ? [i] : []));
    const step = { where, set: [], mask: unpack(message.mask), entropy: message.entropy };
    if (message.best) Object.assign(step, { best: unpack(message.best), p: unpack(message.p) });
    const set = unpack(message.set);
    for (let i = 0; i < set.length; i += 3) step.set.push(set.slice(i, i + 3));
    for (const [i] of step.set) this.masked[i] = false;
    for (const i of step.mask) this.masked[i] = true;
    return step;
  }

  /** Every position after n steps: token (undefined: masked), and its step and its probability. */
  cells(n) {
    const cells = this.given.map((token) =>
      token === BLANK ? { step: 0 } : { step: 0, token, given: true },
    );
    this.steps.slice(0, n).forEach(({ set, mask }, k) => {
      const step = k + 1;
      for (const [i, token, p] of set) Object.assign(cells[i], { token, p: p / BLANK, step });
      for (const i of mask) Object.assign(cells[i], { token: undefined, again: true, step });
    });
    return cells;
  }

  /** The step that called the network on the state after n steps, if one did. */
  called(n) {
    while (this.steps[n] && !this.steps[n].best && !this.steps[n].mask.length) n += 1;
    return this.steps[n]?.best && this.steps[n];
  }

  /** [token, probability] of a step's most probable tokens at a position that was masked. */
  predicted(step, position) {
    const row = step.where.indexOf(position);
    const each = step.best.length / step.where.length;
    const tokens = step.best.slice(row * each, (row + 1) * each);
    return tokens.map((token, i) => [token, step.p[row * each + i] / BLANK]);
  }
}

// --- Small things --------------------------------------------------------------------------------

const $ = (name) => document.getElementById(name);

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

function draw(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function percent(p) {
  return p < 0.0005 ? "<\u00a00.1%" : `${(100 * p).toFixed(p < 0.0995 ? 1 : 0)}%`;
}

const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;

/** A token's text with its invisible characters made visible. */
function visible(text) {
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/[\p{Cc}\p{Cf}]/gu, "·");
}

function quoted(text) {
  return text === " " ? "space" : text === "\n" ? "new line" : visible(text).replaceAll(" ", "␣");
}

// --- The player ----------------------------------------------------------------------------------

class Player {
  constructor() {
    this.colour = "step";
    this.timer = 0;
    this.pinned = -1; // the position that the panel shows when none is pointed at
    this.pointed = -1;
    this.details = () => []; // elements that a page adds to the panel
    this.marks = () => ""; // the class that a page adds to a token
    this.override = () => {}; // a page's changes to the cells that are shown
    this.choose = null; // called with a position and the token chosen for it
    this.listen();
    for (let i = 0; i < 24; i += 1) {
      const tile = $("ramp").appendChild(make("i", "tint"));
      tile.style.setProperty("--v", i / 23);
    }
  }

  listen() {
    $("play").onclick = () => (this.timer ? this.pause() : this.play());
    $("back").onclick = () => this.go(this.n - 1);
    $("next").onclick = () => this.go(this.n + 1);
    $("slider").oninput = () => this.go(Number($("slider").value));
    $("speed").onchange = () => this.timer && this.play();
    for (const input of document.querySelectorAll("input[name=colour]")) {
      input.onchange = () => this.paint(input.value);
    }
    $("curve").onpointerdown = (event) => this.scrub(event);
    $("curve").onpointermove = (event) => event.buttons && this.scrub(event);
    const board = $("board");
    board.onpointerover = (event) => event.pointerType === "mouse" && this.point(event.target);
    board.onpointerleave = () => this.point(null);
    const pin = ({ target }) => target.dataset.i && this.pin(Number(target.dataset.i));
    board.addEventListener("click", pin);
    board.addEventListener("focusin", pin);
    board.onkeydown = (event) => this.walk(event);
    document.addEventListener("keydown", (event) => this.key(event));
  }

  /** Show another trace, from its beginning; one that is live goes on as it grows. */
  load(trace) {
    this.pause();
    Object.assign(this, { trace, n: 0, pinned: -1, pointed: -1 });
    this.build();
    this.show();
  }

  /** Make the board's elements. Once the text is known, its lines break where they will. */
  build() {
    this.settled = !this.trace.live;
    const final = this.settled ? this.trace.cells(this.end) : [];
    const wide = this.trace.texts.some((text) => text.length > 1) ? 3 : 1;
    this.elements = this.trace.given.map((_, i) => {
      const element = make("span", "cell");
      Object.assign(element.dataset, { i });
      element.setAttribute("role", "option");
      element.tabIndex = i ? -1 : 0;
      return element;
    });
    this.finals = this.elements.map((_, i) => this.trace.texts[final[i]?.token] ?? "");
    this.blanks = this.finals.map((text) => "\u00a0".repeat(text.length || wide));
    const [side, high, across] = this.trace.grid ?? [];
    $("board").classList.toggle("grid", Boolean(side));
    $("board").style.setProperty("--side", side ?? 1);
    this.edges = this.elements.map((_, i) => {
      const band = side && i >= side && Math.floor(i / side) % high === 0 ? " band" : "";
      return band + (side && i % side && (i % side) % across === 0 ? " stack" : "");
    });
    this.breaks = this.elements.map(() => document.createTextNode(""));
    $("board").replaceChildren(...this.elements.flatMap((e, i) => [e, this.breaks[i]]));
  }

  // --- States ---

  get end() {
    return this.trace.steps.length;
  }

  get span() {
    return Math.max(1, this.end, this.trace.live ? this.trace.expected : 0);
  }

  go(n) {
    this.pause();
    this.n = Math.min(Math.max(n, 0), this.end);
    this.show();
  }

  play() {
    clearInterval(this.timer);
    if (this.n >= this.end) this.n = 0;
    const whole = this.trace.live ? 4000 : 7000; // a live text plays faster
    const pause = Math.min(Math.max(whole / this.span, 40), 400) / Number($("speed").value);
    this.timer = setInterval(() => {
      if (this.n < this.end) this.n += 1;
      else if (this.trace.live) return;
      if (this.n >= this.end && !this.trace.live) this.pause();
      this.show();
    }, pause);
    this.show();
  }

  pause() {
    clearInterval(this.timer);
    this.timer = 0;
    if (this.trace && !this.trace.live && !this.settled) this.build();
    $("play").setAttribute("aria-label", "play");
    document.body.classList.remove("playing");
  }

  show() {
    if (this.timer) {
      $("play").setAttribute("aria-label", "pause");
      document.body.classList.add("playing");
    }
    this.cells = this.trace.cells(this.n);
    if (this.n === this.end) this.override(this.cells);
    this.cells.forEach((cell, i) => this.place(cell, i));
    const left = plural(this.trace.left[this.n], "mask");
    $("count").textContent = `step ${this.n} of ${this.span} · ${left} left`;
    const slider = $("slider");
    Object.assign(slider, { max: this.span, value: this.n });
    slider.setAttribute("aria-valuetext", $("count").textContent);
    this.curves();
    this.inspect();
  }

  /** Bring the element of a position to its state. */
  place(cell, i) {
    const element = this.elements[i];
    const text = this.trace.texts[cell.token];
    const known = text !== undefined;
    const over = this.n === this.end && !this.timer && !this.trace.live;
    const now = this.n > 0 && cell.step === this.n && !over;
    const end = this.settled ? this.finals[i] : text ?? "";
    const names = [`cell${this.edges[i]}`, this.marks(i)];
    if (!known) names.push("masked");
    if (cell.given) names.push("given");
    if (now) names.push(known ? "new" : "again");
    if (known && !cell.given && this.colour !== "none") names.push("tint");
    if (i === this.pinned) names.push("pinned");
    const shown = known ? visible(text) || "∅" : this.blanks[i];
    const className = names.filter(Boolean).join(" ");
    if (element.className !== className) element.className = className;
    if (element.textContent !== shown) element.textContent = shown;
    const breaks = "\n".repeat(end.split("\n").length - 1);
    if (this.breaks[i].data !== breaks) this.breaks[i].data = breaks;
    if (known && !cell.given) {
      const value = this.colour === "step" ? cell.step / this.span : cell.p;
      element.style.setProperty("--v", value.toFixed(3));
    }
    element.setAttribute("aria-selected", i === this.pinned);
    element.setAttribute("aria-label", `${i + 1}: ${known ? quoted(text) : "masked"}`);
    element.setAttribute("aria-describedby", i === this.pinned ? "panel" : "");
  }

  paint(colour) {
    this.colour = colour;
    document.querySelector(`input[name=colour][value=${colour}]`).checked = true;
    const ends = { step: ["first step", "last step"], confidence: ["0%", "100%"], none: ["", ""] };
    [$("low").textContent, $("high").textContent] = ends[colour];
    $("legend").hidden = colour === "none";
    if (this.trace) this.show();
  }

  // --- The curves ---

  curves() {
    const { trace, span } = this;
    const x = (n) => ((600 * n) / span).toFixed(1);
    const line = (values, top) =>
      values.map((v, n) => (v === undefined ? "" : `${x(n)},${(78 - (73 * v) / top).toFixed(1)}`));
    const masks = line(trace.left, Math.max(1, trace.left[0]));
    const entropies = trace.left.map((_, n) => trace.called(n)?.entropy);
    const top = Math.max(0.1, ...entropies.filter((value) => value !== undefined));
    const shapes = [
      draw("polygon", { class: "area", points: `0,80 ${masks.join(" ")} ${x(this.end)},80` }),
      draw("polyline", { class: "masks", points: masks.join(" ") }),
      draw("polyline", { class: "entropy", points: line(entropies, top).join(" ") }),
      draw("line", { class: "now", x1: x(this.n), x2: x(this.n), y1: 0, y2: 80 }),
    ];
    $("curve").replaceChildren(...shapes);
    $("left").textContent = trace.left[this.n];
    const entropy = entropies[this.n];
    $("entropy").textContent = entropy === undefined ? "–" : `${entropy.toFixed(2)} nats`;
  }

  scrub(event) {
    const box = $("curve").getBoundingClientRect();
    this.go(Math.round(((event.clientX - box.left) / box.width) * this.span));
  }

  // --- The panel ---

  point(target) {
    this.pointed = target?.dataset?.i === undefined ? -1 : Number(target.dataset.i);
    this.inspect();
  }

  pin(i) {
    if ($("panel").contains(document.activeElement)) document.activeElement.blur();
    this.pinned = i;
    this.pointed = -1;
    this.elements.forEach((element, k) => (element.tabIndex = k === i ? 0 : -1));
    this.show();
  }

  inspect() {
    if ($("panel").contains(document.activeElement)) return; // somebody is typing there
    const i = this.pointed >= 0 ? this.pointed : this.pinned;
    $("hint").hidden = i >= 0;
    if (i < 0) return $("panel").replaceChildren();
    const cell = this.cells[i];
    const masked = cell.token === undefined;
    const name = make("b", masked ? "token masked" : "token");
    name.textContent = masked ? "mask" : quoted(this.trace.texts[cell.token]);
    const head = make("p", "head");
    head.append(name, make("span", "faint", `position ${i + 1}`));
    const story = make("p", "story", this.story(cell));
    $("panel").replaceChildren(head, story, ...this.choices(cell, i), ...this.details(i, cell));
  }

  story(cell) {
    if (cell.yours) return "yours: it stays when the rest is regenerated";
    if (cell.given) return "given, and never changed";
    if (cell.token !== undefined) {
      return `came in step ${cell.step}, with probability ${percent(cell.p)}`;
    }
    return cell.again ? `masked again in step ${cell.step}` : "not revealed yet";
  }

  /** The most probable tokens: of the step that revealed the position, or of the next call. */
  choices(cell, i) {
    const masked = cell.token === undefined;
    const step = masked ? this.trace.called(this.n) : this.trace.steps[cell.step - 1];
    if (!step?.best) return [];
    const choices = this.trace.predicted(step, i);
    const listed = masked || choices.some(([token]) => token === cell.token);
    if (!listed) choices.push([cell.token, cell.p]);
    const list = make("ol", "choices");
    for (const [token, p] of choices) {
      const item = list.appendChild(make("li", token === cell.token ? "chosen" : ""));
      const bar = make("i", "bar");
      bar.style.setProperty("--p", p);
      const name = make("b", "", quoted(this.trace.texts[token]));
      item.append(name, bar, make("span", "", percent(p)));
      if (this.choose) this.offer(item, () => this.choose(i, token));
    }
    const title = masked ? "the network predicts now" : "the network predicted then";
    return [make("p", "faint", title), list];
  }

  /** Make an element a button. */
  offer(element, action) {
    element.tabIndex = 0;
    element.setAttribute("role", "button");
    element.onclick = action;
    element.onkeydown = (event) => event.key === "Enter" && action();
  }

  // --- The keyboard ---

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, textarea, select, button, [role]")) return;
    const keys = {
      " ": () => $("play").click(),
      ArrowLeft: () => this.go(this.n - 1),
      ArrowRight: () => this.go(this.n + 1),
      Home: () => this.go(0),
      End: () => this.go(this.end),
      c: () => this.paint({ step: "confidence", confidence: "none", none: "step" }[this.colour]),
    };
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  }

  /** From token to token. */
  walk(event) {
    const i = Number(event.target.dataset.i);
    const lines = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    const goals = { ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: this.elements.length - 1 };
    if (event.key === " ") $("play").click();
    else if (event.key === "Escape") event.target.blur();
    else if (lines) this.elements[this.beside(i, lines)].focus();
    else if (event.key in goals) this.elements[goals[event.key]]?.focus();
    else return;
    event.preventDefault();
  }

  /** The nearest position in the line above (-1) or below (1). */
  beside(i, direction) {
    const boxes = this.elements.map((element) => element.getBoundingClientRect());
    const lines = boxes.map((box) => direction * (box.top - boxes[i].top));
    const next = Math.min(...lines.filter((distance) => distance > 4));
    const away = (k) => Math.abs(boxes[k].left - boxes[i].left);
    const row = [...lines.keys()].filter((k) => Math.abs(lines[k] - next) < 4);
    return row.reduce((best, k) => (away(k) < away(best) ? k : best), row[0] ?? i);
  }
}

// --- Light and dark ------------------------------------------------------------------------------

$("theme").onclick = () => {
  const { dataset } = document.documentElement;
  dataset.theme ??= matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  dataset.theme = dataset.theme === "dark" ? "light" : "dark";
};
