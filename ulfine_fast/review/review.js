// The server holds labels, fits and groups; this page holds what is selected and what may be undone. Names of classes
// and images are untrusted text, and only ever become text.
"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const POLL = 300; // milliseconds between looks at a fit that is running
const TABS = {
  proposed: ["Help most", "The images whose labels should help most: uncertain, of classes with few labels, and unlike each other. Each has its own answer."],
  cluster: ["One cluster", "Images that are alike. Take out those that do not fit, and answer for all others together."],
  wrong: ["Likely wrong", "Labelled images that a fit without their label takes for the class of the group. Below each are its label and the probability of that class."],
  rare: ["Rare classes", "Unlabelled images that may be of a class with few labels, the likeliest first."],
  nothing: ["Fits no class", "Unlabelled images that are unlike all classes, the farthest first."],
};
const EMPTY = {
  proposed: "No unlabelled image is left to propose.",
  cluster: "Every image of the clusters has an answer.",
  wrong: "No label looks wrong.",
  rare: "No unlabelled image looks like one of the rare classes.",
  nothing: "Every unlabelled image is like one of the classes.",
};
// what the page knows: the state and the page of images of the server, and its own
const view = { state: null, page: null, tab: "proposed", group: 0, selected: new Set(), focus: 0, history: [], said: "", polling: false };

