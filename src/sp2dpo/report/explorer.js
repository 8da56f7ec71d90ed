"use strict";
// The list of all pairs: what is packed in this page, the filters, the order, the pages of the list.
// What comes from the data reaches the page as text nodes only.

const byId = id => document.getElementById(id);

function make(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter(child => child !== null));
  return element;
}

// Data ---------------------------------------------------------------------------------------------------------------

async function unpack(name) {
  const coded = atob(byId(`data-${name}`).textContent);
  const bytes = new Uint8Array(coded.length);
  for (let n = 0; n < coded.length; n++) bytes[n] = coded.charCodeAt(n);
  const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(plain).arrayBuffer();
}

const unpackJson = async name => JSON.parse(new TextDecoder().decode(await unpack(name)));

const ARRAYS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };
let described;

async function column(name) {
  const { type, values } = described[name];
  const codes = new ARRAYS[type](await unpack(name));
  if (!values) return codes;
  const known = Float64Array.from(values, value => value === null ? NaN : value);
  return Float64Array.from(codes, code => known[code]);
}

async function columns(...names) {
  const loaded = await Promise.all(names.map(column));
  return Object.fromEntries(names.map((name, n) => [name, loaded[n]]));
}

const NO_ANSWER = "no answer";
const fixed = (value, places = 4) => Number.isFinite(value) ? value.toFixed(places).replace("-", "−") : NO_ANSWER;
const count = value => value.toLocaleString("en-US");
const share = value => Number.isFinite(value) ? `${Math.round(100 * value)}%` : "–";

let run, list;

const HEX = Array.from({ length: 256 }, (_, byte) => byte.toString(16).padStart(2, "0"));
const shortId = i => {
  let id = "";
  for (let n = 6 * i; n < 6 * i + 6; n++) id += HEX[list.key[n]];
  return id;
};
const nameOf = i => list.ids[i] || shortId(i);
const categoryOf = code => code === 255 ? NO_ANSWER : run.categories[code];

async function loadList() {
  [run, described] = await Promise.all([unpackJson("facts"), unpackJson("columns")]);
  const texts = unpackJson("openings");
  list = await columns("key", "category", "beta", "gap", "spread", "doubt", "rank", "reversed");
  Object.assign(list, await texts);
  list.listed = Uint8Array.from(list.rank, rank => rank !== 0xffffffff);
}

// Names of pairs in the address ---------------------------------------------------------------------------------------

let rows, keys;

function nameRows() {
  rows = new Map();
  keys = [];
  for (let i = 0; i < run.n; i++) {
    const id = shortId(i);
    let key = id;
    for (let again = 2; rows.has(key); again++) key = `${id}.${again}`;
    rows.set(key, i);
    keys.push(key);
  }
}

// Filters and order ---------------------------------------------------------------------------------------------------

const COLUMNS = {
  name: i => nameOf(i),
  category: i => list.category[i],
  beta: i => list.beta[i],
  gap: i => list.gap[i],
  spread: i => list.spread[i],
  doubt: i => list.doubt[i],
  prompt: i => list.prompts[i],
};
const PAGE = 50;
const view = { shown: null, sort: null, down: false, page: 0 };
let haystack;

function wanted() {
  const number = (id, otherwise) => byId(id).value === "" ? otherwise : Number(byId(id).value);
  const categories = new Set();
  for (const box of document.querySelectorAll("#filters [name=category]")) if (box.checked) categories.add(Number(box.value));
  return {
    categories,
    low: number("f-low", -Infinity), high: number("f-high", Infinity), spread: number("f-spread", -Infinity),
    errors: byId("f-errors").checked, reversed: byId("f-reversed") !== null && byId("f-reversed").checked,
    text: byId("f-text").value.trim().toLowerCase(),
  };
}

function says(i, text) {
  haystack ??= list.prompts.map((prompt, n) => `${list.ids[n]} ${prompt}`.toLowerCase());
  const id = shortId(i);
  return haystack[i].includes(text) || id.includes(text) || (text.length > 12 && text.startsWith(id))
    || (list.ids[i].length === list.cut && text.startsWith(list.ids[i].toLowerCase()));
}

function filter() {
  const want = wanted();
  const shown = [];
  for (let i = 0; i < run.n; i++) {
    const beta = Number(list.beta[i].toFixed(6));
    if (!want.categories.has(list.category[i]) || beta < want.low || beta > want.high) continue;
    if (list.spread[i] < want.spread || (want.errors && !list.listed[i]) || (want.reversed && !list.reversed[i])) continue;
    if (want.text && !says(i, want.text)) continue;
    shown.push(i);
  }
  view.shown = shown;
  order();
}

