"""The files that are compared: exported in fresh processes, wrapped as artifacts, and judged by parity.

A peer's file lies in a directory like those of our own, with our manifest's facts and our reference's golden vectors,
so that whatever reads artifacts accepts it.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mvit_export import export, load_model, save_weights
from mvit_export.artifact import GOLDEN, MANIFEST, Artifact, hash_files, now, read_artifact, write_json
from mvit_export.benchmarks.peers.exports import MISSING, PEERS, Peer, error_line
from mvit_export.benchmarks.peers.networks import build_network, check_same_logits, state_of
from mvit_export.benchmarks.tables.process_cost import Cost, cost_of
from mvit_export.benchmarks.tables.random_weights import randomize
from mvit_export.checks import parity
from mvit_export.data.preprocessing import FAMILY_PREPROCESSING
from mvit_export.errors import ArtifactError, ConversionError, MissingDependencyError, UsageError
from mvit_export.families.mobilevit.network import create_mobilevit
from mvit_export.formats.base import PLAIN
from mvit_export.formats.table import FORMATS
from mvit_export.formats.targets import Target
from mvit_export.readers.inspect import inspect_artifact
from mvit_export.results.status import FAIL, NOT_RUN, worst_status
from mvit_export.system.staging import staged_directory

OURS = "mvit-export"
VERDICTS = (0, 1, 3)  # exit codes of a command that wrote its file, whatever its check said: that is judged here
DEFAULT = "default"  # the form that a format has if none is asked for
CHECK_SIZE = 96  # of the images for comparing logits in PyTorch: the weights are the same at any size


@dataclass(frozen=True)
class Source:
    """One variant's weights, as a file in the names of each family; `refusals` says why a family's cannot be used."""

    variant: str
    folder: Path
    size: int  # of the image
    weights: dict[str, Path]
    refusals: dict[str, str]


@dataclass(frozen=True)
class File:
    """One row: a file, what its export took, and the verdict on it. `place` is its artifact's, if there is one.

    `export_s` and `export_mb` are of the bare export; `verified_s` and `verified_mb` of ours with its verification.
    """

    variant: str
    format: str
    name: str
    ours: bool
    status: str = NOT_RUN
    reason: str = ""
    place: str | None = None
    psnr_db: float | None = None
    bytes: int | None = None
    operators: int | None = None
    export_s: float | None = None
    export_mb: float | None = None
    verified_s: float | None = None
    verified_mb: float | None = None
    tools: Mapping[str, str] | None = None  # versions


@dataclass(frozen=True)
class Making:
    """How files are made. `forms`: ours, as in `--forms`; `runs`: how often an export is measured."""

    forms: Sequence[str] = (DEFAULT,)
    runs: int = 1
    onnx2tf_python: str = sys.executable


def prepare(variant: str, folder: Path, size: int) -> Source:
    """Random weights, saved in the names of every family and compared in PyTorch. Raises WeightsError."""
    folder.mkdir(parents=True, exist_ok=True)
    model = randomize(create_mobilevit(variant))
    weights = {OURS: folder / f"{OURS}.safetensors"}
    save_weights(model, weights[OURS], preprocessing=FAMILY_PREPROCESSING["hf"])
    refusals = {}
    for family in dict.fromkeys(peer.family for peer in PEERS):
        weights[family] = folder / f"{family}.safetensors"
        save_state(state_of(model.state_dict(), family, model.config), weights[family])
        try:
            check_same_logits(model, build_network(family, variant, weights[family]), CHECK_SIZE)
        except MissingDependencyError as error:
            refusals[family] = str(error)
    return Source(variant, folder, size, weights, refusals)


def save_state(state: dict[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({key: tensor.clone() for key, tensor in state.items()}, path)  # parts of a fused weight share memory


def make_files(source: Source, fmt: str, making: Making) -> Iterator[File]:
    """Ours first, then the peers', each judged as soon as it is there."""
    ours = [judge(export_ours(source, fmt, form, making.runs)) for form in forms_of(fmt, making.forms)]
    yield from ours
    like = next((read_artifact(Path(file.place)) for file in ours if file.place), None)
    if like is None:
        raise ConversionError(f"none of ours could be exported to {fmt}: {ours[0].reason}")
    for peer in PEERS:
        if peer.format == fmt:
            yield judge(export_peer(peer, source, like, making))


