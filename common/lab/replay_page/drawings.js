"use strict";
// Timelines, cache boxes, trees, bars and the curve.

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// Return a canvas's context in CSS pixels; `height` is given, the width is the element's.
function surface(canvas, height) {
  const width = canvas.clientWidth || 300, scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  return [context, width];
}

const TIMELINE = 34;

// All steps of a lane on a clock of `longest` ms: one bar a step, its parts from top to bottom in time from left to right.
function drawTimeline(lane, canvas, longest) {
  const [context, width] = surface(canvas, TIMELINE), x = (t) => (t / longest) * width;
  const colours = Object.fromEntries(PARTS.map(([part]) => [part, colour(part)]));
  context.fillStyle = colour("track");
  context.fillRect(0, 0, width, TIMELINE);
  const heights = { prefill: [2, 32], draft: [10, 24], verify: [2, 32], accept: [10, 24], kv: [10, 24], other: [14, 20] };
  for (const step of lane.steps) {
    let t = step.start;
    for (const [part] of PARTS) {
      const [top, bottom] = heights[part];
      context.fillStyle = colours[part];
      context.fillRect(x(t), top, Math.max(x(t + step[part]) - x(t), 0.3), bottom - top);
      t += step[part];
    }
    if (x(step.duration) > 4) {
      context.fillStyle = colour("card");
      context.fillRect(x(step.end) - 0.75, 0, 1.5, TIMELINE);
    }
  }
  context.fillStyle = colour("text");
  context.fillRect(Math.min(x(lane.total), width - 2) , 0, 2, TIMELINE);
}

function drawCursor(canvas, picture, t, longest) {
  const context = canvas.getContext("2d"), width = canvas.width, at = Math.round((t / longest) * width);
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.clearRect(0, 0, width, canvas.height);
  context.drawImage(picture, 0, 0);
  context.fillStyle = colour("card");
  context.globalAlpha = 0.62;
  context.fillRect(at, 0, width - at, canvas.height);
  context.globalAlpha = 1;
  context.fillStyle = colour("focus");
  context.fillRect(Math.min(at, width - 3), 0, 3, canvas.height);
}

// The cache as boxes, one a position: kept, new, rolled back. `after`: how many the cache holds at the end.
function drawCache(canvas, step, after) {
  const total = step.cells, width = canvas.clientWidth || 300;
  const side = total > 600 ? 7 : total > 200 ? 9 : 14, gap = side > 9 ? 3 : 2, columns = Math.max(1, Math.floor((width + gap) / (side + gap)));
  const [context] = surface(canvas, Math.ceil(total / columns) * (side + gap));
  const kept = colour("kept"), fresh = colour("new"), rolled = colour("rolled"), card = colour("card");
  for (let i = 0; i < total; i++) {
    const x = (i % columns) * (side + gap), y = Math.floor(i / columns) * (side + gap);
    if (i >= after) {
      context.setLineDash([2, 2]);
      context.strokeStyle = rolled;
      context.lineWidth = 1.2;
      context.strokeRect(x + 0.75, y + 0.75, side - 1.5, side - 1.5);
      context.setLineDash([]);
      continue;
    }
    context.fillStyle = i < step.kept ? kept : fresh;
    context.fillRect(x, y, side, side);
    if (i < step.kept) continue;
    context.fillStyle = card; // a diagonal, so that fresh boxes differ by more than their colour
    context.beginPath();
    context.moveTo(x + 1, y + 1);
    context.lineTo(x + side * 0.55, y + 1);
    context.lineTo(x + 1, y + side * 0.55);
    context.fill();
  }
}

const NODE = { width: 128, height: 42, gapX: 26, gapY: 12 };

// The draft from left to right, with the accepted path and the token that follows it.
function drawTree(step) {
  const nodes = step.proposed, end = step.path.at(-1) ?? -1, rows = [], children = new Map();
  nodes.forEach((node, i) => children.set(node.parent, [...(children.get(node.parent) ?? []), i]));
  const place = new Map();
  const next = "next";
  let row = 0;
  const put = (i, depth) => { // a subtree's first child is in its parent's row
    const mine = row;
    place.set(i, [depth, mine]);
    const below = [...(children.get(i) ?? [])];
    if (i === end) below.splice(below.filter((child) => nodes[child].tried).length, 0, next);
    below.forEach((child, n) => {
      if (n > 0) row++;
      if (child === next) place.set(next, [depth + 1, row]); else put(child, depth + 1);
    });
  };
  put(-1, 0);
  const depth = Math.max(...[...place.values()].map(([d]) => d)), wide = NODE.width + NODE.gapX, high = NODE.height + NODE.gapY;
  const left = 40, width = left + depth * wide - NODE.gapX + 2, height = (row + 1) * high - NODE.gapY + 4;
  const at = (i) => { const [d, r] = place.get(i); return [d === 0 ? 0 : left + (d - 1) * wide, r * high + 2]; };
  const drawing = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": treeWords(step) });
  const edge = (from, to, accepted) => {
    const [x0, y0] = at(from), [x1, y1] = at(to), a = from === -1 ? 22 : x0 + NODE.width, m = NODE.height / 2;
    drawing.append(svg("path", { class: accepted ? "edge path" : "edge", d: `M${a} ${y0 + m} C${a + 14} ${y0 + m} ${x1 - 14} ${y1 + m} ${x1} ${y1 + m}` }));
  };
  nodes.forEach((node, i) => edge(node.parent, i, node.accepted));
  edge(end, next, true);
  drawing.append(svg("circle", { cx: 11, cy: at(-1)[1] + NODE.height / 2, r: 9, class: "box accepted" }));
  nodes.forEach((node, i) => {
    const state = node.accepted ? "accepted" : node.tried ? "rejected" : "unseen";
    const mark = node.accepted ? "\u2713 accepted" : node.tried ? "\u2717 rejected" : "not compared";
    drawing.append(box(at(i), node.text, state, mark));
  });
  const names = { bonus: "\u2605 bonus", corrected: step.next.origin === "residual" ? "\u2192 from the residual" : "\u2192 the target\u2019s own", plain: "\u2192 the target\u2019s own" };
  drawing.append(box(at(next), step.next.text, step.next.kind, names[step.next.kind]));
  return drawing;
}