// Equal values stay in the order of review for doubt, else in that of the schedule; what is missing comes last.
function order() {
  const { sort, down } = view;
  if (sort) {
    const values = new Array(run.n);
    for (const i of view.shown) values[i] = COLUMNS[sort](i);
    const sign = down ? -1 : 1;
    const missing = value => Number.isNaN(value) ? 1 : 0;
    view.shown.sort((a, b) => {
      const [x, y] = [values[a], values[b]];
      if (x < y) return -sign;
      if (x > y) return sign;
      return missing(x) - missing(y) || (sort === "doubt" ? list.rank[a] - list.rank[b] : 0) || a - b;
    });
  } else view.shown.sort((a, b) => a - b);
  view.page = 0;
  draw();
}

// The table -----------------------------------------------------------------------------------------------------------

function row(i) {
  const cells = [
    make("th", { scope: "row" }, make("a", { href: `#pair=${keys[i]}`, dir: "auto" }, nameOf(i))),
    make("td", {}, categoryOf(list.category[i])),
    make("td", { className: "n" }, fixed(list.beta[i])),
    make("td", { className: "n" }, fixed(list.gap[i])),
    make("td", { className: "n" }, fixed(list.spread[i], 3)),
    make("td", { className: "n" }, share(list.doubt[i]), list.listed[i] ? make("span", { className: "bad" }, " !") : ""),
    make("td", { className: "prompt" }, make("div", { dir: "auto" }, list.prompts[i]),
      list.reversed[i] ? make("span", { className: "badge" }, "known to be reversed") : ""),
  ];
  return make("tr", {}, ...cells);
}

function draw() {
  const { shown, page } = view;
  const pages = Math.max(Math.ceil(shown.length / PAGE), 1);
  const from = page * PAGE;
  const slice = shown.slice(from, from + PAGE);
  byId("list-rows").replaceChildren(...slice.map(row));
  const of = shown.length === run.n ? `All ${count(run.n)} pairs` : `${count(shown.length)} of ${count(run.n)} pairs match`;
  byId("count").textContent = slice.length ? `${of}; here ${count(from + 1)} to ${count(from + slice.length)}.` : `${of}.`;
  byId("page").textContent = `Page ${count(page + 1)} of ${count(pages)}`;
  for (const button of document.querySelectorAll("#pager button")) {
    const back = button.dataset.go === "first" || button.dataset.go === "back";
    button.disabled = back ? page === 0 : page >= pages - 1;
  }
  for (const button of document.querySelectorAll("#list thead button")) {
    const sorted = button.dataset.sort === view.sort;
    button.closest("th").setAttribute("aria-sort", sorted ? (view.down ? "descending" : "ascending") : "none");
  }
}

function turn(go) {
  const last = Math.max(Math.ceil(view.shown.length / PAGE) - 1, 0);
  view.page = { first: 0, back: view.page - 1, next: view.page + 1, last }[go];
  draw();
}

function sortBy(name) {
  const same = view.sort === name;
  const downFirst = ["spread", "doubt"].includes(name);
  view.down = same ? !view.down : downFirst;
  view.sort = name;
  order();
}

function showOnly(id) {
  byId("filters").reset();
  byId(id).checked = true;
  Object.assign(view, { sort: id === "f-errors" ? "doubt" : "beta", down: true });
  filter();
}

function policy() {
  const { whole, excerpt, all_mb: size } = run.texts;
  if (whole === run.n) return `The texts of all ${count(run.n)} pairs are in this file.`;
  return `To keep this file small, the texts of ${count(whole)} of ${count(run.n)} pairs are whole: likely label errors, `
    + "pairs known to be reversed, the highest and lowest β and the most disagreed first, then in the order of the "
    + `schedule. Of the others it holds ${excerpt ? `the first ${count(excerpt)} characters of each side` : "no text"}. `
    + `All judgements are here. A report with every text, of about ${count(size)} MB: `;
}

function listen() {
  let soon;
  byId("filters").addEventListener("input", () => { clearTimeout(soon); soon = setTimeout(filter, 120); });
  byId("filters").addEventListener("submit", event => event.preventDefault());
  byId("filters").addEventListener("reset", () => {
    Object.assign(view, { sort: null, down: false });
    setTimeout(filter);
  });
  for (const button of document.querySelectorAll("#list thead button")) {
    button.addEventListener("click", () => sortBy(button.dataset.sort));
  }
  for (const button of document.querySelectorAll("#pager button")) {
    button.addEventListener("click", () => turn(button.dataset.go));
  }
  for (const link of document.querySelectorAll("[data-show]")) {
    link.addEventListener("click", () => showOnly(link.dataset.show));
  }
  byId("list-rows").addEventListener("click", event => {
    const link = event.target.closest("tr").querySelector("a");
    if (event.target === link || getSelection().toString()) return;
    link.focus();
    link.click();
  });
}
