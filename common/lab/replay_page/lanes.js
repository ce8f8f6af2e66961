"use strict";
// One lane: its figures, its timeline, and its text up to a moment of the wall clock.

const HEARD = 400; // tokens of the prompt that are shown, from its end

class LaneView {
  constructor(lane, longest, choose, seek, alone) {
    Object.assign(this, { lane, longest, shown: 0, current: -1, scrolled: -1 });
    this.canvas = el("canvas", { role: "img" });
    this.canvas.addEventListener("click", (event) => {
      const box = this.canvas.getBoundingClientRect();
      seek(((event.clientX - box.left) / box.width) * longest, this);
    });
    this.inspect = el("button", { class: "inspect", "aria-pressed": "false", onclick: () => choose(this) }, "inspect");
    this.figures = el("dl");
    this.values = {};
    for (const [name, words] of [["tokens", "tokens"], ["elapsed", "ms"], ["rate", "tokens/s"], ["perForward", "tokens a pass"]]) {
      this.values[name] = el("dd");
      this.figures.append(el("div", {}, el("dt", {}, words), this.values[name]));
    }
    const who = lane.drafted ? [`drafts with `, el("span", { "data-text": "" }, lane.draft), ", verifies with "] : ["one token a pass of "];
    const title = el("h2", {}, lane.name, el("small", {}, ...who, el("span", { "data-text": "" }, lane.model)));
    this.text = el("div", { class: "text", tabindex: "0", role: "group", "aria-label": `Text of the lane ${lane.name}`, onclick: (event) => {
      const step = event.target.dataset?.step;
      if (step !== undefined) seek(lane.steps[Number(step)].end, this);
    } });
    const prompt = lane.prompt.slice(-HEARD);
    this.text.append(el("span", { class: "before", "data-text": "" }, (lane.prompt.length > HEARD ? "\u2026" : "") + visibleText(prompt.join(""))));
    this.spans = lane.steps.map((step, i) => step.tokens.map((token) => el("span",
      { class: `token ${token.kind}`, "data-step": i, "data-text": "", hidden: true }, visibleText(token.text).replace(/\n/g, token.kind === "plain" ? "\n" : "\u21b5\n"))));
    this.text.append(...this.spans.flat());
    this.ghost = el("span", { class: "ghost", "data-text": "", hidden: true });
    this.text.append(this.ghost);
    this.element = el("section", { class: "lane", "aria-label": `Lane ${lane.name}` },
      el("div", { class: "head" }, title, this.figures, alone ? null : this.inspect), this.canvas, this.text);
  }

  // Draw the timeline again, after a change of the width or of the colours.
  draw() {
    drawTimeline(this.lane, this.canvas, this.longest);
    this.picture = el("canvas", { width: this.canvas.width, height: this.canvas.height });
    this.picture.getContext("2d").drawImage(this.canvas, 0, 0);
  }

  // Show the lane at time t. Returns how many of its steps have ended.
  show(t) {
    const { lane, spans } = this, count = stepsAt(lane, t);
    for (let i = Math.min(count, this.shown); i < Math.max(count, this.shown); i++) {
      for (const span of spans[i]) span.hidden = i >= count;
    }
    this.mark(count - 1);
    const running = lane.steps[count], drafted = running && running.proposed.length && t >= running.start + running.draft;
    this.ghost.hidden = !drafted;
    if (drafted) this.ghost.textContent = visibleText(chainOf(running)).replace(/\n/g, "\u21b5");
    if (count !== this.scrolled) this.scroll(count);
    this.shown = count;
    const now = Math.min(t, lane.total), last = lane.steps[count - 1], tokens = last ? last.tokensSoFar : 0;
    this.put("tokens", tokens, "count");
    this.put("elapsed", now, "ms");
    this.put("rate", last ? (1000 * tokens) / now : null, "rate");
    this.put("perForward", last ? tokens / count : null, "ratio");
    drawCursor(this.canvas, this.picture, t, this.longest);
    this.canvas.setAttribute("aria-label", `Timeline of the lane ${lane.name}: ${count} of ${lane.steps.length} steps`);
    return count;
  }

  put(name, value, format) {
    this.values[name].replaceChildren(value === null ? "\u2013" : num(name, value, format));
  }

  mark(step) {
    if (this.current === step) return;
    for (const span of this.spans[this.current] ?? []) span.classList.remove("current");
    for (const span of this.spans[step] ?? []) span.classList.add("current");
    this.current = step;
  }

  scroll(count) {
    const last = count ? this.spans[count - 1].at(-1) : this.text.firstChild;
    const bottom = last.offsetTop + last.offsetHeight, box = this.text;
    this.scrolled = count;
    if (bottom > box.scrollTop + box.clientHeight - 4 || bottom < box.scrollTop + 20) box.scrollTop = bottom - box.clientHeight + 28;
  }
}

// The text of a draft: of a tree, its first line.
function chainOf(step) {
  let at = -1, text = "";
  for (;;) {
    const below = step.proposed.findIndex((node) => node.parent === at);
    if (below < 0) return text;
    text += step.proposed[below].text;
    at = below;
  }
}

function legendOf(lanes) {
  const kinds = Object.keys(KINDS).filter((kind) => lanes.some((lane) => lane.steps.some((step) => step.tokens.some((token) => token.kind === kind))));
  return [
    ...kinds.map((kind) => el("li", {}, el("span", { class: `token ${kind}` }, kind), ` ${KINDS[kind]}`)),
    ...PARTS.filter(([part]) => lanes.some((lane) => lane.steps.some((step) => step[part] > 0.01 * step.duration)))
      .map(([part, name]) => el("li", {}, el("span", { class: `swatch ${part}`, "aria-hidden": "true" }), `time: ${name}`)),
  ];
}
