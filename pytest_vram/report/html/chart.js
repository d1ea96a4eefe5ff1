// Memory over time: stacked areas by category or module, with the budget, what was reserved, and the phases.

const PAGE = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
const CATEGORIES = ["weights", "quantization", "adapters", "gradients", "optimizer", "activations", "logits", "temporary", "other"];

const text = (number) => (number < 0 ? "" : PAGE.strings[number]);
for (const test of PAGE.tests) { // what is left out is what most tests have
  test.outcome ||= "passed";
  test.verdict ||= "within";
  test.metric ||= "allocated";
  [test.kind, test.device] = (test.on || [-1, -1]).map(text);
}

// As Python rounds, so that this page and the terminal say the same: a half goes to the even neighbour.
function fixed(value, digits) {
  const scaled = value * 10 ** digits, low = Math.floor(scaled);
  return (scaled - low === 0.5 ? (low + (low % 2)) / 10 ** digits : value).toFixed(digits);
}

function bytes(size) {
  if (size === undefined || size === null) return "n/a";
  const sign = size < 0 ? "-" : "", magnitude = Math.abs(size);
  for (const [unit, power] of [["TiB", 4], ["GiB", 3], ["MiB", 2], ["KiB", 1]]) {
    const factor = 1024 ** power;
    if (magnitude >= factor * 0.9995 && magnitude >= 1000) {
      const value = magnitude / factor;
      return `${sign}${fixed(value, value < 9.995 ? 2 : value < 99.95 ? 1 : 0)} ${unit}`;
    }
  }
  return `${sign}${magnitude} B`;
}

// Text is only ever set as text: nothing from the report is parsed as markup.
function node(name, attributes, ...children) {
  const made = name.startsWith("svg:") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== null && value !== false) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function unpack(packed, top) {
  const values = [];
  for (let i = 0; i + 1 < packed.length; i += 2) {
    values.push(((DIGITS.indexOf(packed[i]) << 6) + DIGITS.indexOf(packed[i + 1])) / 4095 * top);
  }
  return values;
}

// Layers from the bottom up: name, colour class, bytes at the peak, bytes at each point.
function layers(timeline, by) {
  const found = timeline[by].map(([name, peak, packed], i) => ({
    name: text(name), peak, values: unpack(packed, timeline.top),
    style: by === "categories" ? `c-${text(name)}` : `m-${text(name) === "other" ? 7 : Math.min(i, 7)}`,
  }));
  if (by === "categories") found.sort((a, b) => CATEGORIES.indexOf(a.name) - CATEGORIES.indexOf(b.name));
  if (found.length) return found;
  return [{ name: "allocated", style: "c-other", peak: timeline.most, values: unpack(timeline.allocated, timeline.top) }];
}

function niceStep(top, lines) {
  const power = 1024 ** Math.floor(Math.log(Math.max(top, 1)) / Math.log(1024));
  const wanted = top / lines / power;
  const step = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500].find((s) => s >= wanted) || 1000;
  return step * power;
}

// A budget far above the curve would flatten it.
function showsBudget(test) {
  return test.budget && test.metric === "allocated" && test.budget < test.timeline.top * 2.5;
}

