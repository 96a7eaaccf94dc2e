// The page: conversations with the server's models over its route /v1/chat/completions.
import { make, markdown } from "/page/markdown.js";
import { drawn, jsonOf, marksOf, tree } from "/page/marks.js";
import * as store from "/page/store.js";

const $ = (id) => document.getElementById(id);
const fields = $("settings").querySelector("form").elements;
const LARGEST = 22 << 20; // bytes of a file; base64 makes it a third longer, and the server accepts 32 MiB
let current = fresh();
let pending = []; // images and videos of the next message
let running = null; // an AbortController while an answer is streamed

function fresh() {
  return { id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, title: "", turns: [] };
}

function say(text) {
  $("status").textContent = text;
}

async function call(path, options = {}) {
  const headers = { ...options.headers, ...(store.key() ? { Authorization: `Bearer ${store.key()}` } : {}) };
  const reply = await fetch(path, { ...options, headers });
  if (reply.ok) return reply;
  const told = await reply.json().catch(() => null);
  if (reply.status === 401) {
    $("settings").showModal();
    fields.key.focus();
  }
  throw new Error(told?.error?.message ?? `The server answered with status ${reply.status}.`);
}

// -- rendering

function pictures(media) {
  return make("div", { className: "pictures" }, ...media.map((one) => one.kind === "video"
    ? make("video", { src: one.url, controls: true })
    : make("img", { src: one.url, alt: one.name })));
}

function body(turn, index) {
  const parts = [];
  if (turn.media?.length) parts.push(pictures(turn.media));
  if (turn.reasoning) {
    const open = running !== null && !turn.text && index === current.turns.length - 1;
    parts.push(make("details", { open }, make("summary", {}, "Reasoning"), make("div", { className: "reasoning" }, turn.reasoning)));
  }
  const value = turn.role === "assistant" ? jsonOf(turn.text) : undefined;
  if (turn.role === "user") parts.push(...turn.text.split("\n").flatMap((line, place) => (place ? [make("br"), line] : [line])));
  else if (value !== undefined && typeof value === "object" && value !== null) {
    const marks = marksOf(value);
    const shown = current.turns.slice(0, index).flatMap((one) => one.media ?? []).filter((one) => one.kind === "image");
    if (marks.length && shown.length) parts.push(...onPicture(shown, marks));
    const raw = make("details", {}, make("summary", {}, "Raw text"), make("pre", { tabIndex: 0 }, turn.text));
    parts.push(make("div", { className: "tree" }, tree(value)), raw);
  } else parts.push(make("div", { className: "text" }, markdown(turn.text)));
  if (turn.error) parts.push(make("p", { className: "error" }, turn.error));
  return parts;
}

function onPicture(shown, marks) {
  const place = make("div", {}, drawn(shown.at(-1).url, marks));
  if (shown.length === 1) return [place];
  const pick = make("select", {}, ...shown.map((one, index) => make("option", { value: index }, `${index + 1}: ${one.name}`)));
  pick.value = shown.length - 1;
  pick.onchange = () => place.replaceChildren(drawn(shown[pick.value].url, marks));
  return [make("label", {}, "Drawn on image ", pick), place];
}

function button(text, action) {
  return make("button", { type: "button", onclick: action }, text);
}

function article(turn, index) {
  const mine = turn.role === "user";
  const tools = make("div", { className: "tools" });
  if (mine) tools.append(button("Edit", () => edit(index)));
  else {
    if (turn.told) tools.append(make("span", {}, turn.told));
    tools.append(button("Copy", () => navigator.clipboard?.writeText(turn.text).then(() => say("Copied."))));
    if (index === current.turns.length - 1) tools.append(button("Regenerate", () => again(index)));
    tools.append(button("Branch", () => branch(index)));
  }
  const made = make("article", { className: turn.role }, make("h2", {}, mine ? "You" : turn.model || "Answer"), ...body(turn, index));
  if (!running || mine) made.append(tools);
  return made;
}

