
"use strict";
const byId = (id) => document.getElementById(id);
const TEXTS = JSON.parse(byId("texts").textContent);
const MODELS = ["dual_encoder", "late_interaction", "cross_encoder"];
const RERANKERS = MODELS.slice(1);
const VIEWS = ["maxsim", "attention"];

let health = null;  // what the server has
let running = null;  // AbortController of the search that goes on
let found = null;  // {request, result, step, first, seconds} of the search shown
let pair = null;  // {pid, maxsim, attention} of the passage shown
let view = "maxsim";
let layer = null;
let said = ["", {}, false];  // the status line, to be said again in another language

// --- texts, colours ---------------------------------------------------------------------------

// What a reader has chosen is kept where the browser allows it.
const kept = {
  get(name) { try { return localStorage.getItem(name); } catch { return null; } },
  set(name, value) { try { localStorage.setItem(name, value); } catch { /* not kept */ } },
};
let language = [kept.get("language"), ...navigator.languages.map((tag) => tag.slice(0, 2)), "en"]
  .find((tag) => tag !== null && Object.hasOwn(TEXTS, tag));

function t(key, values = {}) {
  return TEXTS[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

// Texts go in as text nodes and never as markup: passages may hold anything.
function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

// What the server says is no key of ours, and stays as it is.
const inWords = (key, values) => Object.hasOwn(TEXTS.en, key) ? t(key, values) : key;

function say(key, values = {}, isError = false) {
  said = [key, values, isError];
  const line = inWords(key, values);
  const more = found?.result?.query_truncated && !isError
    ? " " + t("truncated", {read: found.result.query_tokens_read, tokens: found.result.query_tokens})
    : "";
  byId("status").textContent = line + more;
  byId("status").classList.toggle("error", isError);
}

function speak() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : language;
  byId("language").value = language;
  for (const element of document.querySelectorAll("[data-text]")) {
    element.textContent = t(element.dataset.text);
  }
  for (const element of document.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", t(element.dataset.label));
    element.title = t(element.dataset.label);
  }
  if (health) {
    byId("served").textContent = t("served", {passages: health.passages.toLocaleString(language)});
    byId("layer").replaceChildren(...health.attention_layers.map((number, i, all) => {
      const last = i === all.length - 1;
      const option = make("option", "", t(last ? "layer_last" : "layer_number", {number: number + 1}));
      option.value = number;
      return option;
    }));
    showRankings();
    showPair();
  }
  say(...said);
}

function paint() {
  const theme = kept.get("theme") ?? "auto";
  byId("theme").value = theme;
  document.documentElement.dataset.theme = theme;
  for (const canvas of document.querySelectorAll("canvas")) canvas.redraw();
}

// --- the server -------------------------------------------------------------------------------

async function send(path, body, signal) {
  let response;
  try {
    response = await fetch(path, {
      method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body),
      signal,
    });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("unreachable");
  }
  if (!response.ok) throw new Error((await response.json()).detail);
  return response;
}

async function* lines(path, body, signal) {
  const {body: stream} = await send(path, body, signal);
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    const whole = (rest + value).split("\n");
    rest = whole.pop();
    for (const line of whole) {
      const read = JSON.parse(line);
      if ("detail" in read) throw new Error(read.detail);
      yield read;
    }
  }
}

// --- the address ------------------------------------------------------------------------------

const whole = (text) => /^-?\d{1,9}$/.test(text) ? Number(text) : text;  // else the server says so

function addressOfForm() {
  const address = new URLSearchParams({q: byId("query").value});
  const used = health.models.filter((name) => byId(`use-${name}`)?.checked ?? true);
  if (used.length < health.models.length) address.set("models", used.join(","));
  for (const [name, usual] of [["depth", 10], ...RERANKERS.map(
    (name) => [`${name}_depth`, health[`${name}_depth`]])]) {
    const value = byId(name).value;
    if (value && whole(value) !== usual && !byId(name).disabled) address.set(name, value);
  }
  return address;
}

