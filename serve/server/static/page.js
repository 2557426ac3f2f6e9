"use strict";

/* Everything that comes from the server is put into text nodes, never into HTML. */

const WINDOW_SECONDS = 120;
const POLL_MS = 1000;
const LOST_MS = 3000;
const PATIENCE_MS = 10000;
const MODELS_MS = 15000;
const JOBS_MS = 2000;
const MOST_JOBS = 8;
const MOST_POINTS = 240;

const at = (id) => document.getElementById(id);
const say = (id, text) => { if (at(id).textContent !== String(text)) at(id).textContent = text; };
const count = (n) => n.toLocaleString("en", { maximumFractionDigits: 0 });
const plural = (n, one) => count(n) + " " + one + (n === 1 ? "" : "s");

function make(tag, name, text) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
}

function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  for (; n >= 1024 && i < units.length - 1; i += 1) n /= 1024;
  return n.toFixed(i && n < 100 ? 1 : 0) + " " + units[i];
}

/* Calls */

let key = sessionStorage.getItem("key") || "";

class Problem extends Error {
  constructor(status, message, seconds) {
    super(message);
    this.status = status;
    this.seconds = seconds;
  }
}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = "Bearer " + key;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, "The server does not answer.");
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  const message = (told && told.error && told.error.message) || "The server answered with status " + answer.status + ".";
  throw new Problem(answer.status, message, Number(answer.headers.get("Retry-After")) || 0);
}

/* Figures */

let samples = [];
let last = null;

function draw(id, series, names) {
  const end = samples.length ? samples.at(-1).time : 0;
  const most = Math.max(1, ...samples.flatMap((one) => series.map((of) => of(one))));
  const lines = series.map((of) => samples.map((one) =>
    (WINDOW_SECONDS - (end - one.time)).toFixed(2) + " " + (39 - 37 * of(one) / most).toFixed(2)));
  const [area, ...paths] = at(id).querySelectorAll("path");
  lines.forEach((points, i) => paths[i].setAttribute("d", points.length ? "M" + points.join("L") : ""));
  if (samples.length) area.setAttribute("d", "M" + (WINDOW_SECONDS - (end - samples[0].time)).toFixed(2) + " 40L" + lines[0].join("L") + "L120 40Z");
  else area.setAttribute("d", "");
  const now = series.map((of, i) => names[i] + " " + (samples.length ? count(of(samples.at(-1))) : 0)).join(", ");
  at(id).setAttribute("aria-label", "last two minutes: " + now + ", peak " + count(samples.length ? most : 0));
}

const peak = (of) => Math.max(0, ...samples.map(of));

function meter(id, part, text) {
  const bar = at(id), share = Math.min(1, Math.max(0, part || 0));
  bar.firstElementChild.style.width = share && Math.max(1, 100 * share) + "%";
  bar.setAttribute("aria-valuenow", share.toFixed(4));
  bar.setAttribute("aria-valuetext", text);
}

function note(now) {
  if (last && now.time > last.time) {
    const seconds = now.time - last.time;
    const each = (name) => Math.max(0, now[name] - last[name]) / seconds;
    samples.push({ time: now.time, rate: each("generated_tokens"), prefill: each("prompt_tokens"), running: now.running, waiting: now.waiting });
    samples = samples.filter((one) => one.time > now.time - WINDOW_SECONDS);
  }
  last = now;
}

function recent(of) {
  const some = samples.slice(-3);
  return some.length ? some.reduce((sum, one) => sum + of(one), 0) / some.length : 0;
}