def kept_files(record: Path) -> Iterator[File]:
    """Files of an earlier run, with what their exports took; judged again, as everything is before it is timed."""
    try:
        rows = json.loads(record.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{record} cannot be read: {error.strerror}; run once without --no-export") from error
    yield from (judge(File(**row)) for row in rows)


def forms_of(fmt: str, asked: Sequence[str]) -> list[str]:
    """Forms for this format: `flat` is for all that have it, `onnx:flat` for one. The default if there is none."""
    parts = [form.rpartition(":") for form in asked]
    known = (DEFAULT, *FORMATS[fmt].forms)
    return [form for prefix, _, form in parts if prefix == fmt or (not prefix and form in known)] or [DEFAULT]


# Ours


def export_ours(source: Source, fmt: str, form: str, runs: int) -> File:
    """The default by the command itself, with and without verification; another form by `export`, its cost unknown.

    A form that this format does not have is NOT-RUN.
    """
    blank = File(source.variant, fmt, OURS if form == DEFAULT else f"{OURS} ({form})", ours=True)
    if form == DEFAULT:
        return export_default(blank, source, runs)
    try:
        return replace(blank, place=str(export_form(source, fmt, form).path))
    except UsageError as error:
        return replace(blank, reason=str(error))


def export_default(blank: File, source: Source, runs: int) -> File:
    command = [
        sys.executable, "-m", "mvit_export", "export", "--to", blank.format, "--precision", "fp32", "--overwrite",
        "--weights", str(source.weights[OURS]), "--image-size", str(source.size),
        "--out", str(source.folder / DEFAULT), "--json",
    ]  # fmt: skip
    bare, verified = typical([*command, "--no-verify"], runs), typical(command, runs)
    if bare.code or verified.code not in VERDICTS:
        return failed(blank, bare if bare.code else verified)
    (row,) = json.loads(verified.out)["artifacts"]
    return replace(
        blank, place=row["path"], export_s=bare.seconds, export_mb=bare.peak_rss_mb,
        verified_s=verified.seconds, verified_mb=verified.peak_rss_mb,
    )  # fmt: skip


def export_form(source: Source, fmt: str, form: str) -> Artifact:
    model = load_model(weights=source.weights[OURS], image_size=source.size)
    out = source.folder / form
    with redirect_stdout(sys.stderr):  # litert-torch prints its progress; only the tables go to stdout
        (result,) = export(model, to=fmt, precision="fp32", form=form, out=out, overwrite=True, verify=False)
    return result.artifact


# The peers'


def export_peer(peer: Peer, source: Source, like: Artifact, making: Making) -> File:
    """The peer's file as an artifact `like` ours of the same format, or the reason why there is none."""
    blank = File(source.variant, peer.format, peer.name, ours=False)
    if peer.family in source.refusals:
        return replace(blank, reason=source.refusals[peer.family])
    with tempfile.TemporaryDirectory() as raw:
        command = [
            sys.executable, "-m", "mvit_export.benchmarks.peers.exports", peer.key, source.variant,
            str(source.weights[peer.family]), raw, "--size", str(source.size),
            "--onnx2tf-python", making.onnx2tf_python,
        ]  # fmt: skip
        cost = typical(command, making.runs)
        if cost.code:
            return failed(blank, cost)
        tools = versions(peer, making.onnx2tf_python)
        artifact = wrap(Path(raw), like, source.folder / "peers" / peer.key, tools)
    return replace(blank, place=str(artifact.path), export_s=cost.seconds, export_mb=cost.peak_rss_mb)


def wrap(raw: Path, like: Artifact, place: Path, tools: dict[str, str]) -> Artifact:
    """An artifact at `place` from the bare model file in `raw`, which has the name of our own, and what lies beside it.

    Its facts and golden vectors are those of `like`: the same weights, input, output and reference.
    """
    with staged_directory(place, overwrite=True) as staging:
        for path in raw.glob(f"{like.model_path.name}*"):  # an ONNX file may keep its weights in another file
            (shutil.copytree if path.is_dir() else shutil.copy)(path, staging / path.name)
        shutil.copy(like.path / GOLDEN, staging / GOLDEN)
        manifest = replace(
            like.manifest, target=Target(like.manifest.format, "fp32"), form=PLAIN, tuning=None, capture="",
            tools=tools, created=now(), files=hash_files(staging),
        )  # fmt: skip
        write_json(staging / MANIFEST, manifest.to_json())
    return read_artifact(place)


def versions(peer: Peer, onnx2tf_python: str) -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in peer.distributions}
    if peer.tool == "onnx2tf":
        ask = "from importlib.metadata import version; print(version('onnx2tf'))"
        done = subprocess.run([onnx2tf_python, "-c", ask], capture_output=True, text=True, check=True)
        found["onnx2tf"] = done.stdout.strip()
    return found


def typical(command: Sequence[str], runs: int) -> Cost:
    """The run with the median time."""
    costs = sorted((cost_of(command) for _ in range(runs)), key=lambda cost: cost.seconds)
    return costs[len(costs) // 2]


def failed(blank: File, cost: Cost) -> File:
    """A missing library is NOT-RUN, anything else a FAIL."""
    if cost.code == MISSING:
        return replace(blank, reason=error_line(cost.err))
    return replace(blank, status=FAIL, reason=f"the export failed: {error_line(cost.err)}")


# The verdict


def judge(file: File) -> File:
    """Parity with our PyTorch reference; size and operators as in the file."""
    if file.place is None:
        return file
    try:
        artifact = read_artifact(Path(file.place))
        verdicts = parity.verify(artifact.path)
    except ArtifactError as error:  # it was changed, or its runtime rejects it
        return replace(file, status=FAIL, reason=str(error), psnr_db=None)
    return replace(
        file, status=worst_status(v.status for v in verdicts), reason="; ".join(v.reason for v in verdicts if v.reason),
        psnr_db=min((v.metrics.psnr_db for v in verdicts if v.metrics), default=None), bytes=artifact.model_bytes,
        operators=inspect_artifact(artifact)["operator_count"], tools=dict(artifact.manifest.tools),
    )  # fmt: skip
