"""Benchmarks: lm-evaluation-harness's task definitions as requests, and its own code as the judge of the answers.

    >>> tasks = build(["lambada_openai", "basic_skills_arithmetic"], limit=100)        # doctest: +SKIP
    >>> responses = ...  # by request fingerprint                                      # doctest: +SKIP
    >>> tasks[0].result(recipe.fingerprint, responses).metrics["acc,none"]             # doctest: +SKIP
    0.41

A task's name means, in this order: a YAML file in a folder that the user includes; one of the YAML files of this
package, whose data come from the Python package index; the harness's own, whose data come from the hub. Prompts
and metrics of the second kind are the harness's; `TaskSet.source` says where the data came from.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import io
import json
import logging
import math
import random
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from impasto import fetch
from impasto.benchmarks.reply import Reply
from impasto.errors import FetchError, ImpastoError, UnknownTask, UsageError
from impasto.result import Kind, Request, Response, Result, digest

Origin = Literal["built-in", "harness", "include"]


@dataclass(frozen=True)
class Benchmark:
    """What impasto knows about a benchmark beyond its definition.

    Attributes:
        measures: what it asks of a model, in a few words.
        order_sensitive: whether the paper's claim (order of layers matters most for reasoning and arithmetic)
            counts it among the tasks that should suffer.
        metric: the metric to report first.
        note: where its data differ from the harness's.
    """

    measures: str
    order_sensitive: bool
    metric: str = "acc,none"
    note: str = ""


_OTHER_SHOTS = "few-shot examples come from the validation split"

BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        "basic_skills_arithmetic": Benchmark("sums and products of small numbers", True),
        "basic_skills_logical_reasoning": Benchmark("one-step inferences", True),
        "basic_skills_string_operations": Benchmark("reversing, joining and counting letters", True),
        "basic_skills_pattern": Benchmark("the next item of a sequence", True),
        "basic_skills_coding": Benchmark("the missing line of a short function", True),
        "basic_skills_common_knowledge": Benchmark("everyday facts", False),
        "lambada_openai": Benchmark("the last word of a passage", False, note="line breaks are spaces"),
        "hellaswag": Benchmark("how a scene goes on", False, "acc_norm,none", _OTHER_SHOTS),
        "winogrande": Benchmark("what a pronoun refers to", False, note=_OTHER_SHOTS),
        "piqa": Benchmark("everyday physics", False, note=_OTHER_SHOTS),
        "arc_easy": Benchmark("school science, easy part", True, note=_OTHER_SHOTS),
        "arc_challenge": Benchmark("school science, hard part", True, "acc_norm,none", _OTHER_SHOTS),
        "gsm8k": Benchmark("arithmetic word problems", True, "exact_match,strict-match"),
    }
)

DEFAULT_TASKS = (
    "basic_skills_arithmetic",
    "basic_skills_logical_reasoning",
    "basic_skills_string_operations",
    "basic_skills_pattern",
    "basic_skills_common_knowledge",
    "lambada_openai",
    "hellaswag",
    "winogrande",
)
PAPER_TASKS = ("lambada_openai", "arc_challenge", "hellaswag", "winogrande", "gsm8k")

_OWN_DATA = ("impasto_", "laser_")  # tasks that do not live on what `impasto fetch benchmarks` brings
_HERE = Path(__file__).parent / "benchmarks"
_PLAIN_GROUP = {"group", "group_alias", "task", "metadata", "tag", "aggregate_metric_list"}


@dataclass(frozen=True)
class TaskInfo:
    """One line of the list of tasks.

    `kind` is the harness's output type, or "group" or "tag" for a name that stands for several tasks.
    """

    name: str
    kind: str
    source: Origin
    description: str


@dataclass(frozen=True)
class TaskSet:
    """One task, ready to be asked: its requests, and its judge.

    Attributes:
        name: the task's name in the harness.
        kind: the harness's output type.
        version: the task definition's version.
        shots: few-shot examples in each prompt.
        n: examples (documents); one example may take several requests.
        requests: what to ask, each once.
        protocol: fingerprint of everything that was asked and of the right answers; only results of equal
            protocols may be compared.
        metric: the metric to report first ("acc,none").
        higher_is_better: of that metric.
        chance: what guessing gets in that metric; None where guessing has no meaning.
        majority: what always choosing the most frequent right position gets; None likewise.
        order_sensitive: see `Benchmark`; None for tasks that are not listed there.
        source: where the definition and the data came from, in words.
    """

    name: str
    kind: str
    version: str
    shots: int
    n: int
    requests: tuple[Request, ...]
    protocol: str
    metric: str
    higher_is_better: bool
    chance: float | None
    majority: float | None
    order_sensitive: bool | None
    source: str
    _task: Any = field(repr=False, compare=False)
    _asked: tuple[str, ...] = field(repr=False, compare=False)  # request fingerprint of each harness instance

    def result(self, recipe: str, responses: Mapping[str, Response]) -> Result:
        """What the harness's own code makes of the responses; may be called for any number of recipes.

        An example with a response that is not finite has no score, and every metric of the task is then NaN rather
        than an average over the rest. `scores` hold one number per example: the metric's own value, or for
        perplexities the nats per unit (smaller is better), of which the metric is the exponential of a mean.

        Args:
            recipe: fingerprint of the recipe that answered.
            responses: by request fingerprint; others than this task's do no harm.

        Raises:
            ValueError: a request of this task has no response.
        """
        if missing := [name for name in self._asked if name not in responses]:
            raise ValueError(f"{self.name}: {len(missing)} of {len(self._asked)} requests have no response")
        mine = {request.fingerprint: (request, responses[request.fingerprint]) for request in self.requests}
        broken = {name for name, (request, response) in mine.items() if not _usable(request, response)}
        with _undisturbed():
            values = self._judge(mine, broken)
            metrics = self._aggregate(values)
        return Result(
            recipe=recipe,
            task=self.name,
            protocol=self.protocol,
            n=self.n,
            metrics=metrics,
            scores={name: tuple(self._score(name, value) for value in column) for name, column in values.items()},
            nonfinite=len(broken),
            truncated=sum(response.truncated for _, response in mine.values()),
            info={
                "version": self.version,
                "shots": self.shots,
                "metric": self.metric,
                "higher_is_better": self.higher_is_better,
                "chance": self.chance,
                "majority": self.majority,
                "order_sensitive": self.order_sensitive,
                "source": self.source,
            },
        )

    def questions(self) -> tuple[tuple[str, str], ...]:
        """(prompt, right answer) of every example with choices of an answer after one prompt; empty for other tasks."""
        if self.kind != "multiple_choice":
            return ()
        examples: dict[int, list[Any]] = {}
        for instance in self._task.instances:
            examples.setdefault(instance.doc_id, []).append(instance)
        found: list[tuple[str, str]] = []
        for instances in examples.values():
            ordered = sorted(instances, key=lambda instance: instance.idx)
            right = _listed(self._task.doc_to_target(ordered[0].doc))[0]
            prompts = {instance.args[0] for instance in ordered}
            if len(prompts) == 1 and isinstance(right, int) and 0 <= right < len(ordered):
                found.append(ordered[right].args)
        return tuple(found)

    def golds(self) -> tuple[int, ...] | None:
        """The right position of every example; None for a task without choices, or with several right ones."""
        if self.kind != "multiple_choice" or self._task.multiple_input or self._task.multiple_target:
            return None
        found: list[int] = []
        for doc in self.documents.values():
            gold = self._task.doc_to_target(doc)
            found.append(self._task.doc_to_choice(doc).index(gold) if isinstance(gold, str) else int(gold))
        return tuple(found)

    def parted(self, share: float = 0.2) -> tuple[TaskSet, TaskSet]:
        """A part to choose on and a part to report on, of a task that has no such parts of its own.

        A hash of each document decides, so it stays on its side under any limit and order. Few-shot examples are
        those of the whole task.

        Raises:
            UsageError: one of the parts would be empty.
        """
        names = {i: json.dumps(doc, sort_keys=True, default=str) for i, doc in self.documents.items()}
        chosen = {i for i, text in names.items() if int(digest("part", text), 16) < share * 2**64}
        return self.part("validation", chosen), self.part("test", set(names) - chosen)

    def part(self, name: str, chosen: Collection[int]) -> TaskSet:
        """Some of the documents, by their numbers in `documents`, as a task of their own.

        Raises:
            UsageError: there are none.
        """
        if not chosen:
            raise UsageError(f"{self.name}: too few examples for a {name} part")
        kept = [k for k, instance in enumerate(self._task.instances) if instance.doc_id in chosen]
        task = copy.copy(self._task)
        task._instances = [self._task.instances[k] for k in kept]
        asked = tuple(self._asked[k] for k in kept)
        wanted = set(asked)
        docs = [doc for i, doc in self.documents.items() if i in chosen]
        chance, majority = _guessing(task, self.metric, docs)
        return replace(
            self,
            n=len(docs),
            requests=tuple(request for request in self.requests if request.fingerprint in wanted),
            protocol=digest("part", self.protocol, name, asked),
            chance=chance,
            majority=majority,
            source=f"{self.source}; {name} part",
            _task=task,
            _asked=asked,
        )

    @property
    def documents(self) -> dict[int, Any]:
        """The examples as the data set has them, by the harness's number, in the order of the scores."""
        return {instance.doc_id: instance.doc for instance in self._task.instances}

    def _judge(self, mine: Mapping[str, tuple[Request, Response]], broken: set[str]) -> dict[str, list[Any]]:
        """Per metric and filter, the harness's raw value of every example in order; None for a broken one."""
        task = copy.copy(self._task)
        task._instances = [
            replace(instance, resps=[_answer(*mine[name])] * (instance.repeats or 1), filtered_resps={})
            for instance, name in zip(self._task.instances, self._asked, strict=True)
        ]
        task.apply_filters()
        examples: dict[int, list[Any]] = {}
        spoilt: set[int] = set()
        for instance, name in zip(task._instances, self._asked, strict=True):
            examples.setdefault(instance.doc_id, []).append(instance)
            if name in broken:
                spoilt.add(instance.doc_id)
        values: dict[str, list[Any]] = {}
        for key in task._instances[0].filtered_resps:
            for row, (number, instances) in enumerate(examples.items()):
                if number in spoilt:
                    continue
                ordered = sorted(instances, key=lambda instance: instance.idx)
                answers = [instance.filtered_resps[key] for instance in ordered]
                for metric, value in task.process_results(ordered[0].doc, answers).items():
                    values.setdefault(f"{metric},{key}", [None] * len(examples))[row] = value
        if not values:  # nothing usable at all: the names must come from the definition
            names = [f"{metric},{key}" for metric in task.aggregation() for key in task._instances[0].filtered_resps]
            values = {name: [None] * len(examples) for name in names}
        return values

    def _aggregate(self, values: Mapping[str, list[Any]]) -> dict[str, float]:
        """The task's metrics, and standard errors where the harness has a formula (not a bootstrap)."""
        from lm_eval.api.metrics import mean, mean_stderr

        metrics: dict[str, float] = {}
        for name, column in values.items():
            metric, key = name.split(",", 1)
            combine = self._combine(name)
            complete = all(value is not None for value in column)
            metrics[name] = float(combine(column)) if complete else math.nan
            if combine is mean and len(column) > 1:
                metrics[f"{metric}_stderr,{key}"] = float(mean_stderr(column)) if complete else math.nan
        return metrics

    def _combine(self, name: str) -> Callable[[Sequence[Any]], float]:
        """The function that makes a metric of its examples' values."""
        from lm_eval.api.metrics import mean

        chosen: Callable[[Sequence[Any]], float] = self._task.aggregation().get(name.split(",", 1)[0], mean)
        return chosen

    def _score(self, name: str, value: Any) -> float | None:
        """One example's value as one finite number, or None."""
        from lm_eval.api import metrics

        if value is None:
            return None
        combine = self._combine(name)
        try:
            if combine is metrics.perplexity:
                score = -float(value)
            elif combine is metrics.weighted_perplexity:
                score = -float(value[0]) / float(value[1])
            elif combine in (metrics.f1_score, metrics.matthews_corrcoef):
                score = float(value[0] == value[1])
            elif isinstance(value, tuple | list):
                score = float(combine([value]))
            else:
                score = float(value)
        except (TypeError, ValueError, ZeroDivisionError, IndexError, OverflowError):
            return None
        return score if math.isfinite(score) else None


