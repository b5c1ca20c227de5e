"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const theme = document.getElementById("theme");
const drawn = [];
const STEP = 100;

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
  for (const child of children) if (child !== null) element.append(child);
  return element;
}
const number = (n) => n.toLocaleString("en-US");
const percent = (share) => (100 * share).toFixed(1) + "%";
const short = (n) => {
  for (const [size, unit] of [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]])
    if (n >= size) return (n / size).toPrecision(3) + unit;
  return number(n);
};
const cost = (before, after) => (after === null || before === after ? short(before) : short(before) + " → " + short(after)) + " FLOPs";
const change = (before, after) => after === null || before === after ? number(before) : number(before) + " → " + number(after);

// ---------------------------------------------------------------- colours

function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  const [ink, soft, line, card] = ["--ink", "--soft", "--line", "--card"].map(of);
  return {
    background: null, font: "system-ui, sans-serif", view: {stroke: null}, title: {color: ink, subtitleColor: soft, subtitleFontSize: 12},
    axis: {labelColor: ink, titleColor: ink, domainColor: soft, tickColor: soft, gridColor: line, titleFontWeight: "normal", labelFontSize: 11, titleFontSize: 12},
    legend: {labelColor: ink, titleColor: ink, labelFontSize: 12}, bar: {stroke: card},
  };
}
function setTheme() {
  const chosen = theme.value === "auto" ? (dark.matches ? "dark" : "light") : theme.value;
  document.documentElement.dataset.theme = chosen;
  for (const [place, spec, said] of drawn) show(place, spec, said);
}
theme.addEventListener("change", setTheme);
dark.addEventListener("change", setTheme);

// ---------------------------------------------------------------- charts

function show(place, spec, said) {
  const options = {actions: false, renderer: "svg", config: colours(), ast: false};
  return vegaEmbed(place, {...spec, description: said}, options).catch((error) => {
    place.textContent = "This chart could not be drawn: " + error.message;
    console.error(error);
  });
}
function chart(spec, said, rows, columns) {
  const place = make("div", {class: "chart"});
  const table = make("details", {}, make("summary", {}, "The same as a table"));
  table.addEventListener("toggle", () => {
    if (table.open && table.childElementCount === 1) table.append(asTable(rows, columns, said));
  });
  const figure = make("figure", {}, place, make("figcaption", {}, said), table);
  drawn.push([place, spec, said]);
  show(place, spec, said);
  return figure;
}
function asTable(rows, columns, said) {
  const head = make("tr", {}, ...columns.map(([title]) => make("th", {scope: "col"}, title)));
  const body = rows.map((row) => make("tr", {}, ...columns.map(([, read], i) =>
    make(i ? "td" : "th", i ? {} : {scope: "row"}, String(read(row))))));
  return make("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": said + " As a table."},
    make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
}
const PART = [["block", (r) => r.block], ["part", (r) => r.part], ["neurons", (r) => number(r.neurons)], ["share", (r) => percent(r.share)]];
const SECTIONS = [
  ["flops", "FLOPs per block", "FLOPs of each block's own calls" + (data.planned ? ", now and kept." : "."),
    [["block", (r) => r.block], ["when", (r) => r.when], ["FLOPs", (r) => number(r.flops)]]],
  ["shares", "Neurons per " + data.parts, "Share of each block's neurons that each " + data.parts + " has, as the network is.", PART],
  ["kept", "What the budget leaves", "Neurons that stay, as shares of what each block had.", PART],
  ["curve", "Budget against importance", ("Share of all scores that plans keep at each share of the FLOPs, per policy" +
    (data.planned ? "; a diamond marks this budget. " : ". ") + data.policies).trim(),
    [["policy", (r) => r.policy], ["FLOPs kept", (r) => percent(r.flops)], ["importance kept", (r) => percent(r.importance)]]],
];
function drawCharts() {
  const place = document.getElementById("charts");
  for (const [key, title, said, columns] of SECTIONS) {
    const spec = data.charts[key];
    if (!spec) continue;
    const rows = spec.data ? spec.data.values : spec.layer.flatMap((layer) => layer.data.values);
    const heading = make("h2", {id: "h-" + key}, title);
    const section = make("section", {"aria-labelledby": "h-" + key, id: "chart-" + key}, heading);
    place.append(section);
    section.append(chart(spec, said, rows, columns));
    const blocks = new Set(rows.map((row) => row.block)).size;
    if (key !== "curve") section.querySelector(".chart").style.maxWidth = 9 + 5 * blocks + "rem";  // bars not too wide
  }
}

// ---------------------------------------------------------------- the network

