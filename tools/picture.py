"""An animated SVG of a text that appears out of masks; without a script, it plays in an <img>, too.

CSS shows each token from the step on that revealed it, in a loop. Where animations are switched
off, the picture shows the finished text.
"""

from collections import defaultdict

from tools.page import escape
from tools.trace import BLANK, unpack

WIDE = 64  # columns
COLUMN, LINE, EDGE = 9, 24, 22  # a column's width, a line's height, a margin, in pixels
LEAD, PLAY = 7, 68  # per cent of a round before the first step, and for all steps
FLASH = 7  # per cent that a new token glows
FONT = "ui-monospace,'SF Mono','Cascadia Mono',Menlo,Consolas,'DejaVu Sans Mono',monospace"
LIGHT = {
    "paper": "#fffefb",
    "line": "#dedbd2",
    "ink": "#1d1d1f",
    "faint": "#66645e",
    "blank": "#e2dfd7",
    "accent": "#6a3df0",
}
DARK = {
    "paper": "#1b1d20",
    "line": "#33353a",
    "ink": "#e9e7e2",
    "faint": "#9a988f",
    "blank": "#2c2f34",
    "accent": "#a990ff",
}
Stay = tuple[int, int | None, str]  # from a step to another (None: the end), a token's text or ""


def draw(messages: list[dict], seconds: float) -> str:
    """The SVG of the messages that tools/trace.py sent of a text; a round takes `seconds`."""
    stays, steps = stays_of(messages), len(messages) - 1
    texts, grid = [position[-1][2] for position in stays], messages[0].get("grid")
    places, height = lay_out_grid(len(texts), *grid) if grid else lay_out(texts)
    shown = defaultdict(list)  # what is visible from one step to another
    for (column, line), position in zip(places, stays, strict=True):
        blank = len(position[-1][2])
        for start, end, text in position:
            shown[start, end, bool(text)].append((column, line, text, len(text) or blank))
    style, body = [], []
    for (start, end, is_text), cells in sorted(shown.items(), key=lambda item: item[0][2]):
        given = is_text and start == 0
        name = f"{'t' if is_text else 'm'}{start}_{'' if end is None else end}"
        style += [] if given else [lasting(name, start, end, steps)]
        body.append(group(name, cells, start if is_text else None))
        style += [glow(start, steps)] if is_text and start else []
    left = counts(stays, steps)
    for step, count in enumerate(left):
        end = None if step == steps else step + 1
        style.append(lasting(f"n{step}", step, end, steps))
        label = f"step {step} of {steps} · {count} mask{'s' * (count != 1)} left"
        body.append(f'<text class="n n{step}" x="{EDGE}" y="{height - 17}">{label}</text>')
    text = "".join(position[-1][2] for position in stays)
    return frame(text, height, style_sheet(style, steps, seconds), body)


def stays_of(messages: list[dict]) -> list[list[Stay]]:
    """What each position shows in turn; the last is a token."""
    texts, stays = [], []
    for step, message in enumerate(messages):
        texts += message.get("texts", [])
        if not step:
            given = unpack(message["given"])
            stays = [[(0, None, "" if n == BLANK else texts[n])] for n in given]
        revealed = unpack(message.get("set", ""))
        changes = [(i, texts[n]) for i, n in zip(revealed[::3], revealed[1::3], strict=True)]
        changes += [(i, "") for i in unpack(message.get("mask", ""))]
        for position, text in changes:
            start, _, before = stays[position].pop()
            stays[position] += [(start, step, before), (step, None, text)]
    return stays


def counts(stays: list[list[Stay]], steps: int) -> list[int]:
    """The number of masks left after 0, 1, ... steps."""
    masked = [(start, end) for position in stays for start, end, text in position if not text]
    return [
        sum(start <= step and (end is None or step < end) for start, end in masked)
        for step in range(steps + 1)
    ]


def lay_out(texts: list[str]) -> tuple[list[tuple[int, int]], int]:
    """The (column, line) of each token of a text, wrapped at its spaces, and the height."""
    places, column, line, word = [], 0, 0, 0  # `word`: the first token of the last word
    for number, text in enumerate(texts):
        word = number if len(text) > 1 and text[0].isspace() else word
        if column + len(text.rstrip()) > WIDE and column:
            line += 1
            moved = places[word:]
            start = moved[0][0] if moved and moved[0][0] else column
            places[word:] = [(c - start, line) for c, _ in moved] if start < column else moved
            column -= start
        places.append((column, line))
        column += len(text)
        if text[-1:].isspace():
            word = number + 1
        if text.endswith("\n"):
            column, line = 0, line + 1
    lines = 1 + max(line for _, line in places)
    return places, 2 * EDGE + lines * LINE + 34