# Finding and building ------------------------------------------------------------------------------------------


def available(include: Sequence[Path | str] = ()) -> list[TaskInfo]:
    """All task names that `build` understands, sorted; reads some ten thousand YAML files, so takes seconds."""
    with _undisturbed():
        manager = _manager(include, harness=True)
        listed = [
            TaskInfo(name, _kind(entry), _origin(entry.yaml_path), _description(name, entry))
            for name, entry in manager.task_index.items()
        ]
    return sorted(listed, key=lambda info: info.name)


def build(
    names: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include: Sequence[Path | str] = (),
    seed: int = 1234,
    tokenizer: Any = None,
    apply_chat_template: bool = False,
    progress: fetch.Progress | None = None,
    notice: fetch.Notice | None = None,
) -> list[TaskSet]:
    """The named tasks as requests, in the order of the names; groups, tags and globs stand for their members.

    Args:
        names: task, group or tag names, or globs of them (`mmlu_*`).
        limit: only the first so many examples of each task.
        num_fewshot: examples per prompt instead of the task's own number (a task that fixes 0 keeps it).
        include: folders with the user's own YAML files; they win over everything else.
        seed: of the choice of few-shot examples.
        tokenizer: needed for chat templates only.
        apply_chat_template: wrap the prompts in the tokenizer's chat template, few-shot examples as turns.
        progress: told about downloads.
        notice: told the licence before the first download of the built-in benchmarks.

    Raises:
        UnknownTask: no task of that name; the text names the nearest.
        FetchError: the data cannot be had from here.
        UsageError: a task that cannot be asked this way.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, not {limit}")
    if num_fewshot is not None and num_fewshot < 0:
        raise UsageError(f"the number of few-shot examples cannot be negative: {num_fewshot}")
    if apply_chat_template and getattr(tokenizer, "chat_template", None) is None:
        raise UsageError("chat templates were asked for, but the model's tokenizer has none")
    with _undisturbed():
        found: dict[str, tuple[Any, str]] = {}
        for name, manager in _resolved(names, include):
            for task, source in _load(name, manager, progress, notice):
                found.setdefault(task.task_name, (task, source))
        template = _chat_template(tokenizer) if apply_chat_template else None
        return [_asked(task, source, limit, num_fewshot, seed, template) for task, source in found.values()]


def check_names(names: Sequence[str], include: Sequence[Path | str] = ()) -> None:
    """Make sure that there are such tasks, without reading their data.

    Args:
        names: as of `build`.
        include: as of `build`.

    Raises:
        UnknownTask: no task of that name; the text names the nearest.
        UsageError: no such folder.
    """
    with _undisturbed():
        for _ in _resolved(names, include):
            pass


def _manager(include: Sequence[Path | str], *, harness: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[_HERE, *map(Path, include)], include_defaults=harness)


def _resolved(names: Sequence[str], include: Sequence[Path | str]) -> Iterator[tuple[str, Any]]:
    """Known names with the task manager that knows them; the harness's own are only read when needed."""
    missing = [str(folder) for folder in include if not Path(folder).is_dir()]
    if missing:
        raise UsageError(f"no folder {missing[0]} to include tasks from")
    near = _manager(include, harness=False)
    far: Any = None
    for name in names:
        if name in near.task_index:
            yield name, near
            continue
        far = far or _manager(include, harness=True)
        if name in far.task_index:
            yield name, far
        elif matches := sorted(far.match_tasks([name])) if any(sign in name for sign in "*?[") else []:
            yield from ((match, far) for match in matches)
        else:
            nearest = difflib.get_close_matches(name, far.all_tasks, n=4, cutoff=0.5)
            hint = f"the nearest: {', '.join(nearest)}" if nearest else "`impasto tasks` lists all"
            raise UnknownTask(f"no task {name!r}; {hint}")


