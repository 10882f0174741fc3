"""python -m mamba_fast.bench scan [--device cuda|cpu] [--peer] [--backend NAME] [--out FILE]"""

import argparse
import datetime
import json
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mamba_fast.bench import scan

BENCHES = {"scan": scan}


def main():
    parser = argparse.ArgumentParser(prog="python -m mamba_fast.bench", description=__doc__)
    parser.add_argument("name", choices=sorted(BENCHES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peer", action="store_true", help="time the published kernel too (needs mamba_ssm)")
    parser.add_argument("--backend", help="time this backend alone")
    parser.add_argument("--out", type=Path, help="default: docs/results/NAME-DEVICE.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    bench = BENCHES[options.name]
    rows = bench.run(device, options.peer, options.backend)
    facts = machine(device)
    slug = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    out = options.out or Path("docs/results") / f"{options.name}-{slug}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts | {"checks": "passed", "rows": rows}, indent=1) + "\n")
    print(bench.report(rows))
    print(f"{facts['device']}, {facts['date']}, torch {facts['torch']}; checks passed; written to {out}")


def machine(device):
    """Device, date, versions and commit, so that a number can be traced."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else f"cpu {torch.get_num_threads()} threads",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
        **{name: _version(name) for name in ("triton", "numba", "mamba_ssm")},
    }


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
