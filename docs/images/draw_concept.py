"""
Draws `concept.svg`, the picture of the two streams and the descent: `python docs/images/draw_concept.py`.

Written out as SVG, so that it follows the reader's light or dark theme. Standard library only.
"""

import math
from pathlib import Path


WIDTH, HEIGHT = 980, 490
TOKENS = ("To", "be", "or", "not")
GUESSES = ("be", "or", "not", "to")
COLUMNS = (100, 230, 360, 490)  # centres of the positions
SHOWN = 2  # the position whose attention is drawn in full
CONTEXT_Y, CANDIDATE_Y, ENERGY_Y = 372, 214, 108
BOX = (92, 44)
STEPS = 3

STYLE = """
  .paper { fill: #ffffff; stroke: #d0d4dc; }
  text { font: 14px system-ui, sans-serif; fill: #1f2430; }
  .title { font-size: 17px; font-weight: 600; }
  .small { font-size: 12.5px; fill: #5a6272; }
  .middle { text-anchor: middle; }
  .context { fill: #e4ecfb; stroke: #4f74c8; }
  .candidate { fill: #fdeedd; stroke: #d9822b; }
  .bar { fill: #d9822b; }
  .energy { fill: #fbe3e6; stroke: #c23b4e; }
  .faint { stroke: #a9b6d3; fill: none; }
  .look { stroke: #4f74c8; fill: none; stroke-width: 1.8; }
  .own { stroke: #d9822b; fill: none; stroke-width: 1.8; }
  .down { stroke: #c23b4e; fill: none; stroke-width: 1.8; }
  .axis { stroke: #8b93a3; fill: none; }
  .curve { stroke: #1f2430; fill: none; stroke-width: 2; }
  .ball, .down-head { fill: #c23b4e; }
  .look-head { fill: #4f74c8; }
  .own-head { fill: #d9822b; }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #1e2129; stroke: #3a3f4c; }
    text { fill: #e6e9f0; }
    .small { fill: #a8b0c0; }
    .context { fill: #26355a; stroke: #86a6ee; }
    .candidate { fill: #4a3420; stroke: #f0a95c; }
    .bar { fill: #f0a95c; }
    .energy { fill: #4d262d; stroke: #f08a99; }
    .faint { stroke: #4a567a; }
    .look { stroke: #86a6ee; }
    .own { stroke: #f0a95c; }
    .down { stroke: #f08a99; }
    .axis { stroke: #737b8c; }
    .curve { stroke: #e6e9f0; }
    .ball, .down-head { fill: #f08a99; }
    .look-head { fill: #86a6ee; }
    .own-head { fill: #f0a95c; }
  }
"""


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Words with their base line at (x, y)."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{words}</text>'


def box(x: float, y: float, kind: str) -> str:
    """A box with its centre at (x, y)."""
    width, height = BOX
    where = f'x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width}" height="{height}"'
    return f'<rect {where} rx="8" class="{kind}"/>'


def path(moves: str, kind: str, arrow: str = "") -> str:
    """A line; `arrow` names the head at its end."""
    head = f' marker-end="url(#{arrow})"' if arrow else ""
    return f'<path d="{moves}" class="{kind}"{head}/>'


def heads() -> list[str]:
    """Arrow heads, one for every colour."""
    size = 'markerWidth="9" markerHeight="9" refX="7" refY="4" orient="auto" markerUnits="userSpaceOnUse"'
    names = ("look-head", "own-head", "down-head")
    return [f'<marker id="{name}" {size}><path d="M0,0 L8,4 L0,8 z" class="{name}"/></marker>' for name in names]


def bars(x: float, base: float, shares: list[float], height: float, width: float = 9) -> list[str]:
    """A distribution as bars, centred at x, standing on `base`; the whole height is a share of one."""
    left = x - len(shares) * (width + 3) / 2
    return [
        f'<rect x="{left + i * (width + 3):.1f}" y="{base - share * height:.1f}" width="{width}" '
        f'height="{share * height:.1f}" class="bar"/>'
        for i, share in enumerate(shares)
    ]


def softmax(logits: list[float]) -> list[float]:
    """A distribution from logits."""
    powers = [math.exp(value) for value in logits]
    return [power / sum(powers) for power in powers]


def candidates() -> list[list[float]]:
    """The same candidate before the first step and after each: a descent of E(p) = -w p with residual updates."""
    weights, logits = [0.2, 1.0, 0.5, -0.3, 0.0], [0.0] * 5
    states = [softmax(logits)]
    for _ in range(STEPS):
        logits = [value + 1.3 * weight for value, weight in zip(logits, weights, strict=True)]
        states.append(softmax(logits))
    return states


