// What the person has set: prompt, negatives as chips with weights, method with its settings, seed, model.

import { element } from "./timeline.js";

const KEY = "nasa-video";
const SUGGESTED = ["blue", "red", "blurry", "snow", "striped background", "border", "watermark", "noisy"];
const $ = (id) => document.getElementById(id);

// "nasa-centred:0.5,limit=0.3" in its parts.
function parseSpelling(spelling) {
  const [head, ...settings] = spelling.split(",");
  const [name, scale] = head.split(":");
  return { name, scale: scale ? Number(scale) : null, settings: Object.fromEntries(settings.map((one) => one.split("="))) };
}

// A setting's value as a spelling has it.
function spelled(value) {
  if (value === null || value?.length === 0) return "none";
  if (typeof value === "boolean") return value ? "yes" : "no";
  return Array.isArray(value) ? value.join("/") : String(value);
}

export class Form {
  // `changed` is called with what a running stream can take over; `restart` when only a new start can; `complain` with
  // what is wrong.
  constructor(changed, restart, complain) {
    Object.assign(this, { changed, restart, complain });
    this.negatives = [];
    this.models = [];
    this.methods = [];
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
      const text = $("negative").value;
      const open = text.split('"').length % 2 === 0 || text.lastIndexOf("(") > text.lastIndexOf(")");
      if (event.key === "Enter" || (event.key === "," && !open)) {
        event.preventDefault();
        this.add(text);
      } else if (event.key === "Backspace" && !$("negative").value && this.negatives.length) {
        this.negatives.pop();
        this.negativesChanged();
      }
    });
    $("negative").addEventListener("blur", () => this.add($("negative").value));
    $("guidance").addEventListener("change", () => {
      this.showGuidance($("guidance").value);
      this.tell({ guidance: this.guidance });
    });
    $("settings").addEventListener("change", () => this.tell({ guidance: this.guidance }));
    $("scale").addEventListener("input", () => {
      $("scale-value").textContent = Number($("scale").value);
      clearTimeout(this.sliding);
      this.sliding = setTimeout(() => this.tell({ guidance: this.guidance }), 120);
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

  // The one spelling of method, scale and settings.
  get guidance() {
    const name = $("guidance").value;
    if (name === "none") return name;
    const own = parseSpelling(this.model()?.methods[name] ?? name).settings;
    const settings = this.method(name).settings.slice(1).flatMap((setting) => {
      const control = $(`setting-${setting.name}`);
      const value = control.type === "checkbox" ? spelled(control.checked) : control.value || "none";
      return setting.name in own || value !== spelled(setting.default) ? [`,${setting.name}=${value}`] : [];
    });
    return `${name}:${Number($("scale").value)}${settings.join("")}`;
  }

  start() {
    return {
      type: "start",
      prompt: $("prompt").value,
      negatives: this.negatives,
      guidance: this.guidance,
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
    if ("guidance" in change) this.showGuidance(now.guidance);
    this.drawChips();
    this.store();
  }

  // The server reads the text: what "--neg" takes is what this field takes.
  async add(text) {
    $("negative").value = "";
    if (!text.trim()) return;
    const answer = await fetch(`v1/terms?${new URLSearchParams({ text })}`).catch(() => null);
    if (!answer?.ok) {
      $("negative").value ||= text;
      this.complain((await answer?.json())?.detail ?? "the connection is lost");
      return;
    }
    const known = new Set(this.negatives.map((term) => term.text));
    const terms = (await answer.json()).filter((term) => !known.has(term.text));
    if (!terms.length) return;
    this.negatives = [...this.negatives, ...terms].slice(0, this.maxNegatives);
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
    const used = this.negatives.map((term) => term.text);
    const known = SUGGESTED.filter((text) => this.model()?.words?.includes(text) && !used.includes(text));
    $("suggestions").replaceChildren(
      ...known.slice(0, 6).map((text) => {
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

  method(name) {
    return this.methods.find((method) => method.name === name) ?? { label: name, settings: [] };
  }

  // A spelling for people: the method's label and its scale.
  describe(spelling) {
    const { name, scale } = parseSpelling(spelling);
    return name === "none" ? "unguided" : `${this.method(name).label} ${Number(scale.toFixed(2))}`;
  }

  setModels(models, methods) {
    this.models = models;
    this.methods = methods;
    const names = [...methods.map((method) => new Option(method.label, method.name)), new Option("none", "none")];
    const chosen = $("guidance").value;
    $("guidance").replaceChildren(...names);
    $("guidance").value = chosen || "none";
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
    $("on-change").value = this.stored?.on_change ?? this.model()?.on_change ?? "keep";
    this.showGuidance(this.stored?.guidance ?? this.model()?.guidance ?? "none");
    this.stored = null;
    this.drawChips();
  }

  // Each method has a scale, a range and settings of its own; what the spelling leaves open is the model's.
  showGuidance(spelling) {
    const given = parseSpelling(spelling);
    const { name } = given;
    const own = parseSpelling(this.model()?.methods[name] ?? name);
    const [scale, ...settings] = this.method(name).settings;
    $("guidance").value = name;
    const slider = $("scale");
    slider.disabled = name === "none";
    slider.min = scale?.low ?? 0;
    slider.max = Math.max(3, 2 * own.scale, given.scale);
    slider.value = given.scale ?? own.scale ?? 0;
    $("scale-value").textContent = name === "none" ? "–" : Number(slider.value);
    const values = { ...own.settings, ...given.settings };
    $("settings").replaceChildren(...settings.map((setting) => this.control(setting, values[setting.name])));
  }

  // One labelled control of a method's setting.
  control(setting, value = spelled(setting.default)) {
    const label = element("label", "setting", setting.name);
    const input = element("input", "");
    label.title = setting.help;
    input.id = `setting-${setting.name}`;
    if (typeof setting.default === "boolean") {
      Object.assign(input, { type: "checkbox", checked: value === "yes" });
    } else if (Array.isArray(setting.default)) {
      Object.assign(input, { type: "text", placeholder: "none, or 1/0.5/0", value: value === "none" ? "" : value });
    } else {
      const { low: min, high: max } = setting;
      Object.assign(input, { type: "number", min, max, step: "any", placeholder: "none", value: value === "none" ? "" : value });
      input.required = !setting.optional;
    }
    label.append(input);
    return label;
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
    if (!this.stored) return;
    const { guidance, scale } = this.stored; // Older pages kept them apart.
    if (typeof scale === "number" && guidance !== "none") this.stored.guidance = `${guidance}:${scale}`;
    const older = { recompute: "recache", remake: "regenerate" };
    this.stored.on_change = older[this.stored.on_change] ?? this.stored.on_change;
    this.fill(this.stored);
  }

  fill(values) {
    $("prompt").value = values.prompt;
    this.negatives = values.negatives;
    if (this.methods.length) this.showGuidance(values.guidance);
    if (values.on_change) $("on-change").value = values.on_change;
    $("compare").checked = values.compare;
    $("seed").value = values.seed;
    $("media").value = values.media ?? "";
  }
}
