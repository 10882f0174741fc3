"""Pictures of speed: wrong clocks, a queue of kernels, the roof, measured times under it."""

import matplotlib.pyplot as plt
import numpy as np

from mamba_ref.plots import COLORS

UNITS = {  # name of a unit of the chip: colour, label
    "memory": (COLORS["other"], "memory"),
    "special": (COLORS["decay"], "exponentials"),
    "issue": (COLORS["y"], "instructions"),
}
MARKERS = {"forward": "o", "backward": "D"}
TOO_LONG, TOO_SHORT = COLORS["delta"], COLORS["u"]


def wrong_numbers(ax, ratios):
    """Bars from 1 to (time read) / (true time), one for each entry of `ratios`."""
    for row, ratio in enumerate(ratios.values()):
        color = TOO_LONG if ratio > 1 else TOO_SHORT
        ax.plot([1, ratio], [row, row], color=color, lw=9, solid_capstyle="butt")
        off = max(ratio, 1 / ratio)
        text = f"{off:,.0f} times" if off >= 10 else f"{off:.1f} times" if off >= 1.2 else f"{off - 1:.0%}"
        at = {"xytext": (6 if ratio > 1 else -6, 0), "textcoords": "offset points", "va": "center"}
        ax.annotate(text, (ratio, row), ha="left" if ratio > 1 else "right", color=color, **at)
    ax.axvline(1, color=COLORS["reference"], lw=1.2)
    low, high = min(ratios.values()), max(ratios.values())
    ax.set(xscale="log", xlim=(low / 30, high * 30), xlabel="time read / true time")
    ax.set_yticks(range(len(ratios)), ratios)
    ax.set_ylim(len(ratios) - 0.4, -0.9)
    ax.text(1.3, -0.65, "looks slow", color=TOO_LONG, va="center")
    ax.text(1 / 1.3, -0.65, "looks fast", color=TOO_SHORT, va="center", ha="right")
    ax.grid(axis="y", visible=False)
    ax.minorticks_off()


def timelines(axes, queues):
    """Host and device over time, one panel each; queues: {title: spans}.

    spans (n, 4): as `roofline.queue` returns them, in microseconds.
    """
    for ax, (title, spans) in zip(axes, queues.items(), strict=True):
        for row, first, color in ((1, 0, "0.6"), (0, 2, COLORS["h"])):
            bars = [(span[first], span[first + 1] - span[first]) for span in spans]
            bars = [bar for bar in bars if bar[1] > 0]
            ax.broken_barh(bars, (row - 0.3, 0.6), facecolor=color, edgecolor="white", lw=0.8)
        host, device = spans[-1, 1], spans[-1, 3]
        for time, label, side in ((host, "host done ", "right"), (device, " device done", "left")):
            ax.axvline(time, ymax=0.83, color=COLORS["reference"], lw=1.1, ls=":")
            ax.text(time, 1.72, label, ha=side, va="center", fontsize=9)
        ax.set(ylim=(-0.5, 2.05), xlim=(0, 1.2 * device), xlabel="time (µs)", title=title)
        ax.set_yticks([1, 0], ["host", "device"])
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="y", visible=False)


def by_states(axes, states, least, measured, colors):
    """Time of one (b, d, t) against N: what each unit needs, and what kernels took; all in seconds.

    axes: one a direction. least: {direction: [{unit: seconds} for each of states]}. measured:
    [(direction, kernel, N, seconds)], N rising; colors: {kernel: colour}.
    """
    for ax, (direction, needs) in zip(axes, least.items(), strict=True):
        ax.fill_between(states, [1e12 * max(need.values()) for need in needs], 1e-3, color="0.93", lw=0)
        curves = [(states, [need[unit] for need in needs], "-", *UNITS[unit]) for unit in UNITS]
        for name in dict.fromkeys(row[1] for row in measured):
            counts, seconds = zip(*[row[2:] for row in measured if row[:2] == (direction, name)], strict=True)
            curves.append((counts, seconds, "o-", colors[name], name))
        for counts, seconds, line, color, label in curves:
            times = [1e12 * second for second in seconds]
            ax.plot(counts, times, line, color=color, ms=5, lw=2 if line == "-" else 1, clip_on=False)
            ax.text(counts[-1] * 1.1, times[-1], label, color=color, va="center", clip_on=False)
        ax.set(xscale="log", yscale="log", title=direction, xlabel="states N", xlim=(states[0], states[-1]))
        ax.set_xticks(states, states)
        ax.minorticks_off()
    top = 1e12 * max(seconds for *_, seconds in measured)
    axes[0].set(ylabel="time per (b, d, t) (ps)", ylim=(0.1, 2 * top))


