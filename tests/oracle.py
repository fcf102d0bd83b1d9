"""A slow second opinion on what a schedule means, sharing no code with `impasto.runtime`.

The untouched model runs; plain torch hooks note how it calls its layers. When the last one returns, the layers are
called by hand in the schedule's order, and the result takes the place of its output.
"""

from __future__ import annotations

from typing import Any

import torch

from impasto.schedule import Call, Schedule


def logits(model: Any, path: str, schedule: Schedule, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """The model's logits under a schedule of whole layers, without any cache."""
    layers = list(model.get_submodule(path))
    heard: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def first(value: Any) -> torch.Tensor:
        return value[0] if isinstance(value, tuple | list) else value

    def call(index: int, hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = heard[index]
        if args:
            return first(layers[index](hidden, *args[1:], **kwargs))
        return first(layers[index](**{**kwargs, "hidden_states": hidden}))

    def play(steps: Any, hidden: torch.Tensor) -> torch.Tensor:
        for step in steps:
            if isinstance(step, Call):
                hidden = call(step.layer, hidden)
                continue
            branches = [play(branch, hidden) for branch in step.branches]
            if step.merge == "mean":
                hidden = sum(branches) / len(branches)
            else:
                hidden = sum([b - hidden for b in branches], hidden)
        return hidden

    def note(_: Any, args: Any, kwargs: Any) -> None:
        if len(heard) < len(layers):  # later calls are those made by hand
            heard.append((args, dict(kwargs)))

    busy: list[bool] = []

    def replace(_: Any, args: Any, output: Any) -> Any:
        if busy:
            return None
        busy.append(True)
        args, kwargs = heard[0]
        hidden = play(schedule.steps, args[0] if args else kwargs["hidden_states"])
        return (hidden, *output[1:]) if isinstance(output, tuple) else [hidden] if isinstance(output, list) else hidden

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(replace))
    try:
        return model(**inputs, **options).logits
    finally:
        for hook in hooks:
            hook.remove()