const percent = (value, digits = 1) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(digits)}%`);
const points = (value) => `${value > 0 ? "+" : value < 0 ? "−" : "±"}${Math.abs(100 * value).toFixed(1)}`;
const images = (count) => (count === 1 ? "1 image" : `${count.toLocaleString("en")} images`);
const className = (k) => view.state.classes[k].name;
const items = () => view.page.items;
const chosen = () => (view.selected.size ? [...view.selected].sort((a, b) => a - b).map((i) => items()[i]) : items().length ? [items()[view.focus]] : []);

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

function drawn(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

const key = (text) => make("kbd", {}, text);

// What a key or a click does comes after what those before it have done, however long the server takes.
let queue = Promise.resolve();
const inTurn = (action) => { queue = queue.then(action).catch((error) => showMessage(`${error}`)); };
const onClick = (id, action) => $(id).addEventListener("click", () => inTurn(action));

// -- the server

async function send(path, options) {
  try {
    const response = await fetch(path, options);
    const body = await response.json().catch(() => ({ error: `the server answered ${response.status}` }));
    return { ok: response.ok, status: response.status, body };
  } catch {
    return { ok: false, status: 0, body: { error: "The server does not answer; start the review again." } };
  }
}

const write = (method, path, body) => send(path, { method, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

function showMessage(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

// The state, and again as long as a fit is running.
async function load() {
  const { ok, body } = await send("state");
  if (!ok) return showMessage(body.error);
  const first = view.state === null;
  const next = !first && body.version !== view.state.version;
  view.state = body;
  if (first) {
    $("classes").replaceChildren(...body.classes.map(({ name }) => make("option", { value: name })));
    view.tab = Object.keys(TABS).find((tab) => body.tabs[tab].length) ?? "proposed";
    await open(view.tab, 0);
  }
  // a page on which every image has an answer has been kept until the next fit
  if (next && view.page) inTurn(() => (items().every((item) => item.correction !== null) ? open(view.tab, view.group) : undefined));
  drawState();
  if ((body.busy || body.fitting) && !view.polling) {
    view.polling = true;
    setTimeout(() => { view.polling = false; load(); }, POLL);
  }
}

// Opens a group as the last fit sees it, or turns to another page of the fit in which it was opened.
async function open(tab, group, page = 0, version = undefined) {
  const { ok, body } = await send(`pages/${tab}/${group}/${page}${version === undefined ? "" : `?version=${version}`}`);
  if (!ok) return showMessage(body.error);
  Object.assign(view, { tab, group, page: body, focus: 0 });
  // images that are alike are all selected; those of a proposal differ
  const alike = tab !== "proposed";
  view.selected = new Set(items().flatMap((item, i) => (alike && item.correction === null ? [i] : [])));
  view.focus = Math.max(items().findIndex((item) => item.correction === null), 0);
  showMessage("");
  drawPage();
}

const groups = () => view.state.tabs[view.tab];

function turn(step) {
  const page = view.page.page + step;
  if (page >= 0 && page < view.page.pages) return open(view.tab, view.group, page, view.page.version);
  const group = view.group + step;
  if (group >= 0 && group < groups().length) return open(view.tab, group);
}

function turnGroup(step) {
  const group = view.group + step;
  if (group >= 0 && group < groups().length) return open(view.tab, group);
}

function turnTab(step) {
  const tabs = Object.keys(TABS);
  return open(tabs[(tabs.indexOf(view.tab) + step + tabs.length) % tabs.length], 0);
}

async function others() {
  if (view.tab === "proposed") {
    const version = view.state.version;
    const { ok, body } = await write("POST", "proposal", {});
    if (!ok) return showMessage(body.error);
    do {
      await new Promise((done) => setTimeout(done, POLL));
      await load();
    } while (view.state.busy && view.state.version === version);
  }
  await open(view.tab, Math.min(view.group, Math.max(groups().length - 1, 0)));
}

// -- answers

// Gives each of these images a label: a class name, "" for none of the classes, null to take it back.
async function save(changes, said, undoable = true) {
  if (!changes.length) return;
  say("");
  const { ok, status, body } = await write("PUT", "labels", { changes });
  if (status === 409) {
    for (const item of items()) if (item.row in body.labels) item.correction = body.labels[item.row];
    drawPage();
    return showMessage("Another page has changed these labels in the meantime. Its labels are shown, and yours were not saved.");
  }
  if (!ok) return showMessage(`${body.error}${body.error.endsWith(".") ? "" : "."} Nothing was saved.`);
  const labels = new Map(changes.map((change) => [change.row, change.label]));
  items().forEach((item, i) => {
    if (!labels.has(item.row)) return;
    item.correction = labels.get(item.row);
    view.selected.delete(i);
  });
  if (undoable) view.history.push(changes);
  showMessage("");
  say(said);
  const left = items().findIndex((item, i) => item.correction === null && i >= view.focus);
  const any = items().findIndex((item) => item.correction === null);
  if (undoable && any >= 0) view.focus = left >= 0 ? left : any;
  drawPage();
  await load();
  // on to what has no answer yet; a proposal waits for what it brought
  if (undoable && any < 0 && view.tab !== "proposed") await turn(1);
}

async function answer(label) {
  const selected = chosen();
  if (!selected.length) return;
  const labels = selected.map((item) => (typeof label === "function" ? label(item) : label));
  const changes = selected.flatMap((item, i) => (labels[i] === undefined ? [] : [{ row: item.row, label: labels[i], expected: item.correction }]));
  const names = new Set(changes.map((change) => change.label));
  const text = names.size === 1 ? ([...names][0] === "" ? "none of the classes" : [...names][0]) : "as suggested";
  return save(changes, `${images(changes.length)}: ${text}. Saved; u undoes.`);
}

const suggestion = (item) => (item.suggested < 0 ? "" : className(item.suggested));
const accept = () => answer(suggestion);
const keep = () => answer((item) => (item.label < 0 ? undefined : className(item.label)));

async function undo() {
  const last = view.history.pop();
  if (!last) return say("Nothing to undo.");
  await save(last.map(({ row, label, expected }) => ({ row, label: expected, expected: label })), `Undone: ${images(last.length)}.`, false);
  const rows = new Set(last.map((change) => change.row));
  items().forEach((item, i) => { if (rows.has(item.row) && item.correction === null) view.selected.add(i); });
  if (last.length === 1) view.selected.clear();
  const first = items().findIndex((item) => rows.has(item.row));
  if (first >= 0) view.focus = first;
  drawPage();
}

async function fit() {
  const { ok, body } = await write("POST", "fit", {});
  if (!ok) return showMessage(body.error);
  await load();
}

// -- drawing

function say(text) {
  view.said = text;
}

function drawPage() {
  const { page, tab } = view;
  $("about").textContent = TABS[tab][1];
  $("tabs").replaceChildren(...Object.entries(TABS).map(([name, [title]]) => {
    const count = view.state.tabs[name].reduce((sum, group) => sum + group.images, 0);
    const button = make("button", { type: "button", role: "tab", "aria-selected": String(name === tab), tabindex: name === tab ? "0" : "-1", "aria-controls": "panel" }, `${title} `, make("small", {}, count.toLocaleString("en")));
    button.addEventListener("click", () => inTurn(() => open(name, 0)));
    return button;
  }));
  const named = groups().some((group) => group.name);
  $("choose").hidden = !named || !groups().length;
  $("group").replaceChildren(...groups().map((group, i) => make("option", { value: i, selected: i === view.group }, `${group.name} (${group.images})`)));
  $("count").textContent = named ? `group ${view.group + 1} of ${groups().length}` : "";
  $("count").hidden = !named || groups().length < 2;
  const old = page.version !== view.state.version;
  $("others").hidden = !(tab === "proposed" || old);
  $("others").firstChild.textContent = tab === "proposed" ? "Other images " : "Update the group ";
  $("pages").textContent = `page ${page.page + 1} of ${page.pages}`;
  for (const id of ["before", "pages", "after"]) $(id).hidden = tab === "proposed";
  $("before").disabled = page.page === 0 && view.group === 0;
  $("after").disabled = page.page + 1 >= page.pages && view.group + 1 >= groups().length;
  $("empty").hidden = items().length > 0;
  $("empty").textContent = EMPTY[tab];
  drawGrid();
  drawBar();
}

function caption(item) {
  if (item.correction !== null) return [item.correction === "" ? "none" : item.correction, "✓"];
  if (item.duplicate) return [`${className(item.label)} → ${suggestion(item)}`, ""];
  // what it is instead is the group's name
  if (item.label >= 0) return [className(item.label), `→ ${percent(item.probability, 0)}`];
  if (item.suggested < 0) return ["", ""];
  return [suggestion(item), percent(item.probability, 0)];
}

function drawGrid() {
  const grid = $("grid");
  const focused = grid.contains(document.activeElement);
  const tiles = items().map((item, i) => {
    const image = make("img", { loading: "lazy", decoding: "async", alt: "", src: `thumbnails/${item.row}`, draggable: "false" });
    watch(image);
    const [text, more] = caption(item);
    return make("div", {
      class: item.correction === null ? "tile" : "tile answered", role: "option", "aria-selected": String(view.selected.has(i)),
      tabindex: i === view.focus ? "0" : "-1", title: item.id, "aria-label": `${item.id}, ${text}`,
    }, image, make("p", {}, make("span", {}, text), make("span", {}, more)));
  });
  // tiles that show the same images keep them: only what is said about them changes
  const same = grid.children.length === tiles.length && tiles.every((tile, i) => tile.firstChild.getAttribute("src") === grid.children[i].firstChild?.getAttribute("src"));
  if (same) {
    tiles.forEach((tile, i) => {
      for (const name of ["class", "aria-selected", "tabindex", "aria-label"]) grid.children[i].setAttribute(name, tile.getAttribute(name));
      grid.children[i].lastChild.replaceWith(tile.lastChild);
    });
  } else grid.replaceChildren(...tiles);
  grid.classList.toggle("none", view.selected.size === 0);
  if (focused || document.activeElement === document.body) grid.children[view.focus]?.focus({ preventScroll: !focused });
}

function watch(image) {
  image.addEventListener("load", () => image.classList.toggle("tiny", image.naturalWidth <= 64));
  image.addEventListener("error", () => image.classList.add("gone"));
}

function answerButton(text, shortcut, primary, action) {
  const button = make("button", { type: "button", class: primary ? "primary" : undefined, "aria-keyshortcuts": shortcut }, text, " ", key(shortcut));
  button.addEventListener("click", () => inTurn(action));
  return button;
}

// The classes that have a key: those likely for the image in focus, or for the page where several are selected.
const likely = () => (view.selected.size || !items().length ? view.page.likely : items()[view.focus].likely);

function drawBar() {
  const selected = chosen();
  const names = [...new Set(selected.map(suggestion))];
  const what = view.selected.size ? `${view.selected.size} of ${images(items().length)} selected` : "Keys act on the image in focus";
  $("selected").textContent = view.said ? `${view.said} ${what}.` : `${what}.`;
  const buttons = likely().map((k, i) => answerButton(className(k), `${(i + 1) % 10}`, false, () => answer(className(k))));
  if (selected.length) {
    const label = names.length > 1 ? "as suggested" : names[0] === "" ? "none of the classes" : names[0];
    const button = answerButton(view.selected.size > 1 ? `${view.selected.size} × ${label}` : label, "Enter", true, accept);
    button.id = "accept";
    buttons.unshift(button);
  }
  $("answers").replaceChildren(...buttons);
  $("bar").hidden = !items().length && !view.history.length;
  $("keep").hidden = view.tab !== "wrong";
  $("undo").disabled = !view.history.length;
  for (const id of ["none", "keep", "all", "view"]) $(id).disabled = !items().length;
  $("all").firstChild.textContent = view.selected.size ? "select none " : "select all ";
}

function drawState() {
  const { state } = view;
  $("progress").textContent = `${state.corrected.toLocaleString("en")} ${state.corrected === 1 ? "label" : "labels"} saved`;
  $("fit").disabled = state.fitting;
  $("fit").firstChild.textContent = state.fitting ? "Fitting … " : "Fit and save ";
  $("labels").textContent = state.labels;
  $("out").textContent = state.out;
  $("busy").hidden = !state.busy;
  if (state.failure) showMessage(`The fit failed: ${state.failure}`);
  drawAccuracy();
  drawRound();
  drawClasses();
  $("fits").replaceChildren(...state.fits.map((fit, i) => make("tr", {}, ...[i ? `${i}` : "the run", `${fit.labeled}`, percent(fit.balanced_accuracy), percent(fit.accuracy)].map((text) => make("td", {}, text)))));
  if (view.page) drawPage();
}

function drawAccuracy() {
  const { balanced_accuracy: value, changed, moved, unknown, classes, history } = view.state;
  if (value) $("balanced").replaceChildren(percent(value.value), " ", make("small", {}, `${percent(value.low, 0)} to ${percent(value.high, 0)}`));
  else $("balanced").replaceChildren("unknown");
  $("changed").replaceChildren(...(changed ? [
    make("b", { class: changed.low > 0 ? "good" : changed.high < 0 ? "bad" : undefined }, points(changed.value)),
    ` (${points(changed.low)} to ${points(changed.high)}) by the last answers; ${images(moved)} changed class`,
  ] : []));
  const on = value ? `On ${value.labels.toLocaleString("en")} held-out labels, by fits that did not see them; 95% interval.` : "Every class needs two labels before it can be measured.";
  const without = unknown.length ? ` ${unknown.length} of ${classes.length} classes still unknown.` : "";
  $("measured").textContent = on + without;
  const known = history.filter((point) => point.balanced_accuracy).map((point) => point.balanced_accuracy);
  drawCurve(known);
}

function drawCurve(values) {
  $("curve").toggleAttribute("hidden", values.length < 2);
  if (values.length < 2) return;
  const low = Math.min(...values.map((point) => point.low));
  const high = Math.max(...values.map((point) => point.high));
  const x = (i) => (260 * i) / (values.length - 1);
  const y = (value) => 62 - (60 * (value - low)) / Math.max(high - low, 1e-6);
  const along = (name) => values.map((point, i) => `${x(i).toFixed(1)},${y(point[name]).toFixed(1)}`);
  $("curve").replaceChildren(
    drawn("polygon", { class: "area", points: [...along("high"), ...along("low").reverse()].join(" ") }),
    drawn("polyline", { class: "line", points: along("value").join(" ") }),
  );
}

const listed = (counts) => counts.slice(0, 5).map(({ name, images: count }) => `${Math.round(count)} ${name}`).join(", ") + (counts.length > 5 ? " and others" : "");

function drawRound() {
  const { proposal, outcome } = view.state;
  $("came").hidden = !outcome;
  if (outcome) {
    const gained = outcome.gained;
    const came = gained ? `${points(gained.value)} (${points(gained.low)} to ${points(gained.high)})` : "too few held-out labels to tell";
    const extra = outcome.labels > outcome.images ? `, of ${outcome.labels} new labels in all` : "";
    $("came").replaceChildren(
      make("p", {}, "Last round expected ", make("b", {}, points(outcome.expected)), " points, came ", make("b", {}, came), `${extra}.`),
      make("p", { class: "note" }, `Expected ${listed(outcome.expected_classes) || "nothing"}; they were ${[listed(outcome.classes), outcome.none ? `${outcome.none} of no class` : ""].filter(Boolean).join(", ")}.`),
    );
  }
  $("expected").replaceChildren(...(proposal.images ? [
    `${images(proposal.images)} should bring `, make("b", {}, points(proposal.gain)), ` points: about ${listed(proposal.classes)}.`,
  ] : [EMPTY.proposed]));
}

function drawClasses() {
  $("recalls").lastElementChild.replaceChildren(...view.state.classes.map(({ name, labels, accuracy, low, high }) => {
    const row = make("tr", {}, make("td", { title: name }, name), make("td", { title: "labels" }, `${labels}`));
    if (accuracy === null) {
      row.append(make("td", {}), make("td", { class: "unknown" }, "unknown"));
      return row;
    }
    const bar = drawn("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img", "aria-label": `${percent(low, 0)} to ${percent(high, 0)}` });
    bar.append(
      drawn("rect", { class: "rail", x: 0, y: 4, width: 100, height: 2 }),
      drawn("rect", { class: "range", x: 100 * low, y: 2, width: Math.max(100 * (high - low), 1), height: 6 }),
      drawn("rect", { class: "dot", x: Math.min(100 * accuracy, 98) , y: 0, width: 2, height: 10 }),
    );
    row.append(make("td", {}, bar), make("td", {}, percent(accuracy, 0)));
    return row;
  }));
}

function lookCloser() {
  const item = items()[view.focus];
  if (!item) return;
  $("image").src = `images/${item.row}`;
  $("name").textContent = item.id;
  $("duplicate").hidden = !item.duplicate;
  if (item.duplicate) {
    $("duplicate-image").src = `images/${item.duplicate.row}`;
    $("duplicate-name").textContent = item.duplicate.id;
  }
  $("why").textContent = reason(item);
  $("closer").showModal();
}

function reason(item) {
  if (item.duplicate) return `Labelled ${className(item.label)}, but the near-duplicate beside it is labelled ${suggestion(item)}.`;
  if (item.label >= 0) return `Labelled ${className(item.label)}, but a fit without this label predicts ${suggestion(item)} (${percent(item.probability)}).`;
  if (item.suggested < 0) return "Unlabelled, and unlike all classes.";
  return `Unlabelled, probably ${suggestion(item)} (${percent(item.probability)}).`;
}

// -- mouse: a click takes an image out or back in, a drag selects

function toggle(i) {
  if (view.selected.has(i)) view.selected.delete(i);
  else view.selected.add(i);
}

function focusOn(i) {
  view.focus = Math.min(Math.max(i, 0), items().length - 1);
}

const drag = { from: null, box: null };

$("grid").addEventListener("pointerdown", (event) => {
  if (event.button === 0 && event.pointerType === "mouse") drag.from = { x: event.clientX, y: event.clientY, add: event.shiftKey || event.ctrlKey || event.metaKey };
});

addEventListener("pointermove", (event) => {
  if (!drag.from) return;
  if (!drag.box && Math.hypot(event.clientX - drag.from.x, event.clientY - drag.from.y) < 6) return;
  if (!drag.box) $("grid").append((drag.box = make("div", { id: "drag" })));
  const frame = $("grid").getBoundingClientRect();
  Object.assign(drag.box.style, {
    left: `${Math.min(event.clientX, drag.from.x) - frame.left}px`, top: `${Math.min(event.clientY, drag.from.y) - frame.top}px`,
    width: `${Math.abs(event.clientX - drag.from.x)}px`, height: `${Math.abs(event.clientY - drag.from.y)}px`,
  });
});

addEventListener("pointerup", () => {
  if (drag.box) {
    const box = drag.box.getBoundingClientRect();
    drag.box.remove();
    const inside = [...$("grid").children].flatMap((tile, i) => {
      const { left, right, top, bottom } = tile.getBoundingClientRect();
      return left < box.right && right > box.left && top < box.bottom && bottom > box.top ? [i] : [];
    });
    view.selected = new Set(drag.from.add ? [...view.selected, ...inside] : inside);
    if (inside.length) focusOn(inside[0]);
    // the click that follows belongs to the drag
    addEventListener("click", (event) => event.stopPropagation(), { capture: true, once: true });
    setTimeout(() => dispatchEvent(new Event("click")));
    drawGrid();
    drawBar();
  }
  Object.assign(drag, { from: null, box: null });
});

$("grid").addEventListener("click", (event) => {
  const tile = event.target.closest(".tile");
  if (!tile) return;
  const i = [...$("grid").children].indexOf(tile);
  inTurn(() => click(i, event));
});

function click(i, event) {
  if (event.shiftKey) for (let k = Math.min(i, view.focus); k <= Math.max(i, view.focus); k += 1) view.selected.add(k);
  else toggle(i);
  focusOn(i);
  drawGrid();
  drawBar();
}

$("grid").addEventListener("dblclick", () => inTurn(lookCloser));

// -- keys

function columns() {
  const tiles = [...$("grid").children];
  const first = tiles[0]?.offsetTop;
  return Math.max(tiles.filter((tile) => tile.offsetTop === first).length, 1);
}

function move(step, select) {
  if (select) view.selected.add(view.focus);
  focusOn(view.focus + step);
  if (select) view.selected.add(view.focus);
  drawGrid();
  drawBar();
  $("grid").children[view.focus]?.focus();
}

function keyAction(event) {
  const { key: pressed, shiftKey } = event;
  if (/^[0-9]$/.test(pressed)) return () => {
    const numbered = likely()[(Number(pressed) + 9) % 10];
    return numbered === undefined ? undefined : answer(className(numbered));
  };
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() };
  if (pressed in steps) {
    // arrows move between tabs where a tab has the focus
    if (event.target.getAttribute("role") === "tab") return Math.abs(steps[pressed]) === 1 ? () => turnTab(steps[pressed]) : undefined;
    return () => move(steps[pressed], shiftKey);
  }
  return {
    Enter: accept, x: () => answer(""), k: () => (view.tab === "wrong" ? keep() : undefined), u: undo, f: fit, v: lookCloser, r: others,
    n: () => turn(1), PageDown: () => turn(1), p: () => turn(-1), PageUp: () => turn(-1), ".": () => turnGroup(1), ",": () => turnGroup(-1),
    t: () => turnTab(1), T: () => turnTab(-1), "/": () => $("any").focus(), "?": () => $("keys").showModal(),
    " ": () => { toggle(view.focus); drawGrid(); drawBar(); },
    a: selectAll,
  }[pressed];
}

function selectAll() {
  view.selected = new Set(view.selected.size ? [] : items().keys());
  drawGrid();
  drawBar();
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !view.page) return;
  if (["INPUT", "SELECT"].includes(event.target.tagName)) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if ($("closer").open) {
    // the image's answer may be given while it is large
    if (event.key === "v" || event.key === "Escape" || event.key === "Enter") return event.key === "v" ? $("closer").close() : undefined;
    $("closer").close();
  }
  if ($("keys").open) return;
  // a focused button keeps its own Enter and space
  if ((event.key === "Enter" || event.key === " ") && event.target.tagName === "BUTTON") return;
  const action = keyAction(event);
  if (!action) return;
  event.preventDefault();
  inTurn(action);
});

onClick("fit", fit);
onClick("help", () => $("keys").showModal());
$("group").addEventListener("change", (event) => inTurn(() => open(view.tab, Number(event.target.value))));
onClick("others", others);
onClick("before", () => turn(-1));
onClick("after", () => turn(1));
onClick("none", () => answer(""));
onClick("keep", keep);
onClick("all", selectAll);
onClick("view", lookCloser);
onClick("undo", undo);
$("other").addEventListener("submit", (event) => {
  event.preventDefault();
  const typed = $("any").value;
  $("any").value = "";
  $("any").blur();
  if (typed) inTurn(() => answer(typed));
});
for (const id of ["image", "duplicate-image"]) watch($(id));

load();