function show() {
  const empty = make("p", { className: "empty" }, "Type a message. Images, videos and PDFs can be dropped here.");
  $("log").replaceChildren(...(current.turns.length ? current.turns.map(article) : [empty]));
  $("log").scrollTop = $("log").scrollHeight;
}

function showLast() {
  const log = $("log");
  const low = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  const index = current.turns.length - 1;
  log.lastElementChild.replaceWith(article(current.turns[index], index));
  if (low) log.scrollTop = log.scrollHeight; // scrolls only if the end was visible
}

async function list() {
  const found = await store.all();
  $("list").replaceChildren(...found.map((one) => {
    const open = button(one.title || "Untitled", () => use(one));
    if (one.id === current.id) open.setAttribute("aria-current", "true");
    const away = button("×", async () => {
      await store.forget(one.id);
      if (one.id === current.id) use(fresh());
      else list();
    });
    away.setAttribute("aria-label", `Delete ${one.title || "Untitled"}`);
    return make("li", {}, open, away);
  }));
}

function use(conversation) {
  running?.abort();
  current = conversation;
  $("side").classList.remove("open");
  $("menu").setAttribute("aria-expanded", "false");
  show();
  list();
  $("question").focus();
}

// -- requests

function content(turn) {
  if (!turn.media?.length) return turn.text;
  const parts = turn.media.map((one) => ({ type: `${one.kind}_url`, [`${one.kind}_url`]: { url: one.url } }));
  return [...parts, { type: "text", text: turn.text }];
}

function request() {
  const body = { model: $("model").value, stream: true, stream_options: { include_usage: true } };
  const turns = current.turns.slice(0, -1).filter((turn) => turn.text || turn.media?.length);
  body.messages = turns.map((turn) => ({ role: turn.role, content: content(turn) }));
  if (fields.system.value.trim()) body.messages.unshift({ role: "system", content: fields.system.value });
  for (const name of ["temperature", "top_p", "seed", "max_tokens", "max_pixels"]) {
    if (fields[name].value !== "") body[name] = Number(fields[name].value);
  }
  if (fields.schema.value.trim()) {
    body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(fields.schema.value) } };
  }
  if (!fields.think.checked) body.reasoning_effort = "none";
  return body;
}

async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (held + value).split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function answer() {
  const turn = { role: "assistant", text: "", reasoning: "", model: $("model").value };
  current.turns.push(turn);
  const conversation = current;
  running = new AbortController();
  const mine = running;
  $("stop").hidden = false;
  $("send").disabled = true;
  say("Processing the prompt …");
  show();
  const began = performance.now();
  let first = 0, drawing = false, reason = "", end = "Answered.";
  const draw = () => {
    drawing = false;
    if (current === conversation && running === mine) showLast();
  };
  try {
    const asked = JSON.stringify(request());
    const reply = await call("/v1/chat/completions", { method: "POST", headers: { "Content-Type": "application/json" }, body: asked, signal: mine.signal });
    for await (const event of events(reply)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (choice?.delta.content || choice?.delta.reasoning_content) {
        if (!first) say("Answering …");
        first ||= performance.now();
        turn.text += choice.delta.content ?? "";
        turn.reasoning += choice.delta.reasoning_content ?? "";
        if (!drawing) requestAnimationFrame(draw);
        drawing = true;
      }
      reason = choice?.finish_reason ?? reason;
      if (event.usage) turn.told = told(event.usage, first - began, performance.now() - first);
    }
    if (reason === "length") turn.told += " · cut off at the limit of tokens";
  } catch (error) {
    end = "Stopped.";
    if (error.name !== "AbortError") {
      turn.error = error.message;
      end = "The request failed.";
    }
  } finally {
    if (running === mine) running = null;
    $("stop").hidden = running === null;
    $("send").disabled = running !== null;
    const tell = (text) => { if (current === conversation && running === null) say(text); };
    if (current === conversation) show();
    tell(end);
    // told before it is saved, because a browser's storage may take long or never answer
    store.keep(conversation).then(list, (error) => tell(`${end} The conversation could not be saved: ${error}`));
  }
}

