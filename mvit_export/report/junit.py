"""Parity as JUnit XML, which CI systems show as test results: a case for each artifact and runtime."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from mvit_export.report import formatting
from mvit_export.report.reading import Report, Verdict
from mvit_export.results.status import FAIL, NOT_RUN


def render_junit(report: Report) -> str:
    counts = report.checks
    numbers = {"tests": sum(counts.values()), "failures": counts[FAIL], "errors": 0, "skipped": counts[NOT_RUN]}
    totals = {name: str(count) for name, count in numbers.items()}
    root = ET.Element("testsuites", totals)
    suite = ET.SubElement(root, "testsuite", {"name": "parity", **totals})
    for entry in report.entries:
        for verdict in entry.verdicts:
            add_verdict(suite, verdict)
        for gap in entry.unread:
            case = ET.SubElement(suite, "testcase", classname=entry.label, name="parity")
            ET.SubElement(case, "skipped", message=f"{gap.reason}; run: {gap.command}")
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def add_verdict(suite: ET.Element, verdict: Verdict) -> None:
    case = ET.SubElement(suite, "testcase", classname=verdict.label, name=verdict.runtime or "parity")
    if verdict.status == FAIL:
        ET.SubElement(case, "failure", message=verdict.reason)
    elif verdict.status == NOT_RUN:
        ET.SubElement(case, "skipped", message=verdict.reason)
    if metrics := verdict.metrics:
        figures = f"PSNR {formatting.decibels(metrics.psnr_db)}, max error {formatting.tiny(metrics.max_rel)} of scale"
        compared = f"{verdict.inputs} inputs against {verdict.against}"
        ET.SubElement(case, "system-out").text = "; ".join(filter(None, [figures, compared, verdict.note]))
