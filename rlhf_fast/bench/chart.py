"""One PNG per op: a panel per case, a bar per candidate, its time over ours on a log axis. No bar for the reference."""

from pathlib import Path

from rlhf_fast.bench.record import cell

#: The colour of a candidate, by how its name begins; grey otherwise.
COLOURS = {
    "ours": "#0b6e4f", "cpp": "#2f9e77", "cuda": "#2f9e77", "triton": "#6cc3a0",
    "compile": "#c8553d", "eager": "#8d99ae",
}  # fmt: skip


def draw(op: str, device: str, rows: list[dict], path: Path) -> None:
    """Draw ``rows`` of ``op`` as measured on ``device`` into ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    wide = 2 if len(rows) <= 12 else 3
    high = -(-len(rows) // wide)
    rows = [row | {"ratios": {n: r for n, r in row["ratios"].items() if n != "reference"}} for row in rows]
    bars = max(len(row["ratios"]) for row in rows) + 1
    size = 5 * wide, 0.9 + high * (0.62 + 0.2 * bars)
    figure, grid = pyplot.subplots(high, wide, figsize=size, sharex=True, squeeze=False, layout="constrained")
    figure.suptitle(f"{op}: time relative to ours, on {device}", fontsize=12, fontweight="bold")
    ratios = [1.0, *(ratio for row in rows for ratio in row["ratios"].values())]
    grid[0, 0].set_xlim(0.5 * min(ratios), 2 * max(ratios))
    for panel, row in zip(grid.flat, rows, strict=False):
        _panel(panel, row, bars)
    for panel in list(grid.flat)[len(rows) :]:
        panel.set_visible(False)
    for column in range(min(wide, len(rows))):
        panel = grid[(len(rows) - 1 - column) // wide, column]
        panel.tick_params(labelbottom=True)
        panel.set_xlabel("times ours (log scale, shorter is faster)", fontsize=8)
    figure.savefig(path, dpi=100 if wide == 2 else 80)
    pyplot.close(figure)
    _few_colours(path)


def _panel(panel, row: dict, bars: int) -> None:
    """One case: ours on top, the others from the fastest down."""
    times = {"ours": 1.0} | dict(sorted(row["ratios"].items(), key=lambda item: item[1]))
    places = range(len(times))
    colours = [next((c for start, c in COLOURS.items() if name.startswith(start)), "#c9a227") for name in times]
    panel.barh(places, [max(t, 1e-3) for t in times.values()], color=colours, height=0.72, left=0)
    panel.set_xscale("log")
    panel.set_yticks(places, list(times), fontsize=8)
    panel.set_ylim(bars - 0.4, -0.6)
    panel.axvline(1, color="black", linewidth=0.6)
    for place, (name, ratio) in enumerate(times.items()):
        text = f"{_duration(row['us'])}" if name == "ours" else f"{cell(ratio)}×"
        panel.annotate(text, (ratio, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7.5)
    title = f"{row['case']}   {cell(row['GB/s'])} GB/s, {cell(row['% copy'])} % of a copy"
    panel.set_title(title, fontsize=8.5, loc="left")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()
    panel.tick_params(axis="x", labelsize=7.5)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _duration(microseconds: float) -> str:
    return f"{microseconds:.3g} µs" if microseconds < 1000 else f"{microseconds / 1000:.3g} ms"


def _few_colours(path: Path) -> None:
    """Bring the file down to a third: a chart needs no more than 16 colours."""
    from PIL import Image

    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(16, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
