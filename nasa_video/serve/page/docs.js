// Renders openapi.json: every address with its parameters and bodies.

import { element } from "./timeline.js";

const main = document.getElementById("paths");
const answer = await fetch("openapi.json");
if (answer.ok) {
  const api = await answer.json();
  const intro = element("p", "", api.info.description);
  main.replaceChildren(intro, ...Object.entries(api.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, call]) => article(api, path, method, call)),
  ));
} else {
  main.replaceChildren(element("p", "notice", "This server needs its token; enter it on the live page first."));
}

function article(api, path, method, call) {
  const made = element("article", "");
  const head = element("h2", "");
  head.append(element("code", "", `${method.toUpperCase()} ${path}`));
  made.append(head, element("p", "", call.summary));
  const body = call.requestBody?.content?.["application/json"]?.schema;
  if (body) {
    const schema = expanded(api, body, 3);
    made.append(element("p", "hint", "Body (JSON):"), element("pre", "", JSON.stringify(schema, null, 2)));
  }
  const codes = Object.entries(call.responses).map(([code, { description }]) => `${code} ${description}`);
  made.append(element("p", "hint", `Answers: ${codes.join(" · ")}`));
  return made;
}

function expanded(api, schema, depth) {
  if (schema?.$ref && depth) return expanded(api, api.components.schemas[schema.$ref.split("/").at(-1)], depth - 1);
  if (Array.isArray(schema)) return schema.map((part) => expanded(api, part, depth));
  if (schema === null || typeof schema !== "object") return schema;
  return Object.fromEntries(
    Object.entries(schema).filter(([key]) => key !== "title").map(([key, part]) => [key, expanded(api, part, depth)]),
  );
}
