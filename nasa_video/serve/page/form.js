// What the person has set: prompt, negatives as chips with weights, method and scale, seed, model.

import { element } from "./timeline.js";

const KEY = "nasa-video";
const SUGGESTED = ["blue", "red", "blurry", "snow", "striped background", "border", "watermark", "noisy"];
const $ = (id) => document.getElementById(id);

export class Form {
  // `changed` is called with what a running stream can take over; `restart` when only a new start can.
  constructor(changed, restart) {
    Object.assign(this, { changed, restart });
    this.negatives = [];
    this.models = [];
    this.maxNegatives = 16;
    this.pending = new Map(); // Changes that were sent and not answered yet, by their ids.
    this.holds = {}; // What the running stream shows, as far as it has answered.
    this.nextId = 0;
    this.restore();
    this.drawChips();
    this.listen();
  }

  listen() {
    $("prompt").addEventListener("input", () => {
      clearTimeout(this.typing);
      this.typing = setTimeout(() => $("prompt").value.trim() && this.tell({ prompt: $("prompt").value }), 600);
    });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        clearTimeout(this.typing);
        this.tell({ prompt: $("prompt").value });
        if (document.body.dataset.running !== "true") $("form").requestSubmit();
      }
    });
    $("negative").addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === ",") {
        event.preventDefault();
        this.add($("negative").value);
      } else if (event.key === "Backspace" && !$("negative").value && this.negatives.length) {
        this.negatives.pop();
        this.negativesChanged();
      }
    });
    $("negative").addEventListener("blur", () => this.add($("negative").value));
    $("guidance").addEventListener("change", () => {
      this.fitScale();
      this.tell({ guidance: $("guidance").value, scale: this.scale });
    });
    $("scale").addEventListener("input", () => {
      $("scale-value").textContent = Number($("scale").value);
      clearTimeout(this.sliding);
      this.sliding = setTimeout(() => this.tell({ scale: this.scale }), 120);
    });
    $("on-change").addEventListener("change", () => this.tell({ on_change: $("on-change").value }));
    $("dice").addEventListener("click", () => {
      $("seed").value = Math.floor(Math.random() * 1e6);
      this.restartNeeded();
    });
    for (const id of ["seed", "model", "compare", "media", "frames"]) {
      $(id).addEventListener("change", () => this.restartNeeded());
    }
    $("model").addEventListener("change", () => this.modelChanged());
  }

  get scale() {
    return $("guidance").value === "none" ? null : Number($("scale").value);
  }

  start() {
    return {
      type: "start",
      prompt: $("prompt").value,
      negatives: this.negatives,
      guidance: $("guidance").value,
      scale: this.scale,
      on_change: $("on-change").value,
      compare: $("compare").checked,
      seed: Number($("seed").value),
      model: $("model").value || null,
      frames: $("frames").value ? Number($("frames").value) : null,
    };
  }

  // A start has told everything: what was about to be told would be a change of nothing.
  started() {
    clearTimeout(this.typing);
    clearTimeout(this.sliding);
    this.pending.clear();
    this.holds = structuredClone(this.start());
  }

  // The id of a change that is sent now.
  sent(change) {
    this.pending.set(this.nextId, structuredClone(change));
    return this.nextId++;
  }

  accepted(id) {
    Object.assign(this.holds, this.pending.get(id));
    this.pending.delete(id);
  }

  // What was refused is taken back; what was typed since then stays.
  refused(id) {
    const change = this.pending.get(id);
    if (!change) return;
    this.pending.delete(id);
    const now = structuredClone(Object.assign({}, this.holds, ...this.pending.values()));
    if ("prompt" in change && $("prompt").value.trim() === change.prompt.trim()) $("prompt").value = now.prompt;
    if ("negatives" in change) this.negatives = now.negatives;
    if ("on_change" in change) $("on-change").value = now.on_change;
    if ("guidance" in change || "scale" in change) {
      $("guidance").value = now.guidance;
      this.fitScale(now.scale);
    }
    this.drawChips();
    this.store();
  }

  add(text) {
    $("negative").value = "";
    if (!text.trim() || this.negatives.some((term) => term.text === text.trim())) return;
    if (this.negatives.length >= this.maxNegatives) return;
    this.negatives.push({ text: text.trim(), weight: 1 });
    this.negativesChanged();
  }

  negativesChanged() {
    this.drawChips();
    this.tell({ negatives: this.negatives });
  }

  tell(change) {
    this.store();
    this.changed(change);
  }

  restartNeeded() {
    this.store();
    this.restart();
  }

  drawChips() {
    const chips = this.negatives.map((term, index) => this.chip(term, index));
    for (const old of $("chips").querySelectorAll(".chip")) old.remove();
    $("chips").prepend(...chips);
    const unused = SUGGESTED.filter((text) => !this.negatives.some((term) => term.text === text));
    const known = this.model()?.vocabulary === "sprites";
    $("suggestions").replaceChildren(
      ...(known ? unused.slice(0, 6) : []).map((text) => {
        const button = element("button", "suggestion", `+ ${text}`);
        button.type = "button";
        button.addEventListener("click", () => this.add(text));
        return button;
      }),
    );
  }

  chip(term, index) {
    const chip = element("span", "chip");
    const weight = element("input", "weight");
    Object.assign(weight, { type: "number", min: 0.1, max: 10, step: 0.1, value: term.weight });
    weight.setAttribute("aria-label", `Weight of ${term.text}`);
    weight.addEventListener("change", () => {
      const value = Number(weight.value);
      if (!(value > 0 && value <= 100)) {
        weight.value = term.weight;
        return;
      }
      term.weight = value;
      this.tell({ negatives: this.negatives });
    });
    const remove = element("button", "remove", "×");
    remove.type = "button";
    remove.setAttribute("aria-label", `Remove ${term.text}`);
    remove.addEventListener("click", () => {
      this.negatives.splice(index, 1);
      this.negativesChanged();
      $("negative").focus();
    });
    chip.append(element("span", "text", term.text), weight, remove);
    return chip;
  }

  model() {
    return this.models.find((model) => model.name === $("model").value);
  }

  setModels(models) {
    this.models = models;
    const before = $("model").value || this.stored?.model;
    $("model").replaceChildren(
      ...models.map((model) => {
        const option = new Option(model.offered ? model.name : `${model.name} (not offered here)`, model.name);
        option.disabled = !model.offered;
        option.title = model.title;
        return option;
      }),
    );
    const known = models.some((model) => model.offered && model.name === before);
    $("model").value = known ? before : models[0].name;
    if ($("model").value !== this.fitted) this.modelChanged(); // After a lost connection everything stays as it was.
  }

  modelChanged() {
    this.fitted = $("model").value;
    $("guidance").value = this.stored?.guidance ?? this.model()?.guidance ?? "nasa";
    $("on-change").value = this.stored?.on_change ?? this.model()?.on_change ?? "keep";
    this.fitScale(this.stored?.scale);
    this.drawChips();
  }

  // Each method has a scale and a range of its own.
  fitScale(wanted = null) {
    const method = $("guidance").value;
    const own = this.model()?.scales[method] ?? 1;
    const slider = $("scale");
    slider.disabled = method === "none";
    slider.min = method === "nag" || method === "cfg" ? 1 : 0;
    slider.max = Math.max(3, 2 * own);
    slider.value = wanted ?? own;
    $("scale-value").textContent = method === "none" ? "–" : Number(slider.value);
    this.stored = null;
  }

  store() {
    try {
      localStorage.setItem(KEY, JSON.stringify({ ...this.start(), media: $("media").value }));
    } catch {
      // Private windows may keep nothing; the page works without.
    }
  }

  restore() {
    try {
      this.stored = JSON.parse(localStorage.getItem(KEY));
    } catch {
      this.stored = null;
    }
    if (this.stored) this.fill(this.stored);
  }

  fill(values) {
    $("prompt").value = values.prompt;
    this.negatives = values.negatives;
    $("guidance").value = values.guidance;
    if (values.on_change) $("on-change").value = values.on_change;
    $("compare").checked = values.compare;
    $("seed").value = values.seed;
    $("media").value = values.media ?? "";
  }
}
