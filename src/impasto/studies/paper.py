"""What the painters paper found, question by question: facts read from it, with its own names for its models.

Numbers are those of its released code and of the matrix printed there; the paper itself prints curves only. Where it
did not ask, that is said. Models are named here and nowhere else in the study, for these are statements about them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

FOUND: Mapping[str, str] = MappingProxyType(
    {
        "skip-one": (
            "Yes: Llama2-7B, 13B and 70B on LAMBADA lose little when one layer is left out, except for the first "
            "ones and the last. The layers seem to speak one language."
        ),
        "swap": "Yes, on the same three models and with the same exceptions.",
        "edges": "Yes: leaving out one of the first layers, or the last, costs most.",
        "three-groups": (
            "Yes: on Llama2-7B the states 2 to 30 are all at least 0.94 alike, while 30 and 31 are 0.39 alike and"
            " 0, 1, 31 and 32 stand apart; 13B has groups {0}, {1 to 3}, the middle, and the last one or two."
        ),
        "without-artefacts": (
            "Not asked. The paper's cosine is one over all tokens of a text together, padding included, and a few"
            " enormous numbers in the first token can decide it."
        ),
        "all-necessary": (
            "No: the score falls slowly at first. Llama2-7B without layers 15, 16 and 17 has 0.727 accuracy on "
            "LAMBADA (0.720 for the full model on the first 100 examples)."
        ),
        "same-function": (
            "No: with the centre layer in all their places Llama2-7B fails faster than under any other method."
        ),
        "repeat-worse-than-skip": "Yes, by far: middle repeat is the most harmful of all methods, on BERT-Large too.",
        "repeat-drifts": (
            "Yes: with M = 5 on Llama2-7B, skip keeps the trend of the full model's similarity, while under "
            "middle repeat the states drift apart and the variance of the last two layers explodes."
        ),
        "order-matters": (
            "Somewhat: reversed and random order lose score gracefully, and do less harm than leaving layers out."
        ),
        "random-beats-reverse": "Yes: the mean of ten random orders lies above the reversed one.",
        "order-by-task": (
            "Yes: ARC and GSM8K fall steepest under reverse, skip and parallel; WinoGrande and HellaSwag are robust."
        ),
        "order-itself": (
            "Not asked: the paper takes the steeper fall as a sign of order, but skip, which keeps the order, "
            "falls steeply too."
        ),
        "parallel": (
            "Yes, except for the tasks that are heavy in mathematics (measured there with averaged KV caches)."
        ),
        "loops-help": "Yes: three iterations are better than one at every width but the narrowest.",
        "iterations-by-width": "Yes: on Llama2-7B it is roughly proportional to the width, except for M = 29 and 31.",
        "looped-best": "Yes: on Llama2-7B, where random order comes next, and on BERT-Large.",
        "ranking": (
            "From most to least harmful on Llama2-7B: middle repeat, skip, parallel, reverse, random order, "
            "looped parallel with k = 3."
        ),
        "repeats-help": (
            "No: neither double nor triple repeat ever does, on Llama2-7B. The paper does not say how, so both "
            "readings run here: the middle as a block, and layer by layer."
        ),
        "averaged-cache": (
            "Not asked. The code keeps one averaged cache slot for a whole parallel group; of the paper's tasks "
            "only GSM8K writes text."
        ),
    }
)
"""By key of the question."""
