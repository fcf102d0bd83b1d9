"""Laws of the runtime, over the whole table of families."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch

import oracle
from families import DECODERS, DEPTH, ENCODERS, FAMILIES, VISION, build, inputs, shared
from impasto import moves
from impasto.anatomy import anatomy
from impasto.errors import NotationError, UnsupportedModel, UsageError
from impasto.runtime import Event, scheduled
from impasto.schedule import Schedule

torch.set_num_threads(1)

# Everything at once: other orders, repeats, loops of a group, series branches, a nested group, both merges.
TANGLE = "0 2 1 {2:5}x2 3x2 sum{1 2, {4 0, 3}} 5"
OWN_LOOP = ("gptj", "bloom", "falcon", "codegen", "mpt", "gpt_neo", "deberta-v2")


def plain(family: str) -> dict[str, Any]:
    return {"use_cache": False} if family in DECODERS else {}


def snapshot(model: Any) -> dict[str, Any]:
    """All that a `with` block might leave changed."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return {
        "classes": [type(m) for m in model.modules()],
        "objects": [id(m) for m in model.modules()],
        "attributes": [{k: id(v) for k, v in vars(m).items()} for m in model.modules()],
        "hooks": [[list(getattr(m, h)) for h in hooks] for m in model.modules()],
        "training": [m.training for m in model.modules()],
        "names": list(model.state_dict()),
        "tensors": [id(p) for p in model.parameters()],
        "values": [v.clone() for v in model.state_dict().values()],
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict() if getattr(model, "generation_config", None) else None,
    }


