"""`mvit-export tune`: find the best recipe of an int8 file, or with --latency the best form, by measuring."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from mvit_export.cli.bench import median_words
from mvit_export.cli.codes import EXIT_CODES
from mvit_export.cli.help import FILES, FORMS, MEASURE, RECIPES
from mvit_export.cli.options import (
    BenchmarkBinary,
    Device,
    DevicePython,
    Json,
    Quiet,
    TrustCode,
    Verbose,
    session,
)
from mvit_export.cli.terminal import Terminal, megabytes, status_text
from mvit_export.errors import UsageError

if TYPE_CHECKING:
    from mvit_export.benchmarks.tuning.form_search import Choice, Setup, Tried
    from mvit_export.benchmarks.tuning.recipe_search import Search

RECIPE_OPTIONS = ("data", "calibration", "max_drop", "candidates", "limit")
FORM_OPTIONS = ("runtime", "device", "device_python", "benchmark_binary", "overwrite")
RECIPE_BUDGET, FORM_BUDGET = 5.0, 30.0  # seconds; a search has many candidates, forms are few and lie close together


def tune(
    ctx: typer.Context,
    artifact: Annotated[Path, typer.Argument(help="Artifact to make faster: fp32, or with --latency also fp16.")],
    latency: Annotated[
        bool,
        typer.Option(
            "--latency", help="Choose the form of a MobileViT by its latency; needs no pictures.", rich_help_panel=FORMS
        ),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Labelled pictures to measure accuracy on: one folder per class, or .npz.", rich_help_panel=RECIPES
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Pictures to find ranges on, different from those of --data.", rich_help_panel=RECIPES),
    ] = None,
    max_drop: Annotated[
        float, typer.Option(help="Points of top-1 that may be lost.", min=0.0, rich_help_panel=RECIPES)
    ] = 1.0,
    candidates: Annotated[
        int, typer.Option(help="Try at most this many recipes.", min=3, rich_help_panel=RECIPES)
    ] = 40,
    limit: Annotated[
        int | None,
        typer.Option(help="Use at most this many pictures to measure accuracy.", min=1, rich_help_panel=RECIPES),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Recipes: folder of the search (tune); a search that was stopped continues. "
            "Forms: the artifact that is kept (ARTIFACT-tuned).",
            rich_help_panel=FILES,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace --out, or without it ARTIFACT itself.", rich_help_panel=FORMS)
    ] = False,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="Runtime as for bench, NAME[:OPTION], e.g. litert:gpu (the format's own).", rich_help_panel=FORMS
        ),
    ] = None,
    device: Device = "local",
    device_python: DevicePython = None,
    benchmark_binary: BenchmarkBinary = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="At most this many seconds of timing for each file (5; --latency: 30).",
            min=0.1,
            rich_help_panel=MEASURE,
        ),
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of the runtime.", min=1, rich_help_panel=MEASURE)] = 1,
    trust_code: TrustCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Find what is fastest by measuring: int8 recipes, or with --latency the form of an fp32 or fp16 file.

    Recipes are searched on accuracy and latency; the front and the best recipe are written. Forms are the same function
    written in other ways: each is proven and timed where it will run, and the fastest becomes the artifact.
    """
    with session(as_json, quiet, verbose) as terminal:
        if latency:
            refuse_given(ctx, RECIPE_OPTIONS, "does not apply to --latency; leave it out")
            from mvit_export.benchmarks.tuning.form_search import Setup

            setup = Setup(device, device_python, benchmark_binary, runtime, threads, budget or FORM_BUDGET)
            status = choose_form(terminal, artifact, setup, out, overwrite=overwrite)
        else:
            refuse_given(ctx, FORM_OPTIONS, "applies only to tune --latency; pass --latency too, or leave it out")
            if data is None or calibration is None:
                raise UsageError("tune takes --data and --calibration to search recipes, or --latency to choose a form")
            from mvit_export.benchmarks.tuning.recipe_search import open_search
            from mvit_export.data.pictures import open_labelled, open_pictures

            open_labelled(data)  # what cannot be read is said now, not by every candidate
            open_pictures(calibration)
            search = open_search(
                artifact, data=data, calibration=calibration, max_drop=max_drop, folder=out or Path("tune"),
                limit=limit, budget_s=budget or RECIPE_BUDGET, candidates=candidates, threads=threads,
            )  # fmt: skip
            status = search_recipes(terminal, search)
        raise typer.Exit(EXIT_CODES[status])


