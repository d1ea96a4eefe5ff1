// The allocator's segments at the peak: every block in its place, row after row, as on a map of a disk.

const POOLS = ["large blocks", "small blocks, up to 1 MiB"];

// Pieces of rows: segment, run, where, how wide. Segments follow each other; a long one goes on in the next row.
function placed(segments, perRow, width) {
  const pieces = [];
  let at = 0;
  for (const [, count, size, blocks, runs] of segments) {
    for (let i = 0; i < count; i++) {
      let inside = 0;
      const rest = size - runs.reduce((sum, run) => sum + run[1], 0);
      const all = rest > 0 ? [...runs, [3, rest, blocks - runs.reduce((sum, run) => sum + (run[2] || 1), 0)]] : runs;
      for (const run of all) {
        for (let left = run[1]; left > 0;) {
          const used = Math.min(left, perRow - (at % perRow)), start = (at % perRow) / perRow * width;
          const last = inside + used === size;
          pieces.push({ run, size, row: Math.floor(at / perRow), x: start, w: used / perRow * width, last });
          at += used;
          inside += used;
          left -= used;
        }
      }
    }
  }
  return { pieces, rows: Math.ceil(at / perRow) };
}

function segmentMap(layout, reserved, width, say) {
  const thick = width < 500 ? 9 : 11, pitch = thick + 3, title = 20;
  const perRow = 2 ** Math.max(21, Math.ceil(Math.log2(reserved / (width < 500 ? 44 : 30))));
  const groups = [0, 1].map((pool) => {
    const segments = layout.segments.filter((segment) => segment[0] === pool);
    return { pool, segments, ...placed(segments, perRow, width) };
  }).filter((group) => group.rows);
  const height = groups.reduce((sum, group) => sum + title + group.rows * pitch + 6, 0);
  const chart = node("svg:svg", { class: "chart map", viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0,
    "aria-label": "the allocator's segments at the peak; the table below sums them up" });
  const all = [], paths = {};
  let y = 0;
  for (const { pool, segments, pieces, rows } of groups) {
    const number = segments.reduce((sum, s) => sum + s[1], 0), size = segments.reduce((sum, s) => sum + s[1] * s[2], 0);
    chart.append(node("svg:text", { x: 0, y: y + 13 }, `${POOLS[pool]}: ${number} segment${number === 1 ? "" : "s"}, ${bytes(size)}`));
    y += title;
    for (const piece of pieces) {
      piece.y = y + piece.row * pitch;
      const style = ["", "s-pending", "s-free", "s-more"][piece.run[0]] || `c-${text(piece.run[3]) || "other"}`;
      // A hair's breadth between segments, as far as there is room for one.
      const wide = piece.last && piece.w > 2 ? piece.w - 1 : piece.w;
      (paths[style] ||= []).push(`M${piece.x.toFixed(2)} ${piece.y}h${wide.toFixed(2)}v${thick}h-${wide.toFixed(2)}z`);
      all.push(piece);
    }
    y += rows * pitch + 6;
  }
  for (const [style, parts] of Object.entries(paths)) chart.append(node("svg:path", { class: style, d: parts.join("") }));
  const frame = node("svg:rect", { class: "frame", width: 0, height: thick + 2 });
  chart.append(frame);
  let at = -1;
  const point = (i) => {
    if (i < 0 || i >= all.length) return;
    at = i;
    const { run, size, x, y: top, w } = all[i];
    for (const [name, value] of Object.entries({ x: x - 1, y: top - 1, width: w + 2 })) frame.setAttribute(name, value);
    const blocks = run[2] > 1 ? ` in ${run[2]} blocks` : "";
    const what = [
      () => [`${text(run[3])}${blocks}`, text(run[4]) || "several lines"].filter(Boolean).join(", "),
      () => "freed, waiting for another stream", () => "free", () => `${run[2]} more blocks, not told apart`,
    ][run[0]]();
    say(`${bytes(run[1])} of a segment of ${bytes(size)}: ${what}`);
  };
  const find = (event) => {
    const box = chart.getBoundingClientRect();
    const px = (event.clientX - box.left) * width / box.width, py = (event.clientY - box.top) * height / box.height;
    return all.findIndex((p) => py >= p.y && py < p.y + pitch && px >= p.x && px < p.x + p.w);
  };
  for (const event of ["pointermove", "pointerdown"]) chart.addEventListener(event, (e) => point(find(e)));
  chart.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    point(Math.max(0, Math.min(all.length - 1, at + move)));
  });
  return { chart, perRow, states: Object.keys(paths) };
}

function stateLegend(states, perRow) {
  const names = [["s-free", "free"], ["s-pending", "freed, waiting for another stream"], ["s-more", "not told apart"]];
  const used = [...CATEGORIES.map((name) => [`c-${name}`, name]), ...names].filter(([style]) => states.includes(style));
  return node("ul", { class: "legend" }, ...used.map(([style, name]) => node("li", {}, swatch(style), name)),
    node("li", {}, `a row is ${bytes(perRow)}`));
}

function segmentsAtThePeak(layout, width) {
  const [reserved, allocated, pending, cached, lost, largest, number] = layout.sums;
  const part = (size) => `${(size / reserved * 100).toFixed(1)}%`, idle = reserved - allocated;
  const sums = [
    ["reserved", reserved, `${number.toLocaleString("en")} segment${number === 1 ? "" : "s"}`],
    ["in use", allocated, part(allocated)],
    ["not in use", idle, part(idle)],
    ["lost to fragmentation", lost, `${part(lost)}, free between blocks in use`],
    ["in empty segments", cached, "given back before memory runs out"],
    ["waiting for a stream", pending, part(pending)],
    ["largest free block", largest, "a larger request asks the driver"],
  ].filter(([name, size]) => size || name !== "waiting for a stream");
  const parts = [node("h3", {}, "Segments at the peak"), tiles(sums.map(([name, size, note]) => [name, bytes(size), note]))];
  if (layout.segments) {
    const said = reading("Point at a block, or use the arrow keys, to see whose it is.");
    const { chart, states, perRow } = segmentMap(layout, reserved, width, said.say);
    parts.push(stateLegend(states, perRow), chart, said.node);
    const [count, size] = layout.undrawn;
    if (count) parts.push(node("p", { class: "soft" }, `and ${count} more segments, ${bytes(size)}, not drawn`));
  } else {
    parts.push(node("p", { class: "soft" }, "Drawn for the worst tests only, to keep this page small: a page of fewer tests has all."));
  }
  if (layout.rows) {
    parts.push(listing(
      [["pool", "s"], ["size", "n"], ["segments", "n t"], ["in use", "n t"], ["waiting", "n t"], ["free", "n t"], ["largest free", "n t"], ["held mostly by", "line"]],
      layout.rows.map(([pool, size, count, active, pending, free, largest, line]) =>
        [pool, bytes(size), `${count}`, ...[active, pending, free, largest].map((n) => (n ? bytes(n) : "")), node("code", {}, text(line))])));
    const [count, size] = layout.more;
    if (count) parts.push(node("p", { class: "soft" }, `and ${count} more segments, ${bytes(size)}`));
  }
  return parts;
}