def assert_untouched(model: Any, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert all(torch.equal(a, b) for a, b in zip(before.pop("values"), after.pop("values"), strict=True))
    assert after == before


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return bool((one.float() - other.float()).abs().max() <= tolerance * max(1.0, float(other.abs().max())))


# ------------------------------------------------------------------------------------------------- law 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_identity_schedule_is_the_untouched_model_and_leaving_restores_it(family: str) -> None:
    model, given = shared(family), inputs(family)
    body = anatomy(model)
    with torch.no_grad():
        expected = model(**given).logits
        before = snapshot(model)
        with scheduled(model, Schedule.identity(DEPTH)) as same:
            assert same is model
            assert torch.equal(model(**given).logits, expected)
            assert list(model.state_dict()) == before["names"]
            assert [id(layer) for layer in model.get_submodule(body.path)] == [id(layer) for layer in body.layers]
        assert_untouched(model, before)
        with scheduled(model, TANGLE):
            assert not close(model(**given).logits, expected, 1e-3)
        assert torch.equal(model(**given).logits, expected)


class Halt(Exception):
    pass


def fail(error: type[BaseException]) -> Any:
    def hook(*_: Any) -> None:
        raise error("stop")

    return hook


@pytest.mark.parametrize("family", ["llama", "falcon", "bert"])
@pytest.mark.parametrize("error", [Halt, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["body", "probe", "embedding", "layer", "half", "between"])
def test_whatever_goes_wrong_inside_the_model_is_restored(family: str, error: Any, where: str) -> None:
    model, given = shared(family), inputs(family)
    layers = anatomy(model).layers
    with torch.no_grad():
        expected = model(**given).logits
        with scheduled(model, "0:6"):
            pass
        places = {
            "embedding": model.get_input_embeddings(),
            "layer": layers[2],
            "half": next(
                m for m in layers[3].modules() if isinstance(m, torch.nn.LayerNorm) or "Norm" in type(m).__name__
            ),
            "between": next(
                m for n, m in model.named_modules() if n and m is not layers[5] and list(m.children()) == []
            ),
        }
        before = snapshot(model)
        handle = places[where].register_forward_hook(fail(error)) if where in places else None
        with pytest.raises(error, match="stop"):
            with scheduled(model, "0:3 3.attn {4 3} 5", probe=fail(error) if where == "probe" else None):
                if where == "body":
                    raise error("stop")
                model(**given)
        if handle:
            handle.remove()
        assert_untouched(model, before)
        assert torch.equal(model(**given).logits, expected)


def test_a_pass_after_a_failed_one_inside_the_same_block_is_right() -> None:
    model, given = shared("llama"), inputs("llama")
    with torch.no_grad(), scheduled(model, TANGLE):
        expected = model(**given).logits
        handle = anatomy(model).layers[3].register_forward_hook(fail(Halt))
        with pytest.raises(Halt):
            model(**given)
        handle.remove()
        assert torch.equal(model(**given).logits, expected)


# ------------------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("family", FAMILIES)
def test_a_schedule_computes_what_calling_the_layers_by_hand_computes(family: str) -> None:
    model, given = shared(family), inputs(family)
    path = anatomy(model).path
    with torch.no_grad():
        for text in (TANGLE, "5:0 {0 5}", "2"):
            schedule = Schedule.parse(text, DEPTH)
            expected = oracle.logits(model, path, schedule, given, **plain(family))
            with scheduled(model, schedule):
                assert close(model(**given, **plain(family)).logits, expected), text


def every_method() -> list[Schedule]:
    found = [moves.skip_one(DEPTH, 3), moves.swap_adjacent(DEPTH, 2)]
    for start in moves.starts(DEPTH):
        found += [moves.skip(DEPTH, start), moves.middle_repeat(DEPTH, start), moves.reverse(DEPTH, start)]
        found += [moves.random_order(DEPTH, start, 1), moves.parallel(DEPTH, start)]
        found += [moves.parallel(DEPTH, start, "sum"), moves.looped_parallel(DEPTH, start, 3)]
        found += [moves.block_repeat(DEPTH, start, 2), moves.inplace_repeat(DEPTH, start, 2)]
    return found


@pytest.mark.parametrize("family", ["llama", "gptj", "bert"])
def test_every_method_of_the_paper_agrees_with_the_oracle(family: str) -> None:
    model, given = shared(family), inputs(family)
    path = anatomy(model).path
    with torch.no_grad():
        for schedule in every_method():
            expected = oracle.logits(model, path, schedule, given, **plain(family))
            with scheduled(model, schedule):
                assert close(model(**given, **plain(family)).logits, expected), str(schedule)


# ------------------------------------------------------------------------------------------------- law 3


@pytest.mark.parametrize("family", FAMILIES)
def test_methods_that_affect_one_layer_are_the_full_model_bit_for_bit(family: str) -> None:
    model, given = shared(family), inputs(family)
    start = DEPTH // 2 - 1

    def run(schedule: Schedule) -> torch.Tensor:
        with scheduled(model, schedule):
            return model(**given).logits

    with torch.no_grad():
        full = model(**given).logits
        for method in (moves.parallel, moves.reverse, moves.middle_repeat, moves.skip):
            same = torch.equal(run(method(DEPTH, start)), full)
            assert same is (method is not moves.skip)
        assert torch.equal(run(moves.looped_parallel(DEPTH, start, 1)), full)
        assert torch.equal(run(moves.random_order(DEPTH, start, 7)), full)
        assert torch.equal(run(moves.skip(DEPTH, start)), run(moves.skip_one(DEPTH, DEPTH // 2)))
        assert torch.equal(run(moves.looped_parallel(DEPTH, 1, 1)), run(moves.parallel(DEPTH, 1)))
        assert torch.equal(run(Schedule.parse("0 {3 1} 5")), run(Schedule.parse("0 {1 3} 5")))


# ------------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_the_calls(family: str) -> None:
    model, given = shared(family), inputs(family)
    events: list[Event] = []
    with torch.no_grad():
        normal = model(**given, output_hidden_states=True).hidden_states
        assert len(normal) == DEPTH + 1
        with scheduled(model, Schedule.identity(DEPTH)):
            same = model(**given, output_hidden_states=True).hidden_states
        assert all(torch.equal(a, b) for a, b in zip(normal, same, strict=True))
        with scheduled(model, "0 3x2 {1 2, 4} 5", probe=events.append):
            out = model(**given, output_hidden_states=True)
            states = out.hidden_states
            expected = [e.hidden for e in events if e.step is None or hasattr(e.step, "layer")]
            events.clear()
            as_tuple = model(**given, output_hidden_states=True, return_dict=False)
        assert torch.equal(as_tuple[0], out.logits)
    assert len(states) == 7 + 1
    assert len(expected) == len(states)
    assert all(torch.equal(a, b) for a, b in zip(states[:-1], expected[:-1], strict=True))
    listed = next(v for v in as_tuple if isinstance(v, tuple) and len(v) == 8 and torch.is_tensor(v[0]))
    assert all(torch.equal(a, b) for a, b in zip(listed, states, strict=True))


@pytest.mark.parametrize("family", OWN_LOOP)
def test_a_config_that_always_wants_states_is_heard(family: str) -> None:
    model = build(family)
    model.config.output_hidden_states = True
    with torch.no_grad(), scheduled(model, "1 2 1"):
        assert len({id(s) for s in model(**inputs(family)).hidden_states}) == 4


@pytest.mark.parametrize(
    "family", ["llama", "bert", "gpt2", "gptj", "bloom", "falcon", "codegen", "mpt", "gpt_neo", "deberta-v2"]
)
def test_attentions_are_those_of_the_calls(family: str) -> None:
    model = build(family, attn_implementation="eager")
    given = inputs(family)
    with torch.no_grad():
        normal = model(**given, output_attentions=True).attentions
        with scheduled(model, Schedule.identity(DEPTH)):
            same = model(**given, output_attentions=True).attentions
        with scheduled(model, "0 0 3"):
            three = model(**given, output_attentions=True).attentions
    assert all(torch.equal(a, b) for a, b in zip(normal, same, strict=True))
    assert len(three) == 3
    assert torch.equal(three[0], normal[0])
    assert not torch.equal(three[1], normal[0])


# ------------------------------------------------------------------------------------------------- probes


def test_a_probe_hears_every_call_and_merge_in_order_and_nothing_stays_alive() -> None:
    model, given = shared("llama"), inputs("llama")
    alive: list[weakref.ref[torch.Tensor]] = []
    heard: list[tuple[int, str]] = []
    most = 0

    def probe(event: Event) -> None:
        nonlocal most
        heard.append((event.place, "embeddings" if event.step is None else str(Schedule((event.step,)))))
        assert event.hidden.shape == (2, 24, 64)
        alive.append(weakref.ref(event.hidden))
        most = max(most, sum(ref() is not None for ref in alive))

    with torch.no_grad(), scheduled(model, "0 {1 2, sum{4 3}}x2 5.mlp", probe=probe):
        for _ in range(2):
            heard.clear()
            model(**given)
            gc.collect()
            assert not any(ref() is not None for ref in alive)
    names = ["embeddings", "0", "1", "2", "3", "4", "sum{3 4}", "{1 2, sum{3:5}}"]
    again = names[2:]
    assert [place for place, _ in heard] == list(range(len(heard)))
    assert [s.replace("3 4", "3:5") for _, s in heard] == [s.replace("3 4", "3:5") for s in [*names, *again, "5.mlp"]]
    assert most <= 6


def test_a_probe_may_change_nothing_but_may_stop_the_pass() -> None:
    model, given = shared("llama"), inputs("llama")
    with torch.no_grad():
        expected = model(**given).logits
        with scheduled(model, "0:6", probe=lambda event: None):
            assert torch.equal(model(**given).logits, expected)


# ------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in VISION])
def test_gradients_flow_through_a_schedule_as_through_the_oracle(family: str) -> None:
    model, given = shared(family), inputs(family)
    schedule = Schedule.parse("0 {1 2, 3}x2 {2:5} 5", DEPTH)
    path = anatomy(model).path

    def gradients(logits: torch.Tensor) -> list[torch.Tensor | None]:
        weight = torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)
        found = torch.autograd.grad((logits * weight).sum(), list(model.parameters()), allow_unused=True)
        return list(found)

    expected = gradients(oracle.logits(model, path, schedule, given, **plain(family)))
    with scheduled(model, schedule):
        got = gradients(model(**given, **plain(family)).logits)
    for one, two in zip(got, expected, strict=True):
        assert (one is None) == (two is None)
        assert one is None or two is None or close(one, two, 1e-3)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("family", "reentrant"),
    [(f, False) for f in FAMILIES if f not in VISION] + [(f, True) for f in ("llama", "gptj", "bloom", "bert")],
)
def test_gradient_checkpointing_changes_no_gradient(family: str, reentrant: bool) -> None:
    model, given = build(family), inputs(family)
    if not model.supports_gradient_checkpointing:
        pytest.skip("the model itself has no gradient checkpointing")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name, value in model.config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(model.config, name, 0.0)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    model.train()
    text = "0 {2:5}x2 sum{1 3} 5"
    if family in ("llama", "gpt2", "gpt_neox", "bert", "mistral"):
        text += " 2.attn 4.mlp"

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        with scheduled(model, text):
            logits = model(**given, **plain(family)).logits
            (logits * torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)).sum().backward()
            assert all(m.training for m in model.modules())
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    got = gradients()
    assert len(expected) == len(got) > 5
    assert all(close(one, two, 1e-4) for one, two in zip(got, expected, strict=True))


def test_a_schedule_can_be_fine_tuned_through() -> None:
    model, given = build("llama").train(), inputs("llama")
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    losses: list[float] = []
    with scheduled(model, "0 1 {2:5}x2 5"):
        for _ in range(4):
            loss = model(**given, labels=given["input_ids"]).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
        assert model.training
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_every_module_is_left_alone(training: bool) -> None:
    model = build("gpt2").train(training)
    model.transformer.h[2].train(not training)
    modes = [m.training for m in model.modules()]
    with scheduled(model, "0:3 3.attn 3.mlp 5"):
        assert [m.training for m in model.modules()] == modes
    assert [m.training for m in model.modules()] == modes


# ------------------------------------------------------------------------------------------------- dtypes, places


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "gptj", "mixtral", "bert", "vit"])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    model, given = build(family, dtype), inputs(family)
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
    with torch.no_grad():
        expected = model(**given).logits
        with scheduled(model, Schedule.identity(DEPTH)):
            assert torch.equal(model(**given).logits, expected)
        single = build(family)
        inside = {k: v.float() if v.is_floating_point() else v for k, v in given.items()}
        for text in ("0 {2:5} 5", "0 sum{2:5} 5"):
            with scheduled(model, text), scheduled(single, text):
                low, high = model(**given).logits, single(**inside).logits
            assert low.dtype == dtype
            assert (low.float() - high).abs().mean() < 0.1 * high.std()


