// Who holds what at the peak, as areas. Squarified: Bruls, Huizing, van Wijk, "Squarified Treemaps" (2000).

function squarify(items, x, y, width, height) {
  const total = items.reduce((sum, item) => sum + item.size, 0);
  const placed = [];
  let rest = items.slice().sort((a, b) => b.size - a.size), area = width * height;
  const scale = total ? area / total : 0;
  while (rest.length && width > 0.5 && height > 0.5) {
    const side = Math.min(width, height);
    let row = [], sum = 0, best = Infinity;
    while (row.length < rest.length) {
      const next = rest[row.length], size = next.size * scale, together = sum + size;
      const smallest = size, largest = row.length ? row[0].size * scale : size;
      const ratio = Math.max((side * side * largest) / together ** 2, together ** 2 / (side * side * Math.max(smallest, 1e-9)));
      if (row.length && ratio > best) break;
      row.push(next);
      sum = together;
      best = ratio;
    }
    rest = rest.slice(row.length);
    const thick = sum / side;
    let along = 0;
    for (const item of row) {
      const long = (item.size * scale) / thick;
      placed.push(width >= height
        ? { item, x, y: y + along, width: thick, height: long }
        : { item, x: x + along, y, width: long, height: thick });
      along += long;
    }
    if (width >= height) { x += thick; width -= thick; } else { y += thick; height -= thick; }
  }
  return placed;
}

const pen = document.createElement("canvas").getContext("2d");
pen.font = "11px system-ui, sans-serif";
const written = (words) => pen.measureText(words).width;

// model.layers.*.mlp, layers.*.mlp, mlp: the end of a module's name says most.
function endings(name) {
  const parts = name.split(".");
  const found = parts.map((_, i) => parts.slice(i).join(".")).filter((words) => !words.startsWith("*"));
  return found.length ? found : [name];
}

function cut(words, room) {
  for (let n = words.length - 1; n > 2; n--) if (written(`${words.slice(0, n)}…`) <= room) return `${words.slice(0, n)}…`;
  return null;
}

function treemap(test, most, width, say) {
  const height = width < 500 ? 220 : 260;
  const items = test.holders.map(([size, count, location, category, module]) => ({
    size, count, location: text(location), category: text(category) || "other", module: text(module),
  }));
  const rest = most - items.reduce((sum, item) => sum + item.size, 0);
  if (rest > most / 1000) items.push({ size: rest, count: 0, location: "all the rest", category: "other", module: "" });
  const chart = node("svg:svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "who held memory at the peak; the table below says the same" });
  for (const { item, x, y, width: w, height: h } of squarify(items, 0, 0, width, height)) {
    const says = `${bytes(item.size)} (${(item.size / most * 100).toFixed(1)}%) ${item.category}${item.module ? `, ${item.module}` : ""}: ${item.location}`;
    const cell = node("svg:rect", { class: `cell c-${item.category}`, x, y, width: w, height: h, onpointerenter: () => say(says), onpointerdown: () => say(says) });
    chart.append(cell);
    const write = (line, ...spellings) => {
      if (h < line * 15 + 5) return;
      const shown = spellings.find((words) => words && written(words) <= w - 9) || (line > 1 && cut(spellings[spellings.length - 1], w - 9));
      if (shown) chart.append(node("svg:text", { class: `in t-${item.category}`, x: x + 5, y: y + line * 15, "pointer-events": "none" }, shown));
    };
    write(1, bytes(item.size));
    write(2, ...(item.module ? endings(item.module) : [item.location, item.location.split(" in ")[0]]));
    write(3, item.category);
  }
  return chart;
}
