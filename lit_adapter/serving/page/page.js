"use strict";
// A conversation is a list of turns: what the user said, and the answer of each model that was asked.
// Texts of models and users reach the page as text nodes only, never as markup.

const $ = (id) => document.getElementById(id);
const KEPT = "lit-adapter-chat";
const FIELDS = ["system", "temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
let turns = [];
let running = [];

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function keep() {
  const settings = Object.fromEntries(FIELDS.map((name) => [name, $(name).value]));
  const said = turns.map((turn) => ({
    user: turn.user,
    answers: turn.answers.map(({ model, text, error, finish }) => ({ model, text, error, finish })),
  }));
  const models = { model: $("model").value, beside: $("beside").value };
  try {
    localStorage.setItem(KEPT, JSON.stringify({ turns: said, settings, ...models }));
  } catch {
    note("This browser keeps nothing: the conversation will be gone when the page is left.");
  }
}

function restore() {
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem(KEPT)) || {};
    turns = (kept.turns || []).map(({ user, answers }) => ({ user: String(user), answers: [...answers] }));
  } catch {
    turns = [];
  }
  for (const name of FIELDS) if (kept.settings && name in kept.settings) $(name).value = kept.settings[name];
  return kept;
}

function note(text) {
  $("note").textContent = text;
  $("note").hidden = !text;
}

function headers() {
  const key = sessionStorage.getItem("key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function loadModels(kept) {
  const wanted = { model: $("model").value || kept.model, beside: $("beside").value || kept.beside };
  let models;
  try {
    const reply = await fetch("/v1/models", { headers: headers() });
    const body = await reply.json();
    if (!reply.ok) {
      note(body.error.message);
      if (reply.status === 401) openSettings(true);
      return;
    }
    models = body.data;
  } catch {
    note("The server does not answer.");
    return;
  }
  note("");
  const options = () => models.map((m) => make("option", { value: m.id, textContent: m.parent ? m.id : `${m.id} (base)` }));
  $("model").replaceChildren(...options());
  $("beside").replaceChildren(make("option", { value: "", textContent: "none" }), ...options());
  const known = new Set(models.map((m) => m.id));
  const first = (models.find((m) => m.parent) || models[0]).id;
  $("model").value = known.has(wanted.model) ? wanted.model : first;
  $("beside").value = known.has(wanted.beside) ? wanted.beside : "";
}

// Answers of a column: those of its own model, or of the first one where a turn has one alone.
function history(number, column) {
  const messages = [];
  if ($("system").value.trim()) messages.push({ role: "system", content: $("system").value });
  for (const turn of turns.slice(0, number)) {
    const answer = turn.answers[column] || turn.answers[0];
    messages.push({ role: "user", content: turn.user });
    if (answer) messages.push({ role: "assistant", content: answer.text });
  }
  messages.push({ role: "user", content: turns[number].user });
  return messages;
}

function request(number, column) {
  const body = { model: turns[number].answers[column].model, messages: history(number, column), stream: true };
  for (const name of FIELDS.slice(1)) {
    const value = $(name).value.trim();
    if (value !== "") body[name] = Number(value);
  }
  return body;
}

async function* events(reader) {
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += decoder.decode(value, { stream: true });
    const lines = rest.split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function answer(number, column) {
  const own = turns[number].answers[column];
  const control = new AbortController();
  running.push(control);
  Object.assign(own, { text: "", error: "", finish: "" });
  try {
    const body = JSON.stringify(request(number, column));
    const reply = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), body, signal: control.signal });
    if (!reply.ok) {
      own.error = (await reply.json()).error.message;
      return;
    }
    for await (const event of events(reply.body.getReader())) {
      if (event.error) {
        own.error = event.error.message;
        return;
      }
      const choice = event.choices[0];
      if (!choice) continue;
      own.text += choice.delta.content || "";
      own.finish = choice.finish_reason || own.finish;
      show(own);
    }
    if (!own.finish) own.error = "The connection ended before the answer did.";
  } catch (error) {
    if (error.name === "AbortError") own.finish = "stopped";
    else own.error = "The server does not answer.";
  } finally {
    running = running.filter((other) => other !== control);
    show(own);
  }
}

async function ask(number, columns) {
  busy(true);
  await Promise.all(columns.map((column) => answer(number, column)));
  keep();
  busy(false);
  draw();
}