function requestOf(address) {
  const named = address.get("models")?.split(",");
  const unknown = named?.find((name) => !health.models.includes(name));
  if (unknown !== undefined) throw Object.assign(new Error("no_model"), {values: {name: unknown}});
  const request = {query: address.get("q")};
  if (address.has("depth")) request.depth = whole(address.get("depth"));
  for (const name of RERANKERS) {
    const key = `${name}_depth`;
    if (named && !named.includes(name) && name !== health.first_stage) {
      request[key] = 0;
    } else if (address.has(key)) {
      request[key] = whole(address.get(key));
    }
  }
  return request;
}

function fillForm(address, request) {
  byId("query").value = address.get("q") ?? "";
  byId("depth").value = request.depth ?? 10;
  byId("depth").max = health.max_depth;
  for (const name of RERANKERS) {
    const limit = health[`${name}_depth`], field = byId(`${name}_depth`), use = byId(`use-${name}`);
    const first = name === health.first_stage;
    use.checked = first || (limit > 0 && request[`${name}_depth`] !== 0);
    use.disabled = first || !limit;
    field.disabled = !use.checked;
    field.max = limit;
    field.value = request[`${name}_depth`] || limit;
  }
}

function note() {  // what is looked at, in the address of the search
  const address = new URLSearchParams(location.search);
  const noted = {pid: pair?.pid, view: view === "maxsim" ? null : view,
                 layer: view === "attention" ? layer : null};
  for (const [name, value] of Object.entries(noted)) {
    if (value !== null && value !== undefined) address.set(name, value);
    else address.delete(name);
  }
  history.replaceState(null, "", `?${address}`);
}

function follow() {
  const address = new URLSearchParams(location.search);
  stop();
  found = pair = null;
  byId("models").hidden = byId("pair").hidden = true;
  byId("pair-status").textContent = "";
  say("");
  try {
    fillForm(address, {});
    const asked = address.get("view") ?? "maxsim";
    if (!VIEWS.includes(asked)) throw Object.assign(new Error("no_view"), {values: {name: asked}});
    view = asked;
    layer = address.has("layer") ? whole(address.get("layer")) : null;
    showView();
    const request = requestOf(address);
    fillForm(address, request);
    if (address.get("q")) search(request, address.get("pid"));
  } catch (error) {
    complain(error);
  }
}

function complain(error) {
  if (error.name !== "AbortError") say(error.message, error.values ?? {}, true);
}

// --- searching --------------------------------------------------------------------------------

function stop() {
  const was = running;
  running = null;
  was?.abort();
  return was !== null;
}

async function search(request, pid) {
  stop();
  const own = running = new AbortController();
  const began = performance.now();
  const seconds = () => ((performance.now() - began) / 1000).toFixed(2);
  found = {request, result: null, step: null};
  pair = null;
  byId("pair").hidden = true;
  byId("pair-status").textContent = "";
  say("searching");
  try {
    if (pid !== null) select(pid);
    for await (const step of lines("search/stream", request, own.signal)) {
      if (own !== running) return;
      found.step = step;
      found.result = step.result ?? found.result;
      found.first ??= seconds();
      found.seconds = seconds();
      showRankings();
      say("searching_on", {seconds: found.first, model: t(step.model), done: step.done, total: step.total});
      const late = step.result?.rankings.late_interaction ?? [];
      if (late.length && pair === null) select(late[0].pid);
    }
    say(found.first === found.seconds ? "answered" : "answered_in_steps",
        {first: found.first, seconds: found.seconds});
  } catch (error) {
    if (own === running) complain(error);
  }
  if (own === running) {
    running = null;
    showRankings();
  }
}

function isUsed(model) {
  const depth = found.request[`${model}_depth`] ?? health[`${model}_depth`];
  return health.models.includes(model) && (model === health.first_stage || model === "dual_encoder" || depth > 0);
}

