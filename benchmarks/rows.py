"""How a step's time grows with its rows and with the images' size, and where the knee is.

    python benchmarks/rows.py [--model NAME=SOURCE] [--device cpu] [--plot docs/images/rows.png]

Whole steps as the engine runs them, by `Engine.profile`, of the model's native size and of a few others.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from workload import quiet, surroundings

from calotype_worker.engine import Engine, EngineSettings
from calotype_worker.engine.profile import Profile
from calotype_worker.models import load_model
from calotype_worker.threads import apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="NAME or NAME=SOURCE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sides", type=int, nargs="*", default=[64, 128, 192, 256], help="of square images")
    parser.add_argument("--max-rows", type=int, default=32)
    parser.add_argument("--compile", choices=["off", "default", "reduce-overhead"], default="off")
    parser.add_argument("--seconds", type=float, default=20.0, help="for all sizes together")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rows.json"))
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    quiet()
    name, _, source = options.model.partition("=")
    model = apart(lambda: load_model(name, source=source or None, device=options.device))
    profiles = []
    for side in options.sides:
        # The engine scales its rows to the native area: here each size is native in turn, so that all try as many.
        model.card = model.card.model_copy(update={"native_sizes": ((side, side),)})
        engine = Engine(model, EngineSettings(max_rows=options.max_rows, compile=options.compile))
        profiles += engine.profile(seconds=options.seconds / len(options.sides))
        print(profiles[-1].width, profiles[-1].knee, flush=True)
    result = {
        "command": f"benchmarks/rows.py --model {options.model} --device {options.device} --compile {options.compile}",
        **surroundings(options.device),
        "sizes": [
            {
                "pixels": f"{profile.width}x{profile.height}",
                "knee_rows": profile.knee.rows,
                "milliseconds_by_rows": {point.rows: round(point.seconds * 1e3, 2) for point in profile.points},
            }
            for profile in profiles
        ],
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        plot(profiles, options.plot)


def plot(profiles: list[Profile], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
    for profile in profiles:
        rows = [point.rows for point in profile.points]
        label = f"{profile.width}x{profile.height}"
        [line] = left.plot(rows, [point.seconds * 1e3 for point in profile.points], "o-", label=label)
        best = max(point.rate for point in profile.points)
        right.plot(rows, [point.rate / best for point in profile.points], "o-", color=line.get_color(), label=label)
        knee = profile.knee
        right.plot([knee.rows], [knee.rate / best], "s", ms=11, mfc="none", mec=line.get_color())
    left.set(xscale="log", yscale="log", xlabel="rows of a step", ylabel="ms a step", title="Time of a step")
    right.set(xscale="log", xlabel="rows of a step", ylabel="share of the best", title="Rows a second; squares: knee")
    right.set_ylim(0, 1.05)
    for axes in (left, right):
        axes.set_xticks([1, 2, 4, 8, 16, 32], labels=["1", "2", "4", "8", "16", "32"])
        axes.grid(alpha=0.3)
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
