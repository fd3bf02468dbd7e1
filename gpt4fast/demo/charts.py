"""Charts as inline SVG that follow the page's colours, light or dark (matplotlib draws, CSS variables paint)."""

from __future__ import annotations

import io
import re

from gpt4fast.generation.plots import smooth

# matplotlib needs fixed colours; these stand for what the page's style sheet decides
_INK, _MUTED, _RULE = "#010101", "#020202", "#030303"
_SERIES = ("#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04")
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _RULE: "var(--rule)",
    **{colour: f"var(--series-{i + 1})" for i, colour in enumerate(_SERIES)},
}


def line_chart(
    name: str,
    series: dict[str, tuple[list[float], list[float]]],
    *,
    x_label: str,
    y_label: str,
    reference: tuple[float, str] | None = None,
) -> str:
    """SVG text of a line chart with one line per entry of `series`, {label: (x, y)}.

    Each line is drawn twice: the values as they were, faint, and their moving average on top.
    `reference` is a horizontal dashed line and its label. `name` must be unique in the page (it seeds the SVG's ids).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 9,
        "axes.edgecolor": _RULE,
        "axes.labelcolor": _MUTED,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "text.color": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
    }
    with matplotlib.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(4.7, 2.75), layout="constrained")
        longest = max((len(x) for x, _ in series.values()), default=0)
        for colour, (label, (x, y)) in zip(_SERIES, series.items(), strict=False):
            if longest > 40:
                axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.28)
            axes.plot(x, smooth(y, 0.9 if longest > 40 else 0.0), color=colour, linewidth=1.7, label=label)
        if reference is not None:
            level, text = reference
            axes.axhline(level, color=_MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
            axes.annotate(text, (1, level), xycoords=("axes fraction", "data"), xytext=(0, 3), ha="right",
                          textcoords="offset points", color=_MUTED, fontsize=8)  # fmt: skip
        if longest > 40:
            _leave_out_spikes(axes, [y for _, y in series.values()], [] if reference is None else [reference[0]])
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(axis="y", color=_RULE, linewidth=0.6)
        axes.tick_params(length=0)
        axes.margins(x=0.01)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))  # steps are whole
        if len(series) > 1:
            # above the axes: never over a line
            axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=len(series), frameon=False,
                        handlelength=1.2, columnspacing=1.4, borderaxespad=0.2)  # fmt: skip
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    return _themed(buffer.getvalue())


def _leave_out_spikes(axes, lines: list[list[float]], levels: list[float]) -> None:
    """Fits the axis to 98 % of the values and to `levels`, so that a few wild first steps don't flatten the rest."""
    values = sorted(value for line in lines for value in line)
    cut = len(values) // 100
    low, high = min([values[cut], *levels]), max([values[-1 - cut], *levels])
    margin = 0.06 * (high - low) or 1.0
    axes.set_ylim(low - margin, high + margin)
    if values[0] < low - margin or values[-1] > high + margin:
        axes.annotate("a few spikes reach further", (1, 1), xycoords="axes fraction", ha="right", va="top",
                      color=_MUTED, fontsize=7.5)  # fmt: skip


def _themed(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' width="[^"]*pt"| height="[^"]*pt"', "", svg, count=2)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    # the names of groups repeat from chart to chart; only what is referred to needs one
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"font: (\S+) [^;\"]*", r"font-size: \1", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg
