"""From the last hidden state to log-likelihoods, at the scored positions only.

The final norm, the head and whatever the model does to its logits run through the model's own forward; the head's
product is taken in slices of the vocabulary, and of each slice only its maximum, its sum of exponentials and the
scored tokens' logits are kept. Nothing of size positions x vocabulary is held.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from impasto.anatomy import Anatomy, at_hand, input_device, probe_inputs, quietly, split
from impasto.levels import record
from impasto.taps import Enough, real_call, tapped

SLICE = {"cpu": 1 << 22, "cuda": 1 << 27}  # logits of one slice (positions x words)
PROBE = 3
TOP = 10  # likelier tokens are counted up to here
CHUNK = 64  # words among which the likeliest is looked for first
FLOOR = -85.0  # exp() of less is a denormal number: nothing in the sum, and very slow on a CPU


class Head:
    """The part of a model behind its last layer, by position.

    Args:
        model: the loaded model.
        body: its anatomy.

    The first use finds out, on a few random states, whether logits are the head's plain product, a function of each
    logit alone (a soft cap, a scale), or something that needs the whole vocabulary at once; the last is run whole in
    small chunks of positions.
    """

    def __init__(self, model: Any, body: Anatomy) -> None:
        self.model = model
        self.body = body
        head = model.get_output_embeddings()
        self.linear = head if isinstance(head, nn.Linear) and not split(head.weight) else None
        self.example: Tensor | None = None  # a few states as they leave the last layer
        self.kind = self._kind()

    def logits(self, states: Tensor, product: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The model's forward with `states` (n, channels) coming out of its last layer.

        Args:
            states: (n, channels).
            product: a function of the head's input that replaces the head's product.
        """
        ids = torch.zeros(states.shape[-2], 1, dtype=torch.long, device=input_device(self.model))
        last = self.body.depth - 1

        def hand_on(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else next(iter(kwargs.values()))
            return self.body.wrap(index, states.unsqueeze(-2).to(hidden.device) if index == last else hidden)

        inputs: dict[str, Any] = {"input_ids": ids}
        if "use_cache" in self.body.arguments:
            inputs["use_cache"] = False
        with tapped(self.body.layers, hand_on):
            if product is None or self.linear is None:
                whole: Tensor = self.model(**inputs).logits[:, 0]
                return whole
            with tapped([self.linear], lambda _, args, kwargs: product(args[0])):
                other: Tensor = self.model(**inputs).logits[:, 0]
            return other

    def enter(self, states: Tensor) -> Tensor:
        """What enters the head for states (n, channels) behind the last layer: normalised, projected, (n, d)."""
        caught: list[Tensor] = []

        def catch(head_input: Tensor) -> Tensor:
            caught.append(head_input)
            raise Enough

        with contextlib.suppress(Enough):
            self.logits(states, catch)
        return caught[0][:, 0]

    def _kind(self) -> str:
        if self.linear is None:
            return "whole"
        with quietly(self.model):
            inputs: dict[str, Any] = probe_inputs(self.model, PROBE)
            if "use_cache" in self.body.arguments:
                inputs["use_cache"] = False
            entering, _ = record(self.model, self.body, inputs)
            states = self.example = entering[..., 0, :, :]
            whole, entered = self.logits(states), self.enter(states)
            plain = real_call(self.linear, (entered,), {}).to(whole.device)
            if torch.equal(whole, plain):
                return "plain"
            half = plain.shape[-1] // 2
            part = self.logits(states, lambda x: real_call(self.linear, (x,), {})[..., :half])  # type: ignore[arg-type]
            return "pointwise" if torch.equal(part, whole[:, :half]) else "whole"

    def score(
        self, states: Tensor, places: Tensor, tokens: Tensor, *, ranks: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-likelihood of `tokens` at `places`.

        Args:
            states: (n, channels) hidden states behind the last layer; (copies, n, channels) where a model
                keeps several.
            places: (m,) index into states.
            tokens: (m,) token ids.
            ranks: also count the likelier tokens.

        Returns:
            (m,) float32 log-likelihoods; (m,) booleans: no other token is likelier; and with `ranks` (m,) integers:
            how many tokens are likelier, `TOP` for as many or more.
        """
        if self.kind == "whole":
            return self._score_whole(states, places, tokens, ranks)
        assert self.linear is not None
        entered = self.enter(states)
        with at_hand(self.linear):
            return self._score_slices(self.linear, entered, places, tokens, ranks)

    def _score_slices(
        self, linear: nn.Linear, entered: Tensor, places: Tensor, tokens: Tensor, ranks: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        weight, bias = linear.weight, linear.bias
        entered = entered.to(weight.device)
        words = weight.shape[0]
        step = max(256, min(words, SLICE.get(weight.device.type, SLICE["cuda"]) // max(1, len(entered))))
        device = weight.device
        places, tokens = places.to(device), tokens.to(device)
        top = torch.full((len(entered),), -torch.inf, device=device)
        mass = torch.zeros(len(entered), device=device)
        own = torch.zeros(len(tokens), device=device)
        best = torch.full((len(entered), TOP if ranks else 0), -torch.inf, device=device)
        weigh = _weigher(device.type)
        for low in range(0, words, step):
            rows = slice(low, min(words, low + step))
            piece = F.linear(entered, weight[rows], None if bias is None else bias[rows])
            if self.kind == "pointwise":
                piece = self._pointwise(entered, piece).to(device)  # the model gives it back where its inputs are
            inside = (tokens >= rows.start) & (tokens < rows.stop)
            column = (tokens - rows.start).clamp(0, piece.shape[1] - 1)
            own = torch.where(inside, piece[places, column].float(), own)
            if ranks:
                best = _largest(torch.cat([best, _largest(piece.float())], -1))
            peak, more = weigh(piece)
            higher = torch.maximum(top, peak)
            anchor = _finite(higher)
            mass = mass * torch.exp(top - anchor) + more * torch.exp(peak - anchor)
            top = higher
        normaliser = _finite(top) + mass.log()
        likelier = (best[places] > own[:, None]).sum(-1) if ranks else None
        return own - normaliser[places], own >= top[places], likelier

    def _pointwise(self, entered: Tensor, piece: Tensor) -> Tensor:
        """What the model's forward does to a slice of logits."""
        assert self.example is not None
        blank = self.example[..., :1, :].repeat_interleave(len(piece), dim=-2)
        return self.logits(blank, lambda _: piece[:, None])

    def _score_whole(
        self, states: Tensor, places: Tensor, tokens: Tensor, ranks: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        values = torch.zeros(len(tokens), device=states.device)
        likelier = torch.zeros(len(tokens), dtype=torch.long, device=states.device) if ranks else None
        greedy = torch.zeros(len(tokens), dtype=torch.bool, device=states.device)
        places, tokens = places.to(states.device), tokens.to(states.device)
        for low in range(0, states.shape[-2], 64):
            logits = self.logits(states[..., low : low + 64, :]).float().to(states.device)
            inside = (places >= low) & (places < low + 64)
            row = (places - low).clamp(0, len(logits) - 1)
            top = logits.amax(-1, keepdim=True)
            normaliser = (top + (logits - top).exp().sum(-1, keepdim=True).log())[:, 0]
            own = logits[row, tokens]
            values = torch.where(inside, own - normaliser[row], values)
            greedy = torch.where(inside, own >= top[row, 0], greedy)
            if likelier is not None:
                likelier = torch.where(inside, (_largest(logits)[row] > own[:, None]).sum(-1), likelier)
        return values, greedy, likelier


def _finite(values: Tensor) -> Tensor:
    return torch.where(torch.isfinite(values), values, torch.zeros_like(values))


def _weigh(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum m of each row, and the sum of exp(x - m), in float32; writes over the logits."""
    logits = logits.float()
    peak = logits.amax(-1)
    return peak, logits.sub_(_finite(peak)[:, None]).clamp_(min=FLOOR).exp_().sum(-1)


@functools.cache
def _weigher(device: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The fastest way to weigh rows of logits on a kind of device."""
    if device == "cuda" and importlib.util.find_spec("triton") is not None:
        from impasto import kernels

        return kernels.weigh
    return _weigh


def _largest(logits: Tensor) -> Tensor:
    """The `TOP` largest of each row, (n, words) to (n, TOP), the largest first.

    A tenth of the time of `topk` over all words: the largest ones lie in the chunks with the largest maxima.
    """
    rows, words = logits.shape
    whole = words // CHUNK * CHUNK
    if words < 4 * TOP * CHUNK:
        return logits.topk(min(TOP, words)).values
    chunks = logits[:, :whole].reshape(rows, -1, CHUNK)
    found = chunks.amax(-1).topk(TOP).indices
    candidates = chunks.gather(1, found[..., None].expand(-1, -1, CHUNK)).flatten(1)
    return torch.cat([candidates, logits[:, whole:]], -1).topk(TOP).values
