// One test, opened below its row.

function listing(heads, lines) {
  const head = node("tr", {}, ...heads.map(([word, style]) => node("th", { class: style }, word)));
  const body = lines.map((cells) => node("tr", {}, ...cells.map((cell, i) => {
    const value = cell === null || cell === undefined ? "" : cell;
    return node("td", { class: heads[i][1] }, value);
  })));
  return node("div", { class: "scroll" }, node("table", {}, node("thead", {}, head), node("tbody", {}, ...body)));
}

function figures(test) {
  const [allocated, reserved, device] = test.figures;
  const facts = [
    ["outcome", test.outcome], ["peak", `${bytes(test.peak)} ${test.metric}`],
    ["budget", test.budget ? `${bytes(test.budget)}${test.where ? ` (${test.where})` : ""}` : null],
    ["headroom", test.budget && test.peak !== undefined ? bytes(test.budget - test.peak) : null],
    ["allocated", allocated === null ? null : bytes(allocated)], ["reserved", reserved === null ? null : bytes(reserved)],
    ["cached, not used", allocated !== null && reserved ? bytes(Math.max(0, reserved - allocated)) : null],
    ["with the context", device === null ? null : bytes(device)], ["not counted", test.uncounted ? bytes(test.uncounted) : null],
    ["left behind", test.leaked ? bytes(test.leaked) : null], ["cache flushed to satisfy an allocation", test.retries],
    ["out-of-memory errors", test.ooms], ["on", test.device ? `${test.device} (${test.kind})` : null],
    ["not measured", test.reason], ["worst example", test.example],
  ];
  const shown = facts.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return node("dl", { class: "figures" }, ...shown.map(([name, value]) => node("div", {}, node("dt", {}, name), node("dd", {}, `${value}`))));
}

function overTime(test, width) {
  const said = node("p", { class: "read", "aria-live": "polite" }), place = node("div");
  const say = (words) => { said.textContent = words; };
  const draw = (by) => {
    place.replaceChildren(timelineChart(test, by, width, say), legend(test.timeline, by));
    for (const button of buttons) button.setAttribute("aria-pressed", `${button.value === by}`);
  };
  const buttons = [["categories", "by category"], ["modules", "by module"]].filter(([by]) => test.timeline[by].length)
    .map(([by, words]) => node("button", { type: "button", value: by, onclick: () => draw(by) }, words));
  draw("categories");
  const cut = test.timeline.cut ? node("p", { class: "odd" }, "The beginning is cut off: more was recorded than is kept.") : null;
  return [node("h2", {}, "Memory over time"), node("div", { class: "bar" }, ...buttons), place, said, cut];
}

function atThePeak(test, width) {
  const most = test.timeline ? test.timeline.most : test.figures[0] || test.holders.reduce((sum, holder) => sum + holder[0], 0);
  const said = node("p", { class: "read" });
  const lines = test.holders.map(([size, count, location, category, module]) => [
    bytes(size), `${(size / most * 100).toFixed(1)}%`, `${count}`, text(category), text(module), node("code", {}, text(location)),
  ]);
  return [
    node("h2", {}, "Who holds the peak"), treemap(test, most, width, (words) => { said.textContent = words; }), said,
    listing([["bytes", "n"], ["share", "n"], ["blocks", "n w"], ["category", "s"], ["module", "s w"], ["line", ""]], lines),
  ];
}

function since(before, test) {
  const change = (old, now) => {
    const words = `${now >= old ? "+" : ""}${bytes(now - old)}`;
    return node("span", { class: now > old ? "grew" : now < old ? "shrank" : "" }, words);
  };
  const table = (title, lines) => lines.length ? [listing([[title, ""], ["before", "n"], ["now", "n"], ["change", "n"]],
    lines.map(([name, old, now]) => [name, bytes(old), bytes(now), change(old, now)]))] : [];
  const now = test.figures[0] - (test.uncounted || 0);
  return [node("h2", {}, "Since the earlier run"), ...table("peak", [["allocated", before.peak, now]]),
    ...table("category", before.categories), ...table("line", before.lines)];
}

function detail(test, width) {
  const inside = node("div", { class: "inside" }, figures(test));
  const add = (parts) => inside.append(...parts.filter(Boolean));
  if (test.before) add(since(test.before, test));
  if (test.timeline) add(overTime(test, width));
  if (test.holders) add(atThePeak(test, width));
  if (test.phases) {
    add([node("h2", {}, "Phases"), listing([["phase", ""], ["peak", "n"], ["budget", "n"], ["seconds", "n"]],
      test.phases.map(([name, peak, limit, seconds]) => [name, bytes(peak), limit === null ? "" : bytes(limit), seconds.toPrecision(3)]))]);
  }
  if (test.fixtures) {
    add([node("h2", {}, "Fixtures"), listing([["fixture", ""], ["scope", ""], ["holds", "n"]],
      test.fixtures.map(([name, scope, size]) => [name, scope, bytes(size)]))]);
  }
  if (test.devices) {
    add([node("h2", {}, "Devices"), listing([["device", ""], ["allocated", "n"]],
      test.devices.map(([index, name, size]) => [`${index}: ${name}`, bytes(size)]))]);
  }
  if (test.reads) {
    add([node("h2", {}, "Values read back from the dry GPU"), listing([["line", ""], ["operation", ""], ["times", "n"], ["value", ""]],
      test.reads.map(([line, operation, count, answered, note]) => [node("code", {}, text(line)), text(operation), `${count}`, (answered ? "answered" : "a guess") + (note ? `: ${note}` : "")]))]);
  }
  if (!test.timeline && !test.holders && test.kind) {
    inside.append(node("p", {}, "No history was recorded: run with --vram-timeline, or write this report with --vram-output=report.html."));
  }
  return inside;
}