function show(now) {
  const restarted = last && now.generated_tokens < last.generated_tokens;
  if (restarted) { samples = []; last = null; }
  note(now);
  say("model", now.model);
  document.title = now.model + " · preft-jax";
  say("rate", count(recent((one) => one.rate)));
  say("prefill", count(recent((one) => one.prefill)));
  say("tokens", count(now.generated_tokens));
  say("rate-peak", count(peak((one) => one.rate)));
  draw("rate-chart", [(one) => one.rate], ["generated tokens per second"]);
  say("running", count(now.running));
  say("waiting", count(now.waiting));
  say("finished", count(now.finished));
  say("failed", count(now.failed));
  say("queue-peak", count(peak((one) => Math.max(one.running, one.waiting))));
  draw("queue-chart", [(one) => one.running, (one) => one.waiting], ["running", "waiting"]);

  const part = now.kv_pages ? now.kv_pages_used / now.kv_pages : 0;
  const prompts = now.prompt_tokens + now.prefix_hit_tokens;
  const pages = count(now.kv_pages_used) + " of " + count(now.kv_pages);
  say("kv", count(100 * part));
  say("kv-pages", pages);
  say("kv-hits", count(now.prefix_hit_tokens) + (prompts ? " (" + count(100 * now.prefix_hit_tokens / prompts) + "%)" : ""));
  say("preemptions", count(now.preemptions));
  meter("kv-bar", part, pages + " pages");

  const of = now.adapters;
  const bank = count(of.device_pages_used) + " of " + plural(of.device_pages, "rank page");
  const memory = bytes(of.host_bytes) + " of " + bytes(of.host_budget_bytes);
  say("device", count(of.device_adapters));
  say("device-note", bank + " used");
  meter("device-bar", of.device_pages_used / of.device_pages, bank);
  say("host", count(of.host_adapters));
  say("host-note", memory + (of.evictions ? ", " + count(of.evictions) + " evicted" : ""));
  meter("host-bar", of.host_bytes / of.host_budget_bytes, memory);
  say("disk", count(of.registered));
  const mean = of.loads ? ", " + (1000 * of.load_seconds / of.loads).toFixed(0) + " ms each" : "";
  say("disk-note", of.registered ? plural(of.loads, "load") + mean + (of.failed_loads ? ", " + count(of.failed_loads) + " failed" : "")
    : "none; give --adapter-dir");
  say("staging", count(of.waiting));
  say("staging-note", "on the way to host memory, " + count(of.leased) + " in use");

  const troubles = [[now.recompiles, "recompilation"], [now.device_failures, "failed device call"]].filter(([n]) => n);
  if (!now.ready) state("wait", "Not ready: compiling or ending");
  else if (troubles.length) state("wait", "Ready, but " + troubles.map(([n, what]) => plural(n, what)).join(" and "));
  else state("good", "Ready");
}

function state(kind, text) {
  at("state").dataset.state = kind;
  say("state", text);
}

let timer = 0;
let turn = 0;
let modelsAt = -Infinity;
let jobsAt = -Infinity;

async function poll() {
  clearTimeout(timer);
  const mine = (turn += 1);
  let next = POLL_MS;
  try {
    const signal = AbortSignal.timeout(PATIENCE_MS);
    const now = await figures(signal);
    if (mine !== turn) return;
    if (now) show(now);
    else state("good", "Ready");
    at("figures").hidden = !now;
    at("figures").classList.remove("stale");
    at("alert").hidden = true;
    if (performance.now() - modelsAt > MODELS_MS) {
      modelsAt = performance.now();
      await models();
    }
    if (performance.now() - jobsAt > JOBS_MS && "fineTuning" in document.body.dataset) {
      jobsAt = performance.now();
      await jobs();
    }
  } catch (problem) {
    if (mine !== turn) return;
    next = lost(problem);
  }
  if (mine === turn && next && !document.hidden) timer = setTimeout(poll, next);
}

/* Figures count everybody's requests: a server with keys tells them to its admin only. */
async function figures(signal) {
  try {
    return await (await call("stats", { signal })).json();
  } catch (problem) {
    if (problem.status !== 403) throw problem;
    await call("ready", { signal });
    return null;
  }
}

function lost(problem) {
  at("figures").classList.add("stale");
  last = null;
  modelsAt = -Infinity;
  if (problem.status === 401) {
    state("wait", "Needs an API key");
    at("alert").hidden = true;
    needKey(key ? "The server does not know this API key." : "This server needs an API key.");
    return 0;
  }
  state("bad", problem.status === 0 ? "Unreachable" : "No figures");
  const text = (problem instanceof Problem ? problem.message : "The server's answer cannot be read.") + " The figures are old; trying again.";
  say("alert", text);
  at("alert").hidden = false;
  return LOST_MS;
}

/* Fine-tuning */

