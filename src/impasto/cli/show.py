"""`impasto show`: what a model is made of, and what a schedule makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text

from impasto import console
from impasto.cli import options
from impasto.cli.loading import Loading, check_texts
from impasto.console import Column

if TYPE_CHECKING:
    from impasto.anatomy import Anatomy
    from impasto.models import LoadedModel


def show(
    model: options.Model,
    schedule: options.ScheduleText = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    attn_implementation: options.AttnImplementation = None,
    device_map: options.DeviceMap = None,
) -> None:
    """Show a model's layers, their halves and matrices, and where its parameters are.

    Examples:
      impasto show demo
      impasto show demo -s "0:5 {5:11} 11:"
      impasto show ./my-model --dtype bfloat16
    """
    check_texts([schedule] if schedule is not None else [])
    loading = Loading(device, dtype, revision, trust_remote_code, attn_implementation, device_map)
    with console.phases() as progress:
        loaded = loading.load(model, progress)
        progress.bytes("listening to one forward pass", 0, 0)
        from impasto.anatomy import anatomy
        from impasto.schedule import Schedule

        body = anatomy(loaded.model)
        expanded = Schedule.parse(schedule, layers=body.depth) if schedule is not None else None
        groups = alike(body)
        kinds = [_halves(loaded, body, group.layers[0]) for group in groups]
        memory = cache_bytes(loaded, body)
    out = console.output()
    out.print(_title(loaded))
    out.print(console.facts(_facts(loaded, body, groups, kinds, memory)))
    out.print()
    out.print(_shares(loaded, body, groups))
    for group, kind in zip(groups, kinds, strict=True):
        out.print()
        out.print(_matrices(body, group, kind if len(groups) > 1 else ""))
    if expanded is not None:
        out.print()
        out.print(console.plain(f"schedule: {expanded.describe(body.depth)}", "bold"), soft_wrap=True)
        out.print(console.facts(_counts(loaded, body, expanded, memory)))


@dataclass(frozen=True, slots=True)
class Alike:
    """Layers of one class whose matrices have the same names and shapes."""

    block: str  # class name
    layers: tuple[int, ...]


def alike(body: Anatomy) -> list[Alike]:
    """The layers in groups that look the same, in the order of their first members."""
    groups: dict[Any, list[int]] = {}
    for i, layer in enumerate(body.layers):
        groups.setdefault((type(layer).__name__, body.matrices(i)), []).append(i)
    return [Alike(name, tuple(members)) for (name, _), members in groups.items()]


def cache_bytes(loaded: LoadedModel, body: Anatomy) -> tuple[int, ...]:
    """Bytes that each layer's keys and values take per token, weighed in one forward pass; empty without a cache."""
    if not body.cached:
        return ()
    from impasto.anatomy import probe_inputs, quietly

    inputs = probe_inputs(loaded.model)
    with quietly(loaded.model):
        cache = loaded.model(**inputs, use_cache=True).past_key_values
    tokens = int(inputs["input_ids"].shape[1])
    return tuple(
        sum(int(t.numel() * t.element_size()) for t in (one.keys, one.values)) // tokens for one in cache.layers
    )