function timelineChart(test, by, width, say) {
  const timeline = test.timeline, height = width < 500 ? 220 : 280;
  const left = 64, right = 12, upper = 22, lower = 24;
  const allocated = unpack(timeline.allocated, timeline.top), count = allocated.length;
  const reserved = unpack(timeline.reserved, timeline.top), stack = layers(timeline, by);
  const highest = Math.max(timeline.top, showsBudget(test) ? test.budget : 0) * 1.04 || 1;
  const x = (i) => left + (count < 2 ? 0 : (i / (count - 1)) * (width - left - right));
  const y = (v) => height - lower - (v / highest) * (height - upper - lower);
  const chart = node("svg:svg", {
    class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0,
    "aria-label": `memory over time, peak ${bytes(timeline.most)}; arrow keys move along it`,
  });
  const step = niceStep(highest, height < 250 ? 5 : 7);
  for (let v = 0; v <= highest; v += step) {
    chart.append(node("svg:line", { class: "grid", x1: left, x2: width - right, y1: y(v), y2: y(v) }));
    chart.append(node("svg:text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, v ? bytes(Math.round(v)) : "0"));
  }
  const bottom = new Array(count).fill(0);
  for (const layer of stack) {
    const up = [], down = [];
    for (let i = 0; i < count; i++) {
      down.unshift(`${x(i).toFixed(1)},${y(bottom[i]).toFixed(1)}`);
      bottom[i] += layer.values[i];
      up.push(`${x(i).toFixed(1)},${y(bottom[i]).toFixed(1)}`);
    }
    const area = node("svg:polygon", { class: layer.style, points: up.concat(down).join(" ") });
    area.append(node("svg:title", {}, `${layer.name}: ${bytes(layer.peak)} at the peak`));
    chart.append(area);
  }
  (test.phases || []).forEach(([name, , , , first, last], i) => {
    if (first < 0) return;
    const wide = Math.max(2, x(last) - x(first));
    chart.append(node("svg:rect", { class: i % 2 ? "phase odd" : "phase", x: x(first), y: upper - 16, width: wide, height: height - upper - lower + 16 }));
    const fits = Math.floor(wide / 7);
    if (fits >= 2) chart.append(node("svg:text", { x: x(first) + 4, y: upper - 4 }, name.length > fits ? name.slice(0, fits - 1) + "…" : name));
  });
  const line = (values) => values.map((v, i) => `${x(i).toFixed(1)},${y(v).toFixed(1)}`).join(" ");
  chart.append(node("svg:polyline", { class: "top", points: line(allocated) }));
  if (reserved.length) chart.append(node("svg:polyline", { class: "reserved", points: line(reserved) }));
  if (showsBudget(test)) {
    chart.append(node("svg:line", { class: "budget", x1: left, x2: width - right, y1: y(test.budget), y2: y(test.budget) }));
  }
  chart.append(node("svg:circle", { class: "summit", cx: x(timeline.peak), cy: y(timeline.most), r: 4 }));
  const seconds = timeline.seconds[1] - timeline.seconds[0];
  chart.append(node("svg:text", { x: left, y: height - 7 }, `${timeline.events.toLocaleString("en")} allocations and frees, in order`));
  if (width > 600) chart.append(node("svg:text", { x: width - right, y: height - 7, "text-anchor": "end" }, `${seconds.toPrecision(3)} s`));
  const cross = node("svg:line", { class: "cross", x1: 0, x2: 0, y1: upper, y2: height - lower });
  const point = (i) => {
    cross.setAttribute("x1", x(i));
    cross.setAttribute("x2", x(i));
    const size = (l) => (i === timeline.peak ? l.peak : Math.round(l.values[i]));
    const parts = stack.filter((l) => size(l) > timeline.top / 4000).sort((a, b) => size(b) - size(a)).map((l) => `${l.name} ${bytes(size(l))}`);
    const held = reserved.length ? `, reserved ${bytes(Math.round(reserved[i]))}` : "";
    say(`${i === timeline.peak ? "Peak: " : ""}${bytes(i === timeline.peak ? timeline.most : Math.round(allocated[i]))} allocated${held}${stack.length > 1 ? `: ${parts.join(", ")}` : ""}`);
  };
  let at = timeline.peak;
  for (const name of ["pointermove", "pointerdown"]) {
    chart.addEventListener(name, (event) => {
      const box = chart.getBoundingClientRect();
      const inside = ((event.clientX - box.left) * width / box.width - left) / (width - left - right);
      at = Math.max(0, Math.min(count - 1, Math.round(inside * (count - 1))));
      point(at);
    });
  }
  chart.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    at = Math.max(0, Math.min(count - 1, at + move));
    point(at);
  });
  chart.append(cross);
  point(at);
  return chart;
}

function swatch(style) {
  return node("svg:svg", { class: "swatch", viewBox: "0 0 10 10", "aria-hidden": "true" }, node("svg:rect", { class: style, width: 10, height: 10 }));
}

function legend(test, by) {
  const items = layers(test.timeline, by).slice().sort((a, b) => b.peak - a.peak).map((layer) =>
    node("li", {}, swatch(layer.style), `${layer.name} ${bytes(layer.peak)}`));
  const stroke = (style, words) => node("li", {}, node("svg:svg", { class: "swatch wide", viewBox: "0 0 24 10", "aria-hidden": "true" },
    node("svg:line", { class: style, x2: 24, y1: 5, y2: 5 })), words);
  if (test.timeline.reserved) items.push(stroke("reserved", "reserved"));
  if (showsBudget(test)) items.push(stroke("budget", `budget ${bytes(test.budget)}`));
  return node("ul", { class: "legend" }, ...items);
}
