"""Several processes that share the members of parallel groups compute what one process computes."""

from __future__ import annotations

import copy
import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import DynamicCache

import families
import impasto.models as models
from impasto.apply import applied
from impasto.errors import NotationError, UnsupportedModel, UsageError
from impasto.fast import fast
from impasto.runtime import scheduled
from impasto.schedule import Call, Group, Schedule
from impasto.shares import Share, by_size, cut, even, plan
from impasto.spread import keep, load_share, split
from impasto.teams import Team, join
from test_placement import two_processes
from test_schedule import SCHEDULES
from tiny import tiny_folder

T = TypeVar("T")
LOOPED = "0 {1:4}x2 4 5"
IN_SERIES = "0 {1 2, 3 4 2, 5}x2 5"
SUMMED = "0 sum{1:5} {2 3} 5"
NESTED = "0 {1 {2:4}, 4 sum{2 3}, 5.mlp}x2 5"
HALVED = "0.attn {1.mlp 2.mlp} {3.attn 4.mlp} 5"
TEXTS = (LOOPED, IN_SERIES, SUMMED, NESTED, HALVED, "{0:6}", "0:6")


# ------------------------------------------------------------------------------------------------------- the plan


@given(st.lists(st.integers(0, 9), max_size=7), st.integers(1, 5))
def test_a_cut_is_the_best_of_all_cuts(costs: list[int], parts: int) -> None:
    def pieces(places: tuple[int, ...]) -> list[int]:
        return [sum(costs[a:b]) for a, b in itertools.pairwise(places)]

    def worth(places: tuple[int, ...]) -> tuple[int, int]:
        return max(pieces(places)), sum(piece**2 for piece in pieces(places))

    every = itertools.combinations_with_replacement(range(len(costs) + 1), parts - 1)
    found = cut(costs, parts)
    assert (found[0], found[-1], len(found)) == (0, len(costs), parts + 1)
    assert list(found) == sorted(found)
    assert worth(found) == min(worth((0, *inner, len(costs))) for inner in every)


@given(SCHEDULES, st.integers(1, 40))
@settings(deadline=None)
def test_every_branch_has_one_process_and_what_is_in_series_has_all(schedule: Schedule, size: int) -> None:
    found = plan(schedule, size)
    assert (found.size, found.schedule) == (size, schedule)
    for place, step in enumerate(schedule.steps):
        parts = [steps[place] for steps in found.steps]
        if isinstance(step, Call) or size == 1:
            assert parts == [step] * size
            continue
        shares = [part for part in parts if isinstance(part, Share)]
        assert len(shares) == size
        assert sum((share.branches for share in shares), ()) == step.branches
        assert {(share.group, share.merge) for share in shares} == {(step, step.merge)}
        assert [share.leads for share in shares] == [True] + [False] * (size - 1)
        assert all(part == again for part, again in zip(parts, _shares_of(found.steps, schedule, step), strict=True))


def _shares_of(steps: tuple[tuple[Any, ...], ...], schedule: Schedule, group: Group) -> list[Any]:
    """What the processes have of the last group that equals this one."""
    last = max(place for place, step in enumerate(schedule.steps) if step == group)
    return [own[last] for own in steps]


@given(st.integers(2, 40), st.integers(1, 50))
def test_equal_members_are_shared_evenly(members: int, size: int) -> None:
    found = plan(Schedule((Group(tuple((Call(i),) for i in range(members))),)), size)
    loads = found.loads(even)
    assert sum(loads) == members
    assert max(loads) - min(loads) <= 1


def test_what_a_plan_says() -> None:
    schedule = Schedule.parse("0 {1:5}x2 5 sum{3.attn 6}")
    two = plan(schedule, 2)
    assert two.layers(0) == {0, 1, 2, 5, 6}
    assert two.layers(1) == {0, 3, 4, 5}
    assert two.loads(even) == (7.0, 6.5)
    assert (two.slots(0), two.slots(1)) == (7, 7)
    assert two.weights([1, 10, 100, 1000, 10_000, 100_000, 1_000_000]) == (1_100_111, 111_001)
    assert (two.sums, plan(schedule, 1).sums) == (3, 0)
    assert two.sent(width=1000) == 3 * 1000 * 4
    assert plan(schedule, 4).sent(width=1000, positions=2) == 3 * 2 * 1000 * 4 * 3 // 2
    assert two.describe().splitlines() == [
        "process 0 of 2: layers 0 1 2 5 6; 7 of 12 calls",
        "process 1 of 2: layers 0 3 4 5; 7 of 12 calls",
    ]
    heavy = plan(Schedule.parse("{0:4}"), 2, by_size([30, 10, 10, 10]))
    assert (heavy.layers(0), heavy.layers(1)) == ({0}, {1, 2, 3})
    with pytest.raises(UsageError, match=r"^a plan is for at least one process, not 0$"):
        plan(schedule, 0)