const curves = new Map(), rows = new Map();
const ended = (job) => job.finished_at !== null;
const JOB_STATES = { succeeded: "good", failed: "bad", cancelled: "bad" };

async function jobs() {
  const ask = async (path) => (await call("v1/fine_tuning/jobs" + path, { signal: AbortSignal.timeout(PATIENCE_MS) })).json();
  const found = (await ask("?limit=" + MOST_JOBS)).data;
  for (const job of found) await learn(job, ask);
  for (const [id, row] of rows) if (!found.some((job) => job.id === id)) { row.item.remove(); rows.delete(id); curves.delete(id); }
  for (const job of found) showJob(job);
  const items = found.map((job) => rows.get(job.id).item);
  if (items.some((item, i) => at("job-list").children[i] !== item)) at("job-list").replaceChildren(...items);
  at("jobs").hidden = !found.length;
}

/* Events come newest first: those that are new since the last time are asked for, page by page. */
async function learn(job, ask) {
  const curve = curves.get(job.id) || { points: [], newest: "", whole: false };
  curves.set(job.id, curve);
  if (curve.whole) return;
  const fresh = [];
  for (let after = "", more = true, i = 0; more && i < 20; i += 1) {
    const page = await ask("/" + encodeURIComponent(job.id) + "/events?limit=1000" + (after && "&after=" + encodeURIComponent(after)));
    const known = page.data.findIndex((event) => event.id === curve.newest);
    fresh.push(...(known < 0 ? page.data : page.data.slice(0, known)));
    after = page.last_id;
    more = known < 0 && page.has_more;
  }
  if (fresh.length) curve.newest = fresh[0].id;
  for (const { data } of fresh.reverse())
    if (data && typeof data.train_loss === "number" && typeof data.step === "number") curve.points.push([data.step, data.train_loss]);
  curve.whole = ended(job);
}

function makeRow(job) {
  const svg = (tag, name) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    element.setAttribute("class", name);
    return element;
  };
  const item = make("li", "job"), name = make("span", "name"), state = make("span", "pill"), learned = make("div", "learned");
  const bar = make("div", "bar"), note = make("p", "note"), chart = svg("svg", "chart first"), link = make("a", "", "Chat with it");
  chart.append(svg("path", "line first"));
  chart.setAttribute("viewBox", "0 0 120 40");
  chart.setAttribute("preserveAspectRatio", "none");
  chart.setAttribute("role", "img");
  bar.setAttribute("role", "meter");
  bar.setAttribute("aria-label", "updates done");
  bar.setAttribute("aria-valuemin", "0");
  bar.setAttribute("aria-valuemax", "1");
  bar.append(make("i"));
  learned.append(bar, note);
  link.href = "#right";
  link.hidden = true;
  item.append(name, state, learned, chart, link);
  const row = { item, name, state, bar, note, chart, link, model: "" };
  link.addEventListener("click", (event) => {
    event.preventDefault();
    chatWith(row.model);
  });
  rows.set(job.id, row);
  return row;
}

function showJob(job) {
  const row = rows.get(job.id) || makeRow(job);
  const points = curves.get(job.id).points, latest = points.at(-1);
  const put = (element, text) => { if (element.textContent !== text) element.textContent = text; };
  put(row.name, job.fine_tuned_model || job.user_provided_suffix || job.id);
  put(row.state, job.status.replace("_", " "));
  row.state.dataset.state = JOB_STATES[job.status] || "wait";
  const share = job.total_steps ? Math.min(1, job.step / job.total_steps) : 0;
  const facts = [job.total_steps ? "update " + count(job.step) + " of " + count(job.total_steps) : "reading its rows"];
  if (latest) facts.push("loss " + latest[1].toPrecision(3));
  put(row.note, job.error ? job.error.message : facts.join(", "));
  row.bar.hidden = Boolean(job.error);
  row.bar.firstElementChild.style.width = 100 * share + "%";
  row.bar.setAttribute("aria-valuenow", share.toFixed(4));
  row.bar.setAttribute("aria-valuetext", facts[0]);
  drawLoss(row.chart, points, job.total_steps || 1);
  row.model = job.fine_tuned_model || "";
  row.link.hidden = !row.model;
}