def ranges(numbers: Sequence[int]) -> str:
    """Ascending layer numbers as a schedule writes them: `0:5 6 7:18`."""
    parts: list[tuple[int, int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number:
            parts[-1] = (parts[-1][0], number + 1)
        else:
            parts.append((number, number + 1))
    return " ".join(f"{first}:{end}" if end - first > 1 else str(first) for first, end in parts)


def _layers(numbers: Sequence[int]) -> str:
    return f"layer{'s' if len(numbers) > 1 else ''} {ranges(numbers)}"


def _halves(loaded: LoadedModel, body: Anatomy, layer: int) -> str:
    from impasto.errors import UnsupportedModel
    from impasto.halves import halves

    try:
        found = halves(loaded.model, body, layer)
    except UnsupportedModel:
        return "not separable: a layer runs whole or not at all"
    names = f"attn = {found.attention.name}, mlp = {found.mlp.name}"
    if found.kind == "sequential":
        return f"sequential ({names})"
    return f"parallel: both read the layer's input ({names})"


def _title(loaded: LoadedModel) -> Text:
    total = sum(p.numel() for p in loaded.model.parameters())
    return Text.assemble(
        (console.printable(loaded.name), "bold"),
        (f"  {type(loaded.model).__name__}, {loaded.layers} layers, {console.amount(total)} parameters", ""),
    )


def _facts(
    loaded: LoadedModel, body: Anatomy, groups: Sequence[Alike], kinds: Sequence[str], memory: tuple[int, ...]
) -> Iterator[tuple[str, str]]:
    setting = loaded.setting
    yield "runs in", f"{setting.dtype} on {setting.device}, {setting.attention} attention"
    yield "weights", f"{loaded.source} ({setting.weights[:12]})"
    blocks = ", ".join(f"{len(group.layers)} × {group.block}" for group in groups)
    yield "layers", f"{blocks} in {body.path}"
    if len(set(kinds)) == 1:
        yield "halves", kinds[0]
    yield from _layer_types(loaded, body)
    if memory:
        each = f"{console.size(memory[0])} in each layer" if len(set(memory)) == 1 else "not the same in all layers"
        yield "KV cache", f"{console.size(sum(memory))} per token, {each}"
    if loaded.tokenizer is not None:
        yield "window", f"{loaded.window:,} tokens"


def _layer_types(loaded: LoadedModel, body: Anatomy) -> Iterator[tuple[str, str]]:
    from impasto.anatomy import text_config

    config = text_config(loaded.model)
    types = getattr(config, "layer_types", None)
    if not types or len(types) != body.depth or len(set(types)) == 1:
        return
    window = getattr(config, "sliding_window", None)
    parts = []
    for kind in dict.fromkeys(types):
        members = [i for i, own in enumerate(types) if own == kind]
        name = str(kind).replace("_", " ")
        if "sliding" in name and window:
            name += f" over {window:,} tokens"
        shown = f": {ranges(members)}" if len(ranges(members)) < 40 else ""
        parts.append(f"{len(members)} {name}{shown}")
    yield "layer types", "; ".join(parts)


def _shares(loaded: LoadedModel, body: Anatomy, groups: Sequence[Alike]) -> Any:
    model = loaded.model
    total = sum(p.numel() for p in model.parameters()) or 1
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    entry = sum(p.numel() for p in embedding.parameters()) if embedding is not None else 0
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    exit_ = 0 if head is None or tied else sum(p.numel() for p in head.parameters())
    inside = sum(body.parameters(i) for i in range(body.depth))

    def row(name: str, count: int, remark: str = "") -> tuple[str, str, str, str]:
        return name, console.amount(count), f"{count / total:.1%}", remark

    rows = [row("embedding", entry, "is the head too" if tied else "")]
    rows.append(row("layers", inside, "" if len(groups) > 1 else _each(body, groups[0])))
    if len(groups) > 1:
        rows += [row(f"  {ranges(g.layers)}", _inside(body, g), _each(body, g)) for g in groups]
    if exit_:
        rows.append(row("head", exit_))
    if rest := total - entry - inside - exit_:
        rows.append(row("the rest", rest, "norms and what else stands outside of layers"))
    columns = (Column("part", "left"), Column("parameters"), Column("share"), Column("", "left", fold=True))
    return console.table(columns, rows)


def _inside(body: Anatomy, group: Alike) -> int:
    return sum(body.parameters(i) for i in group.layers)


def _each(body: Anatomy, group: Alike) -> str:
    return f"{len(group.layers)} × {console.amount(body.parameters(group.layers[0]))}"


def _matrices(body: Anatomy, group: Alike, halves: str) -> Any:
    layer = group.layers[0]
    own = body.parameters(layer) or 1
    title = f"matrices of {_layers(group.layers)}"
    columns = (Column(title, "left", fold=True), Column("shape"), Column("parameters"), Column("share of the layer"))
    rows = [
        (m.name, " × ".join(f"{n:,}" for n in m.shape), console.amount(m.parameters), f"{m.parameters / own:.1%}")
        for m in body.matrices(layer)
    ]
    made = console.table(columns, rows)
    if halves:
        made.caption = console.plain(f"halves: {halves}", "dim")
        made.caption_justify = "left"
    return made


def _counts(loaded: LoadedModel, body: Anatomy, schedule: Any, memory: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    from impasto.steps import leaves

    unused = [i for i in range(body.depth) if i not in schedule.layers_used]
    if unused:
        freed = sum(body.parameters(i) for i in unused)
        yield "not used", f"{_layers(unused)}, {console.amount(freed)} parameters"
    calls = list(leaves(schedule.steps))
    repeated = sorted({c.layer for c in calls if sum(c == other for other in calls) > 1})
    if repeated:
        yield "run again", _layers(repeated)
    if memory:
        slots = [call.layer for call in calls if call.half != "mlp"]
        before, after = sum(memory), sum(memory[i] for i in slots)
        yield "KV cache", f"{console.size(after)} per token in {len(slots)} slots ({after / before:.0%} of the model's)"