def _load(
    name: str, manager: Any, progress: fetch.Progress | None, notice: fetch.Notice | None
) -> Iterator[tuple[Any, str]]:
    """The harness's task objects that a name stands for, with the source of their data."""
    for member, entry in _members(name, manager):
        origin = _origin(entry.yaml_path)
        if origin == "built-in" and not member.startswith(_OWN_DATA):
            try:
                fetch.ensure("benchmarks", progress=progress, notice=notice)
            except FetchError as problem:
                try:  # a hub may be at hand where no package index is
                    yield from ((task, "harness, data from the hub") for task in _built(member, _harness_only()))
                except (ImpastoError, KeyError):
                    raise problem from None
                continue
        for task in _built(member, manager):
            yield task, _source_text(task.task_name, origin, entry.yaml_path)


def _members(name: str, manager: Any) -> list[tuple[str, Any]]:
    """The built-in members of a group or tag one by one, so that their data are fetched; else the name itself."""
    entry = manager.task_index[name]
    config = entry.cfg or {}
    if entry.kind.name == "TAG":
        listed = sorted(entry.tags)
    elif entry.kind.name == "GROUP" and not set(config) - _PLAIN_GROUP:
        listed = list(config.get("task") or [])
    else:
        return [(name, entry)]
    if not all(isinstance(one, str) and one in manager.task_index for one in listed):
        return [(name, entry)]  # members with settings of their own: the harness knows how to combine them
    return [pair for one in listed for pair in _members(one, manager)]


