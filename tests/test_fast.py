"""Laws of compiled decoding: the same tokens as the plain runtime, on every family, schedule, batch and bucket."""

from __future__ import annotations

import gc
import random
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.cache_utils import DynamicCache

import families
from impasto import regions
from impasto.apply import applied
from impasto.errors import NotationError, UnsupportedModel, UsageError
from impasto.fast import fast
from impasto.graphs import Cuda, Eager, Work
from impasto.pieces import Compile
from impasto.runtime import scheduled
from impasto.surgery import edited

MIXED = "0 2 1 {2:5}x2 3x2 5"
REFUSED = {"lfm2": "keep more than keys and values", "gpt_neo": "gives other logits than the plain runtime"}
KINDS = {  # families whose layers differ in kind; all others stand in the slow law
    "llama",  # rotary positions, shared keys, gated MLP
    "gemma3_text",  # sliding and full attention in turn, norms behind the halves
    "gpt2",  # learnt positions
    "bloom",  # biases on scores instead of positions
    "mixtral",  # experts
    *REFUSED,
}
UNRECORDED = {"xglm", "mpt"}  # their code looks at the position's value, so that no recording can serve all steps


def plain(model: Any, schedule: str, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of the plain runtime, with a growing cache and no padding."""
    cache, found = DynamicCache(config=model.config.get_text_config()), []
    ids = torch.tensor([prompt], device=model.device)
    with torch.no_grad(), scheduled(model, schedule):
        for _ in range(count):
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
            found.append(int(logits.max(-1).indices))
            ids = ids.new_tensor([[found[-1]]])
    return found


def prompts(*lengths: int) -> list[list[int]]:
    generator = random.Random(3)
    return [[generator.randrange(3, families.VOCABULARY) for _ in range(length)] for length in lengths]


def slow_unless(quick: set[str], names: Iterable[str]) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("family", slow_unless(KINDS, families.DECODERS))
def test_tokens_equal_the_plain_runtimes_beyond_the_sliding_window(family: str) -> None:
    model, (prompt,) = families.shared(family), prompts(13)
    if family in REFUSED:
        with pytest.raises(UnsupportedModel, match=REFUSED[family]), fast(model, MIXED, context=40):
            pass
        return
    with fast(model, MIXED, context=40, buckets=[16, 24]) as decoder:
        (made,) = decoder.generate([prompt], 14, ends=())
    assert list(made) == plain(model, MIXED, prompt, 14)
    assert decoder.report.error < 1e-4


PADDED = ["llama", "gemma3_text", "mistral", "qwen2", "gpt2", "bloom", "opt", "llama4_text"]


@pytest.mark.parametrize("family", slow_unless({"gemma3_text", "bloom"}, PADDED))
def test_rows_of_a_padded_batch_equal_rows_alone(family: str) -> None:
    model, rows = families.shared(family), prompts(5, 13, 9, 11)
    with fast(model, MIXED, batch=3, context=40, buckets=[16], prompt_sizes=[16]) as decoder:
        made = decoder.generate(rows, 8, ends=())
    assert [list(row) for row in made] == [plain(model, MIXED, row, 8) for row in rows]


@pytest.mark.parametrize(
    "schedule",
    [
        "0:6",
        "5 0",
        "{0:6}",
        "sum{1:5}",
        "0 {1 2, 3 4}x2 5",
        "0 {1 {2:4}, 4} 5",
        "0.attn 1.mlp (2:4).mlp 5",
        "(1:3).mlp",
    ],
)
def test_every_kind_of_schedule(schedule: str) -> None:
    model, (prompt,) = families.shared("llama"), prompts(9)
    with fast(model, schedule, context=24) as decoder:
        (made,) = decoder.generate([prompt], 8, ends=())
    assert list(made) == plain(model, schedule, prompt, 8)


@pytest.mark.parametrize(("family", "batch"), [("llama", 2), pytest.param("mixtral", 1, marks=pytest.mark.slow)])
def test_traced_regions_compute_the_same_and_are_shared_by_equal_layers(family: str, batch: int) -> None:
    model, rows = families.shared(family), prompts(*[13, 9][:batch])
    with fast(model, MIXED, batch=batch, context=24, compile="traced", branches="streams") as decoder:
        made = decoder.generate(rows, 8, ends=())
    assert [list(row) for row in made] == [plain(model, MIXED, row, 8) for row in rows]
    assert decoder.report.regions == 2 + 12
    assert decoder.report.kernels == 3  # embedding, layer, head


STACKED = "0 {1.attn 2, 3.attn 4} sum{1.mlp, 2.mlp} {3 {1:3}, 4} 5"


@pytest.mark.parametrize(
    ("family", "batch", "schedule"),
    [
        ("llama", 1, STACKED),
        pytest.param("llama", 2, STACKED, marks=pytest.mark.slow),
        ("gemma3_text", 1, MIXED),
        pytest.param("gemma3_text", 1, STACKED, marks=pytest.mark.slow),
        pytest.param("mixtral", 1, MIXED, marks=pytest.mark.slow),
    ],
)
def test_stacked_branches_compute_the_same_on_weights_that_return(family: str, batch: int, schedule: str) -> None:
    model, rows = families.build(family), prompts(*[13, 9][:batch])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with fast(model, schedule, batch=batch, context=24, compile="traced") as decoder:
        made = decoder.generate(rows, 6, ends=())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    assert [list(row) for row in made] == [plain(model, schedule, row, 6) for row in rows]
    if schedule == MIXED:
        assert decoder.report.regions == 2 + 6 + 2
        assert decoder.report.kernels == 4


def test_traced_regions_of_halves_and_thin_products() -> None:
    model, (prompt,) = families.build("llama"), prompts(9)
    schedule, edits = "0 1.attn {2 3.mlp, 4} 5", ["1:5.mlp.*@r8"]
    with edited(model, edits, form="factored"):
        expected = plain(model, schedule, prompt, 8)
    with fast(model, schedule, edits, context=24, compile="traced") as decoder:
        (made,) = decoder.generate([prompt], 8, ends=())
    assert list(made) == expected


def test_branches_that_cannot_be_stacked_run_apart_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> Any:
        raise RuntimeError("no such rule")

    monkeypatch.setattr("impasto.pieces.stack", broken)
    model, (prompt,) = families.shared("llama"), prompts(9)
    with fast(model, "0 {1:3}", context=16, compile="traced") as decoder:
        (made,) = decoder.generate([prompt], 4, ends=())
    assert list(made) == plain(model, "0 {1:3}", prompt, 4)
    assert decoder.report.notes == ("stacked branches do not run (no such rule): one stream each",)


@pytest.mark.slow
def test_compiled_regions_compute_the_same() -> None:
    model, (prompt,) = families.shared("llama"), prompts(9)
    with fast(model, MIXED, context=24, compile="inductor") as decoder:
        (made,) = decoder.generate([prompt], 8, ends=())
    assert list(made) == plain(model, MIXED, prompt, 8)


@pytest.mark.slow
def test_what_is_compiled_serves_other_models_and_schedules_and_holds_no_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled, compile = [], torch._inductor.compile
    monkeypatch.setattr(torch._inductor, "compile", lambda *args, **kw: compiled.append(1) or compile(*args, **kw))
    monkeypatch.setattr("impasto.regions._compiled", OrderedDict())
    (prompt,) = prompts(9)

    def decoded(schedule: str, seed: int, steps: int) -> list[StorageWeakRef]:
        model = families.build("llama")
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        with fast(model, schedule, context=24, compile="inductor") as decoder:
            (made,) = decoder.generate([prompt], steps, ends=())
        assert list(made) == plain(model, schedule, prompt, steps)
        return [StorageWeakRef(p.untyped_storage()) for p in model.parameters()]

    held = decoded("0:6", 1, 8)
    assert len(compiled) == 3  # what stands before the layers, a layer, what stands behind
    gc.collect()
    assert all(storage.expired() for storage in held)
    decoded("0 3 2 2 5", 2, 6)
    assert len(compiled) == 3
    decoded("0 {1:4} 5", 3, 6)
    assert len(compiled) == 4


def test_what_is_compiled_is_compiled_again_under_other_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, *_, **__: compiled.append(1) or graph)
    monkeypatch.setattr("impasto.regions._compiled", OrderedDict())
    memory = torch.zeros(40)
    inputs = [memory[:8], memory[8:16]]
    region = regions.trace(lambda a, b: [a * b + 0.5], inputs)

    def count(inputs: list[torch.Tensor] = inputs, **options: Any) -> int:
        regions.compile_region(region, inputs, options)
        return len(compiled)

    assert (count(), count()) == (1, 1)
    assert count(combo_kernels=True) == 2
    assert count([memory[1:9], memory[16:24]]) == 3  # which begins elsewhere
    with torch._inductor.config.patch(emulate_precision_casts=True):
        assert count() == 4
    torch.use_deterministic_algorithms(True)
    try:
        assert count() == 5
    finally:
        torch.use_deterministic_algorithms(False)
    assert count() == 5
    monkeypatch.setattr(regions, "MOST", 5)
    other = regions.trace(lambda a, b: [a - b], inputs)
    regions.compile_region(other, inputs, {})
    assert (len(regions._compiled), count()) == (5, 6)  # the one that was used longest ago is gone
    assert count(combo_kernels=True) == 7


@pytest.mark.parametrize("family", sorted(UNRECORDED))
def test_models_that_look_at_values_are_not_recorded(family: str) -> None:
    message = "does not run as one recorded step"
    with pytest.raises(UnsupportedModel, match=message), fast(families.shared(family), context=24, compile="traced"):
        pass


def test_a_row_ends_with_its_end_token_and_others_go_on() -> None:
    model, rows = families.shared("llama"), prompts(6, 7)
    with fast(model, batch=2, context=40) as decoder:
        free = decoder.generate(rows, 20, ends=())
        end = free[0][3]
        made = decoder.generate(rows, 20, ends=[end])
    for row, whole in zip(made, free, strict=True):
        stop = whole.index(end) + 1 if end in whole else 20
        assert row == whole[:stop]
    assert len(made[0]) <= 4


def test_the_models_own_end_tokens_end_a_row() -> None:
    model, (prompt,) = families.build("llama"), prompts(6)
    with fast(model, context=40) as decoder:
        (free,) = decoder.generate([prompt], 20, ends=())
        model.generation_config.eos_token_id = [free[2]]
        (made,) = decoder.generate([prompt], 20)
    assert made == free[: free.index(free[2]) + 1]


def test_a_row_ends_where_logits_are_not_finite() -> None:
    model, (prompt,) = families.build("llama"), prompts(6)
    with fast(model, context=40) as decoder:
        with torch.no_grad():
            model.lm_head.weight.fill_(torch.nan)
        assert decoder.generate([prompt], 5, ends=()) == [()]


def test_the_whole_context_can_be_used_and_no_more() -> None:
    model, (prompt,) = families.shared("llama"), prompts(10)
    expected = plain(model, "0:6", prompt, 7)
    with fast(model, context=16) as decoder:
        (made,) = decoder.generate([prompt], 7, ends=())
        assert list(made) == expected
        with pytest.raises(UsageError) as error:
            decoder.generate([prompt], 8)
        assert str(error.value) == (
            "a prompt of 10 tokens and 8 new ones do not fit into a context of 16: make the decoder with a larger one"
        )
        with pytest.raises(UsageError, match="the context of 16 is full"):
            decoder.step()
        with pytest.raises(UsageError, match="a prompt of 17 tokens is longer than the context of 16"):
            decoder.prefill(prompts(17))
        with pytest.raises(UsageError, match="at least one token must be generated, not 0"):
            decoder.generate([prompt], 0)
        with pytest.raises(UsageError, match="reads 1 to 1 prompts at a time, each of at least one token"):
            decoder.prefill([[]])


def test_steps_by_hand_are_those_of_generate() -> None:
    model, (prompt,) = families.shared("llama"), prompts(10)
    with fast(model, context=24) as decoder:
        (made,) = decoder.generate([prompt], 5, ends=())
        tokens = [int(decoder.prefill([prompt])[0])]
        tokens += [int(decoder.step()[0]) for _ in range(4)]
        assert decoder.new_tokens() == [tokens]
    assert tokens == list(made)


@pytest.mark.parametrize(("rows", "sizes"), [(3, []), (2, []), (2, [16])])
def test_prompts_in_a_tensor_are_those_in_lists_and_are_never_built_on_the_host(
    rows: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = families.shared("llama"), torch.tensor(prompts(*[11] * rows), dtype=torch.int32)
    with fast(model, batch=3, context=24, prompt_sizes=sizes) as decoder:
        expected = [decoder.prefill(given.tolist()).tolist(), decoder.step().tolist()]
        decoder.prefill(prompts(4, 9))  # leaves padding behind
        monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("built on the host"))
        assert [decoder.prefill(given).tolist(), decoder.step().tolist()] == expected


def test_tensors_that_are_no_prompts() -> None:
    with fast(families.shared("llama"), batch=2, context=16) as decoder:
        for shape in ((3, 5), (0, 5), (2, 0), (5,), (1, 2, 5)):
            with pytest.raises(UsageError, match="reads 1 to 2 prompts at a time, each of at least one token"):
                decoder.prefill(torch.ones(shape, dtype=torch.long))
        with pytest.raises(UsageError, match="a prompt of 17 tokens is longer than the context of 16"):
            decoder.prefill(torch.ones(2, 17, dtype=torch.long))


def test_the_model_is_as_before() -> None:
    model = families.build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(layer) for layer in model.model.layers]
    with pytest.raises(ZeroDivisionError), fast(model, "0 {1:3}", ["1.mlp.*@r4"], context=24, compile="traced"):
        raise ZeroDivisionError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert classes == [type(layer) for layer in model.model.layers]
    assert not any("_impasto_tap" in layer.__dict__ for layer in model.model.layers)


@pytest.mark.parametrize("edits", [[], ["1:5.mlp.*@r4"]])
def test_memory_that_recordings_read_is_theirs_while_others_move_the_models_weights(edits: list[str]) -> None:
    """A replay reads addresses. Stacks give a model's weights others, twice, and what was there before is freed."""
    model, (prompt,) = families.build("llama"), prompts(9)
    read: list[StorageWeakRef] = []

    class Recorder(Eager):
        def record(self, work: Work, undo: Work) -> Work:
            thin = [held for m in model.modules() if "forward" in vars(m) for held in cells(vars(m)["forward"])]
            read.extend(StorageWeakRef(t.untyped_storage()) for t in (*model.parameters(), *model.buffers(), *thin))
            return work

    def cells(function: Any) -> list[Any]:
        return [c.cell_contents for c in function.__closure__ or () if isinstance(c.cell_contents, torch.Tensor)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("impasto.fast.Eager", Recorder)
        with fast(model, "0:6", edits, context=24, prompt_sizes=[16]) as decoder:
            decoder.generate([prompt], 4, ends=())
    before = {p.data_ptr() for p in model.parameters()}
    with fast(model, STACKED, context=24, compile="traced") as other:
        assert any(p.data_ptr() not in before for p in model.parameters())
        other.generate([prompt], 4, ends=())
    del other
    gc.collect()
    assert len(decoder._prompts) == len(decoder._steps) == 1 and len(read) > 2 * len(before)
    assert not any(storage.expired() for storage in read)
    del decoder
    gc.collect()
    assert any(storage.expired() for storage in read)  # and nobody else holds it


@pytest.mark.gpu
def test_a_recording_replays_the_same_after_others_have_moved_the_models_weights() -> None:
    model, (prompt,) = families.build("llama").cuda(), prompts(9)
    with fast(model, "0:6", context=24, prompt_sizes=[16]) as decoder:
        expected = decoder.generate([prompt], 8, ends=())
    with fast(model, STACKED, context=24, compile="traced"):
        pass
    gc.collect()
    taken = [torch.full_like(p, torch.nan) for p in model.parameters() for _ in range(4)]  # whatever was freed
    assert decoder.generate([prompt], 8, ends=()) == expected
    assert taken


@pytest.mark.gpu
def test_a_recording_writes_into_no_memory_that_torch_may_free() -> None:
    """Streams that have multiplied before have workspaces, which others make torch free: `torch.compile` does."""
    backend = Cuda(torch.device("cuda"))
    row, matrix = (torch.randn(size, 16384, dtype=torch.bfloat16, device="cuda") for size in (16, 64))
    products = [torch.empty(16, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3)]

    def work() -> None:  # so many columns are added up by several programs each, which meet in a workspace
        with backend.fork(3) as branches:
            for product, branch in zip(products, branches, strict=True):
                with branch:
                    torch.mm(row, matrix.T, out=product)

    replay = backend.record(work, lambda: None)
    replay()
    expected = [product.clone() for product in products]
    torch._C._cuda_clearCublasWorkspaces()
    taken = []  # all that was freed
    for stream in backend._streams.values():
        with torch.cuda.stream(stream):
            before = torch.cuda.memory_reserved()
            while torch.cuda.memory_reserved() == before:
                taken.append(torch.full((2**20,), 7.0, device="cuda"))
    torch.cuda.synchronize()
    replay()
    torch.cuda.synchronize()
    assert all(bool((x == 7).all()) for x in taken)
    for product, wanted in zip(products, expected, strict=True):
        torch.testing.assert_close(product, wanted)


def test_the_report_tells_what_it_took() -> None:
    with fast(families.shared("llama"), "0 1.mlp {2:4}", batch=2, context=24, compile="traced") as decoder:
        report = decoder.report
    assert (report.schedule, report.batch, report.context, report.slots) == ("0 1.mlp {2 3}", 2, 24, 3)
    assert (
        report.slot_bytes == 3 * 2 * 2 * 2 * 24 * 16 * 4
    )  # slots, keys and values, rows, heads, columns, width, float32
    assert set(report.seconds) == {"check", "trace", "compile", "record"}
    assert report.streams == 0
    assert 0 <= report.error < 1e-4


def test_refusals() -> None:
    model = families.shared("llama")
    with (
        pytest.raises(UsageError, match="at least one row and 4 columns, not 0 and 24"),
        fast(model, batch=0, context=24),
    ):
        pass
    with pytest.raises(UsageError, match="and 4 columns, not 1 and 3"), fast(model, context=3):
        pass
    with pytest.raises(UsageError, match="compile is one of 'off', 'traced', 'inductor', not 'inducter'"):
        with fast(model, compile="inducter"):  # type: ignore[arg-type]
            pass
    with pytest.raises(UsageError, match="branches is one of 'stacked', 'streams', 'series', not 'stack'"):
        with fast(model, branches="stack"):  # type: ignore[arg-type]
            pass
    with pytest.raises(UsageError, match="recorded on CUDA devices only, and this model is on cpu: capture=False"):
        with fast(model, capture=True):
            pass
    with pytest.raises(NotationError), fast(model, "0:9"):
        pass
    with pytest.raises(UnsupportedModel, match="does not write text"), fast(families.shared("bert")):
        pass
    with scheduled(model, "0"), pytest.raises(UsageError, match="already runs under a schedule"), fast(model):
        pass


def test_the_smallest_context_decodes() -> None:
    model, (prompt,) = families.shared("llama"), prompts(2)
    with fast(model, "0 {1 2} 3", context=4, compile="traced") as decoder:
        (made,) = decoder.generate([prompt], 3, ends=())
    assert list(made) == plain(model, "0 {1 2} 3", prompt, 3)


@pytest.mark.parametrize("compile", ["off", "traced"])
def test_behind_its_block_a_decoder_reads_no_prompt(compile: Compile) -> None:
    model, (prompt,) = families.shared("llama"), prompts(9)
    with fast(model, "0 2 2 3", context=24, compile=compile) as decoder:
        decoder.generate([prompt], 3, ends=())
    with pytest.raises(UsageError, match="this decoder's `with` block has ended"):
        decoder.generate([prompt], 3, ends=())
    with fast(model, "0:6", context=24), pytest.raises(UsageError, match="has ended"):
        decoder.generate([prompt], 3, ends=())


def test_a_model_can_be_trained_after_it_was_stacked_in_inference_mode() -> None:
    model, ids = families.build("llama"), torch.tensor(prompts(7))
    with torch.inference_mode(), fast(model, STACKED, context=24, compile="traced"):
        pass
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("compile", ["off", "traced"])
def test_a_decoder_notes_nothing_for_gradients_whatever_thread_and_mode_uses_it(compile: Compile) -> None:
    model, (prompt,) = families.build("llama"), prompts(9)
    expected = plain(model, STACKED, prompt, 6)
    with fast(model, STACKED, context=24, compile=compile) as decoder:
        with torch.enable_grad():
            assert [list(row) for row in decoder.generate([prompt], 6, ends=())] == [expected]
        with ThreadPoolExecutor(1) as pool:
            assert [list(row) for row in pool.submit(decoder.generate, [prompt], 6, ()).result()] == [expected]
        assert decoder.program.logits is not None and not decoder.program.logits.requires_grad
        assert not any(slot.keys.requires_grad for slot in decoder.program.memory.layers)


def test_models_are_traced_in_two_threads_at_once_and_torch_is_as_before() -> None:
    models, (prompt,), call = [families.build("llama") for _ in range(2)], prompts(9), torch.nn.Module.__call__
    expected = plain(models[0], STACKED, prompt, 4)

    def work(model: Any) -> list[list[int]]:
        made = []
        for _ in range(3):
            with fast(model, STACKED, context=16, compile="traced") as decoder:
                made += [list(row) for row in decoder.generate([prompt], 4, ends=())]
        return made

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, models)) == [[expected] * 3] * 2
    assert torch.nn.Module.__call__ is call


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_branches_of_a_model_that_wants_a_mask_are_stacked_too(family: str) -> None:
    model, (prompt,) = families.shared(family), prompts(9)
    with fast(model, "0 {1 3} 5", context=24, compile="traced") as decoder:
        (made,) = decoder.generate([prompt], 6, ends=())
    assert list(made) == plain(model, "0 {1 3} 5", prompt, 6)
    assert (decoder.report.regions, decoder.report.notes) == (5, ())


