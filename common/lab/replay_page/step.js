"use strict";
// One step: its sentence, draft, times, cache, and its arithmetic.

class StepPanel {
  constructor() {
    this.parts = Object.fromEntries(["step", "step-title", "sentence", "tree", "tree-caption", "parts", "parts-caption", "cache",
      "cache-caption", "cache-legend", "arithmetic", "arithmetic-body"].map((id) => [id, document.getElementById(id)]));
    this.parts.arithmetic.addEventListener("toggle", () => this.fill());
  }

  // Show a step of a lane, or with step null what comes before the first one.
  show(lane, number) {
    const { parts } = this, step = lane.steps[number] ?? null;
    if (lane === this.lane && number === this.number) return;
    Object.assign(this, { lane, number, step });
    parts["step-title"].replaceChildren(...(step
      ? ["Step ", num("step", number + 1, "count"), " of ", num("steps", lane.steps.length, "count"), `, lane ${lane.name}`]
      : [`Lane ${lane.name}, before its first step`]));
    parts.sentence.replaceChildren(...(step ? sentence(step, lane) : ["Press play, or the right arrow for one step."]));
    for (const id of ["tree-caption", "tree", "parts-caption", "parts", "cache-caption", "cache-legend"]) parts[id].replaceChildren();
    parts.cache.hidden = parts.arithmetic.hidden = !step;
    if (!step) return;
    this.fill();
    parts["tree-caption"].append(...(step.proposed.length
      ? ["The draft: ", num("proposed", step.proposed.length, "count"), plural(step.proposed.length, " token", " tokens"), ", then what the target wrote"]
      : ["No draft in this step"]));
    parts.tree.append(drawTree(step));
    parts["parts-caption"].append("Time of this step: ", num("duration", step.duration, "ms"), " ms",
      ...(lane.together > 1 ? [", shared by ", num("together", lane.together, "count"), " sequences at most"] : []));
    parts.parts.append(...partsOf(step));
    this.drawCache();
  }

  drawCache() {
    const { step, parts, number, lane } = this;
    if (!step) return;
    const total = step.cells, without = step.cacheBefore === null;
    const freed = !without && step.cacheAfter === 0 && number === lane.steps.length - 1;
    const after = without || freed ? total : step.cacheAfter, legend = parts["cache-legend"];
    parts["cache-caption"].replaceChildren(...(without
      ? ["No cache: the target computed all ", num("computed", total, "count"), " positions that it sees"]
      : ["The target\u2019s cache: a box for each position, from ", num("window", step.window, "count"), " on"]));
    drawCache(parts.cache, step, after);
    const counts = [["kept", "kept from before", step.kept], ["new", "new in this step", after - step.kept],
      ["rolled", "computed, then rolled back", total - after]].filter(([, , count]) => count > 0);
    parts.cache.setAttribute("aria-label", counts.map(([, words, count]) => `${count} ${words}`).join(", "));
    legend.replaceChildren(...counts.map(([style, words, count]) => el("li", {},
      el("span", { class: `swatch ${style}`, "aria-hidden": "true" }), num(`cache.${style}`, count, "count"), ` ${words}`)));
    if (freed) legend.append(el("li", {}, "the text has ended: its boxes are free again"));
  }

  fill() {
    if (!this.step || !this.parts.arithmetic.open) return;
    this.parts["arithmetic-body"].replaceChildren(...arithmetic(this.step, this.lane));
  }
}

const RULES = {
  uniform: "A token is accepted if u < min(1, p / q): p is the target\u2019s probability, q the draft\u2019s, u a uniform random number.",
  certain: "At temperature zero p is one for the target\u2019s likeliest token and zero for the others; no random number is needed.",
  greedy: "At temperature zero the target\u2019s own token is its likeliest one. A draft token is accepted if it is the same.",
  own_draw: "The target draws its own token with its own random numbers. A draft token is accepted if the target drew the same one, so its chance is p.",
  threshold: "A lossy policy: a token is accepted if its probability under the target passes the policy\u2019s threshold.",
};

function table(caption, heads, rows) {
  return el("table", {}, el("caption", {}, caption),
    el("thead", {}, el("tr", {}, ...heads.map(([name, left]) => el("th", { scope: "col", class: left ? "left" : null }, name)))),
    el("tbody", {}, ...rows));
}

function cell(content, style = null) {
  return el("td", { class: style }, content ?? "\u2013");
}

function arithmetic(step, lane) {
  const found = [];
  if (step.proposed.length) {
    const drawn = step.comparison === "uniform", ratio = drawn || step.comparison === "certain";
    const tree = branches(step);
    const heads = [["#"], ...(tree ? [["after #"]] : []), ["draft token", true], ["p"], ["q"], ...(ratio ? [["min(1, p / q)"]] : [["chance"]]), ...(drawn ? [["u"]] : []), ["", true]];
    const rows = step.proposed.map((node, i) => {
      const [u, chance] = node.u === null ? [null, num(`chance.${i}`, node.chance, "prob")] : probPair(`u.${i}`, node.u, `chance.${i}`, node.chance);
      const verdict = node.accepted ? cell("\u2713 accepted", "left accepted") : node.tried ? cell("\u2717 rejected", "left rejected") : cell("not compared", "left");
      return el("tr", {}, cell(num(`number.${i}`, i + 1, "count")), ...(tree ? [cell(node.parent < 0 ? "text" : num(`parent.${i}`, node.parent + 1, "count"))] : []),
        cell(quoted(node.text), "left"), cell(num(`p.${i}`, node.p, "prob")), cell(num(`q.${i}`, node.q, "prob")), cell(node.tried ? chance : null), ...(drawn ? [cell(u)] : []), verdict);
    });
    const rule = RULES[step.comparison === "own_draw" && lane.settings.temperature === 0 ? "greedy" : step.comparison];
    found.push(el("p", {}, rule, tree && drawn ? " Siblings are tried in turn: after a rejected one, p is its probability in the residual." : ""), table("The draft", heads, rows));
  }
  const won = (text) => (text === step.next.text ? "won" : null);
  if (step.residual) {
    const { mass, top } = step.residual;
    found.push(table(el("span", {}, "The residual, max(0, p \u2212 q) / ", num("mass", mass, "prob"), ", from which ", quoted(step.next.text), " was drawn: its likeliest tokens"),
      [["token", true], ["p"], ["q"], ["max(0, p \u2212 q)"], ["residual"]],
      top.map(({ text, p, q, prob }, i) => el("tr", { class: won(text) }, cell(quoted(text), "left"), cell(num(`residual.p.${i}`, p, "prob")), cell(num(`residual.q.${i}`, q, "prob")),
        cell(num(`residual.left.${i}`, Math.max(0, p - q), "prob")), cell(num(`residual.prob.${i}`, prob, "prob"))))));
  }
  const role = step.next.kind === "bonus" ? "the bonus " : "";
  const caption = el("span", {}, "The target\u2019s likeliest tokens after the accepted ones", ...(step.residual ? [] : [", from which ", role, quoted(step.next.text), " was taken"]));
  found.push(table(caption, [["token", true], ["p"]], step.top.map(({ text, p }, i) =>
    el("tr", { class: step.residual ? null : won(text) }, cell(quoted(text), "left"), cell(num(`top.${i}`, p, "prob"))))));
  found.push(el("p", {}, quoted(step.next.text), " had probability ", num("next.prob", step.next.prob, "prob"), " in the distribution that it was drawn from."));
  return found;
}
