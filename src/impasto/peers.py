"""Other ways to run a model, timed beside impasto's: `generate` of transformers, and vLLM.

`generate` runs the untouched model. vLLM runs that too, and every recipe that can be a plain checkpoint.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from impasto import memory
from impasto.anatomy import heads, quietly
from impasto.checkpoint import nbytes, write
from impasto.contenders import Contender, Job, Outfit, Ready, written
from impasto.errors import UnsupportedModel, UsageError
from impasto.hardware import Watch, peak_memory
from impasto.models import LoadedModel
from impasto.recipe import Recipe
from impasto.schedule import Schedule
from impasto.timings import How

PEERS: tuple[How, ...] = ("hf", "hf-compiled", "vllm")
_SPARE = 6 << 30  # bytes that vLLM gets beyond weights and keys, for its activations and graphs
_PROCESS = 1 << 30  # bytes that its process takes before it looks how much is free, at the most


def absent(name: How, loaded: LoadedModel) -> str | None:
    """Why a peer cannot run here; None where it can."""
    if name != "vllm":
        return None
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed: pip install vllm"
    if loaded.device.type != "cuda":
        return "vLLM runs beside impasto on CUDA devices only"
    if loaded.device.index:
        return f"vLLM runs on the first GPU, and the model is on {loaded.device}: choose one by CUDA_VISIBLE_DEVICES"
    return None


def peer(name: How, loaded: LoadedModel, recipe: Recipe, watch: Watch, place: Callable[[], Path]) -> Contender:
    """The peer of a name.

    Args:
        name: one of `PEERS`.
        loaded: the model.
        recipe: what to run; the untouched model for all but vLLM.
        watch: the device's time.
        place: gives a folder with the recipe as a plain checkpoint, for peers that read folders.

    Raises:
        UsageError: no such peer, or one that cannot run here.
    """
    if name not in PEERS:
        raise UsageError(f"a peer is one of {', '.join(PEERS)}, not {name!r}")
    if (reason := absent(name, loaded)) is not None:
        raise UsageError(reason)
    if name == "vllm":
        return Vllm(loaded, recipe, watch, place)
    return Generate(loaded, recipe, watch, name)


class Shelf:
    """Plain checkpoints of recipes, for peers that read folders: each is written when it is first asked for.

    They stay until the shelf is left, so that several cases, and engines that run side by side, read one folder.

        with Shelf(loaded) as shelf:
            shelf.place(recipe, outfit)
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self._undo = contextlib.ExitStack()
        self._places: dict[str, Path] = {}
        self._refused: dict[str, str] = {}

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *_: object) -> None:
        self._places.clear()
        self._undo.close()

    def place(self, recipe: Recipe, outfit: Outfit) -> Path:
        """The recipe's folder; of the untouched model the one that it came from, if transformers can read that.

        Args:
            recipe: what the folder holds.
            outfit: its edits, carried out.

        Raises:
            UnsupportedModel: the recipe cannot be a plain checkpoint; found once, and remembered.
            StoreError: there is no room for it.
        """
        name = recipe.fingerprint
        own = Path(self.loaded.name)
        untouched = recipe.schedule == Schedule.identity(self.loaded.layers) and not recipe.edits
        if untouched and (own / "config.json").is_file():
            return own
        if name in self._refused:
            raise UnsupportedModel(self._refused[name])
        if name not in self._places:
            folder = Path(self._undo.enter_context(tempfile.TemporaryDirectory()))
            try:
                with outfit.worn(thin=False):
                    self._places[name] = write(self.loaded, replace(recipe, edits=()), folder)
            except UnsupportedModel as problem:
                self._refused[name] = str(problem)  # the error itself holds the model that it was found with
                raise
        return self._places[name]


