// One test, opened below its row.

const FEW = 12; // rows of a table before the rest has to be asked for

function listing(heads, lines, few = lines.length) {
  const empty = heads.map((_, i) => lines.every((cells) => cells[i] === ""));
  if (heads.some(([word], i) => word && empty[i])) {
    const kept = (cells) => cells.filter((_, i) => !heads[i][0] || !empty[i]);
    return listing(kept(heads), lines.map(kept), few);
  }
  const head = node("tr", {}, ...heads.map(([word, style]) => node("th", { class: style }, word)));
  const row = (cells) => node("tr", {}, ...cells.map((cell, i) => {
    const value = cell === null || cell === undefined ? "" : cell;
    return node("td", { class: heads[i][1], "data-head": heads[i][0] }, value);
  }));
  const body = node("tbody", {}, ...lines.slice(0, few).map(row));
  const place = node("div", { class: "scroll" }, node("table", {}, node("thead", {}, head), body));
  if (lines.length <= few) return place;
  const more = node("button", { type: "button", onclick: () => { body.append(...lines.slice(few).map(row)); more.remove(); } },
    `show all ${lines.length}`);
  return node("div", {}, place, more);
}

function tiles(facts) {
  return node("dl", { class: "tiles" }, ...facts.map(([name, value, note]) =>
    node("div", {}, node("dt", {}, name), node("dd", {}, node("b", {}, value), note ? node("small", {}, note) : null))));
}

function reading(words) {
  const said = node("p", { class: "read", "aria-live": "polite" }, words);
  return { node: said, say: (now) => { said.textContent = now; } };
}

function signed(size) { return size > 0 ? `+${bytes(size)}` : bytes(size).replace("-", "\u2212"); }

function headline(test) {
  if (test.peak === undefined) {
    const words = test.reason ? `Not measured: ${test.reason}` : test.host ? "No device was measured" : "Not measured";
    return node("p", { class: "headline odd" }, words);
  }
  const place = test.index === undefined ? "the device" : `device ${test.index}`;
  const metric = test.metric === "device" ? `on ${place}, CUDA context included` : test.index === undefined ? test.metric : `${test.metric} on ${place}`;
  const spare = test.budget - test.peak, words = [node("b", {}, bytes(test.peak)), ` ${metric}`];
  const limit = `${test.origin === "card" ? "the card's" : "its budget of"} ${bytes(test.budget)}`;
  if (test.verdict === "exceeded") words.push(", ", node("b", { class: "grew" }, `${bytes(-spare)} over`), ` ${limit}`);
  else if (test.verdict === "within") words.push(`, ${bytes(spare)} below ${limit}`);
  else if (test.verdict === "unmeasured") words.push(`, not held against its budget: ${test.reason}`);
  else words.push(", without a budget");
  if (test.likely) words.push(`, likely ${test.likely}`);
  if (test.where && test.origin !== "card") words.push(" ", node("code", {}, test.where));
  if (test.outcome !== "passed") words.push(`; the test ${test.outcome === "failed" ? "failed" : `was ${test.outcome}`}`);
  return node("p", { class: "headline" }, ...words);
}

function figures(test) {
  const [allocated, reserved, device] = test.figures;
  const facts = [
    ["allocated", allocated, "at most, in live tensors"], ["reserved", reserved, "at most, by the allocator"],
    ["on the device", device, "with the CUDA context"], ["not counted", test.uncounted, "others had left it there"],
    ["left behind", test.leaked, "still held after the test"],
  ].filter(([, size]) => size).map(([name, size, note]) => [name, bytes(size), note]);
  const counts = [["cache flushes", test.retries, "before an allocation succeeded"], ["out of memory", test.ooms, test.recovered ? "errors, caught by the test" : "errors of the allocator"]];
  for (const [name, count, note] of counts) if (count) facts.push([name, `${count}`, note]);
  return tiles(facts);
}

function overTime(test, width) {
  const said = reading(""), place = node("div");
  const draw = (by) => {
    place.replaceChildren(legend(test, by), timelineChart(test, by, width, said.say));
    for (const button of buttons) button.setAttribute("aria-pressed", `${button.value === by}`);
  };
  const kinds = [["categories", "by category"], ["modules", "by module"]].filter(([by]) => test.timeline[by].length);
  const buttons = kinds.map(([by, words]) => node("button", { type: "button", value: by, onclick: () => draw(by) }, words));
  draw("categories");
  const cut = test.timeline.cut ? node("p", { class: "odd" }, "The beginning is cut off: more was recorded than is kept.") : null;
  return [node("h3", {}, "Memory over time"), kinds.length > 1 ? node("div", { class: "bar" }, ...buttons) : null, place, said.node, cut];
}

function atThePeak(test, width) {
  const most = test.timeline ? test.timeline.most : test.figures[0] || test.holders.reduce((sum, holder) => sum + holder[0], 0);
  const said = reading("Point at an area to see whose it is.");
  const share = (size) => (size && size < most / 1000 ? "<0.1%" : `${(size / most * 100).toFixed(1)}%`);
  const lines = test.holders.map(([size, count, location, category, module]) => [
    bytes(size), share(size), count.toLocaleString("en"), node("span", {}, swatch(`c-${text(category) || "other"}`), text(category)), text(module), node("code", {}, text(location)),
  ]);
  return [
    node("h3", {}, "Who holds the peak"), treemap(test, most, width, said.say), said.node,
    listing([["bytes", "n"], ["share", "n"], ["blocks", "n t"], ["category", "s"], ["module", "s t"], ["line", "line"]], lines, FEW),
  ];
}