def streams() -> list[str]:
    """Left: who looks at whom, and what an energy belongs to."""
    parts = [text(24, 38, "Two streams, one set of weights", "title")]
    after = candidates()
    for i, x in enumerate(COLUMNS):
        shown = i == SHOWN
        for j in range(i):  # the context stream is an ordinary causal transformer
            bow = CONTEXT_Y + 26 + 14 * (i - j)
            moves = f"M{x - 8},{CONTEXT_Y + 22} Q{(x + COLUMNS[j]) / 2:g},{bow + 16} {COLUMNS[j] + 8},{CONTEXT_Y + 22}"
            parts.append(path(moves, "faint"))
        for j in range(i + 1):
            start, end = COLUMNS[j] + 6 * (i - 1.5), x + 7 * (j - i)
            moves = f"M{start:g},{CONTEXT_Y - 22} L{end:g},{CANDIDATE_Y + 26}"
            parts.append(path(moves, "look" if shown else "faint", "look-head" if shown else ""))
        parts += [box(x, CONTEXT_Y, "context"), text(x, CONTEXT_Y + 5, TOKENS[i], "middle")]
        parts += [box(x, CANDIDATE_Y, "candidate"), *bars(x, CANDIDATE_Y + 18, after[2], 48)]
        parts.append(f'<circle cx="{x}" cy="{ENERGY_Y}" r="17" class="energy"/>')
        parts.append(text(x, ENERGY_Y + 5, "E", "middle"))
        parts.append(path(f"M{x - 8},{CANDIDATE_Y - 24} L{x - 8},{ENERGY_Y + 19}", "own", "own-head"))
        parts.append(path(f"M{x + 8},{ENERGY_Y + 18} L{x + 8},{CANDIDATE_Y - 25}", "down", "down-head"))
        parts.append(text(x, ENERGY_Y - 24, f"for “{GUESSES[i]}”", "small middle"))
    x, y = COLUMNS[SHOWN] + 46, CANDIDATE_Y
    loop = f"M{x},{y - 10} C{x + 30},{y - 20} {x + 30},{y + 24} {x + 3},{y + 11}"
    parts += [path(loop, "own", "own-head"), text(x - 32, ENERGY_Y + 50, "gradient", "small")]
    parts.append(
        text(24, HEIGHT - 42, "Blue, the context stream: a causal transformer, read once and cached.", "small")
    )
    words = "Orange, the candidate stream: each sees the context so far, and itself."
    parts.append(text(24, HEIGHT - 22, words, "small"))
    return parts


def landscape(x: float) -> float:
    """The energy drawn on the right: one valley, with a shoulder."""
    return 0.5 * (x - 2.4) ** 2 + 0.35 * math.cos(2.2 * x)


def walk(start: float = 0.3, step_size: float = 0.25) -> list[float]:
    """Gradient descent on `landscape`."""
    points = [start]
    for _ in range(STEPS):
        x = points[-1]
        points.append(x - step_size * (x - 2.4 - 0.77 * math.sin(2.2 * x)))
    return points


def descent() -> list[str]:
    """Right: the walk down, and the candidate after every step."""
    left, top, width, height = 616, 88, 330, 172

    def place(x: float) -> tuple[float, float]:
        return left + 14 + x * 78, top + height - 22 - 45 * (landscape(x) + 0.35)

    parts = [text(590, 38, "The descent of one candidate", "title")]
    parts.append(path(f"M{left},{top} V{top + height} H{left + width}", "axis"))
    parts.append(text(left - 6, top - 12, "energy E", "small"))
    parts.append(text(left + width - 62, top + height + 17, "candidate", "small"))
    curve = [place(0.15 + i / 40 * 3.7) for i in range(41)]
    parts.append(path("M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in curve), "curve"))
    points = [place(x) for x in walk()]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        bend = f"{(x0 + x1) / 2 + 16:.1f},{(y0 + y1) / 2 - 26:.1f}"
        moves = f"M{x0 + 6:.1f},{y0 - 8:.1f} Q{bend} {x1 + 2:.1f},{y1 - 9:.1f}"
        parts.append(path(moves, "down", "down-head"))
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" class="ball"/>' for x, y in points]
    for i, shares in enumerate(candidates()):
        x = left + 38 + i * 82
        parts += [path(f"M{x - 32},{370} H{x + 32}", "axis"), *bars(x, 370, shares, 80)]
        parts.append(text(x, 390, "start" if i == 0 else f"step {i}", "small middle"))
    parts.append(text(left - 22, HEIGHT - 42, "The candidate is a distribution over the next token.", "small"))
    parts.append(text(left - 22, HEIGHT - 22, "It starts knowing nothing; its last state is the prediction.", "small"))
    return parts


def draw() -> str:
    """The picture as SVG."""
    title = "The context is read once; every candidate sees the context and itself, gets an energy, and descends it"
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    paper = f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="12" class="paper"/>'
    rule = path(f"M572,24 V{HEIGHT - 24}", "axis")
    parts = [opening, f"<title>{title}</title>", f"<style>{STYLE}</style>", "<defs>", *heads(), "</defs>", paper, rule]
    return "\n".join([*parts, *streams(), *descent(), "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_name("concept.svg").write_text(draw(), encoding="utf-8")
