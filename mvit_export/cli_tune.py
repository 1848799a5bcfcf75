"""`mvit-export tune`: the recipe that keeps the accuracy and costs least, found by measuring."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mvit_export.cli_base import EXIT_CODES, Json, Quiet, Verbose, session


def tune(
    artifact: Annotated[Path, typer.Argument(help="The fp32 artifact to make smaller and faster.")],
    data: Annotated[Path, typer.Option(help="Labelled pictures to measure on: one folder a class, or .npz.")],
    calibration: Annotated[Path, typer.Option(help="Pictures to find ranges on; others than those of --data.")],
    max_drop: Annotated[float, typer.Option(help="Points of top-1 that may be lost.", min=0.0)] = 1.0,
    out: Annotated[Path, typer.Option(help="Folder of the search; one that was stopped goes on.")] = Path("tune"),
    candidates: Annotated[int, typer.Option(help="Most recipes to try.", min=3)] = 40,
    limit: Annotated[int | None, typer.Option(help="Most pictures to measure accuracy on.", min=1)] = None,
    budget: Annotated[float, typer.Option(help="Seconds of latency for each file of a candidate.", min=0.1)] = 5.0,
    threads: Annotated[int, typer.Option(help="Threads of the runtime.", min=1)] = 1,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Search int8 recipes on accuracy and latency; write the front and the best recipe."""
    with session(as_json, quiet, verbose) as terminal:
        from mvit_export.benchmarks import tune as tuning

        search = tuning.open_search(
            artifact, data=data, calibration=calibration, max_drop=max_drop, folder=out, limit=limit, budget_s=budget,
            candidates=candidates, threads=threads,
        )  # fmt: skip
        with terminal.progress("tune") as step:
            outcomes, errors = tuning.tune(search, on_step=lambda what: step(f"tune {what}"))
        front, best = tuning.pareto(outcomes), tuning.best_of(search, outcomes)
        for line in tuning.table(outcomes, front).splitlines():
            terminal.print(line)
        for error in errors:
            terminal.print(f"refused  {error}")
        if best is None:
            terminal.print(f"FAIL  no recipe of {len(outcomes)} keeps the loss within {max_drop:g} points of top-1")
        else:
            terminal.print(f"best: {best.recipe.name}, {best.drop:.2f} points lost, {tuning.describe_cost(best)}")
            terminal.print(f"Next:  mvit-export --to {search.format} --like {artifact} --precision int8 \\")
            terminal.print(f"         --recipe {out / 'best.toml'} --calibration {calibration}")
        status = "pass" if best else "fail"
        terminal.print_json({"status": status, **tuning.document(search, outcomes, errors)})
        raise typer.Exit(EXIT_CODES[status])