function since(test) {
  const table = (title, lines) => {
    const most = Math.max(...lines.map(([, old, now]) => Math.abs(now - old)), 1);
    const rows = lines.map(([name, old, now]) => {
      const change = now - old, wide = Math.abs(change) / most * 50;
      const bar = node("svg:svg", { class: "since", viewBox: "0 0 100 10", "aria-hidden": "true" },
        node("svg:rect", { class: change > 0 ? "up" : "down", x: change > 0 ? 50 : 50 - wide, width: wide, height: 10 }), node("svg:path", { d: "M50 0v10" }));
      return [name, bytes(old), bytes(now), node("span", { class: change > 0 ? "grew" : change < 0 ? "shrank" : "soft" }, change ? signed(change) : "none"), bar];
    });
    return rows.length ? [listing([[title, "line"], ["before", "n c"], ["now", "n c"], ["change", "n c"], ["", "n w"]], rows, FEW)] : [];
  };
  const now = test.figures[0] - (test.uncounted || 0), before = test.before || { categories: [], lines: [] };
  const changed = (lines) => lines.filter(([, old, new_]) => old !== new_);
  const code = changed(before.lines).map(([name, ...sizes]) => [node("code", {}, name), ...sizes]);
  const categories = changed(before.categories).map(([name, ...sizes]) => [node("span", {}, swatch(`c-${name}`), name), ...sizes]);
  return [node("h3", {}, `Since ${PAGE.baseline ? PAGE.baseline[0] : "the earlier run"}`),
    ...table("by category", [[node("b", {}, "allocated peak"), test.baseline, now], ...categories]), ...table("by line of code", code),
    test.before && !before.lines.length ? node("p", { class: "soft" }, "One of the runs has no record of who held the peak: both need --vram-timeline.") : null];
}

const WHY_NOT = {
  nvml: "NVML knows how much a whole process holds and not what for: there is no record over time, and nobody to name. PyTorch's own allocator (--vram-gpu=cuda or dry) tells both.",
  accelerator: "PyTorch keeps no memory history on this kind of device: there is no record over time, and nobody to name.",
};

function detail(test, width) {
  const inside = node("div", { class: "inside" }, headline(test));
  const add = (parts) => inside.append(...parts.filter(Boolean));
  if (test.example) add([node("p", {}, "worst example ", node("code", {}, test.example))]);
  if (test.kind) add([figures(test)]);
  if (test.work) add([node("p", { class: "work" }, `Asked of the device: ${test.work}`)]);
  if (test.host) {
    const [sum, ...parts] = test.host;
    add([node("h3", {}, "Host memory"), node("p", { class: "host" }, sum), ...parts.map((part) => node("p", { class: "soft" }, part))]);
  }
  if (test.baseline !== undefined) add(since(test));
  if (test.timeline) add(overTime(test, width));
  if (test.holders) add(atThePeak(test, width));
  if (test.layout) add(segmentsAtThePeak(test.layout, width));
  if (test.phases) {
    const more = test.hidden ? node("p", { class: "soft" }, `and ${test.hidden} more with smaller peaks`) : null;
    add([node("h3", {}, "Phases"), listing([["phase", "s"], ["peak", "n"], ["budget", "n"], ["seconds", "n"], ["", "rest"]],
      test.phases.map(([name, peak, limit, seconds]) => [name, bytes(peak), limit === null ? "" : bytes(limit), seconds.toFixed(3), ""]), FEW), more]);
  }
  if (test.fixtures) {
    add([node("h3", {}, "Fixtures"), listing([["fixture", "s"], ["scope", "s"], ["holds", "n"], ["", "rest"]],
      test.fixtures.map(([name, scope, size]) => [name, scope, bytes(size), ""]))]);
  }
  if (test.devices) {
    const size = (value) => (value === null ? "" : bytes(value));
    add([node("h3", {}, "Devices"), listing([["device", "s"], ["allocated", "n t"], ["reserved", "n t"], ["on the device", "n t"], ["asked of it", "line t"]],
      test.devices.map(([index, name, ...sizes]) => [`${index}: ${name}`, ...sizes.slice(0, 3).map(size), sizes[3]])),
    node("p", { class: "soft" }, `What stands above is that of device ${test.index}, which needs most.`)]);
  }
  if (test.processes) {
    const seconds = (from, to) => (from === null ? "" : `${from.toFixed(1)} to ${to === null ? "?" : to.toFixed(1)}`);
    add([node("h3", {}, "Processes"), listing([["device", "n t"], ["rank", "n t"], ["PID", "n t"], ["allocated", "n t"], ["on the device", "n t"], ["seconds", "n t"], ["ended", "line t"]],
      test.processes.map(([index, rank, pid, allocated, device, from, to, ended]) => [`${index}`, rank === null ? "" : `${rank}`, `${pid}`, bytes(allocated), bytes(device), seconds(from, to), ended]), FEW)]);
  }
  if (test.notes) {
    add([node("h3", {}, "What the figures rest on"), listing([["assumption", "s"], ["what is assumed", "line"]], test.notes.map(([name, words]) => [text(name), text(words)]))]);
  }
  if (test.reads) {
    add([node("h3", {}, "Values read back from the dry GPU"), listing([["times", "n t"], ["operation", "s"], ["value", "s"], ["line", "line"]],
      test.reads.map(([line, operation, count, answered, note]) => [count.toLocaleString("en"), text(operation), (answered ? "answered" : "a guess") + (note ? `: ${note}` : ""), node("code", {}, text(line))]), FEW)]);
  }
  if (!test.timeline && !test.holders && test.kind) {
    add([node("p", { class: "soft" }, WHY_NOT[test.kind] || "Nothing was recorded over time: run with --vram-timeline, or write this report with --vram-output=report.html.")]);
  }
  if (test.device) add([node("p", { class: "soft" }, `Measured on ${test.device} (${test.kind}).`)]);
  return inside;
}
