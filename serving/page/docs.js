"use strict";

const node = (name, className, text) => {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};

function row(cells) {
  const line = node("tr");
  cells.forEach((text, index) => line.append(node(index ? "td" : "th", "", text)));
  return line;
}

function schemaName(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(schemaName).join(" or ");
  if (schema.enum) return schema.enum.join(" | ");
  if (schema.type === "array") return `list of ${schemaName(schema.items || {}) || "values"}`;
  return schema.type || "";
}

function fields(spec, name) {
  const schema = spec.components.schemas[name];
  if (!schema || !schema.properties) return null;
  const table = node("table");
  for (const [field, about] of Object.entries(schema.properties)) {
    table.append(row([field, schemaName(about), about.description || ""]));
  }
  return table;
}

function prose(text) {  // `code` in backticks
  const made = node("p");
  text.split("`").forEach((part, index) => made.append(index % 2 ? node("code", "", part) : part));
  return made;
}

function route(spec, path, method, operation) {
  const card = node("section", "card");
  card.id = operation.operationId;
  const title = node("h2");
  title.append(node("span", "method", method.toUpperCase()), node("code", "", path));
  card.append(title, prose(operation.description || operation.summary || ""));
  const answers = node("table");
  for (const [status, answer] of Object.entries(operation.responses)) {
    const kinds = Object.values(answer.content || {}).map((content) => schemaName(content.schema));
    answers.append(row([status, [...new Set(kinds.filter(Boolean))].join(", "), answer.description]));
  }
  card.append(answers);
  return card;
}

async function draw() {
  document.getElementById("example").textContent =
    `curl -H 'Content-Type: image/jpeg' --data-binary @picture.jpg ${location.origin}/v1/detect\ncurl -F file=@picture.png ${location.origin}/v1/detect`;
  const spec = await (await fetch("openapi.json")).json();
  const routes = document.getElementById("routes");
  for (const [path, methods] of Object.entries(spec.paths)) {
    for (const [method, operation] of Object.entries(methods)) routes.append(route(spec, path, method, operation));
  }
  for (const name of ["Verdict", "DetectorScore", "Problem"]) {
    const table = fields(spec, name);
    if (!table) continue;
    const card = node("section", "card");
    card.append(node("h2", "", name), table);
    routes.append(card);
  }
}

draw();