function showRankings() {
  if (!found?.step) return;
  const focused = document.activeElement?.closest?.(".hit")?.dataset;
  byId("models").replaceChildren(...MODELS.map((model) => {
    const section = make("section", "panel");
    const title = make("h2", "", t(model));
    title.id = `title-${model}`;
    section.id = model;
    section.setAttribute("aria-labelledby", title.id);
    section.append(title, ranking(model));
    return section;
  }));
  byId("models").hidden = false;
  const again = focused && hitsOf(focused.model).find((hit) => hit.dataset.pid === focused.pid);
  if (again) moveTo(again, hitsOf(focused.model));
}

function ranking(model) {
  const hits = found.result?.rankings[model] ?? [];
  if (hits.length) {
    const list = make("ol");
    list.append(...hits.map((hit, i) => {
      const item = make("li");
      item.append(hitButton(hit, model, i === 0));
      return item;
    }));
    return list;
  }
  if (!isUsed(model)) return make("p", "none", t("left_out"));
  if (running === null) return make("p", "none", t("stopped"));
  const {step} = found;
  const next = MODELS.slice(MODELS.indexOf(step.model) + 1).find(isUsed);
  const box = make("div");
  const bar = make("progress");
  bar.setAttribute("aria-label", t(model));
  let text = t(model === next && step.result ? "searching" : "waiting");
  if (step.model === model && !step.result) {
    [bar.max, bar.value] = [step.total, step.done];
    text = t("scoring", step);
  }
  box.append(make("p", "none", text), bar);
  return box;
}

function hitButton(hit, model, isFirst) {
  const button = make("button", "hit");
  button.type = "button";
  button.tabIndex = isFirst ? 0 : -1;
  Object.assign(button.dataset, {pid: hit.pid, model});
  button.setAttribute("aria-pressed", String(hit.pid === pair?.pid));
  const place = make("span", "place");
  place.append(make("span", "rank", `${hit.ranks[model]}.`), make("span", "pid", hit.pid),
               make("span", "score", hit.scores[model].toFixed(3)));
  button.append(place, make("span", "snippet", hit.text));
  button.title = MODELS.filter((name) => hit.ranks[name] !== null)
    .map((name) => t("rank", {model: t(name), rank: hit.ranks[name]})).join("\n");
  const others = (same) => {
    for (const other of document.querySelectorAll(".hit")) {
      other.classList.toggle("same", same && other.dataset.pid === hit.pid);
    }
  };
  for (const event of ["mouseenter", "focus"]) button.addEventListener(event, () => others(true));
  for (const event of ["mouseleave", "blur"]) button.addEventListener(event, () => others(false));
  button.addEventListener("click", () => select(hit.pid));
  return button;
}

// --- one passage ------------------------------------------------------------------------------

function select(pid) {
  pair = {pid, maxsim: null, attention: null};
  for (const button of document.querySelectorAll(".hit")) {
    button.setAttribute("aria-pressed", String(button.dataset.pid === pid));
  }
  load();
}

async function load() {
  const own = pair, wanted = view, query = found.request.query;
  note();
  showView();
  byId("pair-status").textContent = "";
  if (wanted === "attention" && !health.attention_layers.length) {
    showPair();
    return;
  }
  const lastLayer = layer;
  try {
    if (own[wanted] === null) {
      const answer = await (wanted === "maxsim"
        ? send("explain", {query, pid: own.pid})
        : send("attention", {query, pid: own.pid, ...(layer === null ? {} : {layer})}));
      const content = await answer.json();
      if (own !== pair || (wanted === "attention" && lastLayer !== layer)) return;
      own[wanted] = content;
    }
    if (wanted === view) showPair();
  } catch (error) {
    if (own === pair) byId("pair-status").textContent = inWords(error.message);
  }
}

