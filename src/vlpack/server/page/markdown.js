// Renders Markdown as elements. Text is never parsed as HTML: nodes are made by createElement, texts are text nodes.

const INLINE = /(`+)([\s\S]*?[^`])\1(?!`)|\*\*([^\s*](?:[\s\S]*?[^\s*])?)\*\*|\*([^\s*](?:[^*]*?[^\s*])?)\*|\[([^\]\n]+)\]\(([^()\s]+)\)|(https?:\/\/[^\s<>()]+[^\s<>().,;:!?'"])/;

export function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

function link(text, address) {
  // only web and mail links: a "javascript:" address would run in this page
  if (!/^(https?:\/\/|mailto:)/i.test(address)) return document.createTextNode(text);
  return make("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, text);
}

function inline(text) {
  const nodes = [];
  for (let found; (found = INLINE.exec(text)); text = text.slice(found.index + found[0].length)) {
    if (found.index) nodes.push(text.slice(0, found.index));
    if (found[2] !== undefined) nodes.push(make("code", {}, found[2]));
    else if (found[3] !== undefined) nodes.push(make("strong", {}, ...inline(found[3])));
    else if (found[4] !== undefined) nodes.push(make("em", {}, ...inline(found[4])));
    else if (found[5] !== undefined) nodes.push(link(found[5], found[6]));
    else nodes.push(link(found[7], found[7]));
  }
  if (text) nodes.push(text);
  return nodes;
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
const isRule = (line) => line !== undefined && line.includes("-") && /^[\s|:-]+$/.test(line) && line.includes("|");
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;

function list(lines, start) {
  const [, indent, mark] = ITEM.exec(lines[start]);
  const ordered = /\d/.test(mark);
  const element = make(ordered ? "ol" : "ul", ordered ? { start: parseInt(mark, 10) } : {});
  let place = start;
  while (place < lines.length) {
    const found = ITEM.exec(lines[place]);
    if (!found || found[1].length < indent.length || (found[1].length === indent.length && /\d/.test(found[2]) !== ordered)) break;
    const item = make("li", {}, ...inline(found[3]));
    place += 1;
    while (place < lines.length) {
      const next = ITEM.exec(lines[place]);
      if (next && next[1].length > indent.length) {
        const [inner, end] = list(lines, place);
        item.append(inner);
        place = end;
      } else if (!next && lines[place].trim() && /^\s+/.test(lines[place])) {
        item.append(" ", ...inline(lines[place].trim()));
        place += 1;
      } else break;
    }
    element.append(item);
  }
  return [element, place];
}

function table(lines, start) {
  const head = make("tr", {}, ...cells(lines[start]).map((cell) => make("th", { scope: "col" }, ...inline(cell))));
  const body = make("tbody");
  let place = start + 2;
  for (; place < lines.length && lines[place].includes("|"); place += 1) {
    body.append(make("tr", {}, ...cells(lines[place]).map((cell) => make("td", {}, ...inline(cell)))));
  }
  return [make("div", { className: "table" }, make("table", {}, make("thead", {}, head), body)), place];
}

function begins(lines, place) {
  const line = lines[place];
  return !line.trim() || /^(#{1,6}\s|```|~~~|>)/.test(line) || ITEM.test(line) || (line.includes("|") && isRule(lines[place + 1]));
}

export function markdown(text) {
  const made = document.createDocumentFragment();
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  for (let place = 0; place < lines.length; ) {
    const line = lines[place];
    const fence = /^\s*(```+|~~~+)\s*([\w+-]*)/.exec(line);
    const heading = /^(#{1,6})\s+(.*)$/.exec(line);
    if (!line.trim()) place += 1;
    else if (fence) {
      let end = place + 1;
      while (end < lines.length && !lines[end].trim().startsWith(fence[1])) end += 1;
      made.append(make("pre", { tabIndex: 0 }, make("code", {}, lines.slice(place + 1, end).join("\n"))));
      place = end + 1;
    } else if (heading) {
      made.append(make(`h${Math.min(heading[1].length + 2, 5)}`, {}, ...inline(heading[2])));
      place += 1;
    } else if (/^(\s*[-*_]){3,}\s*$/.test(line)) {
      made.append(make("hr"));
      place += 1;
    } else if (line.startsWith(">")) {
      let end = place;
      while (end < lines.length && lines[end].startsWith(">")) end += 1;
      made.append(make("blockquote", {}, markdown(lines.slice(place, end).map((one) => one.replace(/^> ?/, "")).join("\n"))));
      place = end;
    } else if (ITEM.test(line)) {
      const [element, end] = list(lines, place);
      made.append(element);
      place = end;
    } else if (line.includes("|") && isRule(lines[place + 1])) {
      const [element, end] = table(lines, place);
      made.append(element);
      place = end;
    } else {
      let end = place + 1;
      while (end < lines.length && !begins(lines, end)) end += 1;
      const paragraph = make("p");
      lines.slice(place, end).forEach((one, index) => paragraph.append(...(index ? [make("br")] : []), ...inline(one)));
      made.append(paragraph);
      place = end;
    }
  }
  return made;
}
