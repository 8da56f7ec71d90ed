// One pair with everything that made its β, in a dialog whose address can be kept and sent.

const memo = {};
const once = (name, load) => memo[name] ??= load();

const loadCalls = () => once("calls", () => columns(
  "call_category", "magnitude", "confidence", "gap_j", "mad_j", "category_j", "tie_j", "std"));

async function textsOf(i) {
  const { chunk } = run.texts;
  const texts = await once(`texts-${Math.floor(i / chunk)}`, () => unpackJson(`texts-${Math.floor(i / chunk)}`));
  return texts[i % chunk];
}

const clip = value => Math.min(Math.max(value, 0), 1);

// The numbers of a pair -----------------------------------------------------------------------------------------------

function judgementsOf(i, data) {
  const [J, K] = [run.annotators.length, run.variants.length];
  const [low, width] = run.bounds[list.category[i]].map(Number);
  const offsets = run.offsets || { j: Array(J).fill(0), k: Array(K).fill(0) };
  const calls = [];
  for (let j = 0; j < J; j++) for (let k = 0; k < K; k++) {
    const at = (i * J + j) * K + k;
    const [magnitude, confidence] = [data.magnitude[at], data.confidence[at]];
    const gap = magnitude * confidence;
    calls.push({
      j, k, magnitude, confidence, gap, category: data.call_category[at], beta: low + width * clip(gap),
      offset_j: offsets.j[j], offset_k: offsets.k[k], debiased: gap - offsets.j[j] - offsets.k[k],
      odd: run.odd[at] || "",
    });
  }
  return calls;
}

const listed = (values, weights) =>
  values.map((value, n) => (weights ? `${weights[n]} × ` : "") + fixed(value)).join(", ");

function worked(i, data, calls) {
  const [low, width] = run.bounds[list.category[i]];
  const J = run.annotators.length;
  const shown = {
    call: calls.map(c => ({
      annotator: run.annotators[c.j], variant: run.variants[c.k], magnitude: fixed(c.magnitude),
      confidence: fixed(c.confidence), gap: fixed(c.gap), offset_j: fixed(c.offset_j), offset_k: fixed(c.offset_k),
      debiased: fixed(c.debiased),
    })),
    annotator: run.annotators.map((annotator, j) => {
      const [gap, mad] = [data.gap_j[i * J + j], data.mad_j[i * J + j]];
      const [strength, form] = run.damping || [0, "exponential"];
      const factor = form === "exponential" ? Math.exp(-strength * mad) : 1 / (1 + strength * mad);
      return {
        annotator, gaps: listed(calls.filter(c => c.j === j).map(c => c.debiased), run.weights_k),
        centre: fixed(gap / factor), mad: fixed(mad), gap: fixed(gap), low, width, clipped: fixed(clip(gap)),
        beta: fixed(Number(low) + Number(width) * clip(gap)),
      };
    }),
  };
  const gaps = run.annotators.map((_, j) => clip(data.gap_j[i * J + j]));
  const [alpha, gamma] = [run.weights_j, run.weights_k];
  const both = alpha || gamma
    ? calls.map(c => [alpha && alpha[c.j], gamma && gamma[c.k]].filter(Boolean).join("·")) : null;
  shown.pair = [{
    calls: listed(calls.map(c => c.debiased), both), gaps: listed(gaps),
    betas: listed(gaps.map(gap => Number(low) + Number(width) * gap), alpha), low, width, clipped: fixed(list.gap[i]),
    beta: fixed(list.beta[i]),
  }];
  return run.steps.map(step => ({
    title: step.title, lines: shown[step.of].map(of => step.line.replace(/\{(\w+)\}/g, (_, name) => of[name])),
  }));
}

// What is shown -------------------------------------------------------------------------------------------------------

function table(caption, heads, body) {
  const numeric = new Set(["Magnitude", "Confidence", "Gap", "β", "Disagreement"]);
  const cell = (tag, head, content, more) =>
    make(tag, { ...more, className: numeric.has(head) ? "n" : "" }, content);
  return make("div", { className: "scroll", role: "group", tabIndex: 0, "aria-label": caption }, make("table", {},
    make("caption", {}, caption),
    make("thead", {}, make("tr", {}, ...heads.map(head => cell("th", head, head, { scope: "col" })))),
    make("tbody", {}, ...body.map(cells => make("tr", {}, ...cells.map((content, n) =>
      n ? cell("td", heads[n], content) : cell("th", heads[n], content, { scope: "row" })))))));
}

function side(title, kind, [left, ...turns]) {
  const box = make("div", { className: `side ${kind}` }, make("h3", { className: "what" }, title));
  for (let n = 0; n < turns.length; n += 2) {
    if (turns.length > 2 || (kind === "prompt" && turns[n] !== "user")) {
      box.append(make("p", { className: "role" }, turns[n]));
    }
    box.append(make("div", { className: "text", dir: "auto" }, turns[n + 1]));
  }
  if (left) {
    box.append(make("p", { className: "role" }, `${count(left)} more characters are not in this file. `
      + "They are in pairs.parquet, and in the report of: ", make("code", {}, wholeCommand())));
  }
  return box;
}

const wholeCommand = () => `sp2dpo report RUN_DIR --max-mb ${run.texts.all_mb}`;