function showView() {
  for (const name of VIEWS) {
    byId(name).hidden = name !== view;
    byId(`tab-${name}`).setAttribute("aria-selected", String(name === view));
    byId(`tab-${name}`).tabIndex = name === view ? 0 : -1;
  }
}

function turnTo(name) {
  view = name;
  showView();
  byId(`tab-${name}`).focus();
  if (pair) load();
}

function showPair() {
  if (!pair) return;
  if (view === "attention" && !health.attention_layers.length) {
    byId("attention-readout").textContent = t("attention_none");
    byId("pair-title").textContent = pair.pid;
    byId("pair").hidden = false;
  } else if (pair[view]) {
    (view === "maxsim" ? showMaxSim : showAttention)(pair[view]);
    byId("pair").hidden = false;
  }
}

const keyOf = (token) => token.special ? token.text : `${token.start}-${token.end}`;
const weigh = (element, weight) => element.style.setProperty("--weight", Math.max(0, weight));

// Buttons of query tokens; pointing at one or moving to it activates it.
function showTokens(list, tokens, weights, activate) {
  const release = () => activate(null);
  list.replaceChildren(...tokens.map((token, i) => {
    const item = make("li");
    const button = make("button", "", token.text);
    button.type = "button";
    button.tabIndex = i === 0 ? 0 : -1;
    weigh(button, weights[i]);
    for (const event of ["mouseenter", "focus", "click"]) {
      button.addEventListener(event, () => activate(i));
    }
    for (const event of ["mouseleave", "blur"]) button.addEventListener(event, release);
    item.append(button);
    return item;
  }));
  release();
}

function markActive(list, number) {
  for (const [i, button] of list.querySelectorAll("button").entries()) {
    button.classList.toggle("active", i === number);
  }
}

function showMaxSim({pid, text, score, matches}) {
  const strongest = new Map();  // per winning passage token, its largest similarity
  for (const {passage, similarity} of matches) {
    const before = strongest.get(keyOf(passage));
    if (!before || before.similarity < similarity) {
      strongest.set(keyOf(passage), {token: passage, similarity});
    }
  }
  const marks = new Map();
  for (const [key, {token}] of strongest) {
    marks.set(key, {token, mark: make("mark", token.special ? "special" : "", token.text)});
  }
  byId("passage").replaceChildren(...withMarks(text, [...marks.values()]));
  byId("pair-title").textContent = t("maxsim_title", {pid, score: score.toFixed(3)});
  const list = byId("query-tokens");
  showTokens(list, matches.map(({query}) => query), matches.map((m) => m.similarity), (number) => {
    markActive(list, number);
    for (const [key, {mark}] of marks) {
      mark.classList.remove("winner");
      weigh(mark, strongest.get(key).similarity);
    }
    byId("passage").classList.toggle("faded", number !== null);
    if (number === null) {
      byId("readout").textContent = t("maxsim_hint");
      return;
    }
    const {query, passage, similarity} = matches[number];
    const {mark} = marks.get(keyOf(passage));
    mark.classList.add("winner");
    weigh(mark, similarity);
    byId("readout").textContent = t("maxsim_readout", {
      query: query.text, passage: passage.text, similarity: similarity.toFixed(3),
    });
  });
}

const digits = (number) => number >= 0.01 ? number.toFixed(3) : number.toPrecision(2);
const topOf = (row) => row.indexOf(Math.max(...row));
const meanOf = (rows) => rows[0].map((_, j) => rows.reduce((sum, row) => sum + row[j], 0) / rows.length);