function drawLoss(chart, points, steps) {
  const every = Math.ceil(points.length / MOST_POINTS) || 1;
  const some = points.filter((_, i) => i % every === 0 || i === points.length - 1);
  const most = Math.max(...some.map(([, loss]) => loss), 1e-9);
  const line = some.map(([step, loss]) => (120 * step / Math.max(steps, step)).toFixed(2) + " " + (39 - 37 * Math.max(0, loss) / most).toFixed(2));
  chart.firstElementChild.setAttribute("d", line.length ? "M" + line.join("L") : "");
  const told = points.length ? "training loss from " + points[0][1].toPrecision(3) + " to " + points.at(-1)[1].toPrecision(3) : "no training loss yet";
  chart.setAttribute("aria-label", told);
  chart.style.visibility = points.length ? "" : "hidden";
}

async function chatWith(model) {
  await models().catch(() => {});
  const side = sides[1];
  if (![...side.select.options].some((option) => option.value === model)) return;
  side.select.value = model;
  clear(side);
  at("text").focus();
}

/* The key */

function openKey(open) {
  at("key-form").hidden = !open;
  at("key-open").setAttribute("aria-expanded", String(open));
}

function needKey(why) {
  say("key-why", why);
  const hidden = at("key-form").hidden;
  openKey(true);
  if (hidden && document.activeElement !== at("text")) at("key").focus();
}

function useKey(text) {
  key = text;
  if (key) sessionStorage.setItem("key", key);
  else sessionStorage.removeItem("key");
  at("key").value = "";
  samples = [];
  last = null;
  modelsAt = jobsAt = -Infinity;
  openKey(false);
  poll();
}

at("key-open").addEventListener("click", () => {
  const open = at("key-form").hidden;
  say("key-why", key ? "Requests are sent with a key." : "Requests are sent without a key.");
  openKey(open);
  if (open) at("key").focus();
});
at("key").addEventListener("input", () => at("key").setCustomValidity(""));
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("key").value.trim();
  const fine = /^[\x21-\x7e]+$/.test(text);
  at("key").setCustomValidity(fine ? "" : "A key has printable ASCII characters and no spaces.");
  if (at("key").reportValidity()) useKey(text);
});
at("key-forget").addEventListener("click", () => {
  for (const side of sides) clear(side);
  useKey("");
});

/* The chat */

const sides = ["left", "right"].map((name) => ({ select: at(name), talk: at(name + "-talk"), messages: [], control: null }));
let list = "";

async function models() {
  const found = (await (await call("v1/models", { signal: AbortSignal.timeout(PATIENCE_MS) })).json()).data;
  const now = JSON.stringify(found.map((one) => [one.id, one.parent]));
  if (now === list) return;
  list = now;
  const bases = found.filter((one) => one.parent === null), adapters = found.filter((one) => one.parent !== null);
  const first = [bases[0], adapters[0] || bases[0]];
  sides.forEach((side, i) => {
    const kept = side.select.value;
    const groups = [["Base model", bases], [plural(adapters.length, "adapter"), adapters]].filter(([, ones]) => ones.length);
    if (kept && !found.some((one) => one.id === kept)) groups.push(["No longer listed", [{ id: kept }]]);
    side.select.replaceChildren(...groups.map(([label, ones]) => {
      const group = make("optgroup");
      group.label = label;
      group.append(...ones.map((one) => new Option(one.id, one.id)));
      return group;
    }));
    side.select.value = kept || first[i].id;
  });
  if (!adapters.length) empty("There are no adapters yet: both sides are the base model. Give the server some with --adapter-dir or --lora-modules.");
  else empty();
}

function empty(text = "Choose a model. Both sides get the same messages, and each keeps its own conversation.") {
  for (const side of sides) {
    side.hint = text;
    if (side.talk.querySelector(".turn")) continue;
    side.talk.replaceChildren(make("p", "empty", text));
  }
}

function clear(side) {
  if (side.control) side.control.abort();
  side.messages = [];
  side.talk.replaceChildren(make("p", "empty", side.hint));
}

/* Yields the events of a stream; throws unless it ends as one should. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) throw new Problem(0, "The connection broke before the answer was complete.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.trim() === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

async function generate(side, messages, control, write) {
  const asked = performance.now();
  const body = { model: side.select.value, messages, stream: true, stream_options: { include_usage: true },
    temperature: at("temperature").valueAsNumber, max_tokens: at("max-tokens").valueAsNumber };
  const answer = await call("v1/chat/completions", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal: control.signal });
  let first = 0, end = 0, tokens = 0, reason = "";
  for await (const event of events(answer)) {
    if (event.error) throw new Problem(event.error.code === "overloaded" ? 429 : 500, event.error.message);
    for (const choice of event.choices) {
      const text = (choice.delta && choice.delta.content) || "";
      if (text) {
        end = performance.now();
        first = first || end;
        write(text);
      }
      reason = choice.finish_reason || reason;
    }
    if (event.usage) tokens = event.usage.completion_tokens;
  }
  if (reason === "abort" || reason === "error") throw new Problem(503, "The server gave this answer up.");
  const facts = [plural(tokens, "token")];
  if (first) facts.push("first after " + ((first - asked) / 1000).toFixed(2) + " s");
  if (tokens > 1 && end > first) facts.push(((tokens - 1) / ((end - first) / 1000)).toFixed(1) + " tokens/s");
  if (reason === "length") facts.push("cut at the limit");
  return facts.join(", ");
}

async function ask(side, text) {
  const box = make("div", "turn busy"), answer = make("div", "answer"), written = document.createTextNode("");
  const { messages, talk } = side, mine = { role: "user", content: text };
  const control = (side.control = new AbortController());
  for (const old of talk.querySelectorAll(".empty")) old.remove();
  answer.append(written);
  box.append(make("div", "said", text), answer);
  talk.append(box);
  talk.setAttribute("aria-busy", "true");
  const follow = (change) => {
    const below = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40;
    change();
    if (below) talk.scrollTop = talk.scrollHeight;
  };
  talk.scrollTop = talk.scrollHeight;
  messages.push(mine);
  const keep = () => messages.push({ role: "assistant", content: written.data });
  const drop = () => messages.splice(messages.indexOf(mine), 1);
  try {
    const facts = await generate(side, messages, control, (more) => follow(() => written.appendData(more)));
    if (written.data) keep(); else drop();
    follow(() => box.append(make("p", "note", facts)));
  } catch (error) {
    if (error.name === "AbortError") {
      if (written.data) keep(); else drop();
      follow(() => box.append(make("p", "note", "stopped")));
    } else {
      drop();
      follow(() => box.append(trouble(side, box, text, error)));
    }
  } finally {
    box.classList.remove("busy");
    talk.removeAttribute("aria-busy");
    if (side.control === control) side.control = null;
    busy();
  }
}

function trouble(side, box, text, error) {
  const problem = make("div", "problem"), again = make("button", "quiet", "Try again");
  let told = error instanceof Problem ? error.message : "The server's answer cannot be read.";
  if (error.status === 429) told = "The server is busy" + (error.seconds ? "; it asks to wait " + plural(error.seconds, "second") : "") + ".";
  if (error.status === 401) {
    told = "The server wants an API key.";
    needKey(key ? "The server does not know this API key." : "This server needs an API key.");
  }
  problem.setAttribute("role", "alert");
  again.type = "button";
  again.addEventListener("click", () => {
    if (side.control) return;
    box.remove();
    at("text").focus();
    ask(side, text);
    busy();
  });
  problem.append(make("span", "", told), again);
  return problem;
}

function busy() {
  const some = sides.some((side) => side.control);
  at("send").hidden = some;
  at("stop").hidden = !some;
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("text").value.trim();
  if (!text || sides.some((side) => side.control)) return;
  at("text").value = "";
  at("text").focus();
  for (const side of sides) ask(side, text);
  busy();
});
at("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!sides.some((side) => side.control)) at("ask").requestSubmit();
});
at("stop").addEventListener("click", () => {
  for (const side of sides) if (side.control) side.control.abort();
  at("text").focus();
});
at("clear").addEventListener("click", () => {
  for (const side of sides) clear(side);
  at("text").focus();
});
for (const side of sides) side.select.addEventListener("change", () => clear(side));

document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(timer);
  else if (at("state").textContent !== "Needs an API key") poll();
});
empty();
poll();
