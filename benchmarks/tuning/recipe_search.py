"""`mvit-export tune`: which parts may lose bits. Recipes are tried, measured for accuracy and latency, and compared.

The search is greedy, on measurements alone:

1. the named recipes of the format;
2. from the fastest of them, each kind of work and each part of the network made float by itself: how much accuracy it
   restores, how much time it costs;
3. from the fastest again, parts made float one after another, the best bargain first, until the loss of accuracy is
   within what is allowed or the budget of candidates is spent.

Every candidate is exported, evaluated and timed by the commands that a user would run, each in its own process. Its
record stays in the candidate's folder, so that a search that was killed goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mvit_export.artifact import Artifact, find_artifacts, read_artifact, write_json
from mvit_export.errors import MvitExportError, UsageError, printable, require
from mvit_export.formats.recipes import KINDS, Recipe, Rule, write_toml
from mvit_export.formats.table import FORMATS
from mvit_export.system.files import write_whole
from mvit_export.system.reading import read_json

RECORD = "candidate.json"
COMMAND_TIMEOUT = 3600.0
Step = Callable[[str], None]
Run = Callable[[Sequence[str]], dict[str, Any]]


class CandidateFailed(MvitExportError):
    """A recipe that the converter refuses, or a file that cannot be run: recorded, and the search goes on."""


@dataclass(frozen=True)
class Outcome:
    """What a recipe achieved. `drop` is in points of top-1 below fp32, `ratio` of latency to the fp32 file."""

    recipe: Recipe
    path: str
    bytes: int
    top1: float
    drop: float
    mean_kl: float
    ratio: float | None  # None where latency cannot be measured here
    interval: tuple[float, float] | None

    @property
    def cost(self) -> float:
        """What should be small: time if it could be measured, else bytes."""
        return self.bytes if self.ratio is None else self.ratio


@dataclass(frozen=True)
class Search:
    """What to tune and where its records lie. `base` is the fp32 artifact that everything is compared with."""

    base: Artifact
    data: Path
    calibration: Path
    max_drop: float
    folder: Path
    limit: int | None = None  # pictures to evaluate on
    budget_s: float = 5.0  # of each candidate's latency
    candidates: int = 40
    threads: int = 1

    @property
    def format(self) -> str:
        return self.base.manifest.format


def open_search(path: Path, **options: Any) -> Search:
    """Raises UsageError unless `path` is one fp32 artifact."""
    place, *others = find_artifacts(path)
    base = read_artifact(place)
    found = "several" if others else "a .ort file" if base.manifest.target.ort else base.manifest.precision
    if found != "fp32":
        raise UsageError(f"tune starts from one fp32 artifact, {path} is {found}")
    return Search(base, **options)


def run_command(arguments: Sequence[str]) -> dict[str, Any]:
    """The JSON of `mvit-export ARGUMENTS --json`. Raises CandidateFailed with the command's own line."""
    command = [sys.executable, "-m", "mvit_export", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT)
    if done.returncode in (0, 1, 3):  # a failed check of parity or of a gate is a result
        return json.loads(done.stdout)
    try:
        said = json.loads(done.stdout)["error"]["message"]
    except (ValueError, KeyError):  # it was killed
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    raise CandidateFailed(printable(said, 300))


def tune(search: Search, *, on_step: Step = lambda _: None, run: Run = run_command) -> tuple[list[Outcome], list[str]]:
    """Try recipes: every outcome, and the refusals in words. Writes the front and best recipe to `search.folder`."""
    require("matplotlib", extra="report", purpose="to draw the front")  # now, not after the work
    trial = Trial(search, on_step, run)
    named = trial.all(list(FORMATS[search.format].recipes.values()))
    if not named:
        raise UsageError(f"no recipe could be exported and measured; the first error: {trial.errors[0]}")
    fastest = min(named, key=lambda outcome: outcome.cost)
    trial.all(ablations(fastest.recipe, parts_of(search.base)))
    trial.all(greedy(trial, fastest))
    write_front(search, trial.outcomes, trial.errors)
    return trial.outcomes, trial.errors


