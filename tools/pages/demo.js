// The demo: asks the server (tools/server.py) for traces, shows them as they come, and edits them.

const data = JSON.parse($("data").textContent);
const fields = ["text", "strategy", "steps", "temperature", "guidance", "length", "seed"];
const player = new Player();
let trace = new Trace();
let fixed = new Map(); // the tokens that stay when the rest is regenerated, by position
let request; // of the generation that is under way

// --- Asking --------------------------------------------------------------------------------------

async function post(path, body, signal) {
  const headers = { "content-type": "application/json" };
  const options = { method: "POST", headers, body: JSON.stringify(body), signal };
  const response = await fetch(path, options);
  if (!response.ok) throw new Error((await response.json()).error);
  return response;
}

/** The server-sent events of a response, one after the other. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const [, event, json] = part.match(/^event: (\w+)\ndata: (.*)$/);
      yield [event, JSON.parse(json)];
    }
  }
}

function settings() {
  const values = { strategy: $("strategy").value };
  for (const name of ["steps", "temperature", "guidance", "seed"]) {
    values[name] = Number($(name).value);
  }
  return values;
}

/** Generate what is asked for; a later request, or Stop, ends an earlier one. */
async function generate(wanted) {
  request?.abort();
  const mine = (request = new AbortController());
  const values = { ...settings(), ...wanted };
  busy(true);
  complain("");
  try {
    const response = await post("/generate", values, mine.signal);
    begin(values);
    let over = false;
    for await (const [event, message] of events(response)) {
      if (event === "error") throw new Error(message.error);
      if (event === "done") over = finish(values, message);
      else receive(message);
    }
    if (!over) throw new Error("the server has gone");
  } catch (error) {
    if (mine.signal.aborted) $("status").textContent = "stopped";
    else complain(error instanceof TypeError ? "the server does not answer" : error.message);
    if (request === mine) trace.live = false;
  }
  if (request === mine) busy(false);
}

function begin(values) {
  trace = new Trace();
  trace.live = true;
  trace.expected = data.strategies[values.strategy] ? values.steps : 0;
}

function receive(message) {
  trace.push(message);
  if (message.given === undefined) return;
  fixed = new Map(trace.given.flatMap((token, i) => (token === BLANK ? [] : [[i, token]])));
  $("result").hidden = false;
  player.load(trace);
  if (!calm) player.play();
}

function finish(values, { calls, seconds, label }) {
  trace.live = false;
  const cost = `${plural(calls, "network call")}, ${seconds.toFixed(2)} seconds`;
  $("status").textContent = `${cost} · ${label} · seed ${values.seed}`;
  $("seed").value = values.seed + 1;
  if (calm) player.go(player.end);
  return true;
}

function busy(is) {
  document.body.classList.toggle("busy", is);
  $("stop").hidden = !is;
  $("again").disabled = is;
  if (is) $("status").textContent = "generating …";
}

function complain(sentence) {
  $("error").hidden = !sentence;
  $("error").textContent = sentence;
}

// --- Editing -------------------------------------------------------------------------------------

const editable = () => !trace.live && trace.left.at(-1) === 0;

player.override = (cells) => {
  if (!editable()) return;
  for (const [i, token] of fixed) {
    if (cells[i].token !== token) cells[i] = { token, given: true, yours: true, step: 0 };
  }
};
player.marks = (i) => {
  if (!editable() || fixed.has(i)) return editable() ? "kept" : "";
  return trace.given[i] === BLANK ? "" : "loose";
};

player.details = (i, cell) => {
  if (!editable()) return [];
  const box = make("form", "edit");
  const keep = box.appendChild(make("button", "", fixed.has(i) ? "let it change" : "keep it"));
  keep.type = "button";
  keep.onclick = () => {
    if (!fixed.delete(i)) fixed.set(i, cell.token);
    player.pin(i);
    player.elements[i].focus();
  };
  const text = box.appendChild(make("input"));
  Object.assign(text, { placeholder: "or type instead", maxLength: 500 });
  text.setAttribute("aria-label", "type instead");
  box.onsubmit = (event) => {
    event.preventDefault();
    type(i, text.value);
  };
  return [box];
};

player.choose = (i, token) => {
  if (!editable()) return;
  fixed.set(i, token);
  player.go(player.end);
  player.elements[i].focus();
};

/** Put the tokens of a typed text in the place of those from position i on. */
async function type(i, text) {
  if (!text) return;
  complain("");
  try {
    const { ids, texts } = await (await post("/tokens", { text })).json();
    ids.slice(0, trace.given.length - i).forEach((id, k) => {
      if (!trace.ids.includes(id)) {
        trace.ids.push(id);
        trace.texts.push(texts[k]);
      }
      fixed.set(i + k, trace.ids.indexOf(id));
    });
    player.go(player.end);
    player.elements[i].focus();
  } catch (error) {
    complain(error.message);
  }
}

$("again").onclick = () => {
  const canvas = trace.given.map((_, i) => (fixed.has(i) ? trace.ids[fixed.get(i)] : null));
  generate({ canvas });
};

// --- The form ------------------------------------------------------------------------------------

for (const name of Object.keys(data.strategies)) {
  $("strategy").append(new Option(name.replaceAll("_", " "), name));
}
for (const name of fields) $(name).value = data.defaults[name];
const { steps, length, largest } = data.limits;
const most = { steps, length, temperature: largest, guidance: largest };
for (const [name, value] of Object.entries(most)) $(name).max = value;
$("subtitle").textContent = data.subtitle;
$("strategy").onchange = () => ($("steps").disabled = !data.strategies[$("strategy").value]);
$("blank").onclick = () => {
  const text = $("text");
  text.setRangeText("[MASK*8]", text.selectionStart, text.selectionEnd, "end");
  text.focus();
};
$("form").onsubmit = (event) => {
  event.preventDefault();
  const text = $("text").value;
  const blanks = /\[MASK(\*\d+)?\]/.test(text);
  generate(blanks ? { text } : { text, length: Number($("length").value) });
};
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
};
$("stop").onclick = () => request.abort();