# ------------------------------------------------------------------------------------- any number of processes


class Threads:
    """A team of threads, each with a model of its own: as many processes as a test wants."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, table: list[Any]) -> None:
        self.rank, self.size, self.barrier, self.table = rank, size, barrier, table

    def _all(self, mine: Any) -> list[Any]:
        self.table[self.rank] = mine
        self.barrier.wait()
        found = list(self.table)
        self.barrier.wait()
        return found

    def sum(self, part: Tensor) -> Tensor:
        return torch.stack(self._all(part.clone())).sum(0)

    def lowest(self, value: float) -> float:
        return float(min(self._all(value)))


def together(size: int, work: Callable[[Team], T]) -> list[T | BaseException]:
    """What `work` returns or raises in each of `size` threads."""
    barrier, table = threading.Barrier(size, timeout=60), [None] * size
    answers: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            with torch.no_grad():
                answers[rank] = work(Threads(rank, size, barrier, table))
        except BaseException as problem:
            answers[rank] = problem
            if not isinstance(problem, UsageError):
                barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def greedy(model: Any, prompt: Tensor, count: int) -> tuple[list[int], Tensor, int]:
    """Greedy tokens with a cache, the first logits, and how many slots the cache has."""
    cache, found, logits = DynamicCache(config=model.config.get_text_config()), list[int](), list[Tensor]()
    for _ in range(count):
        logits.append(model(input_ids=prompt, past_key_values=cache, use_cache=True).logits[:, -1])
        found.append(int(logits[-1].max(-1).indices))
        prompt = torch.tensor([[found[-1]]], device=prompt.device)
    return found, torch.stack(logits), len(cache.layers)


def alone(model: Any, text: str, prompt: Tensor, count: int) -> tuple[list[int], Tensor, int]:
    with torch.no_grad(), scheduled(model, text):
        return greedy(model, prompt, count)


def prompt(length: int = 9) -> Tensor:
    return torch.randint(3, families.VOCABULARY, (1, length), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("text", TEXTS)
def test_threads_compute_what_one_computes(text: str, size: int) -> None:
    model = families.shared("llama")
    tokens, logits, _ = alone(model, text, prompt(), 5)
    schedule = Schedule.parse(text)

    def work(team: Team) -> tuple[list[int], Tensor, int]:
        own = copy.deepcopy(model)
        keep(own, text, team)
        with scheduled(own, text, team=team):
            return greedy(own, prompt(), 5)

    answers = together(size, work)
    for rank, answer in enumerate(answers):
        assert not isinstance(answer, BaseException), answer
        assert answer[0] == tokens
        torch.testing.assert_close(answer[1], logits, rtol=0, atol=1e-5)
        assert torch.equal(answer[1], answers[0][1])  # type: ignore[index]
        slots = plan(schedule, size).slots(rank)
        assert answer[2] == (slots or 1)  # one that counts positions where no call keeps keys


@pytest.mark.parametrize("size", [2, 7])
@pytest.mark.parametrize("text", [SUMMED, NESTED, HALVED])
def test_decoders_of_threads_write_what_one_writes(text: str, size: int) -> None:
    model = families.shared("llama")
    tokens, _, _ = alone(model, text, prompt(), 6)

    def work(team: Team) -> tuple[list[int], int]:
        own = copy.deepcopy(model)
        keep(own, text, team)
        with fast(own, text, context=24, team=team) as decoder:
            (made,) = decoder.generate([prompt()[0].tolist()], 6, ends=())
        return list(made), decoder.report.slots

    slots = [plan(Schedule.parse(text), size).slots(rank) for rank in range(size)]
    assert together(size, work) == [(tokens, count) for count in slots]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])  # without and with biases; one with its embeddings
def test_layers_in_series_can_be_split(family: str) -> None:
    model, text = families.shared(family), "0 {1:4} 4.mlp 5 4.attn"
    tokens, logits, _ = alone(model, text, prompt(), 5)
    whole = sum(parameter.nbytes for parameter in model.parameters())

    def work(team: Team) -> tuple[list[int], Tensor, list[int], int]:
        own = copy.deepcopy(model)
        freed = split(own, text, team) + keep(own, text, team)
        assert freed == whole - sum(parameter.nbytes for parameter in own.parameters() if not parameter.is_meta)
        with scheduled(own, text, team=team):
            found, others, _ = greedy(own, prompt(), 5)
        with fast(own, text, context=24, team=team) as decoder:
            (made,) = decoder.generate([prompt()[0].tolist()], 5, ends=())
        return found, others, list(made), freed

    for answer in together(2, work):
        assert not isinstance(answer, BaseException), answer
        assert answer[0] == answer[2] == tokens
        torch.testing.assert_close(answer[1], logits, rtol=0, atol=1e-5)
        assert answer[3] > whole / 4


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        ("llama", 3, "2 heads of keys cannot be split over 3 processes"),
        ("gpt2", 2, "GPT2LMHeadModel has no tensor parallel plan: its layers in series stay whole in every process"),
        ("mixtral", 2, "splits mlp.experts.gate_up_proj as 'packed_colwise'; rows and columns of matrices can be spli"),
    ],
)
def test_what_cannot_be_split(family: str, size: int, message: str) -> None:
    class First:
        rank = 0

        def __init__(self) -> None:
            self.size = size

    with pytest.raises(UnsupportedModel, match=message):
        split(families.build(family), LOOPED, First())  # type: ignore[arg-type]


def test_a_split_model_knows_its_team() -> None:
    model = families.build("llama")

    def work(team: Team) -> str:
        own = copy.deepcopy(model)
        split(own, "0 {1 2} 3", team)
        with pytest.raises(UsageError) as without, scheduled(own, "1 2"):
            pass
        with pytest.raises(UsageError) as grouped, scheduled(own, "0 {1 3}", team=team):
            pass
        with pytest.raises(UsageError, match=r"^the layers of this model are split already: load it again to split o"):
            split(own, "0 {1 2} 3", team)
        return f"{without.value}; {grouped.value}"

    assert set(together(2, work)) == {
        "the weights of this model are split over processes: name the team that plays, team=team; "
        "the weights of layers 3 are split over the processes, and members of groups run in one of them: load the "
        "model again for this schedule"
    }


def test_what_is_freed() -> None:
    model = families.build("llama")
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[2].mlp.up_proj.weight  # a weight of two layers, one of which goes
    sizes = {name: parameter.nbytes for name, parameter in layers[1].named_parameters()}

    class Second:
        rank, size = 1, 2

    assert keep(model, LOOPED, Second()) == sum(sizes.values()) - sizes["mlp.up_proj.weight"]  # type: ignore[arg-type]
    assert [any(p.is_meta for p in layer.parameters()) for layer in layers] == [False, True, *[False] * 4]
    assert not layers[1].mlp.up_proj.weight.is_meta
    assert keep(model, LOOPED, Second()) == 0  # type: ignore[arg-type]
    ids = prompt()
    with torch.no_grad():
        with scheduled(model, "0 {2 3} 5"):
            model(input_ids=ids)
        message = r"^the weights of this layer were left to other processes: run the model under the schedule of its te"
        with pytest.raises(UsageError, match=message):
            model(input_ids=ids)
        message = r"^the weights of layers 1 were left to other processes, and this process needs them: load the model "
        with pytest.raises(UsageError, match=message), scheduled(model, "0 1 2"):
            pass
        with pytest.raises(UsageError, match=message), fast(model, context=24):
            pass


def test_edits_and_halves_of_a_share() -> None:
    """Only the halves that a process runs itself are looked for before weights are changed."""
    model, ids, schedule = families.build("llama"), prompt(), "0 {1.attn 2.attn 3.attn 4.attn} 5"
    edits = ["0.mlp.down_proj@0.5"]
    with torch.no_grad(), applied(copy.deepcopy(model), schedule, edits) as whole:
        expected = whole(input_ids=ids).logits

    def work(team: Team) -> torch.Tensor:
        own = copy.deepcopy(model)
        keep(own, schedule, team)
        with torch.no_grad(), applied(own, schedule, edits, team=team) as changed:
            logits: torch.Tensor = changed(input_ids=ids).logits
        return logits

    for logits in together(2, work):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_teams_that_do_not_agree() -> None:
    model = families.build("llama")

    def differing(team: Team) -> None:
        with scheduled(copy.deepcopy(model), "0 {1 2} 3" if team.rank else "0 {1 2} 4", team=team):
            pass

    one, other = map(str, together(2, differing))
    assert one == "process 0 plays 0 {1 2} 4, and others play another schedule: all play the same"
    assert other == "process 1 plays 0 {1 2} 3, and others play another schedule: all play the same"

    def lacking(team: Team) -> None:
        own = copy.deepcopy(model)
        keep(own, "0 {1 2} 3", team)
        with scheduled(own, "0 {1 2} 2", team=team):
            pass

    one, other = map(str, together(2, lacking))
    assert one == (
        "the weights of layers 2 were left to other processes, and process 0 of 2 needs them: load the model again for "
        "this schedule"
    )
    assert other == "another process of the team lacks weights of its share: see what it says"

    def averaged(team: Team) -> None:
        with scheduled(copy.deepcopy(model), "0 {1 2} 3", kv="mean", team=team):
            pass

    assert {str(answer) for answer in together(2, averaged)} == {
        "kv='mean' averages keys over the members of a group, which several processes hold: kv='exact'"
    }

    def learning(team: Team) -> None:
        with torch.enable_grad(), scheduled(copy.deepcopy(model), "0 {1 2} 3", team=team) as own:
            own(input_ids=prompt())

    assert {str(answer) for answer in together(3, learning)} == {
        "gradients do not travel between processes: run the model under torch.no_grad()"
    }


def test_torchrun_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    message = r"^RANK is not set: start the processes with `torchrun --nproc-per-node N`, one for each device$"
    with pytest.raises(UsageError, match=message):
        join()


def test_more_processes_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UsageError, match=r"^process 1 of this machine has no device: it has 1; start 1 processes$"):
        join()


def test_what_cannot_be_loaded_in_shares(tmp_path: Path) -> None:
    class First:
        rank, size, device = 0, 2, torch.device("cpu")

    message = r"^device_map says where weights go, and so does the schedule of a team: leave it out$"
    with pytest.raises(UsageError, match=message):
        load_share(tmp_path, LOOPED, First(), device_map="auto")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel, match=r" is no folder or hub name of a language model: "):
        load_share(tmp_path, LOOPED, First())  # type: ignore[arg-type]
    with pytest.raises(NotationError):
        load_share(tiny_folder(tmp_path / "model"), "0 {1:9}", First())  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ real processes

PROCESS = """
import json, sys
import torch
from impasto.teams import join
from test_spread import asked

