// The viewer: the traces that the file holds.

const data = JSON.parse($("data").textContent);
const traces = data.traces.map((messages) => new Trace(messages));
const player = new Player();

function choose(number) {
  if (!traces[number]) return;
  [...$("samples").children].forEach((tab, i) => tab.setAttribute("aria-pressed", i === number));
  player.load(traces[number]);
  if (calm) player.go(player.end);
  else player.play();
}

$("subtitle").textContent = data.subtitle;
$("samples").hidden = traces.length < 2;
traces.forEach((_, number) => {
  const tab = $("samples").appendChild(make("button", "", `sample ${number + 1}`));
  tab.onclick = () => choose(number);
});
document.addEventListener("keydown", (event) => {
  if (/^[1-9]$/.test(event.key)) choose(event.key - 1);
});
choose(0);
