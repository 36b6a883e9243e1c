// Tokens of an answer: their colours, and the table of one of them.

// Shifts of a token's log-probability, in nats, from which a mark is stronger.
const LEVELS = [0.5, 1.5, 3];

function make(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

const number = (value) => (value === null || value === undefined ? "none" : value.toFixed(2));

/** Class names by a token's shift: not known if a model lacks the token. */
function mark({ steered, base, changed }) {
  const shift = base === null || steered === null ? 0 : steered - base;
  const level = LEVELS.filter((least) => Math.abs(shift) >= least).length;
  const names = ["token"];
  if (level) names.push((shift > 0 ? "up" : "down") + level);
  if (changed) names.push("changed");
  return names;
}

function table(entry) {
  const head = ["token", "steered", "base", "shift", "expert", "antiexpert"];
  const rows = entry.top.map((row) => {
    const shift = row.base === null || row.steered === null ? null : row.steered - row.base;
    const cells = [row.steered, row.base, shift, row.expert, row.antiexpert].map(number);
    const chosen = row.token_id === entry.token_id ? " ←" : "";
    return make("tr", {}, ...[JSON.stringify(row.token) + chosen, ...cells].map(
      (text) => make("td", { textContent: text })));
  });
  return make("table", {},
    make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col", textContent: text })))),
    make("tbody", {}, ...rows));
}

/** The text of a chunk, cut at its tokens. Some tokenizers name a token without its space. */
function cut(text, entries) {
  let rest = text;
  return entries.map(({ token }, i) => {
    const name = token.trim();
    const found = name ? rest.indexOf(name) : -1;
    const end = i === entries.length - 1 ? rest.length : found < 0 ? 0 : found + name.length;
    const part = rest.slice(0, end);
    rest = rest.slice(end);
    return part;
  });
}

/** A column that grows token by token. */
export class Column {
  constructor(title, place) {
    this.answer = make("div", { className: "answer" });
    this.status = make("span", { className: "status" });
    this.status.setAttribute("aria-live", "polite");
    const heading = make("h2", { textContent: title });
    place.append(make("article", { className: "column" }, make("header", {}, heading, this.status), this.answer));
    this.answer.setAttribute("role", "group");
    this.answer.setAttribute("aria-label", title);
    // Tokens as the server counts them, those with an explanation, and changed ones among these.
    this.count = this.entries = this.changed = 0;
  }

  add(text, entries) {
    if (!entries) {
      this.answer.append(text);
      return;
    }
    const texts = cut(text, entries);
    for (const [i, entry] of entries.entries()) {
      const token = make("span", { className: mark(entry).join(" "), textContent: texts[i] });
      if (!texts[i]) token.classList.add("empty");
      token.setAttribute("role", "button");
      token.setAttribute("aria-label", `${texts[i] || "no text"}${entry.changed ? ", changed" : ""}`);
      token.tabIndex = this.entries ? -1 : 0;
      token.entry = entry;
      this.answer.append(token);
      this.entries += 1;
      this.changed += entry.changed ? 1 : 0;
    }
  }

  say(text) {
    const share = this.entries ? `, ${Math.round((100 * this.changed) / this.entries)} % changed` : "";
    this.status.textContent = `${text} ${this.count} token${this.count === 1 ? "" : "s"}${share}`.trim();
  }
}

/** Clicks and arrow keys on tokens within `answers` show the token's table in `place`. */
export function showTables(answers, place) {
  const show = (token) => {
    answers.querySelector("[aria-current]")?.removeAttribute("aria-current");
    token.setAttribute("aria-current", "true");
    for (const before of token.parentElement.querySelectorAll("[tabindex='0']")) before.tabIndex = -1;
    token.tabIndex = 0;
    const other = token.entry.changed ? "another token here" : "the same token";
    const text = `Log-probabilities. The base would choose ${other}.`;
    place.replaceChildren(make("p", { textContent: text }), table(token.entry));
  };
  answers.addEventListener("click", (event) => {
    const token = event.target.closest(".token");
    if (token) show(token);
  });
  answers.addEventListener("keydown", (event) => {
    const token = event.target.closest(".token");
    if (!token) return;
    const way = { ArrowLeft: "previousElementSibling", ArrowRight: "nextElementSibling" }[event.key];
    const next = way ? token[way] : ["Enter", " "].includes(event.key) ? token : null;
    if (!next) return;
    event.preventDefault();
    next.focus();
    show(next);
  });
}
