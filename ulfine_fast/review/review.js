// The server holds the state; this page holds only the position in the list of images. Names of classes and images are
// untrusted text, and only ever become text.
"use strict";

const $ = (id) => document.getElementById(id);
const view = { state: null, index: 0, busy: false };
const percent = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)}%`);

const currentItem = () => view.state.items[view.index];
const className = (k) => view.state.classes[k];

async function send(path, options) {
  const response = await fetch(path, options);
  const body = await response.json().catch(() => ({ error: `the server answered ${response.status}` }));
  return { ok: response.ok, status: response.status, body };
}

function showMessage(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

// Texts; every second one is bold.
function reason(item) {
  const suggestion = `${className(item.suggested)} (${percent(item.probability)})`;
  if (item.kind === "likely_wrong") return ["Labelled ", className(item.label), ", but heads trained without this label predict ", suggestion, "."];
  if (item.kind === "duplicate") return ["Labelled ", className(item.label), ", but a near-duplicate is labelled ", className(item.suggested), "."];
  return ["Unlabelled, and perhaps of a class with few labels: ", suggestion, "."];
}

function writeTexts(element, texts) {
  element.replaceChildren(...texts.map((text, i) => (i % 2 ? bold(text) : document.createTextNode(text))));
}

function bold(text) {
  return Object.assign(document.createElement("b"), { textContent: text });
}

function answerButton(text, key, pressed, onClick) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(text);
  if (key) button.append(" ", Object.assign(document.createElement("kbd"), { textContent: key }));
  button.setAttribute("aria-pressed", String(pressed));
  button.addEventListener("click", onClick);
  return button;
}

function draw() {
  const { state } = view;
  const answered = state.items.filter((item) => item.correction !== null).length;
  $("progress").textContent = `${answered} of ${state.items.length} answered, ${state.corrected} labels saved`;
  $("fit").disabled = state.fitting;
  $("fit").firstChild.textContent = state.fitting ? "Fitting … " : "Fit again ";
  $("labels").textContent = state.labels;
  $("out").textContent = state.out;
  $("card").hidden = !state.items.length;
  $("empty").hidden = Boolean(state.items.length);
  if (state.failure) showMessage(`The fit failed: ${state.failure}`);
  drawFits();
  if (state.items.length) drawItem();
}

function drawFits() {
  const rows = view.state.fits.map((fit, i) => {
    const row = document.createElement("tr");
    const cells = [i ? `${i}` : "the run", `${fit.labeled}`, percent(fit.balanced_accuracy), percent(fit.accuracy)];
    row.append(...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
    return row;
  });
  $("fits").replaceChildren(...rows);
}

function drawItem() {
  const item = currentItem();
  drawImage($("image"), item.row, item.id);
  $("name").textContent = item.id;
  $("duplicate").hidden = !item.duplicate;
  if (item.duplicate) {
    drawImage($("duplicate-image"), item.duplicate.row, item.duplicate.id);
    $("duplicate-name").textContent = item.duplicate.id;
  }
  writeTexts($("why"), reason(item));
  $("saved").hidden = item.correction === null;
  writeTexts($("saved"), ["Saved: ", item.correction === "" ? "none of the classes" : item.correction ?? ""]);
  const accepted = className(item.label >= 0 ? item.label : item.suggested);
  const button = (text, key, name) => answerButton(text, key, item.correction === name, () => put(name));
  const accept = button(item.label >= 0 ? `Keep ${accepted}` : `It is ${accepted}`, "Enter", accepted);
  accept.id = "accept";
  accept.classList.add("accept");
  const others = item.likely.map((k, i) => button(className(k), `${(i + 1) % 10}`, className(k)));
  $("answers").replaceChildren(accept, ...others);
  $("undo").disabled = item.correction === null && view.index === 0;
  $("before").disabled = view.index === 0;
  $("after").disabled = view.index >= view.state.items.length - 1;
}

function drawImage(image, row, name) {
  const address = `images/${row}`;
  image.alt = name;
  image.classList.remove("tiny", "gone");
  if (image.getAttribute("src") !== address) image.src = address;
}

for (const id of ["image", "duplicate-image"]) {
  $(id).addEventListener("load", (event) => event.target.classList.toggle("tiny", event.target.naturalWidth <= 64));
  $(id).addEventListener("error", (event) => event.target.classList.add("gone"));
}

function move(step) {
  view.index = Math.min(Math.max(view.index + step, 0), Math.max(view.state.items.length - 1, 0));
  showMessage("");
  draw();
}

async function put(label) {
  if (view.busy || !view.state.items.length) return;
  view.busy = true;
  const item = currentItem();
  try {
    const { ok, status, body } = await send(`labels/${item.row}`, {
      method: "PUT",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ label, expected: item.correction }),
    });
    if (status === 409) {
      await load();
      showMessage("Another page has changed this label in the meantime. Its label is shown, and yours was not saved.");
    } else if (!ok) showMessage(body.error);
    else {
      view.state.corrected += (label !== null) - (item.correction !== null);
      item.correction = label;
      showMessage("");
      if (label !== null) view.index = Math.min(view.index + 1, view.state.items.length - 1);
    }
  } catch {
    showMessage("The server does not answer, and this label was not saved; start the review again.");
  }
  view.busy = false;
  draw();
}

function undo() {
  if (!view.state.items.length) return;
  // the last answer is that of the image before
  if (currentItem().correction === null) move(-1);
  if (currentItem().correction !== null) put(null);
}

async function fit() {
  const { ok, body } = await send("fit", { method: "POST", headers: { "Content-Type": "application/json" }, body: "{}" });
  if (!ok) return showMessage(body.error);
  showMessage("");
  await load();
}

async function load() {
  const { ok, body } = await send("state");
  if (!ok) return showMessage(body.error);
  // after a fit the list is a new one: start at its first image without an answer, otherwise stay at this image
  const refitted = view.state && body.fits.length !== view.state.fits.length;
  const row = view.state && !refitted && currentItem() ? currentItem().row : null;
  view.state = body;
  const same = body.items.findIndex((item) => item.row === row);
  const open = body.items.findIndex((item) => item.correction === null);
  view.index = Math.max(same >= 0 ? same : open, 0);
  $("classes").replaceChildren(...body.classes.map((name) => Object.assign(document.createElement("option"), { value: name })));
  draw();
  if (body.fitting) setTimeout(load, 500);
}

$("fit").addEventListener("click", fit);
$("none").addEventListener("click", () => put(""));
$("undo").addEventListener("click", undo);
$("before").addEventListener("click", () => move(-1));
$("after").addEventListener("click", () => move(1));
$("other").addEventListener("submit", (event) => {
  event.preventDefault();
  const typed = $("any").value;
  $("any").value = "";
  $("any").blur();
  if (typed) put(typed);
});

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target === $("any") || !view.state) return;
  const action = keyAction(event.key);
  // a focused button keeps its own Enter
  if (!action || (event.key === "Enter" && event.target.tagName === "BUTTON")) return;
  event.preventDefault();
  action();
});

function keyAction(key) {
  const item = currentItem();
  const likely = /^[0-9]$/.test(key) && item ? item.likely[(Number(key) + 9) % 10] : undefined;
  if (likely !== undefined) return () => put(className(likely));
  return {
    Enter: () => $("accept")?.click(), x: () => put(""), u: undo, f: () => fit(),
    ArrowLeft: () => move(-1), ArrowRight: () => move(1), "/": () => $("any").focus(),
  }[key];
}

load();