@pytest.mark.filterwarnings("ignore:The following device_map keys")
@pytest.mark.parametrize("family", ["llama", "gptj", "bert"])
@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload", "dispatch"])
def test_weights_that_accelerate_keeps_elsewhere(family: str, way: str, tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, given = build(family), inputs(family)
    text = "0 2 {1 3}x2 5 2.attn"
    with torch.no_grad():
        full = model(**given).logits
        with scheduled(model, text):
            expected = model(**given).logits
        model.tie_weights()
        if way == "cpu_offload":
            accelerate.cpu_offload(model, execution_device="cpu")
        elif way == "disk_offload":
            accelerate.disk_offload(model, tmp_path, execution_device="cpu")
        else:
            path = anatomy(build(family)).path
            places = {n: "cpu" for n, m in model.named_modules() if n and not list(m.children()) and path not in n}
            places |= {n: "cpu" for n, p in model.named_parameters() if path not in n}
            places |= {f"{path}.{i}": "disk" if i % 2 else "cpu" for i in range(DEPTH)}
            accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
        with scheduled(model, text):
            got = model(**given).logits
            again = model(**given).logits
        assert torch.equal(got, again)
        assert close(got, expected, 1e-6)
        assert torch.equal(model(**given).logits, full)


# ------------------------------------------------------------------------------------------------- mistakes


def test_a_schedule_inside_a_schedule_is_an_error() -> None:
    model, given = shared("llama"), inputs("llama")
    with torch.no_grad(), scheduled(model, "0 1 5"):
        expected = model(**given).logits
        with (
            pytest.raises(
                UsageError, match=r"^this model already runs under a schedule: leave that `with` block first$"
            ),
            scheduled(model, "0:6"),
        ):
            pass
        assert torch.equal(model(**given).logits, expected)
        other = build("gpt2")
        with scheduled(other, "0 5"):
            assert torch.equal(model(**given).logits, expected)


def test_a_schedule_that_does_not_fit() -> None:
    model = shared("llama")
    before = snapshot(model)
    with pytest.raises(NotationError, match="6"), scheduled(model, "0:7"):
        pass
    with pytest.raises(NotationError), scheduled(model, Schedule.parse("0:9", 9)):
        pass
    with pytest.raises(UsageError, match=r"^kv is 'exact' or 'mean', not 'average'$"):
        with scheduled(model, "0:6", kv="average"):  # type: ignore[arg-type]
            pass
    assert_untouched(model, before)


def test_a_model_that_skips_layers_by_itself_is_an_error_and_never_a_wrong_number() -> None:
    model, given = build("opt", layerdrop=1.0).train(), inputs("opt")
    message = "the model did not call its last layer: it skips layers by itself"
    with scheduled(model, "0:6"), pytest.raises(UnsupportedModel, match=f"^{message}$"):
        model(**given)
    model = build("opt", layerdrop=0.5).train()
    torch.manual_seed(1)
    with scheduled(model, "0:6"), pytest.raises(UnsupportedModel, match="it skips layers by itself|model skips layers"):
        for _ in range(8):
            model(**given)


def test_threads_run_passes_of_their_own() -> None:
    model = shared("llama")
    batches = [{"input_ids": torch.randint(3, 200, (2, n))} for n in (5, 9, 13, 17)]
    results: dict[int, bool] = {}
    for text in ("0 {1 2, 3}x2 5", "0 3.mlp {4.attn 1} 3.attn"):
        with scheduled(model, text):
            with torch.no_grad():
                expected = [model(**batch).logits for batch in batches]

            def work(i: int, expected: list[torch.Tensor] = expected) -> None:
                with torch.no_grad():
                    results[i] = all(torch.equal(model(**batches[i]).logits, expected[i]) for _ in range(5))

            threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert results == dict.fromkeys(range(4), True)


def test_a_copy_made_after_the_block_is_an_ordinary_model() -> None:
    model, given = build("llama"), inputs("llama")
    with scheduled(model, "0 5"):
        pass
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(**given).logits, model(**given).logits)


def test_the_table_covers_what_it_says() -> None:
    assert len(FAMILIES) >= 54
    assert set(OWN_LOOP) <= set(DECODERS + ENCODERS)
