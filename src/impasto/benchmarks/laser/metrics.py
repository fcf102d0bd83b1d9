"""What the LASER tasks make of a model's answers: the paper's metrics, and beside them what shows where they deceive.

All log-losses are in nats. `answer_loss` is that of the whole answer; `log_loss`, the paper's, is divided by the number
of its tokens, and only there where that number is known (`Reply.tokens`); likewise `top5` and `top10` need
`Reply.rank`. A classification's `choice_loss` is that among the labels alone: the paper's log-loss falls as soon
as the model puts more weight on *any* of the labels, this one only if it puts more on the right one.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

Scored = tuple[float, bool]
TOP = (5, 10)


class AnswerTask(ConfigurableTask):  # type: ignore[misc]
    """A task that asks twice for each answer: how likely it is, and what the model writes by itself."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def construct_requests(self, doc: Mapping[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """The two requests of one document: the log-likelihood first."""
        own = {key: value for key, value in kwargs.items() if not key.endswith("chat_template")}
        asked = {
            "loglikelihood": (ctx, doc["target"]),
            "generate_until": (ctx, copy.deepcopy(self.config.generation_kwargs)),
        }
        return [
            Instance(request_type=kind, doc=doc, arguments=arguments, idx=number, **own)
            for number, (kind, arguments) in enumerate(asked.items())
        ]


def choice(doc: Mapping[str, Any], replies: Sequence[Scored]) -> dict[str, Any]:
    """Metrics of one classified document, from the log-likelihoods of its labels.

    `acc` takes the likeliest label, as the paper does: of labels of several tokens the sum counts, so a long
    one is at a disadvantage. `acc_norm` divides by the label's length first. `balanced_acc` is the mean over the
    classes, so that any constant answer gets 1 / classes; `predicted_X` is the share of the answer X.
    """
    names, gold = doc["choices"], doc["gold"]
    logs = [reply[0] for reply in replies]
    predicted = _largest(logs)
    fair = _largest([value / len(name) for value, name in zip(logs, names, strict=True)])
    top = max(logs)
    everything = top + math.log(sum(math.exp(value - top) for value in logs))
    return {
        "acc": float(predicted == gold),
        "acc_norm": float(fair == gold),
        "balanced_acc": (gold, predicted),
        **_losses(replies[gold]),
        "choice_loss": everything - logs[gold],
        **{f"predicted_{name}": float(index == predicted) for index, name in enumerate(names)},
    }


def word(doc: Mapping[str, Any], replies: Sequence[Scored]) -> dict[str, float]:
    """Metrics of one fact: whether the answer is the likeliest text (top-1), among the likeliest, and its losses."""
    (reply,) = replies
    return {"acc": float(reply[1]), **_ranks(reply), **_losses(reply)}


def answer(doc: Mapping[str, Any], replies: Sequence[Any]) -> dict[str, float]:
    """Metrics of one question that is answered in free text.

    `acc` looks for the answer in the new text, `acc_words` for it as whole words ("no" is not in "know").
    `acc_with_prompt` is the authors' accuracy: they look into the prompt and the new text together, and so
    count as right what the question says itself; `in_prompt` is the share of those, whatever the model answers.
    `acc_greedy` says whether the likeliest text is the answer and nothing before it; `top5` and `top10` are of the
    answer's first token.
    """
    scored, text = replies
    wanted, new = doc["answer"].lower(), text.lower()
    prompt = doc["prompt"].lower()
    return {
        "acc": float(wanted in new),
        "acc_words": float(re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", new) is not None),
        "acc_with_prompt": float(wanted in prompt + new),
        "in_prompt": float(wanted in prompt),
        "acc_greedy": float(scored[1]),
        **_ranks(scored),
        **_losses(scored),
    }


def balanced_accuracy(pairs: Sequence[tuple[int, int]]) -> float:
    """The mean over the classes of the share of their documents that got their class, from (right, predicted) pairs.

    >>> balanced_accuracy([(0, 0), (0, 0), (0, 0), (1, 0)])
    0.5
    """
    sizes, right = Counter(gold for gold, _ in pairs), Counter(gold for gold, predicted in pairs if gold == predicted)
    return sum(right[label] / size for label, size in sizes.items()) / len(sizes) if sizes else math.nan


def balanced(scores: Sequence[float | None], golds: Sequence[int]) -> tuple[float | None, ...]:
    """0/1 scores weighed so that their mean is the balanced accuracy: what its paired intervals are made of.

    >>> balanced([1, 1, 1, 0], [0, 0, 0, 1])
    (0.6666666666666666, 0.6666666666666666, 0.6666666666666666, 0.0)
    """
    sizes = Counter(golds)
    return tuple(
        None if score is None else score * len(golds) / (len(sizes) * sizes[gold])
        for score, gold in zip(scores, golds, strict=True)
    )


def majority(found: Sequence[Mapping[str, Any]]) -> float:
    """What always giving the most frequent right answer gets on these documents."""
    right = Counter(str(doc["answer"]).lower() if "answer" in doc else str(doc["gold"]) for doc in found)
    return max(right.values()) / len(found)


def _ranks(reply: Scored) -> dict[str, float]:
    rank = getattr(reply, "rank", None)
    return {} if rank is None else {f"top{k}": float(rank < k) for k in TOP}


def _losses(reply: Scored) -> dict[str, float]:
    tokens = getattr(reply, "tokens", 0)
    whole = {"answer_loss": -reply[0]}
    return {**whole, "log_loss": -reply[0] / tokens} if tokens else whole


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