def refuse_given(ctx: typer.Context, names: tuple[str, ...], why: str) -> None:
    """Refuse options of the other mode that were given on the command line, whatever their value."""
    for name in names:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"--{name.replace('_', '-')} {why}")


# Recipes


def search_recipes(terminal: Terminal, search: Search) -> str:
    """Run the search and print what it found; pass if a recipe stays within the allowed drop."""
    from mvit_export.benchmarks.tuning import recipe_search

    with terminal.progress("tune") as step:
        outcomes, errors = recipe_search.tune(search, on_step=lambda what: step(f"tune {what}"))
    front, best = recipe_search.pareto(outcomes), recipe_search.best_of(search, outcomes)
    for line in recipe_search.table(outcomes, front).splitlines():
        terminal.print(line)
    for error in errors:
        terminal.print(f"refused  {error}")
    if best is None:
        terminal.print(f"FAIL  no recipe of {len(outcomes)} keeps the loss within {search.max_drop:g} points of top-1")
    else:
        terminal.print(f"best: {best.recipe.name}, {best.drop:.2f} points lost, {recipe_search.describe_cost(best)}")
        terminal.print(f"Next:  mvit-export --to {search.format} --like {search.base.path} --precision int8 \\")
        terminal.print(f"         --recipe {search.folder / 'best.toml'} --calibration {search.calibration}")
    status = "pass" if best else "fail"
    terminal.print_json({"status": status, **recipe_search.document(search, outcomes, errors)})
    return status


# Forms


def choose_form(terminal: Terminal, artifact: Path, setup: Setup, out: Path | None, *, overwrite: bool) -> str:
    """Try the forms, keep the fastest, print the result of each."""
    from mvit_export.benchmarks.tuning.form_search import tune_forms

    with terminal.progress("tune") as step:
        choice = tune_forms(
            artifact, setup=setup, out=out, overwrite=overwrite, on_step=lambda what: step(f"tune {what}")
        )
    for tried in choice.tried:
        print_form(terminal, tried, own=choice.tried[0].form)
    for note in notes(choice):
        terminal.print("  ", Text("note", style="bold yellow"), note)
    terminal.print(verdict(choice))
    terminal.print_json(choice.to_json())
    return choice.status


def print_form(terminal: Terminal, tried: Tried, *, own: str) -> None:
    """One form: its time relative to the artifact's own, its parity, its size; or why it has none of these."""
    label = status_text(tried.status) if tried.status in EXIT_CODES else Text("left out", style="bold")
    parts = [tried.form]
    if tried.row:
        parts.append(median_words(tried.row))
        parts.append(f"{tried.ratio} times the time of {own}" if tried.ratio else "as the artifact is")
    if tried.psnr_db is not None:
        parts.append(f"parity {tried.psnr_db:.1f} dB")
    if tried.bytes is not None:
        parts.append(megabytes(tried.bytes))
    if tried.reason:
        parts.append(tried.reason if tried.row or tried.status == "left-out" else f"not timed: {tried.reason}")
    terminal.print(label, "  ".join(parts))


def notes(choice: Choice) -> list[str]:
    """What a reader of the figures needs to know."""
    found = [f"{tried.form}: {warning}" for tried in choice.tried if tried.row for warning in tried.row.warnings]
    if choice.setup.runtime and ":" in choice.setup.runtime and choice.kept:
        checked = ", ".join(dict.fromkeys(check.runtime for check in choice.kept.checks if check.runtime))
        found.append(f"parity was checked in {checked}; in {choice.setup.runtime} only the time was measured")
    return found


def verdict(choice: Choice) -> str:
    own, kept = choice.tried[0], choice.kept
    if kept is None:
        return f"nothing was chosen or written: {choice.base.path} itself has no latency here"
    where = (
        f"{choice.runtime} on {choice.setup.device}, {choice.setup.threads} thread{'s' * (choice.setup.threads > 1)}"
    )
    if kept is own:
        return f"chosen: {own.form}, no other form is shown to be faster in {where}; written to {choice.place}"
    return f"chosen: {kept.form}, {kept.ratio} times the time of {own.form} in {where}; written to {choice.place}"
