"""What is inside an exported file, read from the file itself: operators, opset or specification, sizes, lint."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mvit_export.artifact import MANIFEST, Artifact, TensorSpec, find_artifacts, read_artifact
from mvit_export.errors import ArtifactError, MvitExportError, first_line
from mvit_export.formats.coreml import COREML
from mvit_export.readers.session import reader_of

PACKAGE = COREML  # packages of any origin are inspected too


def inspect_path(path: str | Path) -> list[dict[str, Any]]:
    """Records of the artifacts that `path` refers to, or of one Core ML package outside any artifact."""
    path = Path(path)
    if path.suffix == PACKAGE.suffix and path.exists() and MANIFEST not in os.listdir(path.parent):
        return [inspect_package(path)]
    return [inspect_artifact(read_artifact(place)) for place in find_artifacts(path)]


def inspect_package(path: Path) -> dict[str, Any]:
    """The record of a Core ML package of any origin, without what an artifact's manifest would add."""
    contents = reader_of(PACKAGE.name).read_contents(path)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {"path": str(path), "format": PACKAGE.name, "bytes": size, **contents}


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """Parsers of formats end in any exception on a damaged file."""
    try:
        yield
    except (MvitExportError, MemoryError):
        raise
    except Exception as error:
        raise ArtifactError(f"{path} is damaged: {type(error).__name__}: {first_line(error)}; export again") from error


def inspect_artifact(artifact: Artifact) -> dict[str, Any]:
    """The JSON record of `mvit-export inspect`. Raises MissingDependencyError without the format's package."""
    manifest = artifact.manifest
    with damage(artifact.model_path):
        contents = reader_of(manifest.format).read_contents(artifact.model_path)
    return {
        "path": str(artifact.path),
        "model": manifest.to_json()["model"] | {"labels": len(manifest.model.labels or ())},
        "format": manifest.format,
        "precision": manifest.precision,
        "form": manifest.form,
        "bytes": artifact.model_bytes,
        "created": manifest.created,
        "trained": manifest.weights.trained,
        "preprocessing": manifest.preprocessing.to_json() if manifest.preprocessing else None,
        "inputs": [_spec(spec) for spec in manifest.inputs],
        "outputs": [_spec(spec) for spec in manifest.outputs],
        **contents,
        "tools": dict(manifest.tools),
    }


def _spec(spec: TensorSpec) -> dict[str, Any]:
    record = {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype, "layout": spec.layout}
    return record | ({"enumerated": [list(shape) for shape in spec.enumerated]} if spec.enumerated else {})


def describe(report: Mapping[str, Any], *, verbose: bool = False) -> Iterator[str]:
    """The record as lines for people; `verbose` lists every op of a lint."""
    yield f"{report['path']}"
    if "model" in report:
        yield describe_model(report["model"], report["trained"])
    details = ", ".join(f"{key} {value}" for key, value in report["details"].items())
    kind = " ".join(report[key] for key in ("format", "precision") if key in report)
    kind += f", form {report['form']}" if "form" in report else ""
    yield f"  file        {kind}, {report['bytes'] / 1e6:.2f} MB, {details}"
    yield from describe_interface(report)
    counts = ", ".join(f"{count} {name}" for name, count in report["operators"].items())
    yield f"  operators   {report['operator_count']}: {counts}"
    yield from describe_phones(report.get("phones", {}))
    if "lint" in report:
        yield from describe_lint(report["lint"], verbose=verbose)


def describe_model(model: Mapping[str, Any], trained: bool | None) -> str:
    weights = {True: "trained", False: "UNTRAINED", None: "weights from the model's factory"}[trained]
    return f"  model       {model['name']}, {model['params']:,} parameters, {model['macs'] / 1e6:.1f}M MACs, {weights}"


def describe_interface(report: Mapping[str, Any]) -> Iterator[str]:
    """Inputs, outputs and preprocessing, which a package without a manifest lacks."""
    for kind in ("inputs", "outputs"):
        for spec in report.get(kind, ()):
            shapes = spec.get("enumerated", [spec["shape"]])
            text = " or ".join("x".join("any" if side is None else str(side) for side in shape) for shape in shapes)
            yield f"  {kind[:-1]:<11} {spec['name']}  {text}  {spec['dtype']}  {spec['layout']}".rstrip()
    if p := report.get("preprocessing"):
        yield f"  pixels      {p['channel_order']}, (x / 255 - {p['mean']}) / {p['std']}, from: {p['source']}"


def describe_phones(phones: Mapping[str, Any]) -> Iterator[str]:
    if "reason" in phones:
        yield f"  phones      NOT-RUN: {phones['reason']}"
        return
    for name, part in phones.items():
        unknown = f", not {', '.join(part['unsupported'])}" if part["unsupported"] else ""
        counts = f"{part['supported']} of {part['nodes']} nodes in {part['partitions']} partitions"
        yield f"  phones      {name}: {counts}{unknown} (onnxruntime's usability checker; a device decides)"


def describe_lint(lint: Mapping[str, Any], *, verbose: bool) -> Iterator[str]:
    """The eligible share, broken rules with an example each (worst first), and with `verbose` every op."""
    share, macs = lint["eligible_mac_share"], lint["macs"]
    known = "unknown, sizes are flexible" if macs is None else "no MACs"
    amount = f"{100 * share:.1f} % of {macs / 1e6:.1f}M MACs" if share is not None else known
    yield f"  eligible    {amount} (Neural Engine lint; device, system and size decide)"
    for rule in lint["rules"]:
        example = max((op for op in lint["ops"] if rule["id"] in op["broken"]), key=lambda op: op["macs"] or 0)
        ops = f"{rule['count']} op{'s' if rule['count'] > 1 else ''}"
        reason = f"{rule['text']} [{rule['source']}]"
        yield f"  {rule['severity']:<11} {rule['id']}, {ops}, e.g. {name_op(example)}: {reason}"
    for op in lint["ops"] if verbose else ():
        count = "MACs unknown" if op["macs"] is None else f"{op['macs']:,} MACs"
        verdict = "eligible" if op["eligible"] else "not eligible"
        yield f"  op          {name_op(op)}, {count}, {verdict}" + (
            f": {', '.join(op['broken'])}" if op["broken"] else ""
        )


def name_op(op: Mapping[str, Any]) -> str:
    return f"{op['type']} {op['op']}" + (f" ({op['module']})" if op["module"] else "")