function told(usage, wait, time) {
  const rate = usage.completion_tokens > 1 && time > 0 ? ` · ${((usage.completion_tokens - 1) / time * 1000).toFixed(1)} tokens/s` : "";
  return `${usage.prompt_tokens} + ${usage.completion_tokens} tokens · first token after ${(wait / 1000).toFixed(2)} s${rate}`;
}

function send() {
  const text = $("question").value.trim();
  if (running || (!text && !pending.length)) return;
  current.turns.push({ role: "user", text, media: pending });
  current.title ||= text.slice(0, 60) || pending[0].name;
  pending = [];
  $("question").value = "";
  showPending();
  answer();
}

function again(index) {
  if (running) return;
  current.turns.length = index;
  answer();
}

// An edit begins a new conversation, so that the old one is kept.
function branch(index) {
  use({ ...fresh(), title: current.title, turns: structuredClone(current.turns.slice(0, index + 1)) });
  store.keep(current).then(list);
}

function edit(index) {
  if (running) return;
  const turn = current.turns[index];
  const turns = structuredClone(current.turns.slice(0, index));
  use({ ...fresh(), title: current.title, turns });
  $("question").value = turn.text;
  pending = [...(turn.media ?? [])];
  showPending();
}

// -- images, videos and PDFs

function showPending() {
  $("media").replaceChildren(...pending.map((one, index) => {
    const away = button("×", () => { pending.splice(index, 1); showPending(); });
    away.setAttribute("aria-label", `Remove ${one.name}`);
    return make("li", {}, ...(one.kind === "image" ? [make("img", { src: one.url, alt: "" })] : []), one.name, away);
  }));
}

function dataUri(file) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(file);
  });
}

async function take(files) {
  for (const file of files) {
    try {
      if (file.size > LARGEST) throw new Error(`it has ${(file.size / 2 ** 20).toFixed(0)} MiB; the limit is 22 MiB`);
      if (file.type === "application/pdf") {
        say(`Rendering the pages of ${file.name} …`);
        const reply = await call("/pdf", { method: "POST", headers: { "Content-Type": "application/pdf" }, body: file });
        const { pages } = await reply.json();
        pages.forEach((url, index) => pending.push({ kind: "image", url, name: `${file.name}, page ${index + 1}` }));
      } else if (/^(image|video)\//.test(file.type)) {
        pending.push({ kind: file.type.slice(0, 5), url: await dataUri(file), name: file.name || "pasted" });
      } else throw new Error("it is not an image, video or PDF");
      say("");
    } catch (error) {
      say(`${file.name || "The pasted file"} was not added: ${error.message}.`);
    }
  }
  showPending();
}

$("files").onchange = (event) => take([...event.target.files]).then(() => { event.target.value = ""; });
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) {
    event.preventDefault();
    take([...event.clipboardData.files]);
  }
});
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    $("ask").classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") take([...event.dataTransfer.files]);
  });
}

// -- controls and settings

$("ask").onsubmit = (event) => { event.preventDefault(); send(); };
$("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
};
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !$("settings").open) running?.abort(); });
$("stop").onclick = () => running?.abort();
$("new").onclick = () => use(fresh());
$("menu").onclick = () => $("menu").setAttribute("aria-expanded", String($("side").classList.toggle("open")));
$("options").onclick = () => $("settings").showModal();
$("settings").onclose = () => {
  const chosen = {};
  for (const field of fields) if (field.name) chosen[field.name] = field.type === "checkbox" ? field.checked : field.value;
  store.keepSettings(chosen);
  models();
};

async function models() {
  try {
    const { data } = await (await call("/v1/models")).json();
    const before = $("model").value;
    const fitting = data.filter((one) => one.task === "generate");
    $("model").replaceChildren(...fitting.map((one) => make("option", { value: one.id }, one.id)));
    if (fitting.some((one) => one.id === before)) $("model").value = before;
    say(fitting.length ? "" : "This server has no model that generates text.");
  } catch (error) {
    say(error.message);
  }
}

for (const [name, value] of Object.entries({ ...store.settings(), key: store.key() })) {
  if (fields[name]) fields[name][typeof value === "boolean" ? "checked" : "value"] = value;
}
show();
models();
list();
