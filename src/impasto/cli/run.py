"""`impasto run`: text under a schedule, below the text of the untouched model."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from impasto import console
from impasto.cli import options
from impasto.cli.loading import Loading, check_texts, recipes, require_tokenizer
from impasto.console import Column, Stream
from impasto.errors import UsageError

if TYPE_CHECKING:
    from impasto.generation import Generated
    from impasto.models import LoadedModel
    from impasto.recipe import Recipe

WARM_UP = 2  # tokens made, and thrown away, before anything is timed


def run(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from.")],
    schedule: options.ScheduleText = None,
    edit: options.Edits = [],  # noqa: B006 (the command line's own copy)
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="How many tokens to write at most.")] = 40,
    kv: Annotated[options.KV, typer.Option(help="Cache: a slot per layer call, or the paper's shared mean.")] = (
        options.KV.exact
    ),
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's turn in the chat template.")] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    attn_implementation: options.AttnImplementation = None,
    device_map: options.DeviceMap = None,
    tp_plan: options.TensorParallel = None,
) -> None:
    """Write text under a schedule, and the original's beside it, with the speed of both; an encoder fills five masks.

    Examples:
      impasto run demo -s "0:8 12:18" "The capital of France is"
      impasto run demo -s "0:6 {6:10}x2 10:" "Once upon a time" --max-new-tokens 60
      impasto run demo -e "10:16.mlp.*@0.1" "Two plus two is"
    """
    if not prompt.strip():
        raise UsageError("the prompt is empty: give some text to go on from")
    if schedule is None and not edit:
        raise UsageError("nothing to compare: give a schedule (-s '0:8 12:18') or an edit (-e '10.mlp.*@0.1')")
    check_texts([] if schedule is None else [schedule], edit)
    loading = Loading(device, dtype, revision, trust_remote_code, attn_implementation, device_map, tp_plan=tp_plan)
    with console.phases() as progress:
        loaded = loading.load(model, progress)
        require_tokenizer(loaded)
        from impasto.evaluate import setting_of

        setting_of(loaded, kv.value)  # refuses a cache that the model does not have
        original, changed = recipes(loaded, [None], [])[0], recipes(loaded, [schedule], edit)[0]
        out = console.output()
        if loaded.masked and not chat:
            written = [_filled(loaded, recipe, prompt, max_new_tokens) for recipe in (original, changed)]
            progress.close()
            _print_recipe(out, loaded, changed)
            for title, text in zip(("original", "changed"), written, strict=True):
                stream = _print_text(out, title, prompt)
                stream.write(text)
                stream.end()
            return
        from impasto.generation import context_window, prompt_room

        ids = encoded(loaded, prompt, chat=chat)
        prompt_room(context_window(loaded.model, loaded.tokenizer), max_new_tokens)  # or nothing is printed
        progress.bytes("warming up", 0, 0)
        for recipe in (original, changed):
            _generate(loaded, recipe, ids, WARM_UP, kv, None)
    _print_recipe(out, loaded, changed)
    made = []
    for title, recipe, cache in (("original", original, options.KV.exact), ("changed", changed, kv)):
        stream = _print_text(out, title, "" if chat else prompt)
        made.append(_generate(loaded, recipe, ids, max_new_tokens, cache, stream))
        stream.end()
    out.print()
    out.print(speeds(made, len(ids)))
    out.print(console.plain("one run each: a hint, not a measurement", "dim"))


def _print_recipe(out: Console, loaded: LoadedModel, recipe: Recipe) -> None:
    out.print(console.plain(f"schedule: {recipe.schedule.describe(loaded.layers)}"), soft_wrap=True)
    for edit in recipe.edits:
        out.print(console.plain(f"edit: {edit}"), soft_wrap=True)


def _print_text(out: Console, title: str, prompt: str) -> Stream:
    """A title and the prompt; what is written comes behind it."""
    out.print()
    out.print(console.plain(title, "bold"))
    stream = Stream(out)
    stream.write(prompt, "dim")
    return stream


def encoded(loaded: LoadedModel, prompt: str, *, chat: bool) -> list[int]:
    """The prompt's tokens as the model expects them: with its own first token, or as a turn of a chat."""
    if not chat:
        return list(loaded.tokenizer.encode(prompt))
    if getattr(loaded.tokenizer, "chat_template", None) is None:
        raise UsageError(f"{loaded.name} has no chat template: leave --chat out")
    text = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    return list(loaded.tokenizer.encode(text, add_special_tokens=False))


def speeds(made: list[Generated], prompt_tokens: int) -> Any:
    """Prefill and decode of the original and of the changed model, apart."""
    prefill = [prompt_tokens / one.seconds_prefill for one in made]
    decode = [_decode_rate(one) for one in made]
    rows: list[tuple[object, ...]] = [
        (name, _per_second(prefill[i]), _per_second(decode[i]), str(one.tokens), Text(_end(one), "dim"))
        for i, (name, one) in enumerate(zip(("original", "changed"), made, strict=True))
    ]
    rows.append(("ratio", _ratio(*prefill), _ratio(*decode), "", ""))
    columns = (Column("", "left"), Column("prefill"), Column("decode"), Column("tokens"), Column("", "left", fold=True))
    return console.table(columns, rows)


def _decode_rate(made: Generated) -> float | None:
    return (made.tokens - 1) / made.seconds_decode if made.tokens > 1 and made.seconds_decode > 0 else None


def _per_second(rate: float | None) -> str:
    if rate is None:
        return "–"
    return f"{rate:,.0f} tokens/s" if rate >= 99.5 else f"{rate:.1f} tokens/s"


def _ratio(old: float | None, new: float | None) -> str:
    return "–" if new is None or old is None else f"{new / old:.2f} x"


def _end(made: Generated) -> str:
    return "the beginning of the prompt was cut off: it is longer than the window" if made.truncated else ""


def _filled(loaded: LoadedModel, recipe: Recipe, prompt: str, tokens: int) -> str:
    """What a masked model puts under masks behind the prompt."""
    from impasto.apply import applied
    from impasto.masked import MASKS, respond
    from impasto.result import Request

    with applied(loaded, recipe.schedule, recipe.edits):
        (answer,) = respond(loaded.model, loaded.tokenizer, [Request("generate", prompt)], masks=min(tokens, MASKS))
    text = answer.text or ""
    return text if text[:1].isspace() or prompt[-1].isspace() else f" {text}"


def _generate(
    loaded: LoadedModel, recipe: Recipe, ids: list[int], tokens: int, kv: options.KV, stream: Stream | None
) -> Generated:
    from impasto.fast import hastened
    from impasto.generation import generate

    def tell(_: int, piece: str) -> None:
        if stream is not None:
            stream.write(piece)

    with contextlib.ExitStack() as stack:
        if recipe.edits:
            from impasto.apply import worn

            stack.enter_context(worn(loaded, recipe.edits))
        return generate(
            loaded.model,
            loaded.tokenizer,
            recipe.schedule,
            [ids],
            max_new_tokens=tokens,
            kv=kv.value,
            window=loaded.window,
            on_token=tell,
            hasten=hastened,
        )[0]