class Trial:
    """Candidates of one search: each is made once, and found again after a restart."""

    def __init__(self, search: Search, on_step: Step, run: Run) -> None:
        self.search, self.on_step, self.run = search, on_step, run
        self.outcomes: list[Outcome] = []
        self.errors: list[str] = []

    def all(self, recipes: Sequence[Recipe] | Iterator[Recipe]) -> list[Outcome]:
        found = []
        for recipe in recipes:
            if len(self.outcomes) + len(self.errors) >= self.search.candidates:
                break
            outcome = self.measure(recipe)
            if outcome is not None:
                found.append(outcome)
        return found

    def measure(self, recipe: Recipe) -> Outcome | None:
        """The outcome of one recipe, from its record if it has one; None if the recipe failed."""
        place = self.search.folder / folder_name(recipe)
        self.on_step(f"{len(self.outcomes) + 1}: {recipe.name}")
        record = read_record(place / RECORD, self.key)
        if record is None:
            try:
                record = self.make(recipe, place)
            except CandidateFailed as error:
                record = {"error": str(error)}
            place.mkdir(parents=True, exist_ok=True)
            write_json(place / RECORD, {"key": self.key, "recipe": recipe.to_json(), **record})
        if "error" in record:
            self.errors.append(f"{recipe.name}: {record['error']}")
            return None
        interval = tuple(record["interval"]) if record["interval"] else None
        figures = {name: record[name] for name in ("path", "bytes", "top1", "drop", "mean_kl", "ratio")}
        self.outcomes.append(Outcome(recipe, **figures, interval=interval))
        return self.outcomes[-1]

    @property
    def key(self) -> dict[str, Any]:
        """What a record was made with: a different data set or different weights make it another search."""
        search, manifest = self.search, self.search.base.manifest
        return {
            "weights": manifest.weights.state_sha256, "format": search.format, "data": os.path.realpath(search.data),
            "calibration": os.path.realpath(search.calibration), "limit": search.limit, "threads": search.threads,
        }  # fmt: skip

    def make(self, recipe: Recipe, place: Path) -> dict[str, Any]:
        """Export, evaluate, time."""
        search, base = self.search, str(self.search.base.path)
        file = place / f"{recipe.name}.toml"
        place.mkdir(parents=True, exist_ok=True)
        write_whole(file, write_toml(recipe).encode())
        exported = self.run([
            "export", "--to", search.format, "--like", base, "--precision", "int8", "--recipe", str(file),
            "--calibration", str(search.calibration), "--out", str(place), "--overwrite", "--no-verify",
        ])["artifacts"][0]  # fmt: skip
        limit = ["--limit", str(search.limit)] if search.limit else []
        data = ["--data", str(search.data), *limit, "--reference", base]
        accuracy = self.run(["eval", base, exported["path"], *data])["results"]
        bench = ["bench", base, exported["path"], "--no-roofline", "--budget", str(search.budget_s)]
        latency = self.run([*bench, "--threads", str(search.threads)])["results"][1]
        ratio = latency["ratio"] or {"median": None, "interval": None}
        return {
            "path": exported["path"], "bytes": exported["bytes"], "top1": accuracy[1]["top1"],
            "drop": 100 * (accuracy[0]["top1"] - accuracy[1]["top1"]), "mean_kl": accuracy[1]["mean_kl"],
            "ratio": ratio["median"], "interval": ratio["interval"],
        }  # fmt: skip


# Which candidates


def ablations(recipe: Recipe, parts: Sequence[str]) -> list[Recipe]:
    """The recipe with each kind of work that it touches, then each part of the network, left in float by itself."""
    touched = [kind for kind in KINDS if any(kind in rule.kinds for rule in recipe.rules if rule.use != "float")]
    kinds = [rename(recipe.before(Rule("float", (kind,))), f"{recipe.name}-without-{kind}") for kind in touched]
    return kinds + [rename(recipe.before(part_rule(part)), f"{recipe.name}-without-{part}") for part in parts]


def part_rule(part: str) -> Rule:
    return Rule("float", modules=rf"{re.escape(part)}(\..*)?")


def rename(recipe: Recipe, name: str) -> Recipe:
    return replace(recipe, name=re.sub(r"[^A-Za-z0-9_]+", "-", name), note="found by mvit-export tune")


def greedy(trial: Trial, start: Outcome) -> Iterator[Recipe]:
    """From the start, add the rule of the best bargain each time, until the drop is small enough."""
    steps = [outcome for outcome in trial.outcomes if outcome.recipe.rules[1:] == start.recipe.rules]
    steps = sorted((o for o in steps if o.drop < start.drop), key=lambda o: bargain(start, o), reverse=True)
    rules: tuple[Rule, ...] = ()
    for count, step in enumerate(steps, start=1):
        if trial.outcomes[-1].drop <= trial.search.max_drop and count > 1:
            return
        rules = (step.recipe.rules[0], *rules)
        yield rename(start.recipe.before(*rules), f"{start.recipe.name}-greedy-{count}")


def bargain(start: Outcome, step: Outcome) -> float:
    """Points of accuracy gained for each per cent of cost; what costs nothing measurable is counted as 0.1 %."""
    return (start.drop - step.drop) / max(step.cost / start.cost - 1, 0.001)