function say(text) {
  const models = [$("model").value, $("beside").value].filter(Boolean);
  turns.push({ user: text, answers: models.map((model) => ({ model, text: "" })) });
  draw();
  keep();
  ask(turns.length - 1, models.map((_, column) => column));
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("status").textContent = is ? "Answering." : "";
  for (const button of document.querySelectorAll(".tools button[data-asks]")) button.disabled = is;
}

function stop() {
  for (const control of running) control.abort();
}

const SAID = { length: "cut at its longest", stopped: "stopped" };

function show(own) {
  if (!own.shown) return;
  const chat = $("chat");
  const follows = chat.scrollHeight - chat.scrollTop - chat.clientHeight < 60;
  own.shown.text.textContent = own.error ? `${own.text}${own.text ? "\n" : ""}${own.error}` : own.text;
  own.shown.box.classList.toggle("failed", Boolean(own.error));
  own.shown.finish.textContent = SAID[own.finish] || "";
  if (follows) chat.scrollTop = chat.scrollHeight;
}

function button(text, label, action, asks) {
  const made = make("button", { type: "button", textContent: text });
  made.setAttribute("aria-label", label);
  if (asks) made.dataset.asks = "";
  made.addEventListener("click", action);
  return made;
}

async function copy(text, control) {
  try {
    await navigator.clipboard.writeText(text);
    control.textContent = "Copied";
  } catch {
    control.textContent = "Not allowed";
  }
  setTimeout(() => (control.textContent = "Copy"), 1500);
}

function drawAnswer(number, column) {
  const own = turns[number].answers[column];
  const text = make("div", { className: "text" });
  const finish = make("span");
  const copying = button("Copy", `Copy the answer of ${own.model}`, () => copy(own.text, copying));
  const again = button("Again", `Ask ${own.model} again`, () => {
    if (!running.length) {
      turns.length = number + 1;
      draw();
      ask(number, [column]);
    }
  }, true);
  const tools = make("div", { className: "tools" }, copying, again, finish);
  const box = make("article", { className: "answer" }, make("div", { className: "by", textContent: own.model }), text, tools);
  box.setAttribute("aria-label", `Answer of ${own.model}`);
  own.shown = { box, text, finish };
  show(own);
  return box;
}

function edit(number, box) {
  const field = make("textarea", { className: "edit", value: turns[number].user, rows: 3 });
  field.setAttribute("aria-label", "Edit the message");
  const send = button("Send", "Send the edited message", () => {
    if (running.length || !field.value.trim()) return;
    turns.length = number;
    say(field.value);
  }, true);
  box.replaceChildren(field, make("div", { className: "tools" }, send, button("Cancel", "Cancel the edit", draw)));
  field.focus();
}

function draw() {
  const drawn = turns.map((turn, number) => {
    const box = make("div", { className: "user" }, make("div", { className: "text", textContent: turn.user }));
    box.append(make("div", { className: "tools" }, button("Edit", "Edit this message", () => edit(number, box), true)));
    const answers = turn.answers.map((_, column) => drawAnswer(number, column));
    return [box, make("div", { className: `answers${answers.length > 1 ? " two" : ""}` }, ...answers)];
  });
  const empty = make("p", { className: "empty", textContent: "Nothing said yet. Choose a model and write a message." });
  $("chat").replaceChildren(...(turns.length ? drawn.flat() : [empty]));
  $("chat").scrollTop = $("chat").scrollHeight;
  for (const control of document.querySelectorAll(".tools button[data-asks]")) control.disabled = running.length > 0;
}

function openSettings(open) {
  $("settings").hidden = !open;
  $("open-settings").setAttribute("aria-expanded", String(open));
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value;
  if (!text.trim() || running.length || !$("model").value) return;
  $("prompt").value = "";
  note("");
  say(text);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
$("stop").addEventListener("click", stop);
$("clear").addEventListener("click", () => {
  stop();
  turns = [];
  keep();
  draw();
  $("prompt").focus();
});
$("open-settings").addEventListener("click", () => openSettings($("settings").hidden));
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value.trim());
  loadModels({});
});
for (const name of [...FIELDS, "model", "beside"]) $(name).addEventListener("change", keep);
$("model").addEventListener("pointerdown", () => running.length || $("model").options.length || loadModels({}));

const kept = restore();
draw();
loadModels(kept);