def roofline(axes, speeds, groups, measured):
    """Two roofs: operations per byte against operations a second, for exponentials and for instructions.

    speeds: {unit: amount a second}. groups: {name: [((text, dx, dy, side), work), ...]} with a label
    for each mark and work {unit: amount}. measured: [(work, seconds, colour, label)]. An open mark is
    the most that all units together allow: it touches the roof only over the unit that binds it.
    """
    for ax, unit in zip(axes, ("special", "issue"), strict=True):
        color, label = UNITS[unit]
        ridge = speeds[unit] / speeds["memory"]
        left, right = ridge / 150, ridge * 20
        ax.plot([left, ridge], [left * speeds["memory"], speeds[unit]], color=UNITS["memory"][0], lw=3)
        ax.plot([ridge, right], [speeds[unit]] * 2, color=color, lw=3)
        ax.fill_between([left, ridge, right], [left * speeds["memory"], *[speeds[unit]] * 2],
                        1e20, color="0.93", lw=0)  # fmt: skip
        for name, points in groups.items():
            found = [(work[unit] / work["memory"], best(work, speeds, unit), text) for text, work in points]
            found = [point for point in found if point[0] > 0]
            ax.plot([p[0] for p in found], [p[1] for p in found], MARKERS.get(name, "s"), mfc="white", ms=6,
                    color=COLORS["reference"], zorder=3)  # fmt: skip
            for px, py, (text, dx, dy, side) in found:
                ax.annotate(text, (px, py), (dx, dy), textcoords="offset points", ha=side, fontsize=9)
        for work, seconds, dot, text in measured:
            if work[unit]:
                px, py = work[unit] / work["memory"], work[unit] / seconds
                ax.plot([px, px], [py, best(work, speeds, unit)], color="0.6", lw=0.8, zorder=2)
                ax.plot(px, py, "o", color=dot, ms=6, zorder=4)
                ax.annotate(text, (px, py), (7, -3), textcoords="offset points", color=dot, fontsize=9)
        ax.set(xscale="log", yscale="log", xlim=(left, right), ylim=(speeds[unit] / 80, speeds[unit] * 3))
        ax.set(xlabel=f"{label} per byte", ylabel=f"{label} per second", title=f"the roof of the {label}")
        ax.minorticks_off()


def best(work, speeds, unit):
    """The most of `unit` a second that a kernel can do while every unit keeps up."""
    return work[unit] / max(work[name] / speeds[name] for name in speeds)


def over_limit(entries, colors):
    """Time over limit, a line a case, a dot a kernel. Returns the figure.

    entries: [(heading, case, direction, {kernel: time / limit})], in the order of the lines; colors:
    {kernel: colour}.
    """
    lines = list(dict.fromkeys(entry[:2] for entry in entries))
    labels = []  # a line for each heading, then one for each of its cases
    for heading in dict.fromkeys(heading for heading, _ in lines):
        labels += [(heading, None), *(line for line in lines if line[0] == heading)]
    directions = list(dict.fromkeys(entry[2] for entry in entries))
    size = (9.2, 1.1 + 0.2 * len(labels))
    figure, axes = plt.subplots(1, len(directions), figsize=size, sharey=True, squeeze=False)
    for heading, case, direction, kernels in entries:
        ax, row = axes[0, directions.index(direction)], labels.index((heading, case))
        ax.plot([min(kernels.values()), max(kernels.values())], [row, row], color="0.8", lw=1, zorder=1)
        for name, ratio in kernels.items():
            ax.plot(ratio, row, "o", color=colors[name], ms=6, label=name)
    for ax, direction in zip(axes[0], directions, strict=True):
        ax.axvline(1, color=COLORS["reference"], lw=1.4)
        ax.set(xscale="log", title=direction, xlabel="time / limit")
        ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500) if tick < ax.get_xlim()[1]]
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
        ax.tick_params(axis="y", length=0)
    axes[0, 0].set_yticks(range(len(labels)), [case or heading for heading, case in labels], fontsize=8)
    for text, (_, case) in zip(axes[0, 0].get_yticklabels(), labels, strict=True):
        text.set_weight("normal" if case else "bold")
    axes[0, 0].set_ylim(len(labels) - 0.4, -0.6)
    shown = {}
    for ax in axes[0]:
        shown |= {name: dot for dot, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown, loc="outside upper center", ncols=len(shown))
    return figure


def two_ratios(ax, points):
    """Ratio to the rival against ratio to the limit; points: {direction: [(rival / ours, ours / limit)]}."""
    for (direction, pairs), marker in zip(points.items(), ("o", "D"), strict=False):
        ax.plot(*zip(*pairs, strict=True), marker, color=COLORS["h"], mfc="none" if marker == "D" else None,
                ms=5, ls="", label=direction)  # fmt: skip
    ax.axvline(1, color=COLORS["reference"], lw=1)
    ax.axhline(1, color=COLORS["reference"], lw=1)
    ax.set(xscale="log", yscale="log", xlabel="published time / our time", ylabel="our time / limit")
    ax.legend(loc="upper left", fontsize=9)
    for axis, ticks in ((ax.xaxis, (0.5, 1, 2, 3, 5)), (ax.yaxis, (1, 2, 5, 10, 20, 50))):
        axis.set_ticks(ticks, ticks)
    ax.minorticks_off()


def host_and_device(ax, points, colors):
    """Host time against device time; points: {name: [(device, host)]}, in ms.

    Above the line an eager call takes the host's time.
    """
    for name, pairs in points.items():
        ax.plot(*zip(*pairs, strict=True), "o", color=colors[name], ms=5, label=name)
    ends = np.array([pair for pairs in points.values() for pair in pairs])
    low, high = ends.min() / 2, ends.max() * 2
    ax.plot([low, high], [low, high], color=COLORS["reference"], lw=1)
    ax.text(1.3 * low, high / 2.2, "launching takes longer", va="top")
    ax.text(high / 1.3, 1.6 * low, "computing takes longer", ha="right")
    ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    ax.set(xlabel="device time (ms)", ylabel="host time (ms)")
    ax.legend(loc="upper left", bbox_to_anchor=(0, 0.9), fontsize=9)
    ax.minorticks_off()
