// Draws what /console/state says, every two seconds while the page can be seen. Text that comes
// from elsewhere (names, domains, reasons) is only ever set as text.
"use strict";

const PERIOD_MS = 2000;
const DEADLINE_MS = 5000;
const TIERS = ["hbm", "dram", "nvme", "peer", "files"];
const SVG = "http://www.w3.org/2000/svg";
const at = (id) => document.getElementById(id);
let paused = false;

function element(tag, text = "", className = "") {
  const made = document.createElement(tag);
  if (text !== "") made.textContent = text;
  if (className) made.className = className;
  return made;
}

const count = (value) => value.toLocaleString("en");
const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)} %` : "–");
const ms = (value) => (value === null ? "–" : `${value < 100 ? value.toFixed(1) : Math.round(value)} ms`);
const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString("en-GB");
const sum = (tiers) => TIERS.reduce((total, tier) => total + tiers[tier], 0);

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return `${value.toFixed(unit ? 1 : 0)} ${units[unit]}`;
}

// A table with a caption for those who cannot see it, and a line of its own when it is empty.
function fill(id, caption, columns, rows) {
  const table = at(id);
  const head = element("thead");
  const titles = element("tr");
  for (const [title, numeric] of columns) {
    const cell = element("th", title, numeric ? "number" : "");
    cell.scope = "col";
    titles.append(cell);
  }
  head.append(titles);
  const body = element("tbody");
  for (const row of rows) {
    const line = element("tr");
    row.forEach((value, index) => {
      const cell = element(index ? "td" : "th", "", columns[index][1] ? "number" : "");
      if (!index) cell.scope = "row";
      if (value instanceof Node) cell.append(value); else cell.textContent = value;
      line.append(cell);
    });
    body.append(line);
  }
  if (!rows.length) {
    const cell = element("td", "nothing yet", "empty");
    cell.colSpan = columns.length;
    const line = element("tr");
    line.append(cell);
    body.append(line);
  }
  table.replaceChildren(element("caption", caption), head, body);
}

function drawNow(state) {
  const totals = state.totals;
  const live = (kind) => state.members.filter((one) => one.kind === kind && one.health === "live").length;
  const tiles = [
    ["hit rate, overall", percent(sum(totals.by_tier), totals.prompt_tokens)],
    ["running", count(state.running)],
    ["waiting", count(state.waiting)],
    ["ended", count(totals.ended)],
    ["mean first token", ms(totals.ttft_ms)],
    ["live workers", count(live("worker"))],
    ["live nodes", count(live("node"))],
  ];
  at("now").replaceChildren(...tiles.map(([title, value]) => {
    const tile = element("div");
    tile.append(element("dt", title), element("dd", value));
    return tile;
  }));
}

// Steps of five seconds are gathered by minute: a share of few tokens jumps.
function minutes(steps) {
  const found = new Map();
  for (const step of steps) {
    const minute = Math.floor(step.at / 60) * 60;
    if (!found.has(minute)) {
      found.set(minute, { at: minute, prompt: 0, ended: 0, tiers: Object.fromEntries(TIERS.map((t) => [t, 0])) });
    }
    const sums = found.get(minute);
    sums.prompt += step.prompt_tokens;
    sums.ended += step.ended;
    for (const tier of TIERS) sums.tiers[tier] += step.by_tier[tier];
  }
  return [...found.values()];
}

function drawHistory(state) {
  const points = minutes(state.history.steps);
  const chart = at("chart");
  const end = state.now, span = 3600, width = 960, height = 220;
  const x = (seconds) => width * (1 - (end - seconds) / span);
  const parts = [0.25, 0.5, 0.75, 1].map((share) => {
    const line = document.createElementNS(SVG, "line");
    const y = height * (1 - share);
    for (const [name, value] of [["x1", 0], ["x2", width], ["y1", y], ["y2", y]]) line.setAttribute(name, value);
    return line;
  });
  for (const point of points) {
    let base = 0;
    for (const tier of TIERS) {
      const share = point.prompt ? point.tiers[tier] / point.prompt : 0;
      if (!share) continue;
      const bar = document.createElementNS(SVG, "rect");
      const left = Math.max(0, x(point.at));
      const attributes = {
        x: left, width: Math.max(1, x(Math.min(end, point.at + 60)) - left - 1),
        y: height * (1 - base - share), height: height * share, class: tier,
      };
      for (const [name, value] of Object.entries(attributes)) bar.setAttribute(name, value);
      parts.push(bar);
      base += share;
    }
  }
  chart.replaceChildren(...parts);
  at("axis").replaceChildren(...[60, 45, 30, 15, 0].map((ago) => element("span", ago ? `${ago} min ago` : "now")));
  const prompt = points.reduce((total, one) => total + one.prompt, 0);
  const byTier = Object.fromEntries(TIERS.map((tier) => [tier, points.reduce((total, one) => total + one.tiers[tier], 0)]));
  const shown = TIERS.filter((tier) => byTier[tier]);
  const said = shown.map((tier) => `${tier} ${percent(byTier[tier], prompt)}`).join(", ");
  at("chart-text").textContent =
    `Share of prompt tokens that came from a cache, by minute; the top line is 100 %. In the hour: ${said || "no hits"}.`;
  at("legend").replaceChildren(...shown.map((tier) => {
    const item = element("li", "", tier);
    item.append(element("span", tier));
    return item;
  }));
  fill("history", "Newest first", [["minute"], ...TIERS.map((tier) => [tier, true]), ["prompt tokens", true], ["requests ended", true]],
    points.reverse().map((one) => [
      clock(one.at), ...TIERS.map((tier) => percent(one.tiers[tier], one.prompt)), count(one.prompt), count(one.ended),
    ]));
}

function drawMember(member) {
  const card = element("div", "", "member");
  const title = element("div");
  title.append(element("b", member.name), ` ${member.kind}, `, element("span", member.health, member.health));
  card.append(title);
  const tiers = Object.entries(member.blocks).map(([tier, blocks]) => `${count(blocks)} blocks in ${tier}`);
  card.append(element("p", [tiers.join(", "), member.address].filter(Boolean).join(" · ")));
  const load = member.load;
  if (load) {
    card.append(element("p", `${load.running} running, ${load.waiting} waiting, ${count(load.queued_tokens)} tokens to compute; `
      + `${Math.round(load.prefill_tokens_per_s)} prompt and ${Math.round(load.decode_tokens_per_s)} output tokens/s${load.draining ? "; draining" : ""}`));
    const meter = element("meter");
    meter.max = load.kv_capacity_bytes || 1;
    meter.value = load.kv_used_bytes;
    const text = `pages: ${bytes(load.kv_used_bytes)} of ${bytes(load.kv_capacity_bytes)}`;
    meter.setAttribute("aria-label", `${member.name} ${text}`);
    card.append(meter, element("p", text));
  }
  return card;
}

function drawTopology(state) {
  const hosts = new Map();
  for (const member of state.members) {
    const host = member.host || "(no host)";
    if (!hosts.has(host)) hosts.set(host, []);
    hosts.get(host).push(member);
  }
  const cards = [...hosts].map(([host, members]) => {
    const card = element("div", "", "host");
    card.append(element("h3", `host ${host}`), ...members.map(drawMember));
    return card;
  });
  if (state.members_left_out) cards.push(element("p", `and ${count(state.members_left_out)} more members`, "empty"));
  at("topology").replaceChildren(...(cards.length ? cards : [element("p", "no members yet", "empty")]));
}

async function explain(id) {
  const box = at("explanation");
  at("explanation-title").textContent = `Request ${id.slice(0, 8)}`;
  try {
    const told = await get(`/console/requests/${encodeURIComponent(id)}`);
    const steps = told.plan.map((one) => `${one.tokens} tokens from ${one.first_token} on, out of ${one.tier} of ${one.place}`);
    at("explanation-plan").textContent = told.worker
      ? `Went to ${told.worker}, expecting ${count(told.hit_tokens)} cached tokens${steps.length ? `: ${steps.join("; ")}` : ""}.` : "";
    at("explanation-text").textContent = told.explanation;
  } catch (error) {
    at("explanation-plan").textContent = "";
    at("explanation-text").textContent = `No explanation: ${error.message}`;
  }
  box.hidden = false;
  box.focus();
}

function drawRequests(state) {
  // Rebuilt rows would take the focus from whoever is about to press a button in one.
  const focused = document.activeElement?.dataset?.request;
  const rows = state.requests.map((one) => {
    const button = element("button", one.id.slice(0, 8));
    button.type = "button";
    button.dataset.request = one.id;
    button.setAttribute("aria-label", `Explain request ${one.id.slice(0, 8)}`);
    button.addEventListener("click", () => explain(one.id));
    const cached = one.by_tier === null ? "–" : percent(sum(one.by_tier), one.prompt_tokens);
    const from = one.by_tier === null ? "" : TIERS.filter((tier) => one.by_tier[tier]).join(", ");
    const good = ["stop", "length", "cancelled", ""].includes(one.outcome);
    const two = one.prefill_worker && one.prefill_worker !== one.worker;
    const worker = two ? `${one.prefill_worker}, then ${one.worker}` : one.worker || "–";
    return [
      button, clock(one.began), one.domain, count(one.prompt_tokens), cached, from || "–", one.miss_reason === "none" ? "–" : one.miss_reason.replaceAll("_", " ") || "–",
      ms(one.ttft_ms), ms(one.predicted_ttft_ms), worker, count(one.output_tokens),
      element("span", one.outcome || "running", good ? one.outcome : "failed"),
    ];
  });
  fill("requests", `The ${state.requests.length} newest; press one to see why it went where it went`, [
    ["request"], ["began"], ["domain"], ["prompt tokens", true], ["cached", true], ["from"], ["rest is"],
    ["first token", true], ["predicted", true], ["worker"], ["output", true], ["ended"],
  ], rows);
  if (focused) at("requests").querySelector(`[data-request="${CSS.escape(focused)}"]`)?.focus();
}

function drawRest(state) {
  fill("hot", "By the work that their requests ask for", [["prefix"], ["tokens", true], ["busy", true]],
    state.hot.map((one) => [element("code", one.name.slice(0, 16)), count(one.tokens), `${(100 * one.busy).toFixed(1)} % of a worker`]));
  fill("domains", "Since the start", [["domain"], ["requests", true], ["prompt tokens", true], ["cached", true], ["output tokens", true]],
    state.domains.map((one) => [
      one.domain, count(one.requests), count(one.prompt_tokens), percent(one.cached_tokens, one.prompt_tokens), count(one.output_tokens),
    ]));
}

async function get(path) {
  const reply = await fetch(path, { signal: AbortSignal.timeout(DEADLINE_MS), headers: { Accept: "application/json" } });
  if (!reply.ok) throw new Error(`the server answered ${reply.status}`);
  return reply.json();
}

function say(text, lost) {
  const status = at("status");
  // Said once: a screen reader need not hear the time every two seconds.
  if (status.dataset.said !== `${lost} ${paused}`) status.textContent = text;
  status.dataset.said = `${lost} ${paused}`;
  status.title = text;
  status.className = lost ? "lost" : "";
}

async function look() {
  try {
    const state = await get("/console/state");
    at("models").textContent = state.models.join(", ") || "no model yet";
    drawNow(state);
    drawHistory(state);
    drawTopology(state);
    drawRequests(state);
    drawRest(state);
    say("live, every 2 s", false);
    document.body.dataset.drawn = String(Number(document.body.dataset.drawn || 0) + 1);
  } catch (error) {
    say(`not connected: ${error.message}; trying again`, true);
  }
}

async function follow() {
  if (!paused && !document.hidden) await look();
  setTimeout(follow, PERIOD_MS);
}

at("pause").addEventListener("click", () => {
  paused = !paused;
  at("pause").setAttribute("aria-pressed", String(paused));
  say(paused ? "paused" : "live, every 2 s", false);
});
at("explanation-close").addEventListener("click", () => {
  at("explanation").hidden = true;
  at("requests").querySelector("button")?.focus();
});
follow();