team = join()
for folder in sys.argv[2:]:
    found = asked(folder, sys.argv[1] == "traced", team)
    everyone = [None] * team.size
    torch.distributed.all_gather_object(everyone, found)
    if team.rank == 0:
        print(json.dumps(everyone))
torch.distributed.destroy_process_group()
"""


def asked(folder: str, traced: bool, team: Any) -> dict[str, Any]:
    """What each process of a team (or None) makes of a model of four layers, as JSON."""
    text = "0 {1, 2 3}x2 sum{1 3} 0"  # each of two processes lacks members that the other has
    loaded = models.load(folder) if team is None else load_share(folder, text, team)
    model, ids = loaded.model, torch.arange(3, 27, device=loaded.device)[None]
    with torch.no_grad(), scheduled(model, text, team=team):
        full = model(input_ids=ids).logits
        written = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0].tolist()
        tokens, logits, slots = greedy(model, ids, 6)
    found = {
        "full": full.tolist(),
        "written": written[24:],
        "tokens": tokens,
        "logits": logits.tolist(),
        "slots": slots,
        "bytes": sum(p.nbytes for p in loaded.model.parameters() if not p.is_meta),
        "setting": loaded.setting.fingerprint,
    }
    if Path(folder).name in ("own head", "tied head and window") and team is not None:
        divided = models.load(folder, device=str(loaded.device)).model
        split(divided, text, team)
    else:
        divided = model
    for name, decoded in (("shared", model), ("split", divided)):
        with fast(decoded, text, context=40, team=team, compile="traced" if traced else "off") as decoder:
            (made,) = decoder.generate([ids[0].tolist()], 6, ends=())
        found[name], found["notes"] = list(made), list(decoder.report.notes)
    return found


FOLDERS: dict[str, dict[str, Any]] = {
    "own head": {},
    "tied head and window": {"family": "gemma2", "sliding_window": 8},
    "experts": {"family": "mixtral", "num_local_experts": 4},
    "learnt positions": {"family": "gpt2", "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256},
}


@pytest.mark.parametrize(
    ("names", "how"),
    [
        (["own head"], "called"),
        pytest.param(["own head", "tied head and window"], "traced", marks=pytest.mark.slow),
        pytest.param(["experts", "learnt positions"], "traced", marks=pytest.mark.slow),
    ],
)
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="each process takes a GPU where there are any")
def test_two_processes_compute_what_one_computes(names: list[str], how: str, tmp_path: Path) -> None:
    folders = [str(tiny_folder(tmp_path / name, **FOLDERS[name])) for name in names]
    near = {"rtol": 0, "atol": 1e-3 if torch.cuda.is_available() else 1e-5}
    for folder, line in zip(folders, two_processes(PROCESS, how, *folders), strict=True):
        wanted, both = asked(folder, how == "traced", None), json.loads(line)
        for got in both:
            torch.testing.assert_close(torch.tensor(got["full"]), torch.tensor(wanted["full"]), **near)
            torch.testing.assert_close(torch.tensor(got["logits"]), torch.tensor(wanted["logits"]), **near)
            assert got["full"] == both[0]["full"]  # bit for bit
            assert got["written"] == got["tokens"] == wanted["tokens"] == wanted["written"]
            assert got["shared"] == got["split"] == wanted["tokens"]
            assert got["notes"] == wanted["notes"]
            assert got["slots"] < wanted["slots"]
            assert got["bytes"] < wanted["bytes"]
            assert got["setting"] == wanted["setting"]
