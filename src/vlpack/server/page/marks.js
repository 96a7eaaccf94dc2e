// Draws the boxes and points of an answer on an image, and shows JSON as a tree.
// Qwen3-VL writes {"bbox_2d": [x1, y1, x2, y2], "label": …} and {"point_2d": [x, y], …}, from 0 to 1000 on both axes.
import { make } from "/page/markdown.js";

const HUES = ["#c2255c", "#1864ab", "#2b8a3e", "#a3540a", "#5f3dc4", "#0b7285", "#846358", "#495057"];

// The JSON value of an answer: its whole text, or a block of code in it; undefined if there is none.
export function jsonOf(text) {
  const fence = /```(?:json)?\s*\n([\s\S]*?)```/.exec(text);
  for (const candidate of [text, fence && fence[1]]) {
    if (!candidate || !/^\s*[[{]/.test(candidate)) continue;
    try {
      return JSON.parse(candidate);
    } catch {
      continue;
    }
  }
  return undefined;
}

const numbers = (value, count) => Array.isArray(value) && value.length === count && value.every(Number.isFinite);

// All boxes and points at any depth of a JSON value.
export function marksOf(value, found = []) {
  if (Array.isArray(value)) value.forEach((one) => marksOf(one, found));
  else if (value && typeof value === "object") {
    const label = [value.label, value.text_content, value.name].find((one) => typeof one === "string") ?? "";
    const boxes = numbers(value.bbox_2d, 4) ? [value.bbox_2d] : Array.isArray(value.bbox_2d) ? value.bbox_2d.filter((one) => numbers(one, 4)) : [];
    const points = numbers(value.point_2d, 2) ? [value.point_2d] : Array.isArray(value.point_2d) ? value.point_2d.filter((one) => numbers(one, 2)) : [];
    boxes.forEach((box) => found.push({ box, label }));
    points.forEach((point) => found.push({ point, label }));
    Object.entries(value).forEach(([key, one]) => key === "bbox_2d" || key === "point_2d" || marksOf(one, found));
  }
  return found;
}

const percent = (value) => `${Math.min(1000, Math.max(0, value)) / 10}%`;

export function drawn(address, marks) {
  const frame = make("div", { className: "drawn" }, make("img", { src: address, alt: `The image with ${marks.length} marks` }));
  const labels = [...new Set(marks.map((mark) => mark.label))];
  for (const mark of marks) {
    const shape = make("div", { className: mark.box ? "box" : "point" });
    shape.style.setProperty("--hue", HUES[labels.indexOf(mark.label) % HUES.length]);
    if (mark.box) {
      const [x1, y1, x2, y2] = mark.box;
      shape.style.left = percent(Math.min(x1, x2));
      shape.style.top = percent(Math.min(y1, y2));
      shape.style.width = percent(Math.abs(x2 - x1));
      shape.style.height = percent(Math.abs(y2 - y1));
      if (Math.min(y1, y2) < 60) shape.classList.add("low"); // its label has no room above it
    } else {
      shape.style.left = percent(mark.point[0]);
      shape.style.top = percent(mark.point[1]);
    }
    if (mark.label) shape.append(make("span", { className: "label" }, mark.label));
    frame.append(shape);
  }
  const told = marks.map((mark) => `${mark.label || "mark"}: ${(mark.box || mark.point).join(", ")}`).join("; ");
  return make("figure", {}, frame, make("figcaption", {}, told));
}

export function tree(value, key) {
  const name = key === undefined ? [] : [make("span", { className: "key" }, String(key)), ": "];
  if (value === null || typeof value !== "object") return make("div", { className: "leaf" }, ...name, JSON.stringify(value));
  const plain = Array.isArray(value) && value.length < 9 && value.every((one) => one === null || typeof one === "number");
  if (plain) return make("div", { className: "leaf" }, ...name, JSON.stringify(value).replaceAll(",", ", "));
  const entries = Object.entries(value);
  const kind = Array.isArray(value) ? `[${entries.length}]` : `{${entries.length}}`;
  const inside = entries.map(([one, item]) => tree(item, Array.isArray(value) ? Number(one) : one));
  return make("details", { open: true }, make("summary", {}, ...name, kind), ...inside);
}