def _harness_only() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _built(name: str, manager: Any) -> list[Any]:
    """Task objects with their data loaded; every failure in one line."""
    try:
        return list(manager.load([name])["tasks"].values())
    except ImpastoError:
        raise
    except ImportError as problem:
        raise UsageError(f"task {name} needs a package that is not installed: {problem}") from problem
    except Exception as problem:
        first = str(problem).strip().splitlines()[0][:200] if str(problem).strip() else type(problem).__name__
        raise FetchError(
            f"the data of task {name} cannot be had from here ({first}): it needs the hub, "
            "or a YAML file of your own over local files (--include-path)"
        ) from problem


def _asked(task: Any, source: str, limit: int | None, num_fewshot: int | None, seed: int, template: Any) -> TaskSet:
    """One loaded task with its requests built, exactly as the harness builds them."""
    name = task.task_name
    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(f"task {name} runs code that the model wrote, which impasto does not do")
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"task {name} shows pictures or sound, and impasto asks in text only")
    own = task.get_config("num_fewshot")
    shots = int(own or 0) if num_fewshot is None or own == 0 else num_fewshot
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=seed)
    try:
        task.build_all_requests(
            limit=limit,
            apply_chat_template=template is not None,
            fewshot_as_multiturn=template is not None,
            chat_template=template,
        )
    except (AssertionError, ValueError, IndexError) as problem:
        raise UsageError(f"task {name} cannot be asked with {shots} examples per prompt: {problem}") from problem
    said = task.config.metadata or {}
    options = {name: said[name] for name in ("after", "rank") if said.get(name)}
    requests = tuple(_request(instance, options) for instance in task.instances)
    asked = tuple(request.fingerprint for request in requests)
    docs = {instance.doc_id: instance.doc for instance in task.instances}
    filters = [ensemble.name for ensemble in task._filters]
    metric, better = _primary(task, filters)
    chance, majority = _guessing(task, metric, list(docs.values()))
    known = BENCHMARKS.get(name)
    version = str(task.VERSION)
    targets = [str(task.doc_to_target(doc)) for doc in docs.values()]
    return TaskSet(
        name=name,
        kind=str(task.OUTPUT_TYPE),
        version=version,
        shots=shots,
        n=len(docs),
        requests=tuple({request.fingerprint: request for request in requests}.values()),
        protocol=digest("protocol", name, version, shots, sorted(task.aggregation()), filters, asked, targets),
        metric=metric,
        higher_is_better=better,
        chance=chance,
        majority=majority,
        order_sensitive=known.order_sensitive if known else None,
        source=source,
        _task=task,
        _asked=asked,
    )