class _Marks(StoppingCriteria):  # type: ignore[misc]
    """Puts a mark behind every token that `generate` makes, and ends nothing."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.marks: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.marks.append(self.watch.mark())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Generate:
    """The model's own greedy `generate`: "hf" as it is, "hf-compiled" with a static cache, which it then compiles.

    It compiles on accelerators only; elsewhere "hf-compiled" shows the static cache alone.
    """

    def __init__(self, loaded: LoadedModel, recipe: Recipe, watch: Watch, how: How) -> None:
        written(loaded.model)
        self.loaded = loaded
        self.model: Any = loaded.model
        self.recipe = recipe
        self.how = how
        self.watch = watch

    def ready(self, job: Job) -> Ready:
        """Run the case twice: what is compiled, is compiled then."""
        self.job = job
        began = time.perf_counter()
        with peak_memory(self.loaded.device) as peak:
            for _ in range(2):
                self.run(1, job.case.new_tokens - 1)
        weights = sum(p.nbytes for p in self.model.parameters())
        memory = None if peak.bytes is None else weights + peak.bytes
        name = "warm-up and compile" if self.how == "hf-compiled" else "warm-up"
        return Ready({name: time.perf_counter() - began}, memory)

    def run(self, prefills: int, steps: int) -> tuple[list[float], list[float]]:
        """`generate`, once for the whole text and before that for its first token alone."""
        ttft: list[float] = []
        for _ in range(prefills - 1):
            ttft += self._generate(1)
        first, *rest = self._generate(steps + 1)
        return [*ttft, first], rest

    def close(self) -> None:
        """Drop the cache that the model has kept, and what was compiled for this case."""
        vars(self.model).pop("_cache", None)
        if self.how == "hf-compiled":
            torch._dynamo.reset()

    def _generate(self, tokens: int) -> list[float]:
        ids, case = self.job.ids, self.job.case
        asked: dict[str, Any] = {
            "attention_mask": torch.ones_like(ids),
            "do_sample": False,
            "num_beams": 1,
            "use_cache": True,
            "min_new_tokens": tokens,
            "max_new_tokens": tokens,
            "pad_token_id": 0,
        }
        if self.how == "hf-compiled":
            # A static cache is as long as the text may become: the same for every call, so that one is compiled.
            asked |= {"cache_implementation": "static", "max_new_tokens": case.new_tokens}
            asked["min_new_tokens"] = case.new_tokens
        marks = _Marks(self.watch)
        with quietly(self.model), _silent():
            self.watch.wait()
            began = self.watch.mark()
            self.model.generate(ids, stopping_criteria=StoppingCriteriaList([marks]), **asked)
        return self.watch.between([began, *marks.marks])[:tokens]


class Vllm:
    """vLLM's offline engine on a plain checkpoint of the recipe, in a process that it starts itself.

    It gives whole answers only, so TPOT is the mean over a text: what the text takes beyond its first token. Several
    engines may be alive on one device: the share of memory that one is given is its own (vLLM counts what it allocates
    itself, and refuses to start if less is free), so each asks for what its recipe needs in this case.

    Args:
        loaded: the model.
        recipe: what to run.
        watch: the device's time.
        place: gives the checkpoint's folder.
    """

    how: How = "vllm"

    def __init__(self, loaded: LoadedModel, recipe: Recipe, watch: Watch, place: Callable[[], Path]) -> None:
        self.loaded = loaded
        self.recipe = recipe
        self.watch = watch
        self._place = place
        self._engine: Any = None

    def ready(self, job: Job) -> Ready:
        """Write the checkpoint, start the engine on it, with memory for this case, and run it twice."""
        from vllm import LLM  # type: ignore[import-not-found]

        began = time.perf_counter()
        self.job, case = job, job.case
        folder = self._place()
        there = time.perf_counter()
        gc.collect()  # what the checkpoint was checked with
        memory.free()
        free, whole = torch.cuda.mem_get_info(self.loaded.device)
        need = self._need(job)
        if need + _PROCESS > free:
            raise torch.OutOfMemoryError(f"out of memory: vLLM needs about {need / 1e9:.1f} GB")
        with _silent():
            self._engine = LLM(
                model=str(folder),
                skip_tokenizer_init=True,
                dtype=self.loaded.setting.dtype,
                max_model_len=case.context + case.new_tokens,
                max_num_seqs=case.batch,
                gpu_memory_utilization=need / whole,
                enable_prefix_caching=False,
                disable_log_stats=True,
            )
        for _ in range(2):
            self.run(1, case.new_tokens - 1)
        notes = ["vllm: TPOT is a mean over each text"]
        if self.recipe.edits:
            notes.append("vllm: matrices that edits cut are whole in a checkpoint, and take their full time")
        build = {"checkpoint": there - began, "start": time.perf_counter() - there}
        return Ready(build, notes=tuple(notes))

    def _need(self, job: Job) -> float:
        """Bytes for the weights, for keys and values of every layer call, and to spare."""
        found, case = heads(self.loaded.model), job.case
        number: int = next(self.loaded.model.parameters()).element_size()
        column = 2 * found.keys * found.width * self.recipe.schedule.calls * number
        columns = case.batch * (case.context + case.new_tokens)
        return nbytes(self.loaded, self.recipe.schedule) + 1.2 * column * columns + _SPARE

    def run(self, prefills: int, steps: int) -> tuple[list[float], list[float]]:
        """Texts of one token, and then one of all."""
        ttft = [self._seconds(1) for _ in range(max(prefills, 1))]
        beyond = self._seconds(steps + 1) - sorted(ttft)[len(ttft) // 2]
        if beyond <= 0:
            raise UsageError(
                f"texts of {steps + 1} tokens took no longer than their first one: ask for more new tokens"
            )
        return ttft, [beyond / steps]

    def close(self) -> None:
        """Stop the engine's process: its memory is free then, and not only when the engine is collected."""
        engine, self._engine = self._engine, None
        with contextlib.suppress(Exception):  # it was never there, is dead already, or ends when it is collected
            engine.llm_engine.engine_core.shutdown()

    def _seconds(self, tokens: int) -> float:
        """Milliseconds of texts of so many tokens, one per row."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": row} for row in self.job.ids.tolist()]
        asked = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self.watch.wait()
        before = self.watch.mark()
        self._engine.generate(prompts, asked, use_tqdm=False)
        return self.watch.between([before, self.watch.mark()])[0]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep transformers from warning of settings that greedy text has no use for."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
