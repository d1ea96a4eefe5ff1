// The table: sort, filter, open.

const table = document.getElementById("tests") || node("table", {}, node("thead", {}, node("tr")), node("tbody"));
const body = table.tBodies[0];
const lines = PAGE.tests.map((test, index) => {
  const row = document.getElementById(`t${index}`);
  test.name = row.querySelector("a").textContent;
  return { test, row, index };
});
const keys = {
  name: (t) => t.name, peak: (t) => t.peak || 0, before: (t) => t.baseline || 0,
  change: (t) => (t.change === undefined ? -Infinity : t.change),
  fixtures: (t) => (t.fixtures || []).reduce((sum, f) => sum + f[2], 0),
  budget: (t) => t.budget || 0, used: (t) => (t.budget && t.peak !== undefined ? t.peak / t.budget : -1), kind: (t) => t.kind || "",
};
let opened = null;

function close() {
  if (!opened) return;
  opened.line.row.classList.remove("open");
  opened.line.row.querySelector("a").setAttribute("aria-expanded", "false");
  opened.place.remove();
  opened = null;
}

function open(line) {
  close();
  const cell = node("td", { colspan: table.tHead.rows[0].cells.length });
  const place = node("tr", { class: "detail" }, cell);
  line.row.after(place);
  line.row.classList.add("open");
  line.row.querySelector("a").setAttribute("aria-expanded", "true");
  // The width of what scrolls, not of the table: a table grows with what is put into it.
  const style = getComputedStyle(cell), frame = table.parentElement.clientWidth;
  const room = Math.max(260, Math.floor(frame - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight) - 2));
  const inside = detail(line.test, room);
  inside.style.width = `${room}px`;
  cell.append(inside);
  opened = { line, place, frame };
}

function follow() {
  const match = /^#t(\d+)$/.exec(location.hash), line = match && lines[Number(match[1])];
  if (!line) return close();
  open(line);
  line.row.scrollIntoView({ block: "nearest" });
}

function sort(head) {
  const key = keys[head.dataset.key], up = head.getAttribute("aria-sort") === "descending" || (head.dataset.key === "name" && head.getAttribute("aria-sort") !== "ascending");
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
  lines.slice().sort((a, b) => (up ? 1 : -1) * compare(key(a.test), key(b.test)) || a.index - b.index)
    .forEach((line) => {
      body.append(line.row);
      if (opened && opened.line === line) body.append(opened.place);
    });
}

function filter() {
  const words = document.getElementById("find").value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = document.getElementById("show").value;
  let count = 0;
  for (const { test, row } of lines) {
    const name = test.name.toLowerCase();
    const fits = words.every((word) => name.includes(word)) && (!wanted || test.verdict === wanted || test.outcome === wanted || (wanted === "regressed" && test.regressed));
    row.hidden = !fits;
    count += fits;
  }
  if (opened) opened.place.hidden = opened.line.row.hidden;
  const none = document.getElementById("none");
  if (none) none.hidden = count > 0;
  document.getElementById("shown").textContent = count === lines.length ? "" : `${count} of ${lines.length}`;
}

for (const head of table.tHead.rows[0].cells) {
  const button = node("button", { type: "button", onclick: () => sort(head) }, head.textContent);
  head.replaceChildren(button);
}
for (const line of lines) {
  const link = line.row.querySelector("a");
  link.setAttribute("aria-expanded", "false");
  link.addEventListener("click", (event) => {
    event.preventDefault();
    const closing = opened && opened.line === line;
    history.replaceState(null, "", closing ? location.pathname + location.search : link.getAttribute("href"));
    if (closing) close(); else open(line);
  });
}
const controls = document.getElementById("controls");
controls.hidden = lines.length < 2;
controls.addEventListener("submit", (event) => event.preventDefault());
for (const event of ["input", "change"]) controls.addEventListener(event, filter);
if (!PAGE.tests.some((test) => test.regressed)) document.querySelector("option[value=regressed]").remove();
window.addEventListener("hashchange", follow);
// A notebook shows the page in a frame, whose first width is not the one that it gets: the window's own event is too early.
const refit = () => { if (opened && Math.abs(table.parentElement.clientWidth - opened.frame) > 40) open(opened.line); };
if (table.parentElement) new ResizeObserver(() => requestAnimationFrame(refit)).observe(table.parentElement);
if (lines.length === 1) open(lines[0]); else follow();
