"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const report = data.report, find = selector => document.querySelector(selector);
const MAIN = ["chamfer_l1", "chamfer_l2", "f_score@0.02", "f_score@0.05", "normal_consistency", "volume_iou",
              "silhouette_iou", "watertight", "components"];
const FIRST_ROWS = 200;

function element(tag, text = "", name = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

function show(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value !== "number") return Array.isArray(value) ? value.join(", ") : String(value);
  return Number.isInteger(value) ? String(value) : value.toPrecision(4);
}

function fill(table, head, rows) {
  const top = element("tr");
  for (const cell of head) top.append(element("th", cell));
  const body = element("tbody");
  for (const row of rows) {
    const line = element("tr");
    for (const cell of row) line.append(cell instanceof Node ? cell : element("td", show(cell)));
    body.append(line);
  }
  const head_ = element("thead");
  head_.append(top);
  table.replaceChildren(...(head.length ? [head_] : []), body);
}

function svg(tag, attributes, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

function headline() {
  const {count, protocol} = report;
  find("#summary").textContent = `${count.items} items, ${count.ok} ok, ${count.failed} failed. Protocol ` +
    `${protocol.name}: ${protocol.points} points, seed ${protocol.seed}, align ${protocol.align}; Chamfer is the ` +
    `${protocol.chamfer}. elastic3d ${report.elastic3d}.`;
  const rows = Object.entries(report.mean).map(([key, mean]) =>
    [key, mean, report.interval[key].map(show).join(" .. "), report.values[key]]);
  fill(find("#headline table"), ["metric", "mean", "95 % interval", "values"], rows);
  if (report.gate) {
    find("#gate").hidden = false;
    const lines = report.gate.violations;
    const list = lines.length ? lines.map(line => element("li", line, "bad"))
                              : [element("li", "all bounds hold", "good")];
    find("#gate ul").replaceChildren(...list);
  }
}

function comparisons() {
  const rows = [];
  for (const kind of ["floor", "baseline"]) for (const c of report[kind] || []) {
    const tone = c.verdict.startsWith("worse") ? "text bad" : /^(inside|better|equal)/.test(c.verdict) ? "text good" : "text";
    const difference = `${show(c.worse_by.mean)} [${show(c.worse_by.low)}, ${show(c.worse_by.high)}]`;
    rows.push([c.metric, element("td", c.verdict, tone), c.pred, kind, c.rival, difference, c.worse_by.count, c.p_value]);
  }
  find("#comparisons").hidden = !rows.length;
  fill(find("#comparisons table"),
       ["metric", "verdict", "predictions", "against", "its value", "worse by [95 %]", "samples", "sign test p"], rows);
  find("#sets").hidden = !report.sets;
  if (report.sets) fill(find("#sets table"), [], Object.entries(report.sets));
}

function histogram(key) {
  const values = report.items.map(row => row[key]).filter(value => typeof value === "number");
  const low = Math.min(...values), high = Math.max(...values);
  if (values.length < 2 || low === high) return null;
  const bins = Array(24).fill(0), [width, height] = [300, 110];
  for (const value of values) bins[Math.min(23, Math.floor(24 * (value - low) / (high - low)))]++;
  const plot = svg("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `distribution of ${key}`});
  const top = Math.max(...bins), step = width / 24;
  bins.forEach((n, i) => plot.append(svg("rect", {class: "bar", x: i * step + 1, width: step - 2,
    y: 90 - 85 * n / top, height: 85 * n / top})));
  const at = width * (report.mean[key] - low) / (high - low);
  plot.append(svg("line", {class: "mean", x1: at, x2: at, y1: 0, y2: 90}), svg("text", {x: 0, y: 106}, show(low)),
              svg("text", {x: width, y: 106, "text-anchor": "end"}, show(high)));
  const card = element("div", "", "card");
  card.append(element("h3", key), plot);
  return card;
}

function frontier() {
  if (!data.frontier.length) return;
  find("#frontier").hidden = false;
  const numeric = [...new Set(data.frontier.flatMap(row => Object.keys(row)))]
    .filter(key => data.frontier.some(row => typeof row[key] === "number"));
  const choose = (label, preferred) => {
    const select = element("select"), wrap = element("label", label + " ");
    for (const key of numeric) select.add(new Option(key));
    select.value = preferred.find(key => numeric.includes(key)) || numeric[0];
    wrap.append(select);
    find("#frontier .controls").append(wrap);
    select.onchange = draw;
    return select;
  };
  const x = choose("across", ["dit_speedup", "executed_flops_ratio"]);
  const y = choose("up", ["f_score@0.05", "f_score@0.02", "chamfer_l1_paired"]);
  function draw() {
    const rows = data.frontier.filter(row => typeof row[x.value] === "number" && typeof row[y.value] === "number");
    const methods = [...new Set(rows.map(row => row.method ?? ""))];
    const range = key => [Math.min(...rows.map(r => r[key])), Math.max(...rows.map(r => r[key]))];
    const [x0, x1] = range(x.value), [y0, y1] = range(y.value), [width, height] = [640, 320];
    const px = v => 60 + (width - 200) * (v - x0) / (x1 - x0 || 1);
    const py = v => height - 40 - (height - 60) * (v - y0) / (y1 - y0 || 1);
    const plot = svg("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "frontier of benchmark runs"});
    plot.append(svg("path", {class: "axis", d: `M60 10V${height - 30}H${width - 130}`}));
    for (let i = 0; i <= 4; i++) {
      const vx = x0 + (x1 - x0) * i / 4, vy = y0 + (y1 - y0) * i / 4;
      plot.append(svg("text", {x: px(vx), y: height - 15, "text-anchor": "middle"}, show(vx)),
                  svg("text", {x: 55, y: py(vy) + 4, "text-anchor": "end"}, show(vy)));
    }
    methods.forEach((method, i) => {
      const colour = `hsl(${(i * 137 + 215) % 360} 65% 45%)`;
      const line = rows.filter(row => (row.method ?? "") === method).sort((a, b) => a[x.value] - b[x.value]);
      const points = line.map(row => `${px(row[x.value])},${py(row[y.value])}`).join(" ");
      plot.append(svg("polyline", {points, fill: "none", stroke: colour}));
      for (const row of line) {
        const dot = svg("circle", {cx: px(row[x.value]), cy: py(row[y.value]), r: 4, fill: colour});
        dot.append(svg("title", {}, Object.entries(row).map(([k, v]) => `${k}: ${show(v)}`).join("\n")));
        plot.append(dot);
      }
      plot.append(svg("circle", {cx: width - 118, cy: 20 + 16 * i, r: 4, fill: colour}),
                  svg("text", {x: width - 110, y: 24 + 16 * i}, method));
    });
    find("#frontier .plot").replaceChildren(plot);
  }
  draw();
}

function exhibits(viewer) {
  for (const kind of ["worst", "best"]) {
    find("#" + kind).hidden = !data[kind].length;
    for (const name of data[kind]) {
      const row = report.items.find(item => item.name === name), card = element("div", "", "card");
      card.append(element("h3", name), element("p", `chamfer_l1 ${show(row.chamfer_l1)}, f_score@0.02 ` +
        `${show(row["f_score@0.02"])}, normals ${show(row.normal_consistency)}`, "note"));
      const renders = element("div", "", "renders");
      for (const [caption, source] of Object.entries(data.renders[name])) {
        const figure = element("figure"), image = element("img");
        image.src = source;
        image.alt = `${caption} of ${name}`;
        figure.append(image, element("figcaption", caption));
        renders.append(figure);
      }
      const button = element("button", "view in 3D");
      button.type = "button";
      button.onclick = () => { viewer.show(name); find("#viewer").scrollIntoView({behavior: "smooth"}); };
      card.append(renders, button);
      find(`#${kind} .grid`).append(card);
    }
  }
}

const order = {key: "chamfer_l1", down: true};
let everything = false;

function matches(row) {
  const status = find("#status").value;
  if (status !== "all" && row.status !== status) return false;
  return find("#filter").value.trim().split(/\s+/).every(word => {
    const parts = word.match(/^([\w@.]+)(<=|>=|<|>|=)(.+)$/);
    if (!parts) return `${row.name} ${row.error || ""}`.toLowerCase().includes(word.toLowerCase());
    const [, key, sign, text] = parts, value = row[key], bound = Number(text);
    if (value === null || value === undefined) return false;
    if (sign === "=") return String(value) === text || Number(value) === bound;
    return sign[0] === "<" ? value < bound || (sign === "<=" && value === bound)
                           : value > bound || (sign === ">=" && value === bound);
  });
}

function compareRows(a, b) {
  const [x, y] = [a[order.key], b[order.key]];
  if (x === y) return 0;
  if (x === null || x === undefined) return 1;  // absent values stay at the end
  if (y === null || y === undefined) return -1;
  return (x < y ? -1 : 1) * (order.down ? -1 : 1);
}

function items() {
  const keys = [...new Set(report.items.flatMap(row => Object.keys(row)))]
    .filter(key => !["name", "status", "error"].includes(key));
  const columns = ["name", "status",
    ...(find("#all-columns").checked ? keys : keys.filter(key => MAIN.includes(key))), "error"];
  const rows = report.items.filter(matches).sort(compareRows), shown = everything ? rows : rows.slice(0, FIRST_ROWS);
  find("#shown").textContent = `${rows.length} of ${report.items.length} items`;
  find("#more").hidden = shown.length === rows.length;
  const table = find("#items table");
  fill(table, [], shown.map(row => columns.map(key => element("td", show(row[key]), key === "error" ? "text" : ""))));
  [...table.querySelectorAll("tbody tr")].forEach((line, i) => line.classList.toggle("failed", shown[i].status !== "ok"));
  const head = element("tr");
  for (const key of columns) {
    const cell = element("th"), button = element("button", key);
    button.onclick = () => { order.down = order.key === key ? !order.down : true; order.key = key; items(); };
    if (order.key === key) cell.setAttribute("aria-sort", order.down ? "descending" : "ascending");
    cell.append(button);
    head.append(cell);
  }
  const top = element("thead");
  top.append(head);
  table.prepend(top);
}

headline();
comparisons();
frontier();
find("#distributions .grid").append(...MAIN.map(histogram).filter(card => card));
find("#distributions").hidden = !find("#distributions .grid").children.length;
find("#heat-max").textContent = data.heat_max;
if (Object.keys(data.meshes).length) {
  find("#viewer").hidden = false;
  exhibits(new PairViewer(find("#viewer"), data.meshes));
}
for (const id of ["#filter", "#status", "#all-columns"]) find(id).oninput = items;
find("#more").onclick = () => { everything = true; items(); };
items();
fill(find("#protocol table"), [], Object.entries(report.protocol));
fill(find("#versions"), [], Object.entries(report.environment));
find("#command").textContent = report.command;