def _request(instance: Any, options: Mapping[str, Any]) -> Request:
    """A harness instance as a request; `options` are those of a log-likelihood, see `Request`."""
    kinds: dict[str, Kind] = {
        "loglikelihood": "loglikelihood",
        "loglikelihood_rolling": "rolling",
        "generate_until": "generate",
    }
    kind, texts = kinds[instance.request_type], instance.args
    if kind == "rolling":
        return Request(kind, "", texts[0])
    if kind == "generate":
        wanted = json.dumps(texts[1], sort_keys=True, ensure_ascii=False, default=str)
        return Request(kind, texts[0], options=wanted)
    return Request(kind, texts[0], texts[1], json.dumps(options, sort_keys=True) if options else "")


def _answer(request: Request, response: Response) -> Any:
    """A response in the form that the harness's models return."""
    if request.kind == "generate":
        return response.text or ""
    if request.kind == "rolling":
        return response.loglikelihood
    return Reply(response.loglikelihood, response.is_greedy, response.tokens, response.rank)


def _usable(request: Request, response: Response) -> bool:
    if request.kind == "generate":
        return response.text is not None
    return math.isfinite(response.loglikelihood)


def _primary(task: Any, filters: Sequence[str]) -> tuple[str, bool]:
    """The metric to report first, and whether more of it is better."""
    better = task.higher_is_better()
    known = BENCHMARKS.get(task.task_name)
    if known is not None and known.metric.split(",")[0] in better and known.metric.split(",")[1] in filters:
        return known.metric, bool(better[known.metric.split(",")[0]])
    names = list(better) or list(task.aggregation())
    chosen = next((name for name in names if name in ("acc", "exact_match", "acc_norm")), names[0])
    return f"{chosen},{filters[0]}", bool(better.get(chosen, True))