function showAttention(shown) {
  const {pid, text, query_tokens: queries, passage_tokens: passages, divergences} = shown;
  byId("pair-title").textContent = t("attention_title", {pid, divergence: shown.divergence.toFixed(3)});
  byId("layer").value = shown.layer;
  const list = byId("attention-tokens"), readout = byId("attention-readout");
  const activate = (number, column = null) => {
    markActive(list, number);
    const rows = sides.map(({rows}) => number === null ? meanOf(rows) : rows[number]);
    const tops = rows.map((row) => Math.max(...row));
    const scale = byId("one-scale").checked ? [Math.max(...tops), Math.max(...tops)] : tops;
    for (const [i, side] of sides.entries()) side.show(rows[i], scale[i], number);
    const [target, student] = rows;
    if (number === null) {
      readout.textContent = t("attention_all", {
        divergence: shown.divergence.toFixed(3), rows: queries.length,
      });
    } else if (column === null) {
      const [best, own] = [topOf(target), topOf(student)];
      readout.textContent = t("attention_row", {
        token: queries[number].text, divergence: divergences[number].toFixed(3),
        share: (100 * shown.shares[number]).toFixed(0),
        target: passages[best].text, target_weight: digits(target[best]),
        student: passages[own].text, student_weight: digits(student[own]),
      });
    } else {
      readout.textContent = t("attention_cell", {
        token: queries[number].text, passage: passages[column].text,
        target_weight: digits(target[column]), student_weight: digits(student[column]),
      });
    }
  };
  const sides = RERANKERS.toReversed().map((model) => attentionMap(
    shown[model], text, passages, activate,
    (top) => t(`map_${model}`, {layer: shown.layer + 1, tau: shown.tau, top: digits(top)})));
  byId("maps").replaceChildren(...sides.map(({figure}) => figure));
  const most = Math.max(...divergences, 1e-9);
  showTokens(list, queries, divergences.map((value) => value / most), activate);
  byId("one-scale").onchange = () => activate(null);
}

// One model's map: a picture of all rows, and the passage in the colours of one of them.
function attentionMap(rows, text, passages, activate, caption) {
  const figure = make("figure"), title = make("figcaption"), canvas = make("canvas");
  const marks = passages.map((token) => ({token, mark: make("mark")}));
  const passage = make("p", "passage");
  passage.append(...withMarks(text, marks));
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", t("map_picture", {rows: rows.length, columns: passages.length}));
  canvas.style.setProperty("--rows", Math.max(rows.length, 6));
  [canvas.width, canvas.height] = [passages.length, rows.length];
  let active = null;
  canvas.redraw = () => {
    const pen = canvas.getContext("2d");
    const top = Math.max(...rows.map((row) => Math.max(...row)));
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.fillStyle = getComputedStyle(canvas).color;
    for (const [i, row] of rows.entries()) {
      for (const [j, weight] of row.entries()) {
        pen.globalAlpha = (weight / top) * (active === null || active === i ? 1 : 0.35);
        pen.fillRect(j, i, 1, 1);
      }
    }
  };
  canvas.addEventListener("mousemove", (event) => {
    const [i, j] = [event.offsetY / canvas.clientHeight * rows.length,
                    event.offsetX / canvas.clientWidth * passages.length].map(Math.floor);
    if (i in rows && j in passages) activate(i, j);
  });
  canvas.addEventListener("mouseleave", () => activate(null));
  figure.append(title, canvas, passage);
  const show = (row, top, number) => {
    title.textContent = caption(top);
    for (const [j, {mark}] of marks.entries()) weigh(mark, row[j] / top);
    if (number !== active || number === null) {
      active = number;
      requestAnimationFrame(canvas.redraw);
    }
  };
  return {figure, rows, show};
}

// Spans count code points, JavaScript's strings count UTF-16 units.
function withMarks(text, marks) {
  const characters = Array.from(text);
  const special = marks.filter(({token}) => token.special);
  const inside = marks.filter(({token}) => !token.special)
    .sort((a, b) => a.token.start - b.token.start);
  const nodes = [];
  let position = 0;
  for (const {token, mark} of inside) {
    nodes.push(characters.slice(position, token.start).join(""));
    mark.textContent = characters.slice(Math.max(position, token.start), token.end).join("");
    nodes.push(mark);
    position = Math.max(position, token.end);
  }
  nodes.push(characters.slice(position).join(""));
  return [...nodes, ...special.map(({mark}) => mark)];
}

