"use strict";
// The recording as objects, and the numbers that are computed from it. Nothing here touches the page.

const FIELDS = ["round", "start", "duration", "draft", "verify", "accept", "kv", "prefill", "position", "window",
  "kept", "cacheBefore", "cacheAfter", "k", "comparison", "proposed", "path", "next", "emitted",
  "counted", "top", "residual"];

function readStep(values, strings, before) {
  const step = Object.fromEntries(FIELDS.map((name, i) => [name, values[i]]));
  step.end = step.start + step.duration;
  step.prefill ??= 0;
  step.other = Math.max(0, step.duration - step.draft - step.prefill - step.verify - step.accept - step.kv);
  step.cells = step.position - step.window + step.proposed.length; // positions that the target sees, its draft included
  step.jumped = before !== null && step.window !== before.window;
  step.proposed = step.proposed.map(([text, parent, q, p, accepted, u]) => ({
    text: strings[text], parent, q, p, tried: accepted !== undefined, accepted: accepted === 1, u: u ?? null,
  }));
  for (const node of step.proposed) {
    node.depth = node.parent < 0 ? 1 : step.proposed[node.parent].depth + 1;
    node.chance = chance(node, step.comparison);
  }
  const [text, origin, prob] = step.next;
  const kind = origin === "bonus" ? "bonus" : step.proposed.length ? "corrected" : "plain";
  step.next = { text: strings[text], kind, prob, origin };
  step.tokens = step.path.map((node) => ({ text: step.proposed[node].text, kind: "accepted", prob: step.proposed[node].p }));
  step.tokens = [...step.tokens, step.next].slice(0, step.emitted);
  step.accepted = Math.min(step.path.length, step.emitted);
  // Levels of the draft that count: those past the end of the text do not.
  const levels = Math.max(0, ...step.proposed.map((node) => node.depth));
  step.depth = levels && step.emitted <= step.path.length ? step.emitted : levels;
  step.top = step.top.map(([id, p]) => ({ text: strings[id], p }));
  if (step.residual) {
    const [mass, top] = step.residual;
    step.residual = { mass, top: top.map(([id, p, q]) => ({ text: strings[id], p, q, prob: residual(p, q, mass) })) };
  }
  return step;
}

// The chance that a draft token is accepted; p of the target, q of the draft.
function chance(node, comparison) {
  if (comparison === "own_draw") return node.p;
  if (comparison === "threshold") return node.accepted ? 1 : 0;
  return Math.min(1, node.p / node.q);
}

function residual(p, q, mass) {
  return mass > 0 ? Math.max(0, p - q) / mass : p;
}

function readLane(raw) {
  const lane = { ...raw, steps: [] };
  for (const values of raw.steps) lane.steps.push(readStep(values, raw.strings, lane.steps.at(-1) ?? null));
  lane.prompt = raw.prompt.map((id) => raw.strings[id]);
  lane.total = lane.steps.at(-1).end;
  lane.drafted = lane.steps.some((step) => step.proposed.length > 0);
  lane.name = lane.drafted ? "Speculative" : "Plain";
  let tokens = 0, accepted = 0, proposed = 0;
  for (const step of lane.steps) {
    step.first = tokens;
    tokens += step.emitted;
    accepted += step.accepted;
    proposed += step.counted;
    Object.assign(step, { tokensSoFar: tokens, acceptedSoFar: accepted, proposedSoFar: proposed });
  }
  lane.count = tokens;
  return lane;
}

// How many steps of a lane have ended at time t.
function stepsAt(lane, t) {
  let low = 0, high = lane.steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (lane.steps[middle].end <= t + 1e-9) low = middle + 1; else high = middle;
  }
  return low;
}

// Whether a draft is a tree and not a chain.
function branches(step) {
  return step.proposed.some((node, i) => node.parent !== i - 1);
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b), half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}

// The costs and acceptances of two lanes, from which the speed-up at other K and other costs is computed, as by --explain.
function costsOf(lanes) {
  const lane = lanes.find((each) => each.drafted), plain = lanes.find((each) => !each.drafted);
  if (!lane) return null;
  const drafted = lane.steps.filter((step) => step.depth > 0);
  const later = drafted.filter((step) => step !== lane.steps[0] && !step.jumped);
  const timed = later.length ? later : drafted;
  const k = Math.max(...drafted.map((step) => step.depth));
  const shares = [];
  for (let j = 1; j <= k; j++) {
    const tried = drafted.filter((step) => step.depth >= j);
    shares.push(tried.filter((step) => step.accepted >= j).length / tried.length);
  }
  const verify = median(timed.map((step) => step.verify));
  const plainSteps = plain ? plain.steps.filter((step, i) => i > 0 && !step.jumped) : [];
  const step = plainSteps.length ? median(plainSteps.map((each) => each.duration)) : verify;
  return {
    shares, k, verify, plain: step, unit: lane.steps.some(branches) ? "level" : "token", measuredPlain: plainSteps.length > 0,
    rest: median(timed.map((each) => each.duration - each.draft - each.prefill - each.verify)),
    draft: median(timed.map((each) => each.draft / each.depth)),
  };
}

function tokensPerStep(costs, k) {
  return 1 + costs.shares.slice(0, k).reduce((sum, share) => sum + share, 0);
}

// cost: of a draft token, in plain steps.
function computedStep(costs, k, cost) {
  return (k * cost * costs.plain + costs.verify + costs.rest) / costs.plain;
}

function computedSpeedup(costs, k, cost) {
  return tokensPerStep(costs, k) / computedStep(costs, k, cost);
}
