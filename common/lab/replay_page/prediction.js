"use strict";
// Predict, then turn: a question about the race, a question before each step, and what other settings would have given.

class Race {
  constructor(lanes, reveal) {
    const box = document.getElementById("guess"), answers = document.getElementById("guess-answers");
    this.outcome = document.getElementById("guess-outcome");
    box.hidden = lanes.length < 2;
    this.known = lanes.length < 2;
    Object.assign(this, { lanes, reveal, said: null });
    this.outcome.replaceChildren();
    const names = lanes.map((lane, i) => laneName(lanes, i));
    this.buttons = [...names, "about the same"].map((name, i) =>
      el("button", { "aria-pressed": "false", onclick: () => this.answer(i) }, name));
    answers.replaceChildren(...this.buttons);
  }

  answer(said) {
    if (this.known) return;
    this.said = said;
    this.buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === said)));
    this.outcome.replaceChildren("Play to the end to see.");
  }

  // Tell who was first, once both lanes have ended.
  end() {
    if (this.known) return;
    this.known = true;
    const [a, b] = this.lanes, ratio = speedOf(b) / speedOf(a), right = ratio > 1.02 ? 1 : ratio < 0.98 ? 0 : 2;
    this.buttons.forEach((button) => { button.disabled = true; });
    const names = this.lanes.map((lane, i) => laneName(this.lanes, i));
    const verdict = this.said === null ? [] : [this.said === right ? "Right. " : "Not so. "];
    this.outcome.replaceChildren(...verdict, `${names[1]} made `, num("measured", ratio, "ratio"), ` times the tokens a second of ${names[0]}: `,
      num("rate.1", 1000 * speedOf(b), "rate"), " against ", num("rate.0", 1000 * speedOf(a), "rate"), " (measured, the prompt\u2019s pass included).");
    this.reveal();
  }
}

function speedOf(lane) {
  return lane.count / lane.total;
}

function laneName(lanes, i) {
  return lanes.every((lane) => lane.name === lanes[0].name) && lanes.length > 1 ? ["Upper", "Lower"][i] : lanes[i].name;
}

// Asks how many draft tokens of the next step will be accepted.
class Quiz {
  constructor(turn) {
    this.box = document.getElementById("question");
    this.switch = document.getElementById("ask");
    this.turn = turn;
    this.reset();
  }

  reset() {
    Object.assign(this, { asked: 0, right: 0, step: null });
    this.box.hidden = true;
  }

  // Ask about a step. Returns false if there is nothing to ask.
  ask(step) {
    if (!this.switch.checked || !step || !step.proposed.length) return false;
    this.step = step;
    this.levels = Math.max(...step.proposed.map((node) => node.depth));
    const buttons = Array.from({ length: this.levels + 1 }, (_, i) => el("button", { "data-text": "", onclick: () => this.answer(i) }, String(i)));
    this.box.replaceChildren(
      el("p", {}, "The draft proposes ", quoted(chainOf(step)), branches(step) ? " and other branches" : "", ". How many tokens will the target accept?"),
      el("div", { class: "answers", role: "group", "aria-label": "How many are accepted?" }, ...buttons, el("button", { onclick: () => this.answer(null) }, "show me")));
    this.box.hidden = false;
    this.box.scrollIntoView({ block: "nearest" });
    return true;
  }

  answer(said) {
    const step = this.step;
    if (!step) return;
    this.step = null;
    const accepted = step.path.length;
    if (said === null) this.box.hidden = true;
    else {
      this.asked++;
      this.right += said === accepted;
      this.box.replaceChildren(el("p", {}, said === accepted ? "\u2713 Right: " : "\u2717 Not so: ", num("accepted", accepted, "count"), " accepted. ",
        num("right", this.right, "count"), " of ", num("asked", this.asked, "count"), " right so far."));
    }
    this.turn();
  }

  close() {
    this.step = null;
    this.box.hidden = true;
  }
}

// The panel of sliders: the speed-up at another K and another cost of a draft token.
class WhatIf {
  constructor() {
    this.k = document.getElementById("k");
    this.cost = document.getElementById("cost");
    for (const slider of [this.k, this.cost]) slider.addEventListener("input", () => this.show());
  }

  load(lanes) {
    this.costs = costsOf(lanes);
    document.getElementById("whatif").hidden = this.costs === null;
    if (this.costs === null) return;
    const recorded = this.costs.draft / this.costs.plain;
    this.k.max = this.k.value = this.costs.k;
    this.cost.max = Math.max(1.5, 1.2 * recorded);
    this.cost.value = this.recorded = Math.round(100 * recorded) / 100;
    const { unit } = this.costs;
    document.getElementById("k-label").textContent = `draft ${unit}s a step, K`;
    document.getElementById("cost-label").textContent = `time of a draft ${unit}, in plain steps`;
    document.getElementById("curve-caption").textContent = `Speed-up by K, at this cost of a draft ${unit}`;
    this.show();
  }

  // What is computed from the whole run waits until the race is over.
  conceal(hidden) {
    document.getElementById("whatif-body").hidden = hidden;
    document.getElementById("whatif-later").hidden = !hidden;
  }

  show() {
    const { costs } = this, k = Number(this.k.value), cost = Number(this.cost.value);
    const tokens = tokensPerStep(costs, k), price = computedStep(costs, k, cost), value = computedSpeedup(costs, k, cost);
    document.getElementById("k-value").replaceChildren(num("whatif.k", k, "count"));
    document.getElementById("cost-value").replaceChildren(num("whatif.cost", cost, "ratio"));
    document.getElementById("whatif-words").replaceChildren(
      "A step would give ", num("whatif.tokens", tokens, "ratio"), " tokens for the price of ", num("whatif.price", price, "ratio"), " plain steps: ",
      el("strong", {}, num("whatif.speedup", value, "ratio"), "\u00d7"), " plain decoding, ", el("em", {}, "computed"), ".");
    document.getElementById("whatif-notes").replaceChildren(
      "From this recording\u2019s medians: a verification ", num("whatif.verify", costs.verify, "ms"), " ms, accepting and the rest ", num("whatif.rest", costs.rest, "ms"), ` ms, a draft ${costs.unit} `,
      num("whatif.draft", costs.draft, "ms"), " ms, a plain step ", num("whatif.plain", costs.plain, "ms"), costs.measuredPlain ? " ms (measured in the other lane). " : " ms (not recorded: the time of a verification is used). ",
      "The first step, which reads the prompt, is left out. The first ", num("whatif.levels", k, "count"), plural(k, ` draft ${costs.unit} was`, ` draft ${costs.unit}s were all`), " accepted in ",
      num("whatif.share", costs.shares[k - 1], "percent"), " of the drafts that long. A verification is taken to cost the same at every K.");
    document.getElementById("curve").replaceChildren(curveOf(costs, k, cost));
  }
}
