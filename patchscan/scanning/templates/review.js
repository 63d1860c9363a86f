// Label the images of an audit. Texts of strangers, such as names of files, are only ever set as textContent.
"use strict";
const content = JSON.parse(document.getElementById("content").textContent);
const images = content.images;
const at = (id) => document.getElementById(id);
const store = `patchscan-${content.audit}`;
// labels: by number; scoreSeen: numbers whose score was shown before the label; order: numbers as they were labelled.
let state = { labels: {}, scoreSeen: [], order: [], position: 0, reviewer: "" };
let keeps = true;
try {
  state = { ...state, ...JSON.parse(localStorage.getItem(store) ?? "{}") };
} catch {
  keeps = false;
}

function keep() {
  try {
    localStorage.setItem(store, JSON.stringify(state));
  } catch {
    keeps = false;
  }
  if (!keeps) notice("This browser keeps no progress for this page: save the labels before you close it.");
}

function notice(text) {
  at("notice").textContent = text;
  at("notice").hidden = false;
}

function picture(uri, alt) {
  const image = document.createElement("img");
  image.src = uri;
  image.alt = alt;
  return image;
}

function draw() {
  const image = images[state.position];
  const labelled = Object.keys(state.labels).length;
  at("place").textContent = `Image ${state.position + 1} of ${images.length}, ${labelled} labelled`;
  at("done").max = images.length;
  at("done").value = labelled;
  const missing = document.createElement("p");
  missing.textContent = "This image was changed or deleted since it was scored: it can only be labelled “cannot tell”.";
  at("stage").replaceChildren(image.picture ? picture(image.picture, "the image to label") : missing);
  for (const button of at("labels").children) {
    button.setAttribute("aria-pressed", String(state.labels[image.number] === button.dataset.label));
    button.disabled = !image.picture && button.dataset.label !== "cannot_tell";
  }
  at("score").textContent = "";
  at("name").textContent = "";
  at("patch").replaceChildren();
  at("undo").disabled = state.order.length === 0;
  at("back").disabled = state.position === 0;
  at("next").disabled = state.position === images.length - 1;
}

function move(step) {
  state.position = Math.min(images.length - 1, Math.max(0, state.position + step));
  keep();
  draw();
}

function label(name) {
  const image = images[state.position];
  if (!image.picture && name !== "cannot_tell") return;
  state.labels[image.number] = name;
  state.order = [...state.order.filter((number) => number !== image.number), image.number];
  move(1);
  if (Object.keys(state.labels).length === images.length) notice("All images are labelled: save the labels.");
}

function undo() {
  const number = state.order.pop();
  if (number === undefined) return;
  delete state.labels[number];
  state.position = images.findIndex((image) => image.number === number);
  move(0);
}

function showScore() {
  const image = images[state.position];
  if (!(image.number in state.labels) && !state.scoreSeen.includes(image.number)) state.scoreSeen.push(image.number);
  keep();
  at("score").textContent = image.score;
  at("name").textContent = image.key;
  if (image.patch) at("patch").replaceChildren(picture(image.patch, "the image with the scored patch, and the patch"));
}

function rows() {
  return images
    .filter((image) => image.number in state.labels)
    .map((image) => ({
      number: image.number,
      label: state.labels[image.number],
      score_seen: state.scoreSeen.includes(image.number),
    }));
}

function save(text, kind, ending) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: kind }));
  link.download = `labels-${content.audit}${ending}`;
  link.click();
}

function saveJson() {
  const labels = { schema: "patchscan-labels/1", audit: content.audit, reviewer: state.reviewer, labels: rows() };
  save(JSON.stringify(labels, null, 1), "application/json", ".json");
}

// A spreadsheet would take a cell that begins with such a character for a formula.
function cell(value) {
  const text = String(value);
  return `"${(/^[=+\-@\t\r]/.test(text) ? "'" : "") + text.replaceAll('"', '""')}"`;
}

function saveCsv() {
  const lines = rows().map((row) => [row.number, row.label, row.score_seen ? 1 : 0, content.audit, state.reviewer]);
  const table = [["number", "label", "score_seen", "audit", "reviewer"], ...lines];
  save(table.map((line) => line.map(cell).join(",") + "\r\n").join(""), "text/csv", ".csv");
}

const keys = {
  r: () => label("real"),
  a: () => label("ai"),
  c: () => label("cannot_tell"),
  u: undo,
  s: showScore,
  ArrowLeft: () => move(-1),
  ArrowRight: () => move(1),
};
document.addEventListener("keydown", (event) => {
  if (event.target.tagName === "INPUT" || event.ctrlKey || event.metaKey || event.altKey) return;
  const action = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  action();
});
for (const button of at("labels").children) button.addEventListener("click", () => label(button.dataset.label));
at("back").addEventListener("click", () => move(-1));
at("next").addEventListener("click", () => move(1));
at("undo").addEventListener("click", undo);
at("show").addEventListener("click", showScore);
at("json").addEventListener("click", saveJson);
at("csv").addEventListener("click", saveCsv);
at("reviewer").value = state.reviewer;
at("reviewer").addEventListener("input", () => {
  state.reviewer = at("reviewer").value;
  keep();
});
state.position = Math.min(images.length - 1, Math.max(0, Number(state.position) || 0));
draw();
