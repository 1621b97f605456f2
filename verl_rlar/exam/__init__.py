# SPDX-License-Identifier: Apache-2.0
"""The exam: the trial that every tool must pass before it may score, whoever wrote it, and the card that records it.

    cases.py        a case: a query, a response, and what a tool must say of it; case files
    generators.py   changes of a right answer that must fail, and changes that must not matter
    attacks.py      the ways in which rewards have been cheated, as answers
    biases.py       changes that only look better: length, format, flattery
    evidence.py     cases out of rows of data, and the rows whose gold cannot be trusted
    trial.py        runs a tool on the cases, as in training, and measures
    card.py         the record: every figure, its threshold, the failing cases, the verdict and its reasons
    subject.py      what is examined: a built-in rule, a function of the user's, a verifier in a file

Guarantees and what is not covered: see the modules.
"""

from verl_rlar.exam.card import Card
from verl_rlar.exam.cases import Case, Expect, read_cases
from verl_rlar.exam.evidence import Evidence, gather
from verl_rlar.exam.subject import Subject, find
from verl_rlar.exam.trial import Examination, examine

__all__ = ["Card", "Case", "Evidence", "Examination", "Expect", "Subject", "examine", "find", "gather", "read_cases"]
