"use strict";

const at = (id) => document.getElementById(id);
const show = (id, visible) => { at(id).hidden = !visible; };

const WORDS = {
  real: ["Real", "real", "The detectors agree that this looks like a camera picture."],
  fake: ["Fake", "fake", "The detectors find traces of a generated or altered picture."],
  uncertain: ["Uncertain", "unsure", "The evidence is too weak for a verdict at the stated error rate."],
  no_verdict: ["No verdict", "unsure", "This picture cannot be judged."],
};
const REASONS = {
  no_face: "No face was found, and these detectors judge faces.",
  out_of_domain: "It is unlike anything the detectors were tested on.",
  too_small: "It is too small to carry traces.",
  unavailable: "Too few detectors could be reached; try it again.",
  failed: "Too few detectors could judge it, by an error of ours.",
};
const MISSING = {  // of one detector; the others judge
  unavailable: "could not be reached",
  failed: "broke off with an error of ours",
  no_face: "found no face",
  too_small: "needs a larger picture",
};

let asked = 0;  // the newest picture wins when several are dropped quickly
let thumbnail = "";

function percent(value) {
  if (value === null || value === undefined) return "–";
  const shown = value > 0.999 ? ">99.9" : value < 0.001 ? "<0.1" : (100 * value).toFixed(1);
  return `${shown} %`;
}

function element(name, className, text) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function bar(value, label) {
  const outer = element("div", "bar");
  outer.setAttribute("role", "img");
  outer.setAttribute("aria-label", label);
  const fill = element("span", "fill");
  fill.style.width = `${100 * value}%`;
  outer.append(fill);
  return outer;
}

function sentence(text) {
  return text ? `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}` : "";
}

function showProblem(title, detail, reason) {
  at("problem-title").textContent = title;
  at("problem-detail").textContent = sentence(detail);
  at("problem-reason").textContent = reason || "";
  show("problem", true);
  show("result", false);
}

function showDetectors(detectors) {
  const weights = detectors.map((one) => Math.abs(one.weight));
  const total = weights.reduce((sum, one) => sum + one, 0) || 1;
  at("detectors").replaceChildren(...detectors.map((one, index) => {
    const row = element("li");
    const name = element("span", "name", one.name);
    const answered = one.probability !== null;
    const note = answered ? `weight ${Math.round((100 * weights[index]) / total)} %` : (MISSING[one.reason] || `did not answer: ${one.reason}`);
    name.append(element("span", "small", note));
    row.append(name, element("span", "number", percent(one.probability)), bar(one.probability || 0, `${one.name}: ${percent(one.probability)} fake`));
    return row;
  }));
}

function errorRate(answer) {
  const share = answer.error_rate > 0 ? `at most about 1 in ${Math.max(1, Math.round(1 / answer.error_rate))}` : "none in the test";
  return `${percent(answer.error_rate)} (${share})`;
}

function showOrigin(origin) {
  if (!origin || !Object.values(origin).some((value) => value && String(value).length)) return "nothing";
  const said = [];
  if (origin.maker) said.push(`made by ${origin.maker}`);
  if (origin.digital_source_type) said.push(String(origin.digital_source_type).split("/").pop());
  if (origin.has_c2pa) said.push("Content Credentials present");
  return said.join(", ") || "some metadata; see the JSON";
}

function showVerdict(answer) {
  const [word, tone, meaning] = WORDS[answer.verdict];
  at("verdict").className = `tone-${tone}`;
  at("word").textContent = word;
  at("meaning").textContent = REASONS[answer.reason] || meaning;
  const known = answer.probability_fake !== null;
  show("scale", known);
  at("probability").textContent = percent(answer.probability_fake);
  at("probability-bar").setAttribute("aria-label", `Probability of fake: ${percent(answer.probability_fake)}`);
  at("probability-bar").firstElementChild.style.width = known ? `${100 * answer.probability_fake}%` : "0";
  showDetectors(answer.detectors);
  at("error-rate").textContent = errorRate(answer);
  at("model").replaceChildren(`${answer.model.name}, version ${answer.model.version} `, element("code", "", answer.model.digest.slice(0, 12)));
  at("seconds").textContent = `${answer.timings.total_ms.toFixed(0)} ms`;
  at("origin").textContent = showOrigin(answer.provenance);
  at("json").textContent = JSON.stringify(answer, null, 2);
  show("working", false);
  show("verdict", true);
  at("status").textContent = known ? `${word}. Probability of fake ${percent(answer.probability_fake)}.` : `${word}. ${at("meaning").textContent}`;
}

function showPicture(file) {
  if (thumbnail) URL.revokeObjectURL(thumbnail);
  thumbnail = URL.createObjectURL(file);
  at("thumbnail").src = thumbnail;
  at("thumbnail").alt = `The picture being judged: ${file.name || "pasted picture"}`;
  const size = file.size >= 1e6 ? `${(file.size / 1e6).toFixed(1)} MB` : `${Math.max(1, Math.round(file.size / 1e3))} kB`;
  at("caption").textContent = `${file.name || "pasted picture"}, ${size}`;
  at("form").classList.add("compact");
  show("problem", false);
  show("result", true);
  show("verdict", false);
  show("working", true);
  at("status").textContent = "Looking at the picture.";
}

async function judge(file) {
  const mine = ++asked;
  showPicture(file);
  try {
    const response = await fetch("v1/detect", {
      method: "POST", body: file, headers: { "Content-Type": file.type.startsWith("image/") ? file.type : "application/octet-stream" },
    });
    const answer = await response.json();
    if (mine !== asked) return;
    if (response.ok) showVerdict(answer);
    else showProblem(answer.title, answer.detail, `${answer.reason}, request ${answer.request_id}`);
  } catch (error) {
    if (mine === asked) showProblem("The service did not answer", "Check the connection and try the picture again.", String(error.message || error));
  }
}

function first(list) {
  return [...(list || [])].find((file) => file.type.startsWith("image/")) || [...(list || [])][0];
}

async function showService() {
  try {
    const { models } = await (await fetch("v1/models")).json();
    if (!models.length) return;
    const [model] = models;
    const names = model.members.map((member) => member.name).join(", ");
    at("service").textContent = `Serving ${model.name} version ${model.version} (${names}).`;
  } catch { /* the footer stays empty; a picture can still be tried */ }
}

at("file").addEventListener("change", (event) => { const file = first(event.target.files); if (file) judge(file); event.target.value = ""; });
at("form").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("paste", (event) => { const file = first(event.clipboardData.files); if (file) judge(file); });
document.addEventListener("dragover", (event) => { event.preventDefault(); at("form").classList.add("over"); });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) at("form").classList.remove("over"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  at("form").classList.remove("over");
  const file = first(event.dataTransfer.files);
  if (file) judge(file);
});
showService();