function box([x, y], text, state, mark) {
  const shown = [...shownText(text)], label = shown.length > 15 ? [...shown.slice(0, 14), "\u2026"].join("") : shown.join("");
  const word = svg("text", { x: x + 9, y: y + 18, class: state === "unseen" ? "unseen-text" : "", "data-text": "" });
  word.textContent = label;
  const under = svg("text", { x: x + 9, y: y + 34, class: "small" });
  under.textContent = mark;
  const title = svg("title", { "data-text": "" });
  title.textContent = `${shownText(text)} (${mark})`;
  return svg("g", {}, title, svg("rect", { x, y, width: NODE.width, height: NODE.height, rx: 6, class: `box ${state}` }), word, under);
}

function treeWords(step) {
  if (!step.proposed.length) return `No draft; the target\u2019s token is ${shownText(step.next.text)}`;
  const words = step.proposed.map((node) => `${shownText(node.text)} ${node.accepted ? "accepted" : node.tried ? "rejected" : "not compared"}`);
  return `Draft: ${words.join(", ")}; then ${shownText(step.next.text)}`;
}

// The parts of a step as one bar and a list of numbers.
function partsOf(step) {
  const shown = PARTS.filter(([part]) => step[part] > 0);
  return [
    el("div", { class: "bar", "aria-hidden": "true" }, ...shown.map(([part]) => el("div", { class: part, style: `width:${(100 * step[part]) / step.duration}%` }))),
    el("ul", {}, ...shown.map(([part, name]) => el("li", {}, el("span", { class: `swatch ${part}`, "aria-hidden": "true" }), `${name} `, num(part, step[part], "ms"), " ms"))),
  ];
}

// Speed-up by K at one cost of a draft token; a dashed line at 1, where speculation neither gains nor loses.
function curveOf(costs, chosen, cost) {
  const width = 460, height = 220, left = 44, bottom = 34, ks = Array.from({ length: costs.k }, (_, i) => i + 1);
  const values = ks.map((k) => computedSpeedup(costs, k, cost)), highest = Math.max(1.25, ...values) * 1.12;
  const x = (k) => left + ((k - 0.5) / costs.k) * (width - left - 10), y = (v) => (height - bottom) * (1 - v / highest) + 6;
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Computed speed-up: ${ks.map((k, i) => `K ${k}: ${values[i].toFixed(2)}`).join(", ")}` });
  const words = (text, at, name, value) => {
    const made = svg("text", { class: "small", ...at });
    if (name) Object.entries({ "data-n": name, "data-value": value, "data-format": "ratio" }).forEach(([key, each]) => made.setAttribute(key, each));
    made.textContent = text;
    drawing.append(made);
  };
  drawing.append(svg("line", { class: "one", x1: left, x2: width - 4, y1: y(1), y2: y(1) }));
  words("1.00", { x: left - 8, y: y(1) + 4, "text-anchor": "end" }, "one", 1);
  drawing.append(svg("polyline", { class: "line", points: ks.map((k, i) => `${x(k)},${y(values[i])}`).join(" ") }));
  ks.forEach((k, i) => {
    drawing.append(svg("circle", { cx: x(k), cy: y(values[i]), r: k === chosen ? 6 : 4, class: k === chosen ? "now" : "" }));
    if (costs.k <= 10 || k === chosen) words(values[i].toFixed(2), { x: x(k), y: y(values[i]) - 11, "text-anchor": "middle" }, `speedup.${k}`, values[i]);
    if (costs.k <= 16 || k === chosen) words(String(k), { x: x(k), y: height - 15, "text-anchor": "middle", "data-text": "" });
  });
  words(`K, draft ${costs.unit}s a step`, { x: width - 10, y: height - 1, "text-anchor": "end" });
  words("plain", { x: left - 8, y: y(1) + 17, "text-anchor": "end" });
  return drawing;
}