def parts_of(artifact: Artifact, most: int = 12) -> list[str]:
    """Paths of the model's parts: modules are split into their children, the largest first, up to `most` parts."""
    from mvit_export.families.load import rebuild_model

    model = rebuild_model(artifact.manifest).module
    parts = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    parts = {name: count for name, count in parts.items() if count}
    while True:
        for name in sorted(parts, key=lambda part: -parts[part]):
            children = {
                f"{name}.{key}": count
                for key, child in model.get_submodule(name).named_children()
                if (count := sum(p.numel() for p in child.parameters()))
            }
            if children and len(parts) - 1 + len(children) <= most:
                del parts[name]
                parts |= children
                break
        else:
            return sorted(parts)


# What came out


def pareto(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those that no other beats in both accuracy and cost, the cheapest first."""
    front: list[Outcome] = []
    for outcome in sorted(outcomes, key=lambda o: (o.cost, o.drop)):
        if not front or outcome.drop < front[-1].drop:
            front.append(outcome)
    return front


def best_of(search: Search, outcomes: Sequence[Outcome]) -> Outcome | None:
    """The cheapest whose drop is allowed."""
    return min((o for o in outcomes if o.drop <= search.max_drop), key=lambda o: o.cost, default=None)


def document(search: Search, outcomes: Sequence[Outcome], errors: Sequence[str]) -> dict[str, Any]:
    """front.json: every outcome, which of them are on the front, and the best one's name."""
    front, best = pareto(outcomes), best_of(search, outcomes)
    rows = [asdict(o) | {"recipe": o.recipe.to_json(), "on_front": o in front} for o in outcomes]
    return {
        "base": str(search.base.path), "data": str(search.data), "max_drop": search.max_drop,
        "best": best and best.recipe.name, "outcomes": rows, "refused": list(errors),
    }  # fmt: skip


def write_front(search: Search, outcomes: Sequence[Outcome], errors: Sequence[str]) -> None:
    """front.json, front.md and front.svg; and best.toml, for `--recipe`, if a recipe stays within the drop."""
    front, best = pareto(outcomes), best_of(search, outcomes)
    write_json(search.folder / "front.json", document(search, outcomes, errors))
    write_whole(search.folder / "front.md", table(outcomes, front).encode())
    write_whole(search.folder / "front.svg", draw(search, outcomes, front))
    if best:
        note = f"top-1 drop {best.drop:.2f} points, {describe_cost(best)}, mean KL {best.mean_kl:.1e} on {search.data}"
        write_whole(search.folder / "best.toml", write_toml(replace(best.recipe, note=note)).encode())


def describe_cost(outcome: Outcome) -> str:
    if outcome.ratio is None or outcome.interval is None:
        return f"{outcome.bytes / 1e6:.2f} MB, latency not measured here"
    return "{:.3f} [{:.3f}, {:.3f}] of fp32's latency".format(outcome.ratio, *outcome.interval)


def table(outcomes: Sequence[Outcome], front: Sequence[Outcome]) -> str:
    """Markdown, the cheapest first; the front is marked."""
    lines = [
        "| recipe | on the front | top-1 drop, points | mean KL | latency to fp32 | MB |",
        "|---|---|---|---|---|---|",
    ]
    for o in sorted(outcomes, key=lambda outcome: outcome.cost):
        ratio = "-" if o.ratio is None or o.interval is None else "{:.3f} [{:.3f}, {:.3f}]".format(o.ratio, *o.interval)
        cells = [o.recipe.name, "yes" if o in front else "", f"{o.drop:.2f}", f"{o.mean_kl:.1e}", ratio]
        lines.append(f"| {' | '.join([*cells, f'{o.bytes / 1e6:.2f}'])} |")
    return "\n".join(lines) + "\n"


def draw(search: Search, outcomes: Sequence[Outcome], front: Sequence[Outcome]) -> bytes:
    """Accuracy lost against cost, the front as a line, as SVG."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter([o.cost for o in outcomes], [o.drop for o in outcomes], color="#888", label="tried")
    axes.plot(
        [o.cost for o in front], [o.drop for o in front], "o-", color="#0a7", drawstyle="steps-post", label="front"
    )
    for outcome in front:
        place = (outcome.cost, outcome.drop)
        axes.annotate(outcome.recipe.name, place, textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.axhline(search.max_drop, color="#c33", linestyle="--", linewidth=1, label="allowed")
    timed = any(o.ratio is not None for o in outcomes)
    axes.set_xlabel("latency, as a share of fp32's" if timed else "bytes")
    axes.set_ylabel("points of top-1 lost")
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


# Records


def folder_name(recipe: Recipe) -> str:
    digest = hashlib.sha256(write_toml(replace(recipe, name="", note="")).encode()).hexdigest()[:8]
    return f"{recipe.name}-{digest}"


def read_record(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """A candidate's record if it is whole and was made for the same search."""
    try:
        record = read_json(path)
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("key") == key else None