function categories(i, data) {
  const J = run.annotators.length;
  return table("Categories: a vote over the prompts, then over the annotators", ["Annotator", "Majority", "Tie"],
    [...run.annotators.map((annotator, j) => [annotator, categoryOf(data.category_j[i * J + j]),
      data.tie_j[i * J + j] ? "yes; the graver one won" : "no"]), ["all", categoryOf(list.category[i]), ""]]);
}

function disagreement(i, data) {
  const J = run.annotators.length;
  const facts = run.variants.length > 1 ? run.annotators.map((annotator, j) =>
    `${annotator}, over prompts (median absolute deviation, eq. 36): ${fixed(data.mad_j[i * J + j])}`) : [];
  facts.push(`Over all judgements (range of the gap): ${fixed(list.spread[i])}`);
  if (J > 1) facts.push(`Over annotators (standard deviation of β, eq. 37): ${fixed(data.std[i])}`);
  facts.push(`Annotators in doubt of the label: ${share(list.doubt[i])}. ${run.doubt}`);
  return make("ul", {}, ...facts.map(fact => make("li", {}, fact)));
}

function own(pairId, promptId, values) {
  const facts = { pair_id: pairId, prompt_id: promptId, ...values };
  return make("dl", { className: "own" }, ...Object.entries(facts).flatMap(([name, value]) =>
    [make("dt", {}, name), make("dd", { dir: "auto" }, String(value))]));
}

function fill(i, data, [pairId, promptId, prompt, chosen, rejected, values]) {
  const calls = judgementsOf(i, data);
  byId("trail-name").textContent = nameOf(i);
  byId("trail-facts").replaceChildren(
    make("span", {}, "β = ", make("strong", {}, fixed(list.beta[i]))), make("span", {}, categoryOf(list.category[i])),
    list.listed[i] ? make("span", { className: "badge" }, "likely label error") : "",
    list.reversed[i] ? make("span", { className: "badge" }, "known to be reversed") : "");
  const rows = calls.map(c => [run.annotators[c.j], run.variants[c.k], categoryOf(c.category), fixed(c.magnitude, 2),
    fixed(c.confidence, 2), fixed(c.gap), fixed(c.beta), c.odd]);
  byId("trail-body").replaceChildren(
    make("div", { className: "sides" }, side("Prompt", "prompt", prompt), side("Chosen", "chosen", chosen),
      side("Rejected", "rejected", rejected)),
    make("h3", {}, "Judgements"),
    table(`All judgements of pair ${nameOf(i)}`,
      ["Annotator", "Prompt", "Category", "Magnitude", "Confidence", "Gap", "β", "Note"], rows),
    make("h3", {}, "How its β was made"),
    make("dl", { className: "formulas" }, ...worked(i, data, calls).flatMap(step =>
      [make("dt", {}, step.title), ...step.lines.map(line => make("dd", {}, line))])),
    make("h3", {}, "Category"), categories(i, data),
    make("h3", {}, "Disagreement and doubt"), disagreement(i, data),
    make("h3", {}, "From the source"), own(pairId, promptId, values));
  const place = view.shown.indexOf(i);
  byId("trail-place").textContent = place < 0 ? "" : `${count(place + 1)} of ${count(view.shown.length)}`;
  for (const [id, step] of [["trail-back", -1], ["trail-next", 1]]) {
    const other = place < 0 ? undefined : view.shown[place + step];
    byId(id).disabled = other === undefined;
    byId(id).onclick = () => location.replace(`#pair=${keys[other]}`);
  }
}

// Opening and closing -------------------------------------------------------------------------------------------------

let opened = null;
let entered = false; // whether going back leads to the list

const addressed = () => /^#pair=([0-9a-f]{12,64}(\.\d+)?)$/.exec(location.hash);

function rowOf(key) {
  const whole = key.slice(0, 12) + (key.includes(".") ? key.slice(key.indexOf(".")) : "");
  return rows.get(whole);
}

async function route() {
  const dialog = byId("trail");
  const address = addressed();
  const i = address ? rowOf(address[1]) : undefined;
  opened = i;
  if (i === undefined) {
    if (dialog.open) dialog.close();
    if (address) byId("count").textContent = `There is no pair ${address[1]} in this schedule.`;
    return;
  }
  const [data, texts] = await Promise.all([loadCalls(), textsOf(i)]);
  if (opened !== i) return;
  fill(i, data, texts);
  if (!dialog.open) dialog.showModal();
  byId("trail").scrollTop = 0;
}

function closed() {
  if (!addressed()) return;
  if (entered) history.back();
  else {
    history.replaceState(null, "", "#pairs");
    byId("pairs").focus();
  }
}

async function start() {
  await loadList();
  nameRows();
  byId("policy").append(policy(), ...(run.texts.whole === run.n ? [] : [make("code", {}, wholeCommand())]));
  listen();
  filter();
  byId("explorer-off").hidden = true;
  byId("explorer").hidden = false;
  byId("trail-close").addEventListener("click", () => byId("trail").close());
  byId("trail").addEventListener("close", closed);
  addEventListener("hashchange", event => {
    if (addressed() && !byId("trail").open) entered = !event.oldURL.includes("#pair=");
    route();
  });
  await route();
}

start();
