"use strict";
// Small builders of elements. Text of a model enters the page only as the content of text nodes.
// Every number is in an element with its name and its full value, so that a test can compute it again.

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const FORMATS = {
  count: (value) => value.toLocaleString("en-US"),
  prob: (value) => formatProb(value, 2),
  ms: (value) => (value >= 1000 ? value.toLocaleString("en-US", { maximumFractionDigits: 0 })
    : value.toFixed(value >= 100 ? 0 : value >= 10 ? 1 : 2)),
  ratio: (value) => value.toFixed(2),
  rate: (value) => value.toFixed(value >= 100 ? 0 : 1),
  percent: (value) => `${(100 * value).toFixed(0)}%`,
};

function formatProb(value, digits) {
  if (value === 0) return "0";
  if (value >= 0.1) return value.toFixed(digits);
  return value >= 0.001 ? value.toPrecision(digits) : value.toExponential(digits - 1).replace("e-", "e\u2212");
}

function num(name, value, format) {
  return el("span", { "data-n": name, "data-value": value, "data-format": format }, FORMATS[format](value));
}

// Two probabilities with enough digits to tell them apart.
function probPair(nameA, a, nameB, b) {
  let digits = 2;
  while (digits < 7 && a !== b && formatProb(a, digits) === formatProb(b, digits)) digits++;
  return [[nameA, a], [nameB, b]].map(([name, value]) =>
    el("span", { "data-n": name, "data-value": value, "data-format": `prob${digits}` }, formatProb(value, digits)));
}

// Text of a token, with what cannot be seen made visible.
function visibleText(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/\u007f/g, "\u2421")
    .replace(/[\u0080-\u009f\u200b-\u200f\u202a-\u202e\u2028\u2029\u2060-\u206f\ufeff]/g, (c) => `<U+${c.charCodeAt(0).toString(16).toUpperCase()}>`);
}

function shownText(text) {
  return visibleText(text).replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5").replace(/^ +| +$/g, (spaces) => "\u00b7".repeat(spaces.length));
}

function quoted(text) {
  return el("span", { class: "quoted", "data-text": "" }, shownText(text));
}

function plural(count, one, many = `${one}s`) {
  return count === 1 ? one : many;
}

const KINDS = {
  accepted: "draft token that the target accepted",
  corrected: "the target\u2019s own token in place of a rejected one",
  bonus: "the target\u2019s own token after a fully accepted draft",
  plain: "the target\u2019s own token without a draft",
};

const PARTS = [["prefill", "read the prompt"], ["draft", "draft"], ["verify", "verify"], ["accept", "accept"], ["kv", "move cache"], ["other", "the rest"]];

// The draft token that ended the step: the last rejected one that was compared after the accepted path, or null.
function rejectedOf(step) {
  const end = step.path.at(-1) ?? -1;
  return step.proposed.filter((node) => node.parent === end && node.tried && !node.accepted).at(-1) ?? null;
}

// One plain sentence about a step, as nodes.
function sentence(step, lane) {
  const said = [];
  if (step.jumped) {
    said.push("The sequence outgrew the context of ", num("context", lane.context, "count"), " tokens: the window jumped to position ",
      num("window", step.window, "count"));
    said.push(step.cacheBefore === null ? ". " : [", the ", num("cacheBefore", step.cacheBefore, "count"),
      " cached positions were dropped, and the cache was filled anew. "]);
  }
  if (!step.proposed.length) {
    said.push("No draft: one pass of the target gave one token, ", quoted(step.next.text), ", with probability ", num("next.prob", step.next.prob, "prob"), ".");
    return said.flat();
  }
  const drafted = Math.max(...step.proposed.map((node) => node.depth)), rejected = rejectedOf(step), ended = step.emitted <= step.path.length;
  const full = step.next.origin === "bonus";
  if (ended) {
    said.push("Accepted ", num("path.length", step.path.length, "count"), "; the text ended after ", num("emitted", step.emitted, "count"),
      plural(step.emitted, " of them."));
  } else if (full) {
    said.push("Accepted all ", num("depth", drafted, "count"), " ", plural(drafted, "token", "tokens"), " of the draft. The same pass of the target also gave ",
      quoted(step.next.text), ", the bonus.");
  } else {
    said.push(...verdictOf(step, rejected, lane));
    said.push(step.path.length ? [" Kept ", num("path.length", step.path.length, "count"), plural(step.path.length, " draft token", " draft tokens"), ", then "] : " Kept no draft token; ");
    said.push(quoted(step.next.text), step.next.origin === "residual" ? " was drawn from the residual." : " is the target\u2019s own.");
  }
  return said.flat();
}

// Why a token was rejected: "rejected: u = 0.71 > 0.42 = min(1, 0.05 / 0.12)".
function verdictOf(step, node, lane) {
  const rejected = ["Rejected ", quoted(node.text), ": "];
  if (step.comparison === "uniform") {
    const [u, chance] = probPair("u", node.u, "chance", node.chance);
    return [...rejected, "u = ", u, " \u2265 ", chance, " = min(1, ", num("p", node.p, "prob"), " / ", num("q", node.q, "prob"), ")."];
  }
  if (step.comparison === "certain" || lane.settings.temperature === 0) return [...rejected, "greedily, the target\u2019s likeliest token is ", quoted(step.next.text), "."];
  if (step.comparison === "own_draw") return [...rejected, "the target drew another token with its own random numbers (p = ", num("p", node.p, "prob"), ")."];
  return [...rejected, "its probability under the target, ", num("p", node.p, "prob"), ", does not pass the policy\u2019s threshold."];
}
