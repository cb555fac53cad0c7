"use strict";
// Curves, filters and comparison of medllm's pages. Reads the JSON block of the page; text is only ever set as text.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const NS = "http://www.w3.org/2000/svg";
  document.documentElement.classList.add("js");

  const make = (name, text = "", attributes = {}) => {
    const node = document.createElement(name);
    if (text !== "") node.textContent = text;
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return node;
  };
  const draw = (parent, name, attributes, text = "") => {
    const node = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== "") node.textContent = text;
    return parent.appendChild(node);
  };
  const number = v => typeof v !== "number" ? String(v)
    : Number.isInteger(v) ? v.toLocaleString("en") : Math.abs(v) >= 1e-3 && Math.abs(v) < 1e6 ? String(+v.toPrecision(4)) : v.toExponential(2).replace(/\.?0+e/, "e");

  // --- curves
  const ticks = (low, high, wanted) => {
    const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map(n => n * power).find(s => s >= raw);
    const out = [];
    for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-6; t += step) out.push(+t.toPrecision(12));
    return out;
  };
  const smooth = (points, weight = 0.6) => {
    let mean = 0;
    return points.map(([x, y], n) => [x, (mean = weight * mean + (1 - weight) * y) / (1 - weight ** (n + 1))]);
  };
  const path = (points, x, y) => points.map(([a, b], n) => `${n ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");

  // one plot: series is [{name, colour, points, smooth}]
  function plot(figure, series) {
    const shown = series.filter(s => s.points.length);
    figure.querySelectorAll("svg, .tip").forEach(old => old.remove());
    if (!shown.length) return;
    const large = figure.classList.contains("large");
    const [width, height, left, bottom] = [large ? Math.max(340, Math.min(figure.clientWidth || 900, 1000)) : 340, large ? 300 : 190, 52, 24];
    const all = shown.flatMap(s => s.points), xs = all.map(p => p[0]), ys = all.map(p => p[1]);
    let [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    if (x0 === x1) { x0 -= 1; x1 += 1; }
    const room = (y1 - y0 || Math.abs(y1) || 1) * 0.06;
    y0 -= room; y1 += room;
    const x = v => left + (v - x0) / (x1 - x0) * (width - left - 8), y = v => 8 + (y1 - v) / (y1 - y0) * (height - bottom - 8);
    const svg = document.createElementNS(NS, "svg");
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `${figure.dataset.name || "curves"}: ` + shown.map(s =>
      `${s.name} from ${number(s.points[0][1])} to ${number(s.points.at(-1)[1])}`).join("; "));
    figure.append(svg);
    for (const t of ticks(y0, y1, large ? 6 : 4)) {
      draw(svg, "line", {class: "grid", x1: left, x2: width - 8, y1: y(t), y2: y(t)});
      draw(svg, "text", {x: left - 6, y: y(t) + 4, "text-anchor": "end"}, number(t));
    }
    for (const t of ticks(x0, x1, large ? 8 : 4).filter(Number.isInteger)) {
      draw(svg, "text", {x: x(t), y: height - 6, "text-anchor": "middle"}, number(t));
    }
    for (const s of shown) {
      const many = s.smooth && s.points.length > 12;
      draw(svg, "path", {class: `curve s${s.colour}${many ? " faint" : ""}`, d: path(s.points, x, y)});
      if (many) draw(svg, "path", {class: `curve s${s.colour}`, d: path(smooth(s.points), x, y)});
      if (s.points.length <= 12) for (const [a, b] of s.points) draw(svg, "circle", {cx: x(a), cy: y(b), r: 2.8, class: `s${s.colour}`, fill: "currentColor"});
    }
    const cross = draw(svg, "line", {class: "cross", y1: 8, y2: height - bottom, visibility: "hidden"});
    const dots = shown.map(s => draw(svg, "circle", {r: 4.5, class: `s${s.colour}`, fill: "currentColor", visibility: "hidden"}));
    const tip = figure.appendChild(make("div", "", {class: "tip", hidden: ""}));
    const nearest = (points, step) => points.reduce((best, p) => Math.abs(p[0] - step) < Math.abs(best[0] - step) ? p : best);
    const leave = () => { tip.hidden = true; [cross, ...dots].forEach(n => n.setAttribute("visibility", "hidden")); };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointermove", event => {
      const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * width;
      const step = nearest(all, x0 + (at - left) / (width - left - 8) * (x1 - x0))[0];
      tip.replaceChildren(make("b", `step ${number(step)}`));
      cross.setAttribute("x1", x(step)); cross.setAttribute("x2", x(step)); cross.setAttribute("visibility", "visible");
      shown.forEach((s, n) => {
        const [a, b] = nearest(s.points, step), near = Math.abs(x(a) - x(step)) < 12;
        dots[n].setAttribute("visibility", near ? "visible" : "hidden");
        if (!near) return;
        dots[n].setAttribute("cx", x(a)); dots[n].setAttribute("cy", y(b));
        const line = tip.appendChild(make("div"));
        line.append(make("span", s.name + (a === step ? "" : ` (step ${number(a)})`), {class: `key s${s.colour}`}), make("span", number(b)));
      });
      tip.hidden = false;
      const wanted = x(step) / width * box.width + 14;
      tip.style.left = `${Math.max(0, wanted + tip.offsetWidth > box.width ? wanted - tip.offsetWidth - 28 : wanted)}px`;
      tip.style.top = `${svg.offsetTop + 10}px`;
    });
  }
  const panels = [];
  const redraw = () => panels.forEach(([figure, series]) => plot(figure, series));
  let waiting;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(redraw, 150); });

  for (const figure of document.querySelectorAll("figure[data-panel]")) {
    panels.push([figure, data.panels[+figure.dataset.panel].series]);
  }
  redraw();

  // --- a run's page
  const notebook = document.querySelector(".notebook"), code = document.getElementById("code");
  if (code) {
    notebook.classList.add("no-code");
    code.addEventListener("click", () => {
      code.textContent = notebook.classList.toggle("no-code") ? "Show the code" : "Hide the code";
      notebook.closest("details").open = true;
    });
  }
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(d => { d.open = true; }));

  // --- the index: filters, order, comparison
  const table = document.getElementById("records");
  if (!table) return;
  const body = table.tBodies[0], rows = [...body.rows], runs = new Map(data.runs.map(r => [r.id, r]));
  const field = name => document.getElementById(name), filters = ["status", "stage", "tag"];
  const count = field("count"), button = field("compare-button"), ticked = () => rows.filter(r => r.querySelector("input").checked);

  function filter() {
    const words = field("text").value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const run = runs.get(row.dataset.id);
      row.hidden = !(filters.every(f => !field(f).value || run[f] === field(f).value) && words.every(w => run.text.includes(w)));
    }
    const left = rows.filter(r => !r.hidden).length;
    count.textContent = left === rows.length ? `${left} records` : `${left} of ${rows.length} records`;
  }
  for (const name of filters) {
    const values = [...new Set(data.runs.map(r => r[name]))].filter(Boolean).sort();
    for (const value of values) field(name).append(make("option", value, {value}));
    field(name).hidden = !values.length;
    field(name).addEventListener("change", filter);
  }
  field("text").addEventListener("input", filter);
  filter();

  for (const head of table.tHead.querySelectorAll("button[data-key]")) head.addEventListener("click", () => {
    const cell = head.closest("th"), key = head.dataset.key, up = cell.getAttribute("aria-sort") !== "ascending";
    table.tHead.querySelectorAll("th").forEach(th => th.removeAttribute("aria-sort"));
    cell.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => runs.get(row.dataset.id).sort[key];
    const order = (a, b) => {
      const [p, q] = [value(a), value(b)];
      if (p === null || q === null) return (p === null) - (q === null);      // what is not known comes last, either way
      return (typeof p === "number" && typeof q === "number" ? p - q : String(p).localeCompare(String(q))) * (up ? 1 : -1);
    };
    body.append(...rows.sort(order));
  });

  const said = v => v === undefined ? "—" : v === null ? "not set" : v === "" ? "(empty)" : typeof v === "object" ? JSON.stringify(v)
    : typeof v === "boolean" ? (v ? "yes" : "no") : number(v);
  function differences(chosen, group) {
    const names = [...new Set(chosen.flatMap(r => Object.keys(r[group])))];
    return names.filter(n => new Set(chosen.map(r => JSON.stringify(r[group][n]))).size > 1);
  }
  function side(chosen, group, title) {
    const names = differences(chosen, group), part = make("div");
    part.append(make("h3", title));
    if (!names.length) { part.append(make("p", "No difference.", {class: "quiet"})); return part; }
    const wide = part.appendChild(make("div", "", {class: "wide"})), t = wide.appendChild(make("table"));
    const head = t.createTHead().insertRow();
    ["", ...chosen.map(r => r.title)].forEach(text => head.append(make("th", text)));
    const lines = t.createTBody();
    for (const name of names) {
      const row = lines.insertRow();
      row.append(make("td", name.replaceAll("_", " "), {class: "quiet"}));
      chosen.forEach(r => row.append(make("td", said(r[group][name]), {class: "differs"})));
    }
    return part;
  }
  function compare() {
    const chosen = ticked().map(r => runs.get(r.dataset.id)), place = field("compare");
    const inside = field("compare-inside");
    const rank = n => n === "loss" ? 0 : n === "eval_loss" ? 1 : 2;
    const names = [...new Set(chosen.flatMap(r => Object.keys(r.curves)))].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
    inside.replaceChildren();
    if (names.length) {
      const pick = make("select", "", {"aria-label": "curve"}), figure = make("figure", "", {class: "large"}), caption = make("figcaption");
      names.forEach(n => pick.append(make("option", n.replaceAll("_", " "), {value: n})));
      inside.append(pick, figure);
      const show = () => {
        caption.replaceChildren();
        chosen.forEach((r, n) => caption.append(make("span", r.title, {class: `key s${n % 8}`})));
        figure.dataset.name = pick.value;
        const series = chosen.map((r, n) => ({name: r.title, colour: n % 8, points: r.curves[pick.value] || [], smooth: true}));
        panels.splice(0, panels.length, [figure, series]);
        figure.replaceChildren(caption);
        redraw();
      };
      pick.addEventListener("change", show);
      place.hidden = false;
      show();
    }
    inside.append(side(chosen, "metrics", "Metrics that differ"), side(chosen, "parameters", "Parameters that differ"),
      side(chosen, "data", "Data that differs"), side(chosen, "environment", "Environment that differs"));
    place.hidden = false;
    place.scrollIntoView({block: "start"});
  }
  const ready = () => {
    const n = ticked().length;
    button.disabled = n < 2;
    button.textContent = n < 2 ? "Compare: tick two or more" : `Compare ${n} records`;
  };
  body.addEventListener("change", ready);
  button.addEventListener("click", compare);
  field("compare-close").addEventListener("click", () => { field("compare").hidden = true; });
  ready();
})();
