"""Other ways to run the untouched model, timed beside impasto's: `generate` of transformers, and vLLM."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from impasto.anatomy import heads, quietly
from impasto.contenders import Contender, Job, Ready, written
from impasto.errors import UsageError
from impasto.hardware import Watch, peak_memory
from impasto.models import LoadedModel
from impasto.recipe import Recipe
from impasto.timings import How

PEERS: tuple[How, ...] = ("hf", "hf-compiled", "vllm")
_SPARE = 6 << 30  # bytes that vLLM gets beyond weights and keys, for its activations and graphs


def peer(name: How, loaded: LoadedModel, recipe: Recipe, watch: Watch) -> Contender:
    """The peer of a name, for the untouched model `recipe`.

    Raises:
        UsageError: no such peer, or a package that is not installed.
    """
    if name == "vllm":
        if importlib.util.find_spec("vllm") is None:
            raise UsageError("vLLM is not installed")
        return Vllm(loaded, recipe, watch)
    if name not in PEERS:
        raise UsageError(f"a peer is one of {', '.join(PEERS)}, not {name!r}")
    return Generate(loaded, recipe, watch, name)


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
    """vLLM's offline engine on the untouched weights, in a process that it starts itself.

    It gives whole answers only, so TPOT is the mean over a text: what the text takes beyond its first token.
    """

    how: How = "vllm"

    def __init__(self, loaded: LoadedModel, recipe: Recipe, watch: Watch) -> None:
        if loaded.device.type != "cuda":
            raise UsageError("vLLM runs beside impasto on CUDA devices only")
        self.loaded = loaded
        self.recipe = recipe
        self.watch = watch
        self._engine: Any = None
        self._folder = contextlib.ExitStack()

    def ready(self, job: Job) -> Ready:
        """Start the engine on the weights, with memory for this case, and run it twice."""
        from vllm import LLM  # type: ignore[import-not-found]

        began = time.perf_counter()
        self.job, case = job, job.case
        found = heads(self.loaded.model)
        column = 2 * found.keys * found.width * self.loaded.layers * next(self.loaded.model.parameters()).element_size()
        columns = case.batch * (case.context + case.new_tokens)
        weights = sum(p.nbytes for p in self.loaded.model.parameters())
        free, whole = torch.cuda.mem_get_info(self.loaded.device)
        need = weights + 1.2 * column * columns + _SPARE
        if need > 0.95 * free:
            raise torch.OutOfMemoryError(f"out of memory: vLLM needs about {need / 1e9:.1f} GB")
        with _silent():
            self._engine = LLM(
                model=str(self._checkpoint()),
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
        return Ready(
            {"start": time.perf_counter() - began},
            notes=("vllm: TPOT is a mean over each text",),
        )

    def run(self, prefills: int, steps: int) -> tuple[list[float], list[float]]:
        """Texts of one token, and then one of all."""
        ttft = [self._seconds(1) for _ in range(max(prefills, 1))]
        whole = self._seconds(steps + 1)
        return ttft, [(whole - sorted(ttft)[len(ttft) // 2]) / steps]

    def close(self) -> None:
        """Stop the engine and remove the checkpoint that was written for it."""
        self._engine = None
        self._folder.close()

    def _checkpoint(self) -> Path | str:
        """A folder with the weights as transformers writes them; the one they came from, if it is such a folder."""
        own = Path(self.loaded.name)
        if (own / "config.json").is_file():
            return own
        folder = self._folder.enter_context(tempfile.TemporaryDirectory())
        self.loaded.model.save_pretrained(folder)
        return folder

    def _seconds(self, tokens: int) -> float:
        """Milliseconds of texts of so many tokens, one per row."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": row} for row in self.job.ids.tolist()]
        asked = SamplingParams(temperature=0.0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False)
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