def _guessing(task: Any, metric: str, docs: Sequence[Any]) -> tuple[float | None, float | None]:
    """Chance level and majority-class level of an accuracy."""
    if metric.split(",")[0] not in ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"):
        return None, None
    if task.OUTPUT_TYPE != "multiple_choice":
        texts = Counter(str(task.doc_to_target(doc)).strip().lower() for doc in docs)
        return 0.0, max(texts.values(), default=0) / len(docs)
    chances, positions = [], Counter[int]()
    for doc in docs:
        choices = task.doc_to_choice(doc)
        gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        right = {choices.index(one) if isinstance(one, str) and one in choices else one for one in _listed(gold)}
        chances.append(len(right) / len(choices))
        positions.update(one for one in right if isinstance(one, int))
    return sum(chances) / len(docs), max(positions.values(), default=0) / len(docs)


def _listed(gold: Any) -> list[Any]:
    return list(gold) if isinstance(gold, list) else [gold]


def _chat_template(tokenizer: Any) -> Callable[..., str]:
    """The tokenizer's chat template in the form that the harness calls, a system turn dropped if it is refused."""
    import jinja2

    def apply(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        options = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return str(tokenizer.apply_chat_template(history, **options))
        except jinja2.exceptions.TemplateError:
            rest = [turn for turn in history if turn["role"] != "system"]
            return str(tokenizer.apply_chat_template(rest, **options))

    return apply


# Words ---------------------------------------------------------------------------------------------------------


def _kind(entry: Any) -> str:
    if entry.kind.name in ("GROUP", "TAG"):
        return str(entry.kind.name.lower())
    return str((entry.cfg or {}).get("output_type", "python"))


def _origin(path: Path | None) -> Origin:
    import lm_eval.tasks

    if path is None or Path(path).is_relative_to(Path(lm_eval.tasks.__file__).parent):
        return "harness"
    return "built-in" if Path(path).is_relative_to(_HERE) else "include"


def _description(name: str, entry: Any) -> str:
    if name in BENCHMARKS:
        return BENCHMARKS[name].measures
    config = entry.cfg or {}
    if entry.kind.name == "TAG":
        return f"{len(entry.tags)} tasks"
    return str(config.get("dataset_path") or config.get("task_alias") or config.get("group_alias") or "")


def _source_text(name: str, origin: Origin, path: Path | None) -> str:
    if origin == "include":
        return f"included file {Path(str(path)).name}"
    if origin == "harness":
        return "harness, data from the hub"
    if name.startswith("impasto_"):
        return "part of impasto"
    if name.startswith("laser_"):
        return "rows from the folder that IMPASTO_DATA names, or from the hub"
    wheel = fetch.SOURCES["benchmarks"].wheels[0]
    note = BENCHMARKS[name].note if name in BENCHMARKS else ""
    return f"data from the package {wheel.package} {wheel.version}" + (f"; {note}" if note else "")


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Run the harness without its log lines and progress bars, seeded as it seeds itself, leaving no trace."""
    import numpy as np

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub", "httpx")]
    levels = [logger.level for logger in loggers]
    state, numpy_state = random.getstate(), np.random.get_state()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    random.seed(0)
    np.random.seed(1234)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