// --- keys -------------------------------------------------------------------------------------

const hitsOf = (model) => [...document.querySelectorAll(`#${model} .hit`)];

// One of a group can be reached by Tab: the one where the reader was last.
function moveTo(element, group) {
  if (!element) return false;
  for (const other of group) other.tabIndex = other === element ? 0 : -1;
  element.focus();
  return true;
}

function stepInLists(key, hit) {
  const column = hitsOf(hit.dataset.model), place = column.indexOf(hit);
  const filled = MODELS.filter((model) => hitsOf(model).length);
  const beside = (by) => filled[filled.indexOf(hit.dataset.model) + by];
  if (key === "ArrowUp" && place === 0) {
    byId("query").focus();
    return true;
  }
  if (key === "ArrowLeft" || key === "ArrowRight") {
    const model = beside(key === "ArrowLeft" ? -1 : 1);
    if (!model) return false;
    const group = hitsOf(model);
    return moveTo(group[Math.min(place, group.length - 1)], group);
  }
  const target = {ArrowUp: place - 1, ArrowDown: place + 1, Home: 0, End: column.length - 1}[key];
  return target !== undefined && moveTo(column[target], column);
}

function stepInRow(key, element, group) {
  const place = group.indexOf(element);
  const target = {ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: group.length - 1}[key];
  return target === undefined ? undefined : group[target];
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const {key, target} = event;
  const isTyping = target.matches("input, select, textarea");
  const hit = target.closest(".hit"), tokens = target.closest(".tokens");
  let done = true;
  if (key === "/" && !isTyping) {
    byId("query").focus();
    byId("query").select();
  } else if (key === "?" && !isTyping) {
    byId("help").togglePopover();
  } else if (key === "Escape") {
    // The browser closes the help.
    if (byId("help").matches(":popover-open")) return;
    if (stop()) {
      say("stopped");
      showRankings();
    }
    byId("query").focus();
  } else if (key === "ArrowDown" && target === byId("query")) {
    const first = MODELS.map(hitsOf).find((hits) => hits.length) ?? [];
    done = moveTo(first[0], first);
  } else if (hit) {
    done = stepInLists(key, hit);
  } else if (tokens) {
    const group = [...tokens.querySelectorAll("button")];
    done = moveTo(stepInRow(key, target, group), group);
  } else if (target.matches("[role=tab]")) {
    const tab = stepInRow(key, target, VIEWS.map((name) => byId(`tab-${name}`)));
    if (tab) turnTo(tab.getAttribute("aria-controls"));
    done = Boolean(tab);
  } else {
    done = false;
  }
  if (done) event.preventDefault();
}

// --- start ------------------------------------------------------------------------------------

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!health) return;
  const address = addressOfForm();
  history.pushState(null, "", `?${address}`);
  search(requestOf(address), null);
});
for (const name of RERANKERS) {
  byId(`use-${name}`).addEventListener("change", (event) => {
    byId(`${name}_depth`).disabled = !event.target.checked;
  });
}
for (const name of VIEWS) byId(`tab-${name}`).addEventListener("click", () => turnTo(name));
byId("layer").addEventListener("change", (event) => {
  layer = Number(event.target.value);
  if (pair) {
    pair.attention = null;
    load();
  }
});
byId("language").addEventListener("change", (event) => {
  language = event.target.value;
  kept.set("language", language);
  speak();
});
byId("theme").addEventListener("change", (event) => {
  kept.set("theme", event.target.value);
  paint();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
document.addEventListener("keydown", onKey);
window.addEventListener("popstate", () => { if (health) follow(); });

speak();
paint();
fetch("health").then((answer) => answer.json()).then((answer) => {
  health = answer;
  speak();
  follow();
}, () => say("unreachable", {}, true));
