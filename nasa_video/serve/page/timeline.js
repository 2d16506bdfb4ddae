// Which chunk had which prompt and negatives: a strip to scale, and a list.

const MAX_ROWS = 40;
const COLOURS = 8;

export class TimelineView {
  // `describe`: a method's spelling for people.
  constructor(strip, playhead, list, describe) {
    Object.assign(this, { strip, playhead, list, describe });
    this.clear(1);
  }

  clear(fps) {
    this.fps = fps;
    this.segments = [];
    this.frames = 0;
    this.current = null;
    this.list.replaceChildren();
    this.strip.replaceChildren(this.playhead);
    this.playhead.hidden = true;
  }

  add(chunk) {
    this.frames = chunk.first_frame + chunk.frames;
    const shows = JSON.stringify([chunk.prompt, chunk.negatives, chunk.guidance, chunk.on_change]);
    let segment = this.segments.at(-1);
    if (!segment || segment.shows !== shows) {
      segment = { shows, chunk, start: chunk.first_frame, firstIndex: chunk.index };
      this.segments.push(segment);
      this.draw(segment);
      while (this.segments.length > MAX_ROWS) {
        const old = this.segments.shift();
        old.row.remove();
        old.bar.remove();
      }
    }
    segment.end = this.frames;
    segment.lastIndex = chunk.index;
    segment.bar.style.flexGrow = segment.end - segment.start;
    const span = `${(segment.start / this.fps).toFixed(1)} – ${(segment.end / this.fps).toFixed(1)} s`;
    const chunks = segment.firstIndex === segment.lastIndex ? `chunk ${chunk.index}` : `chunks ${segment.firstIndex}–${chunk.index}`;
    segment.when.textContent = `${span} · ${chunks}`;
  }

  draw(segment) {
    const { chunk } = segment;
    const colour = `colour-${(this.segments.length + chunk.index) % COLOURS}`;
    segment.bar = element("b", colour);
    this.strip.insertBefore(segment.bar, this.playhead);
    segment.when = element("span", "when");
    const terms = chunk.negatives.map((term) => {
      const weight = term.weight === 1 ? "" : ` × ${term.weight}`;
      return element("span", "term", term.text + weight);
    });
    const how = this.describe(chunk.guidance);
    const what = element("span", "what", chunk.prompt);
    segment.row = element("li", colour);
    segment.row.append(segment.when, what, ...terms);
    if (terms.length) segment.row.append(Object.assign(element("span", "how", how), { title: chunk.guidance }));
    this.list.prepend(segment.row);
  }

  // Marks what is shown now.
  show(frame) {
    if (!this.segments.length) return;
    const first = this.segments[0].start;
    this.playhead.hidden = false;
    this.playhead.style.left = `${(100 * (frame - first + 1)) / Math.max(1, this.frames - first)}%`;
    const segment = this.segments.findLast((one) => one.start <= frame);
    if (segment === this.current) return;
    this.current?.row.removeAttribute("aria-current");
    segment?.row.setAttribute("aria-current", "true");
    this.current = segment;
  }
}

export function element(name, classes, text = "") {
  const made = document.createElement(name);
  made.className = classes;
  made.textContent = text;
  return made;
}