function bar(before, after) {
  const share = before ? Math.min(1, (after === null ? before : after) / before) : 0;
  const inner = make("i");
  inner.style.width = percent(share);
  return make("span", {class: "bar", "aria-hidden": "true"}, inner);
}
function item(entry, level) {
  if (typeof entry === "number") return make("li", {class: "block"}, block(entry, level));
  const [what, name, before, after, flops, left] = entry;
  return make("li", {class: "layer"}, what + " ", name ? make("code", {}, name) : null, " " + change(before, after),
    flops ? make("span", {class: "soft"}, " " + cost(flops, left)) : null);
}
function block(i, level) {
  const [name, kind, channels, kept, flops, share, adds, branches, , left, inner, innerKept] = data.blocks[i];
  const summary = make("summary", {}, make("span", {class: "name"}, name), make("span", {class: "tag"}, kind),
    make("span", {}, branches.length + (branches.length === 1 ? " row" : " branches")),
    make("span", {}, change(channels, kept) + " channels" + (inner ? ", " + change(inner, innerKept) + " inside" : "")),
    data.planned && flops ? bar(flops, left) : null,
    make("span", {class: "soft"}, flops ? cost(flops, left) + ", " + percent(share) + " of all" : "no FLOPs of its own"));
  const details = make("details", {id: "block-" + i}, summary);
  details.addEventListener("toggle", () => {
    if (details.open && details.childElementCount === 1) fill(details, i, level);
  });
  return details;
}
function fill(details, i, level) {
  const [name, , , , , , , branches, scores] = data.blocks[i];
  const lanes = make("div", {class: "lanes", tabindex: "0", role: "group", "aria-label": "branches of " + name});
  for (const [title, channels, kept, inner, innerKept, scale, kernel, flops, gamma, lane, left] of branches) {
    const facts = [change(channels, kept) + " channels", "scale " + scale];
    if (kernel) facts.push((kernel.includes(",") ? "kernels " : "kernel ") + kernel);
    if (inner) facts.push(change(inner, innerKept) + " inside");
    if (flops) facts.push(cost(flops, left));
    if (gamma) facts.push("|γ| " + gamma[1] + " to " + gamma[2] + ", mean " + gamma[0]);
    const heading = make("div", {role: "heading", "aria-level": Math.min(level, 6)}, title);
    heading.className = "name";
    const steps = make("ol", {class: "flow"}, ...lane.map((entry) => item(entry, level + 1)));
    lanes.append(make("div", {class: "lane"}, heading, data.planned ? bar(channels, kept) : null,
      make("p", {}, facts.join(", ")), lane.length ? steps : null));
  }
  details.append(lanes);
  if (scores) details.append(histogram(name, scores));
}
function histogram(name, [low, high, cut, kept, dropped]) {
  const width = (high - low) / kept.length;
  const rows = [];
  for (const [state, counts] of [["kept", kept], ["dropped", dropped]])
    counts.forEach((neurons, k) => { if (neurons) rows.push({from: low + k * width, to: low + (k + 1) * width, state, neurons}); });
  const spec = structuredClone(data.histogram);
  spec.layer[0].data.values = rows;
  spec.layer[1].data.values = cut === null ? [] : [{cut}];
  spec.layer[0].encoding.x.axis.title = data.criterion === "bn_scale" ? "|γ|" : "score (" + data.criterion + ")";
  spec.width = "container";
  spec.height = 140;
  const said = "Scores of the neurons in " + name + (cut === null ? "." : "; all above " + cut + " are kept" +
    (data.cut ? ": " + data.cut + "." : "."));
  return chart(spec, said, rows, [["from", (r) => r.from.toFixed(3)], ["to", (r) => r.to.toFixed(3)],
    ["state", (r) => r.state], ["neurons", (r) => number(r.neurons)]]);
}

const list = document.getElementById("network");
const more = document.getElementById("more");
const find = document.getElementById("find");
const found = document.getElementById("found");
let entries = data.top;
let shown = 0;
function showMore() {
  const next = entries.slice(shown, shown + STEP);
  list.append(...next.map((entry) => item(entry, 3)));
  shown += next.length;
  more.hidden = shown >= entries.length;
  more.textContent = "Show more (" + number(entries.length - shown) + " left)";
}
function restart() {
  const wanted = find.value.trim().toLowerCase();
  entries = data.top;
  if (wanted) entries = data.blocks.flatMap((each, i) => each[0].toLowerCase().includes(wanted) ? [i] : []);
  found.textContent = wanted ? number(entries.length) + " found" : "";
  list.replaceChildren();
  shown = 0;
  showMore();
}
more.addEventListener("click", () => {
  const before = list.childElementCount;
  showMore();
  const next = list.children[before];
  const target = next && (next.querySelector("summary") || next);
  if (target) { if (target.tagName !== "SUMMARY") target.tabIndex = -1; target.focus(); }
});
find.addEventListener("input", restart);
document.getElementById("close").addEventListener("click", () => {
  for (const each of list.querySelectorAll("details[open]")) each.open = false;
});

setTheme();
drawCharts();
restart();
})();
