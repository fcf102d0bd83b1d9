"""What several commands do first: read their texts, load the model, open the run folder, note the run."""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from impasto.cli import processes
from impasto.console import Phases
from impasto.errors import NotationError, UsageError

if TYPE_CHECKING:
    from impasto.cluster import Cluster
    from impasto.models import LoadedModel
    from impasto.recipe import Recipe
    from impasto.store import Store

RUNS = Path("impasto-runs")
_ANY_DEPTH = 4096  # deeper than any model: for reading a text before the model is there


@dataclass(frozen=True, slots=True)
class Loading:
    """How a model is to be loaded: the options of that name."""

    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    attention: str | None = None
    device_map: str | None = None
    tp_plan: str | None = None
    masking: str | None = None

    def __post_init__(self) -> None:
        if self.tp_plan is None:
            return
        if self.device_map is not None:
            raise UsageError(
                "give --device-map or --tp-plan, not both: the one spreads whole layers, the other splits each"
            )
        if processes.together() < 2:
            raise UsageError(
                "--tp-plan splits every layer over several processes, and this is one: start them with "
                "`torchrun --nproc-per-node N -m impasto ...`"
            )

    @contextlib.contextmanager
    def store(self, folder: Path, *, dry_run: bool = False) -> Iterator[Store]:
        """The store of a run folder; one that is thrown away in all processes but the first, and in a dry run.

        Processes that split a model must find the same answers in it, or each would go on with another question. So
        the others take a copy before they load the model: the first one writes nothing until all have come to that.
        """
        from impasto.store import Store, duplicate

        if dry_run:
            with looking(folder) as store:
                yield store
        elif self.tp_plan is None or processes.rank() == 0:
            with Store(folder) as store:
                yield store
        else:
            with tempfile.TemporaryDirectory() as nowhere:
                duplicate(folder, nowhere)
                with Store(nowhere) as store:
                    yield store

    def cluster(self, address: str | None, workers: int | None) -> Cluster | None:
        """The cluster that `--ray` and `--workers` ask for, whose workers load as this says; None is this process.

        Raises:
            MissingExtra: Ray is not installed.
            UsageError: options that do not go together.
        """
        if address is None:
            if workers is not None:
                raise UsageError("--workers goes with --ray: `--ray local` starts workers on this host")
            return None
        for option, value in (("--device-map", self.device_map), ("--tp-plan", self.tp_plan)):
            if value is not None:
                raise UsageError(f"--ray gives each worker one device, and {option} several: leave one of them away")
        from impasto.cluster import Cluster

        return Cluster(address, workers, self.revision, self.trust_remote_code)

    def load(self, model: str, progress: Phases) -> LoadedModel:
        """The model, with its progress and its licence shown."""
        progress.bytes(f"loading {model}", 0, 0)
        from impasto import models

        loaded = models.load(
            model,
            device=self.device,
            dtype=self.dtype,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            attention=self.attention,
            device_map=self.device_map,
            tp_plan=self.tp_plan,
            progress=progress.bytes,
            notice=progress.note,
        )
        return loaded.scored(self.masking) if self.masking else loaded


def check_texts(schedules: Iterable[str], edits: Iterable[str] = ()) -> None:
    """Find what is wrong with texts whatever the model, before minutes go into loading it.

    Raises:
        NotationError: a text that fits no model.
    """
    from impasto.edit import Edit
    from impasto.schedule import Schedule

    for read, texts in ((Schedule.parse, schedules), (Edit.parse, edits)):
        for text in texts:
            problems = []
            for layers in (None, _ANY_DEPTH):
                try:
                    read(text, layers)
                except NotationError as problem:
                    problems.append(problem)
            if len(problems) == 2 and problems[0].problem == problems[1].problem:
                raise problems[0]


def check_tasks(names: Sequence[str], include: Sequence[Path]) -> None:
    """Refuse tasks that there are not, before a folder is made and minutes go into loading a model."""
    if names or include:
        from impasto.tasks import check_names

        check_names(names, include)


def recipes(loaded: LoadedModel, schedules: Iterable[str | None], edits: Sequence[str]) -> list[Recipe]:
    """One recipe per schedule, all with the same edits; None is the model's own order."""
    from impasto.recipe import Recipe

    return [Recipe.of(loaded.name, schedule, edits, layers=loaded.layers) for schedule in schedules]


def require_tokenizer(loaded: LoadedModel) -> None:
    """Make sure that the model can read text."""
    if loaded.tokenizer is None:
        raise UsageError(
            f"{loaded.name} came without a tokenizer, so it cannot read text: put its files beside the weights"
        )


def run_folder(output: Path | None, model: str, kind: str) -> Path:
    """Where a run lives: what was asked for, else a name made of model and kind below `impasto-runs`."""
    if output is not None:
        return output
    place = Path(model)
    short = (place.stem if place.suffix == ".gguf" else place.resolve().name) if place.exists() else model
    slug = re.sub(r"[^\w.-]+", "-", short).strip("-.") or "model"
    return RUNS / f"{slug}-{kind}"


@contextlib.contextmanager
def looking(folder: Path) -> Iterator[Store]:
    """The store of a run folder for reading only; an empty one, somewhere else, where there is none yet."""
    from impasto.store import FILENAME, Store

    if (folder / FILENAME).exists():
        with Store(folder, readonly=True) as store:
            yield store
        return
    with tempfile.TemporaryDirectory() as nowhere, Store(nowhere) as store:
        yield store


@contextlib.contextmanager
def recorded(store: Store, command: Sequence[str], *, seed: int | None = None) -> Iterator[None]:
    """Note in the store that a run begins, with what, and how it ends."""
    began = time.monotonic()
    run = store.start_run(command, versions=versions(), seed=seed)
    outcome = "failed"
    try:
        yield
        outcome = "finished"
    except KeyboardInterrupt:
        outcome = "interrupted"
        raise
    finally:
        with contextlib.suppress(Exception):  # the error that ends the run says more than one about its last line
            store.finish_run(run, seconds=time.monotonic() - began, outcome=outcome)


def versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers."""
    found = {}
    for package in ("impasto", "torch", "transformers", "lm-eval", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
