"""What the LASER paper found, benchmark by benchmark and question by question (arXiv 2312.13558, tables 1 and 3).

Its numbers are of the four fifths of each benchmark that its edits were not chosen on, without intervals. Models are
named here and nowhere else in the study, for these are statements about them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Found:
    """One cell of the paper's tables: accuracies in percent, losses in nats per token, and the chosen edit."""

    model: str
    base: float
    edited: float
    base_loss: float
    edited_loss: float
    matrix: str
    layer: int
    rho: str

    def __str__(self) -> str:
        return (
            f"{self.model} {self.base:.1f} \u2192 {self.edited:.1f} % ({self.matrix}, layer {self.layer}, {self.rho})"
        )


_IN, _OUT = "U_in", "U_out"
_MODELS = ("RoBERTa", "GPT-J", "Llama2-7B")
_TABLE: Mapping[str, tuple[tuple[float, float, float, float, str, int, str], ...]] = MappingProxyType(
    {
        "counterfact": (
            (17.3, 19.3, 5.78, 5.43, _IN, 8, "0.8"),
            (13.1, 24.0, 5.78, 5.05, _IN, 27, "0.01"),
            (35.6, 37.6, 3.61, 3.49, _IN, 28, "0.05"),
        ),
        "hotpotqa": (
            (6.1, 6.7, 10.99, 10.53, _OUT, 2, "0.4"),
            (19.6, 19.5, 3.40, 3.39, _IN, 27, "0.1"),
            (16.5, 17.2, 3.15, 2.97, _IN, 27, "0.2"),
        ),
        "fever": (
            (50.0, 52.3, 2.5, 1.76, _IN, 3, "0.4"),
            (50.2, 56.2, 1.24, 1.27, _IN, 24, "0.01"),
            (59.3, 64.5, 1.02, 0.91, _IN, 30, "0.2"),
        ),
        "bios_gender": (
            (87.5, 93.7, 0.87, 1.13, _IN, 9, "0.9"),
            (70.9, 97.5, 3.86, 4.20, _IN, 14, "0.01"),
            (75.5, 88.4, 3.48, 2.93, _IN, 24, "0.01"),
        ),
        "bios_profession": (
            (64.5, 72.5, 4.91, 6.44, _IN, 3, "0.9"),
            (75.6, 82.1, 4.64, 4.91, _IN, 18, "0.01"),
            (85.0, 86.7, 4.19, 4.05, _OUT, 30, "0.4"),
        ),
        "truthfulqa": (
            (56.2, 56.2, 1.60, 1.42, _IN, 0, "0.01"),
            (54.9, 55.6, 1.02, 1.01, _IN, 7, "0.8"),
            (50.5, 56.2, 0.95, 1.04, _IN, 30, "0.05"),
        ),
        "epistemic": (
            (37.1, 41.8, 9.39, 6.80, _OUT, 1, "0.4"),
            (37.1, 38.3, 0.74, 0.62, _IN, 26, "0.01"),
            (44.8, 63.4, 0.78, 0.73, _OUT, 28, "0.01"),
        ),
        "wikidataqa": (
            (28.0, 30.7, 9.07, 7.69, _IN, 7, "0.4"),
            (51.8, 65.9, 3.52, 2.86, _IN, 27, "0.01"),
            (59.5, 62.0, 2.40, 2.31, _IN, 27, "0.01"),
        ),
    }
)

_REMARKS: Mapping[str, str] = MappingProxyType(
    {
        "truthfulqa": "56.2 is what always answering the more frequent class gets.",
        "epistemic": "37.1 is what one constant answer gets, and 63.4 is close to what the other gets.",
        "fever": "50.0 is close to what a constant answer gets.",
    }
)

FOUND: Mapping[str, str] = MappingProxyType(
    {
        "loss": "Mostly: the loss falls in 18 of its 24 results, and rises in both biography tasks of two models.",
        "flattered": "Not asked: it reports test accuracy alone.",
        "constant": "Not asked. Several of its accuracies equal that of a constant answer.",
        "strong": "Yes: more than 90 % of the components can go, and 99 % are gone in most of GPT-J's results.",
        "zero": "Yes: removing the matrix can beat the full model, but is worse than a low rank (appendix C.2).",
        "pruning": "Yes: zeroing the smallest entries improves later layers in much the same way (appendix D).",
        "composed": "Yes: GPT-J on CounterFact rises from 13.1 to 24.0 % with one edit, to 29.2 % with several.",
        "late": "Yes: cuts help in the later layers and do harm in the first ones (figure 2).",
        "halves": "Yes: cutting the MLP's matrices changes the loss, cutting attention's hardly does (figure 2).",
        "nested": "Yes: what is right at one reduction stays right at stronger ones.",
        "robust": "Yes: of the facts that GPT-J has right, 24.8 points more are right in all paraphrases.",
        "rare": "Yes: GPT-J's corrected answers are .19 of those right before below 50 documents, .09 above 1,000.",
        "discarded": "Yes, in examples: another entity of the right kind, or function words where more is kept.",
        "reads": "Nearly: GPT-J's perplexity on the Pile rises from 4.8 to 5.0 or 4.9 (appendix C.4).",
        "moved": "Not asked: every layer stays in its place.",
        "screening": "Not asked: every candidate is measured. Later work screens by gradients (arXiv 2510.20800).",
    }
)
"""By key of the question."""


def found(benchmark: str) -> str:
    """The paper's results on a benchmark, in a sentence."""
    if benchmark not in _TABLE:
        return "Not asked: the paper has other benchmarks."
    cells = [Found(model, *numbers) for model, numbers in zip(_MODELS, _TABLE[benchmark], strict=True)]
    remark = _REMARKS.get(benchmark)
    return f"{', '.join(map(str, cells))}; without intervals.{f' {remark}' if remark else ''}"
