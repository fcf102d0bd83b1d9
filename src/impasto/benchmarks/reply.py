"""What a task's judge is told of a scored continuation: the harness's pair, and more for those who ask."""

from __future__ import annotations


class Reply(tuple[float, bool]):
    """A log-likelihood and whether greedy decoding gives the continuation, as the harness's models return them.

    The harness's own code unpacks the pair and sees nothing else. Code of ours finds beside it what per-token losses
    and top-k accuracies need.

    Attributes:
        tokens: how many tokens were scored; 0 where that is not known.
        rank: how many tokens are likelier than the first token of the continuation, 0 for the likeliest; None where
            that is not known.
    """

    tokens: int
    rank: int | None

    def __new__(cls, loglikelihood: float, is_greedy: bool, tokens: int = 0, rank: int | None = None) -> Reply:
        """The pair `(loglikelihood, is_greedy)` with its attributes."""
        reply = super().__new__(cls, (loglikelihood, is_greedy))
        reply.tokens = tokens
        reply.rank = rank
        return reply