@pytest.mark.parametrize("form", [tuple, torch.tensor])
def test_end_tokens_may_come_in_any_form(form: Any) -> None:
    model, (prompt,) = families.build("llama"), prompts(6)
    with fast(model, context=40) as decoder:
        (free,) = decoder.generate([prompt], 20, ends=())
        model.generation_config.eos_token_id = form([free[2]])
        (made,) = decoder.generate([prompt], 20)
    assert made == free[: free.index(free[2]) + 1]


def test_halves_are_found_before_edits_silence_what_they_are_known_by() -> None:
    edits, (prompt,) = ["3.self_attn.v_proj@0"], prompts(9)
    model = families.build("llama")
    with fast(model, "0 3.attn 3.mlp 5", edits, context=24) as decoder:
        (made,) = decoder.generate([prompt], 6, ends=())
    with edited(model, edits):
        assert list(made) == plain(model, "0 3.attn 3.mlp 5", prompt, 6)
    with applied(families.build("llama"), "0 3.attn 3.mlp 5", edits) as changed:
        assert changed(input_ids=torch.tensor([prompt])).logits[0, -1].argmax() == made[0]


def test_sums_of_double_precision_are_of_double_precision() -> None:
    model, states = families.build("llama", torch.float64), []
    with torch.no_grad(), scheduled(model, "0 sum{1 2} 3", probe=lambda event: states.append(event.hidden)):
        model(input_ids=torch.tensor(prompts(9)))
    before, one, two, both = states[1:5]
    torch.testing.assert_close(both, before + (one - before) + (two - before), rtol=1e-14, atol=1e-14)
