"""Which Neural Engine rules the ops of a package break, and the share of compute that is eligible.

    from mvit_export.mil.lint import lint_package
    print(lint_package("x.mlpackage").eligible_mac_share)

Apple publishes no static list of what the Neural Engine accepts, and it varies by device, system version and size: see
`rules.py`. Eligible means that nothing in the file is known to keep an op off it, never where the op is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvit_export.mil.listing import Operation, list_operations
from mvit_export.mil.macs import count_macs
from mvit_export.mil.package import read_package
from mvit_export.mil.rules import RULES, Rule
from mvit_export.mil.steps import Op


@dataclass(frozen=True)
class Finding:
    """One op: its multiply-accumulates (None: they depend on a flexible size) and the rules it breaks."""

    op: Op
    macs: int | None
    broken: tuple[Rule, ...]

    @property
    def eligible(self) -> bool:
        return not any(rule.severity == "blocks" for rule in self.broken)

    @property
    def name(self) -> str:
        return self.op.outputs[0] if self.op.outputs else self.op.place

    def to_json(self) -> dict[str, Any]:
        return {
            "op": self.name,
            "type": self.op.type,
            "module": self.op.module,
            "macs": self.macs,
            "broken": [rule.id for rule in self.broken],
            "eligible": self.eligible,
        }


@dataclass(frozen=True)
class Lint:
    """All ops that run, in order."""

    findings: tuple[Finding, ...]

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of the file; None if a flexible size leaves them open."""
        return total(self.findings)

    @property
    def eligible_mac_share(self) -> float | None:
        """Between 0 and 1; None if the MACs are open or 0."""
        macs, eligible = self.macs, total([f for f in self.findings if f.eligible])
        return eligible / macs if macs and eligible is not None else None

    def breaking(self, rule: Rule) -> tuple[Finding, ...]:
        """Ops that break a rule, those with the most MACs first."""
        found = [finding for finding in self.findings if rule in finding.broken]
        return tuple(sorted(found, key=lambda finding: -(finding.macs or 0)))

    @property
    def rules(self) -> tuple[tuple[Rule, tuple[Finding, ...]], ...]:
        """Broken rules with their ops, worst first: blocking before slowing, then by MACs and number of ops."""
        broken = [(rule, found) for rule in RULES if (found := self.breaking(rule))]
        return tuple(sorted(broken, key=lambda pair: (pair[0].severity, -(total(pair[1]) or 0), -len(pair[1]))))

    def to_json(self) -> dict[str, Any]:
        rules = [
            {"id": r.id, "severity": r.severity, "text": r.text, "source": r.source, "count": len(found)}
            for r, found in self.rules
        ]
        return {
            "eligible_mac_share": self.eligible_mac_share,
            "macs": self.macs,
            "rules": rules,
            "ops": [finding.to_json() for finding in self.findings],
        }


def total(findings: Sequence[Finding]) -> int | None:
    known = [finding.macs for finding in findings if finding.macs is not None]
    return sum(known) if len(known) == len(findings) else None


def lint(operations: Sequence[Operation]) -> Lint:
    """Check every op that runs against every rule; compressed weights are unfolded before and do not count as ops."""
    running = [operation for operation in operations if not operation.type.startswith("constexpr_")]
    return Lint(tuple(Finding(o.op, count_macs(o), tuple(rule for rule in RULES if rule.broken(o))) for o in running))


def lint_package(path: str | Path) -> Lint:
    """All functions of a saved package. ArtifactError, one line, if it is damaged or of another kind."""
    return lint(list_operations(read_package(path)))
