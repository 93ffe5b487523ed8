// The state is the server's; what this page holds is where the reader stands. Names of classes and images are
// untrusted text, and only ever become text.
"use strict";

const $ = (id) => document.getElementById(id);
const shown = { state: null, place: 0, busy: false };
const percent = (share) => (share === null || share === undefined ? "–" : `${(100 * share).toFixed(1)}%`);

const item = () => shown.state.items[shown.place];
const nameOf = (k) => shown.state.classes[k];

async function ask(path, options) {
  const response = await fetch(path, options);
  const body = await response.json().catch(() => ({ error: `the server answered ${response.status}` }));
  return { ok: response.ok, status: response.status, body };
}

function say(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

function reason(one) {
  const sure = `${percent(one.probability)}`;
  const likely = `${nameOf(one.suggested)} (${sure})`;
  if (one.kind === "doubt") return ["Labelled ", nameOf(one.given), ", but heads that did not see this label say ", likely, "."];
  if (one.kind === "twins") return ["Labelled ", nameOf(one.given), ", and a near-duplicate is labelled ", nameOf(one.suggested), "."];
  return ["Unlabelled, and perhaps of a class with few labels: ", likely, "."];
}

function write(element, parts) {
  element.replaceChildren(...parts.map((part, i) => (i % 2 ? strong(part) : document.createTextNode(part))));
}

function strong(text) {
  const made = document.createElement("b");
  made.textContent = text;
  return made;
}

function answer(text, key, chosen, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.append(text);
  if (key) {
    const hint = document.createElement("kbd");
    hint.textContent = key;
    made.append(" ", hint);
  }
  made.setAttribute("aria-pressed", String(chosen));
  made.addEventListener("click", act);
  return made;
}

function draw() {
  const { state } = shown;
  const done = state.items.filter((one) => one.now !== null).length;
  $("progress").textContent = `${done} of ${state.items.length} looked at, ${state.corrected} labels saved`;
  $("fit").disabled = state.fitting;
  $("fit").firstChild.textContent = state.fitting ? "Fitting … " : "Fit again ";
  $("labels").textContent = state.labels;
  $("out").textContent = state.out;
  $("card").hidden = !state.items.length;
  $("empty").hidden = Boolean(state.items.length);
  if (state.failure) say(`The fit failed: ${state.failure}`);
  drawFits();
  if (state.items.length) drawItem();
}

function drawFits() {
  const rows = shown.state.figures.map((one, i) => {
    const row = document.createElement("tr");
    const cells = [i ? `${i}` : "the run", `${one.labeled}`, percent(one.balanced_accuracy), percent(one.accuracy)];
    row.append(...cells.map((text) => Object.assign(document.createElement("td"), { textContent: text })));
    return row;
  });
  $("fits").replaceChildren(...rows);
}

function drawItem() {
  const one = item();
  image($("image"), one.row, one.id);
  $("name").textContent = one.id;
  $("twin").hidden = !one.twin;
  if (one.twin) {
    image($("twin-image"), one.twin.row, one.twin.id);
    $("twin-name").textContent = one.twin.id;
  }
  write($("why"), reason(one));
  $("now").hidden = one.now === null;
  write($("now"), one.now === "" ? ["Saved: ", "none of the classes"] : ["Saved: ", one.now ?? ""]);
  const accept = one.given >= 0 ? one.given : one.suggested;
  const keep = answer(one.given >= 0 ? `Keep ${nameOf(accept)}` : `It is ${nameOf(accept)}`, "Enter", one.now === nameOf(accept), () => put(nameOf(accept)));
  keep.id = "accept";
  keep.classList.add("accept");
  const rest = one.likely.map((k, i) => answer(nameOf(k), `${(i + 1) % 10}`, one.now === nameOf(k), () => put(nameOf(k))));
  $("answers").replaceChildren(keep, ...rest);
  $("undo").disabled = one.now === null && shown.place === 0;
  $("before").disabled = shown.place === 0;
  $("after").disabled = shown.place >= shown.state.items.length - 1;
}

function image(image, row, name) {
  const address = `images/${row}`;
  image.alt = name;
  image.classList.remove("tiny", "gone");
  if (image.getAttribute("src") !== address) image.src = address;
}

for (const id of ["image", "twin-image"]) {
  $(id).addEventListener("load", (event) => event.target.classList.toggle("tiny", event.target.naturalWidth <= 64));
  $(id).addEventListener("error", (event) => event.target.classList.add("gone"));
}

function move(by) {
  shown.place = Math.min(Math.max(shown.place + by, 0), Math.max(shown.state.items.length - 1, 0));
  say("");
  draw();
}

async function put(label) {
  if (shown.busy || !shown.state.items.length) return;
  shown.busy = true;
  const one = item();
  try {
    const { ok, status, body } = await ask(`labels/${one.row}`, {
      method: "PUT",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ label, seen: one.now }),
    });
    if (status === 409) {
      await load();
      say("Another page has changed this label meanwhile; what it says is shown, and yours was not saved.");
    } else if (!ok) say(body.error);
    else {
      shown.state.corrected += (label !== null) - (one.now !== null);
      one.now = label;
      say("");
      if (label !== null) shown.place = Math.min(shown.place + 1, shown.state.items.length - 1);
    }
  } catch {
    say("The server is gone, and this label was not saved; start the review again.");
  }
  shown.busy = false;
  draw();
}

function undo() {
  if (!shown.state.items.length) return;
  // what was just answered is the image before
  if (item().now === null) move(-1);
  if (item().now !== null) put(null);
}

async function fit() {
  const { ok, body } = await ask("fit", { method: "POST", headers: { "Content-Type": "application/json" }, body: "{}" });
  if (!ok) return say(body.error);
  say("");
  await load();
}

async function load() {
  const { ok, body } = await ask("state");
  if (!ok) return say(body.error);
  const news = shown.state && body.figures.length !== shown.state.figures.length;
  const row = shown.state && !news && item() ? item().row : null;
  shown.state = body;
  const same = body.items.findIndex((one) => one.row === row);
  const open = body.items.findIndex((one) => one.now === null);
  shown.place = Math.max(same >= 0 ? same : open, 0);
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
  if (event.ctrlKey || event.metaKey || event.altKey || event.target === $("any") || !shown.state) return;
  const act = keys(event.key);
  // a button that has the focus keeps its own Enter
  if (!act || (event.key === "Enter" && event.target.tagName === "BUTTON")) return;
  event.preventDefault();
  act();
});

function keys(key) {
  const one = item();
  const digit = /^[0-9]$/.test(key) && one ? one.likely[(Number(key) + 9) % 10] : undefined;
  if (digit !== undefined) return () => put(nameOf(digit));
  return {
    Enter: () => $("accept")?.click(), x: () => put(""), u: undo, f: () => fit(),
    ArrowLeft: () => move(-1), ArrowRight: () => move(1), "/": () => $("any").focus(),
  }[key];
}

load();
