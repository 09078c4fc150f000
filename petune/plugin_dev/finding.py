"""A contract in executable form: properties, each of which is looked at on a trial."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from petune.base.author import line_of
from petune.base.errors import ContractViolation

TrialT = TypeVar("TrialT")


@dataclass(frozen=True)
class Property(Generic[TrialT]):
    """One property of a contract.

    Attributes:
        name: A noun phrase, for tables and messages.
        requirement: What must hold.
        problem: Returns what is wrong on a trial, or an empty text.
    """

    name: str
    requirement: str
    problem: Callable[[TrialT], str]


@dataclass(frozen=True)
class Finding:
    """The result for one property.

    Attributes:
        name: The property.
        requirement: What must hold.
        problem: What is wrong; empty if the property holds.
    """

    name: str
    requirement: str
    problem: str


def examine_all(properties: Iterable[Property[TrialT]], trial: TrialT) -> Iterator[Finding]:
    """Yield the finding for each property; what an author's code raises is a finding, too."""
    for prop in properties:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                problem = prop.problem(trial)
            except (Exception, SystemExit) as error:
                problem = f"{type(error).__name__}: {error}{line_of(error)}"
        yield Finding(prop.name, prop.requirement, problem)


def names_of(findings: Iterable[Finding], subject: str) -> list[str]:
    """Return the names of the properties, all of which hold.

    Raises:
        ContractViolation: The first property of `subject` that does not hold.
    """
    names = []
    for finding in findings:
        if finding.problem:
            raise ContractViolation(f"{subject}: {finding.name}: {finding.problem} (required: {finding.requirement})")
        names.append(finding.name)
    return names
