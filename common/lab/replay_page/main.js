"use strict";
// The player: one wall clock for all lanes.

const SPEEDS = [1, 1 / 2, 1 / 5, 1 / 10, 1 / 20, 1 / 50, 1 / 100, 1 / 200];
const SECONDS = 14; // a replay lasts about so long at first

class Player {
  constructor(stories) {
    this.stories = stories;
    this.ids = Object.fromEntries(["stories", "title", "words", "prompt", "lanes", "legend", "facts", "clock", "now", "speed", "play", "play-icon"]
      .map((id) => [id, document.getElementById(id)]));
    this.panel = new StepPanel();
    this.quiz = new Quiz(() => this.jump(this.chosen.shown));
    this.whatIf = new WhatIf();
    this.ids.stories.hidden = stories.length < 2;
    this.tabs = stories.map((story, i) => el("button", { "aria-pressed": "false", "data-text": "", onclick: () => this.load(i) }, story.title));
    this.ids.stories.append(...this.tabs);
    this.ids.speed.append(...SPEEDS.map((speed) => el("option", { value: speed, "data-text": "" }, speed === 1 ? "real time" : `1/${Math.round(1 / speed)}`)));
    const on = (id, act) => document.getElementById(id).addEventListener("click", act);
    on("play", () => this.toggle());
    on("first", () => this.seek(0));
    on("last", () => this.seek(this.longest));
    on("back", () => this.back());
    on("next", () => this.forward());
    this.ids.clock.addEventListener("input", () => this.seek(Number(this.ids.clock.value)));
    document.addEventListener("keydown", (event) => this.key(event));
    addEventListener("resize", () => this.redraw());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
    this.load(0);
  }

  load(number) {
    this.pause();
    const story = this.stories[number], lanes = (story.read ??= story.lanes.map(readLane));
    this.tabs.forEach((tab, i) => tab.setAttribute("aria-pressed", String(i === number)));
    this.longest = Math.max(...lanes.map((lane) => lane.total));
    this.ids.words.textContent = story.words;
    const prompt = lanes[0].prompt.slice(-24).map(shownText).join("");
    this.ids.prompt.replaceChildren("Prompt of ", num("prompt", lanes[0].prompt.length, "count"), plural(lanes[0].prompt.length, " token: ", " tokens: "),
      el("code", { class: "quoted", "data-text": "" }, (lanes[0].prompt.length > 24 ? "\u2026" : "") + prompt));
    this.views = lanes.map((lane) => new LaneView(lane, this.longest, (view) => this.choose(view), (t, view) => { this.chosen = view; this.seek(t); }, lanes.length === 1));
    this.ids.lanes.replaceChildren(...this.views.map((view) => view.element));
    this.ids.legend.replaceChildren(...legendOf(lanes));
    this.ids.facts.replaceChildren(...lanes.map(factsOf));
    this.chosen = this.views.find((view) => view.lane.drafted) ?? this.views[0];
    const wanted = this.longest / 1000 / SECONDS;
    this.ids.speed.value = SPEEDS.reduce((best, speed) => (Math.abs(Math.log(speed / wanted)) < Math.abs(Math.log(best / wanted)) ? speed : best));
    this.ids.clock.max = this.longest;
    this.race = new Race(lanes, () => this.whatIf.conceal(false));
    this.quiz.reset();
    this.whatIf.load(lanes);
    this.whatIf.conceal(lanes.length > 1);
    this.t = 0;
    this.redraw();
  }

  choose(view) {
    this.chosen = view;
    this.quiz.close();
    this.show();
  }

  redraw() {
    for (const view of this.views) view.draw();
    this.show();
    this.panel.drawCache();
  }

  show() {
    for (const view of this.views) {
      view.show(this.t);
      view.element.classList.toggle("chosen", view === this.chosen && this.views.length > 1);
      view.inspect.setAttribute("aria-pressed", String(view === this.chosen));
    }
    this.panel.show(this.chosen.lane, this.chosen.shown - 1);
    this.ids.clock.value = this.t;
    this.ids.clock.setAttribute("aria-valuetext", `${FORMATS.ms(this.t)} of ${FORMATS.ms(this.longest)} milliseconds`);
    this.ids.now.replaceChildren(num("now", this.t, "ms"), " of ", num("longest", this.longest, "ms"), " ms");
    if (this.t >= this.longest) this.race.end();
  }

  seek(t) {
    this.pause();
    this.quiz.close();
    this.t = Math.min(this.longest, Math.max(0, t));
    this.show();
  }

  // Go to the end of a step of the chosen lane; `number` counts from 0.
  jump(number) {
    const { steps } = this.chosen.lane;
    this.t = number < 0 ? 0 : number < steps.length ? steps[number].end : this.longest;
    this.show();
  }

  forward() {
    this.pause();
    if (this.quiz.step) return this.quiz.answer(null);
    const next = this.chosen.shown;
    if (this.quiz.ask(this.chosen.lane.steps[next])) return undefined;
    this.quiz.close();
    return this.jump(next);
  }

  back() {
    this.pause();
    this.quiz.close();
    const { steps } = this.chosen.lane, shown = this.chosen.shown, within = shown < steps.length && this.t > (shown ? steps[shown - 1].end : 0) + 1e-9;
    this.jump(within ? shown - 1 : shown - 2);
  }

  toggle() {
    if (this.playing) return this.pause();
    if (this.t >= this.longest) this.t = 0;
    this.quiz.close();
    this.playing = true;
    this.playSign("Pause", "M4 3h4.5v14H4zM11.5 3H16v14h-4.5z");
    let before = performance.now();
    const tick = (now) => {
      if (!this.playing) return;
      this.t = Math.min(this.longest, this.t + (now - before) * Number(this.ids.speed.value));
      before = now;
      this.show();
      if (this.t >= this.longest) this.pause(); else requestAnimationFrame(tick);
    };
    return requestAnimationFrame(tick);
  }

  pause() {
    this.playing = false;
    this.playSign("Play", "M5 3v14l12-7z");
  }

  playSign(name, path) {
    this.ids.play.setAttribute("aria-label", name);
    this.ids["play-icon"].setAttribute("d", path);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, input[type=range], summary")) return;
    const typed = event.target.matches("button, input"); // a button takes space and enter itself
    const acts = { ArrowRight: () => this.forward(), ArrowLeft: () => this.back(), Home: () => this.seek(0), End: () => this.seek(this.longest) };
    if (!typed) acts[" "] = () => this.toggle();
    if (this.quiz.step && /^[0-9]$/.test(event.key) && Number(event.key) <= this.quiz.levels) acts[event.key] = () => this.quiz.answer(Number(event.key));
    if (!acts[event.key]) return;
    event.preventDefault();
    acts[event.key]();
  }
}

const DRAFTING = ["k", "policy", "drafter", "controller", "tree"]; // settings that say nothing of a plain lane

// One line of what was run, and on what.
function factsOf(lane) {
  const { commit, cpu, threads, dtype, device_name: device } = lane.environment;
  const settings = Object.entries(lane.settings).filter(([name]) => lane.draft !== null || !DRAFTING.includes(name)).map(([name, value]) => `${name} ${value}`).join(", ");
  const words = `phase ${lane.phase}, ${settings}; ${dtype}, ${threads} ${plural(threads, "thread")}, ${device ?? cpu}; commit ${(commit ?? "unknown").slice(0, 10)}; ended by ${lane.finish}`;
  return el("p", {}, `${lane.name}: `, el("span", { "data-text": "" }, words), ". The clock leaves out the time in which the run was recorded.");
}

const player = new Player(JSON.parse(document.getElementById("data").textContent));
