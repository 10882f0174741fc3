"""Shared figures. One quantity has one colour in every notebook (colour-blind-safe palette)."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.font_manager import findfont, get_font

COLORS = {
    "u": "#0072B2",  # input
    "delta": "#D55E00",  # step size, and the gate it makes
    "h": "#009E73",  # state
    "decay": "#E69F00",  # A_bar = exp(delta A)
    "y": "#CC79A7",  # output
    "g": "#882255",  # gradient: whatever flows backward
    "other": "#56B4E9",  # a second implementation, or a comparison
    "reference": "#000000",  # the reference, exact values, limits
}
SIGNS = {9: "\u2192", 10: "\u21b5", 13: " "}  # tab, end of line, carriage return


def use_style():
    """Apply notebooks/style.mplstyle where the repository is at hand; otherwise keep the defaults."""
    style = Path(__file__).parent.parent / "notebooks" / "style.mplstyle"
    if style.exists():
        plt.style.use(style)


def byte_labels(data):
    """One character a byte that the monospace font can draw.

    A control character gets a sign of its own, one that the font lacks a "?", and every byte inside
    a longer character a blank.
    """
    font = get_font(findfont("monospace"))
    labels = []
    for k, byte in enumerate(data):
        if byte & 0xC0 == 0x80:  # the rest of a character that began before
            labels.append(" ")
        elif byte >= 0x80:
            character = data[k : k + 4].decode(errors="ignore")[:1]
            labels.append(character if character and font.get_char_index(ord(character)) else "?")
        else:
            labels.append(SIGNS.get(byte) or (chr(byte) if 32 <= byte < 127 else "?"))
    return labels


def shades(name):
    """A colormap from white to the colour of one quantity of COLORS."""
    return LinearSegmentedColormap.from_list(f"to_{name}", ["white", COLORS[name]])


def token_axis(ax, labels, size=9):
    """Write one label a token under the axis, or leave plain numbers where there are no labels."""
    if labels is None:
        ax.set_xlabel("token t")
        return
    ax.set_xticks(range(len(labels)), labels, family="monospace", fontsize=size)
    ax.tick_params(axis="x", length=0, pad=2)


def delta_strip(ax, delta, labels=None, size=9):
    """Δ (L,) of one channel as a row of cells on a log scale, with each token's label in its cell."""
    low = delta[delta > 0].min(initial=delta.max()) or 1.0  # a step of 0 stays white
    high = max(delta.max(), 1.01 * low)
    image = ax.imshow(delta[None], aspect="auto", cmap=shades("delta"), norm=LogNorm(low, high))
    for t, label in enumerate(labels or []):
        ax.text(t, 0, label, ha="center", va="center", family="monospace", fontsize=size)
    ax.set(yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.01, aspect=4, ticks=[low, high], format="%.1g")
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)


def state_map(ax, states):
    """States (L, N) of one channel over time, each row up to 2.5 times its rms: green + and purple -."""
    scaled = states.T / np.maximum(2.5 * np.sqrt((states**2).mean(0)), 1e-30)[:, None]
    image = ax.imshow(scaled, aspect="auto", cmap="PRGn", vmin=-1, vmax=1, origin="lower")
    rows = states.shape[1]
    ticks = np.unique(np.linspace(0, rows - 1, min(rows, 4)).round().astype(int))
    ax.set_yticks(ticks, ticks + 1)
    ax.set_ylabel("state number n")
    ax.grid(False)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.01, aspect=20, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["-", "0", "+"])
    bar.outline.set_visible(False)


def liveliest(seen, batch=0):
    """The channel of a Trace to look at: its Δ moves, and its state, not the skip D u, makes the output."""
    moves = np.log(np.maximum(seen.delta[batch], 1e-30)).std(-1)  # (D,)
    skip = seen.D[:, None] * seen.u[batch]
    carried = (seen.y[batch] - skip).std(-1)
    return int(np.argmax(moves * carried / (carried + skip.std(-1) + 1e-30)))


def plot_comparison(seen, y, labels, what, source, verdict, path, tokens=96):
    """Save the picture of a comparison: Δ, the state of one channel, both outputs and their difference.

    seen: the reference's Trace. y (B, D, L): the candidate's output. labels: a character a token, or
    None. what, source, verdict: the candidate, its inputs and the judgement on y, for the headings.
    The first row's liveliest channel is drawn, its first `tokens` tokens where they carry labels.
    Returns the channel.
    """
    use_style()
    channel = liveliest(seen)
    shown = slice(0, tokens if labels else None)
    labels = labels[shown] if labels else None
    want, got = seen.gated[0, channel, shown], y[0, channel, shown]
    figure, axes = plt.subplots(4, 1, figsize=(12, 6.6), height_ratios=[0.45, 2.3, 1.7, 0.7], sharex=True)
    strip, heat, outputs, apart = axes
    heading = f"{what} beside the reference: {source}, channel {channel} of {seen.u.shape[1]}"
    figure.suptitle(heading, x=0.01, ha="left", weight="bold", size=11)

    delta_strip(strip, seen.delta[0, channel, shown], labels)
    strip.set_title("step size Δ: a dark token writes much and forgets much")
    state_map(heat, seen.states[0, channel, shown])
    heat.set_title("state h, each row in its own scale: slow rows (small n) smear, fast rows flicker")
    outputs.plot(got, color=COLORS["y"], lw=5, alpha=0.6, label=what)
    outputs.plot(want, color=COLORS["reference"], lw=1.1, label="reference")
    outputs.set(ylabel="y")
    outputs.set_title("output y, gated")
    outputs.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 0.97), borderaxespad=0)
    difference = np.abs(got - want)
    top = difference[np.isfinite(difference)].max(initial=0)
    apart.bar(range(len(want)), difference, width=1, color=COLORS["other"], lw=0)
    apart.set_title(f"|difference| of the two outputs; over all of y: {verdict}")
    apart.set_ylim(0, 1.05 * top or 1)
    apart.set_yticks([0, top] if top else [0], ["0", f"{top:.0e}"][: 2 if top else 1])
    token_axis(apart, labels)
    for ax in axes:
        ax.set_xlim(-0.5, len(want) - 0.5)
        ax.tick_params(axis="x", length=0)
        ax.grid(axis="x", visible=False)
    figure.savefig(path)
    plt.close(figure)
    return channel
