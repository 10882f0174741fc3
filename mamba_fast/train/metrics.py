"""What a run measured: JSON lines that can be taken up again, and the curve drawn from them."""

import json
import math
import os
from pathlib import Path

LOSS, VALIDATION = "#0072B2", "#D55E00"
TIMES = ("seconds", "tokens_per_s")  # the fields of a line that differ from run to run


class Metrics:
    """The lines of metrics.jsonl, one a logged step; on disk as soon as they are added."""

    def __init__(self, path, upto):
        """Keep the lines of steps up to `upto`: the rest of the run will write the others again."""
        self.path = Path(path)
        self.lines = [line for line in read_metrics(path) if line["step"] <= upto]
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text("".join(json.dumps(line) + "\n" for line in self.lines), "utf-8")
        os.replace(unfinished, self.path)

    def add(self, line):
        """Append one line. What is no number (inf, nan) becomes null, as JSON wants it."""
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line, allow_nan=False) + "\n")


def read_metrics(path):
    """The whole lines of a file of metrics, as dicts; an unfinished last one is left out."""
    path = Path(path)
    if not path.exists():
        return []
    *whole, _ = path.read_text("utf-8").split("\n")
    return [json.loads(line) for line in whole]


def draw_curve(lines, path):
    """Draw loss over steps, and the validation loss if there is one, to `path`."""
    import matplotlib.pyplot as plt

    style = Path(__file__).parents[2] / "notebooks" / "style.mplstyle"
    with plt.style.context(style if style.exists() else "default"):
        figure, ax = plt.subplots()
        for key, name, look in (
            ("loss", "training, one batch", {"color": LOSS, "lw": 1}),
            ("validation_loss", "validation", {"color": VALIDATION, "marker": "o", "ms": 4}),
        ):
            shown = [line for line in lines if line.get(key) is not None]
            if shown:
                ax.plot([line["step"] for line in shown], [line[key] for line in shown], label=name, **look)
        last = next((line for line in reversed(lines) if line.get("loss") is not None), None)
        if last:
            ax.set_title(f"Loss {last['loss']:.3g} nats a token after {last['step']} steps")
            ax.legend()
            losses = [line["loss"] for line in lines if line.get("loss")]
            if losses and max(losses) > 20 * min(losses):
                ax.set_yscale("log")
        ax.set(xlabel="optimizer step", ylabel="cross-entropy (nats a token)")
        figure.savefig(path)
        plt.close(figure)