def lay_out_grid(cells: int, side: int, high: int, wide: int) -> tuple[list, float]:
    """The same for a square, with gaps between boxes of `high` rows and `wide` columns."""
    places = []
    for cell in range(cells):
        row, column = divmod(cell, side)
        places.append((2 * column + column // wide, row + row // high / 3))
    return places, 2 * EDGE + (side + side / high / 3) * LINE + 34


def group(name: str, cells: list, step: int | None) -> str:
    """Cells that come and go together; of texts, step 0 is given, and others get their colour."""
    boxes, texts = [], []
    for column, line, text, width in cells:
        x, y = EDGE + column * COLUMN, EDGE + line * LINE
        boxes.append(f'<rect x="{x}" y="{y}" width="{width * COLUMN - 1}" height="20" rx="3"/>')
        drawn = [(k, c) for k, c in enumerate(text) if not c.isspace() and c.isprintable()]
        if drawn:
            xs = " ".join(f"{x + k * COLUMN + 4}" for k, _ in drawn)
            letters = escape("".join(c for _, c in drawn))
            texts.append(f'<text x="{xs}" y="{y + 15}">{letters}</text>')
    if step is None:
        return f'<g class="m {name}">{"".join(boxes)}</g>'
    if step == 0:
        return f'<g class="given">{"".join(texts)}</g>'
    boxes = "".join(boxes)
    return (
        f'<g class="{name}"><g class="c{step}">{boxes}</g><g class="f f{step}">{boxes}</g>'
        f"{''.join(texts)}</g>"
    )


def moment(step: int, steps: int) -> float:
    """When a step is shown, in per cent of a round."""
    return LEAD + PLAY * (step - 1) / max(1, steps - 1) if step else 0.0


def lasting(name: str, start: int, end: int | None, steps: int) -> str:
    """The rule that shows a class from one step until another."""
    a, frames = moment(start, steps), []
    frames += [f"0%,{a:.2f}%{{opacity:0}}{a + 0.01:.2f}%"] if start else ["0%"]
    if end is None:
        frames.append(",to{opacity:1}")
    else:
        b = moment(end, steps)
        frames.append(f",{b:.2f}%{{opacity:1}}{b + 0.01:.2f}%,to{{opacity:0}}")
    rest = "" if end is None else f".{name}{{opacity:0}}"
    return f"{rest}.{name}{{animation-name:{name}}}@keyframes {name}{{{''.join(frames)}}}"


def glow(step: int, steps: int) -> str:
    a = moment(step, steps)
    return (
        f".f{step}{{animation-name:f{step}}}@keyframes f{step}"
        f"{{0%,{a:.2f}%{{opacity:1}}{a + FLASH:.2f}%,to{{opacity:0}}}}"
    )


def style_sheet(rules: list[str], steps: int, seconds: float) -> str:
    def colours(theme: dict, lightness: float, more: float, chroma: float) -> str:
        names = "".join(f"--{name}:{value};" for name, value in theme.items())
        tints = "".join(
            f".c{step}{{fill:oklch({lightness + more * v:.3f} {chroma:.3f} {300 - 205 * v:.0f})}}"
            for step in range(1, steps + 1)
            for v in [step / steps]
        )
        return f"svg{{{names}}}{tints}"

    unique = "".join(dict.fromkeys(rules))
    return (
        f"{colours(LIGHT, 0.84, 0.09, 0.1)}"
        f"@media(prefers-color-scheme:dark){{{colours(DARK, 0.33, 0.19, 0.095)}}}"
        f"text{{font:15px {FONT};text-anchor:middle;fill:var(--ink)}}"
        ".given text{font-weight:700}.m{fill:var(--blank)}.f{fill:var(--accent);opacity:0}"
        ".n{font:13px system-ui,sans-serif;fill:var(--faint);text-anchor:start}"
        f"g,.n,.bar{{animation:{seconds:g}s linear infinite}}"
        ".bar{transform-origin:left;transform-box:fill-box;animation-name:bar}"
        f"@keyframes bar{{0%,{LEAD}%{{transform:scaleX(0)}}{LEAD + PLAY}%,to{{transform:none}}}}"
        f"{unique}@media(prefers-reduced-motion:reduce){{*{{animation:none!important}}}}"
    )


def frame(text: str, height: int, style: str, body: list[str]) -> str:
    width = 2 * EDGE + WIDE * COLUMN
    stops = "".join(f'<stop offset="{k / 8}" class="s{k}"/>' for k in range(9))
    ramp = "".join(f".s{k}{{stop-color:oklch(.7 .13 {300 - 205 * k / 8:.0f})}}" for k in range(9))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img"><title>A text appears out of masks</title>'
        f"<desc>{escape(text)}</desc><style>{style}{ramp}</style>"
        f'<defs><linearGradient id="ramp">{stops}</linearGradient></defs>'
        f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="10" '
        'fill="var(--paper)" stroke="var(--line)"/>'
        f"{''.join(body)}"
        f'<rect class="bar" x="{EDGE}" y="{height - 46}" width="{WIDE * COLUMN}" height="3" '
        'rx="1.5" fill="url(#ramp)"/></svg>\n'
    )
