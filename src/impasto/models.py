"""How a pretrained model arrives: from the hub, a folder, a GGUF file, or `demo`.

    >>> loaded = load("demo")                                     # doctest: +SKIP
    >>> loaded.layers, loaded.setting.dtype                       # doctest: +SKIP
    (18, 'bfloat16')

Weights are read from safetensors and GGUF files only, never from pickles, and no code from a model repository
runs unless asked for. A GGUF file is de-quantised once and kept as safetensors in the cache, keyed by the file's
SHA-256: in float32 up to `EXACT` bytes, so that nothing is lost and any dtype can be had from it; above that in
bfloat16. Loading in bfloat16 gives the same numbers either way.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from impasto import fetch
from impasto.errors import FetchError, ImpastoError, OutOfMemory, UnknownModel, UnsupportedModel, UsageError
from impasto.result import MASKINGS, Setting

EXACT = 2 << 30  # bytes of float32 up to which a de-quantised model is stored without rounding
LARGE = 10_000  # words in a vocabulary that is not of single signs
PLAIN = "A Quick Fox, 12 words."  # what any tokenizer should give back

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with what must be known to compare its numbers.

    Attributes:
        name: as the user named it.
        model: the transformers model, in evaluation mode, on its device.
        tokenizer: its tokenizer, or None if it has none (a vision model).
        setting: weights, dtype, device, attention, and how masks are used: equal settings give comparable numbers.
        layers: depth T of the text (or only) stack.
        source: where the weights came from, in words.
    """

    name: str
    model: Any
    tokenizer: Any
    setting: Setting
    layers: int
    source: str

    @property
    def window(self) -> int:
        """Most tokens that one sequence may have, by the same rule as lm-evaluation-harness's `hf` model."""
        config = self.model.config.get_text_config()
        for name in ("n_positions", "max_position_embeddings", "n_ctx"):
            if isinstance(length := getattr(config, name, None), int):
                return length
        length = getattr(self.tokenizer, "model_max_length", None)
        return int(length) if isinstance(length, int) and length < 10**9 else 2048

    @property
    def device(self) -> torch.device:
        """Where inputs belong."""
        from impasto.anatomy import input_device

        return input_device(self.model)

    @property
    def masked(self) -> bool:
        """Whether it predicts masked tokens from both sides, and not next tokens from what stands before them."""
        return bool(self.setting.masking)

    def scored(self, masking: str) -> LoadedModel:
        """The same masked language model, its texts to be scored in another way.

        Args:
            masking: a name in `impasto.result.MASKINGS`. "together" masks all tokens of an answer at once, as in the
                LASER paper, "each" one at a time; "authors" is "together" with the lengths of the LASER authors'
                code, one token too many, for comparison only.

        Raises:
            UsageError: no such way, or the model is no masked language model.
        """
        if masking not in MASKINGS:
            raise UsageError(f"no way to mask {masking!r}: one of {', '.join(MASKINGS)}")
        if not self.masked:
            raise UsageError(
                f"{self.name} is no masked language model, so there is nothing to mask: leave --masking out"
            )
        return replace(self, setting=replace(self.setting, masking=masking))

    def require_head(self) -> None:
        """Make sure that the model can say how likely a text is.

        Raises:
            UnsupportedModel: it predicts no tokens at all.
        """
        if self.model.get_output_embeddings() is None:
            raise UnsupportedModel(
                f"{self.name} was loaded as {type(self.model).__name__}, which has no head that predicts tokens, so "
                "texts cannot be scored with it: take a checkpoint that was saved with its language modelling head"
            )


def load(
    ref: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attention: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: Path | str | None = None,
    tp_plan: str | None = None,
    progress: fetch.Progress | None = None,
    notice: fetch.Notice | None = None,
) -> LoadedModel:
    """The model that `ref` names.

    Args:
        ref: a hub id (`org/name`), a local folder, a `.gguf` file, or `demo`.
        device: `auto` (CUDA, else MPS, else CPU) or a torch device such as `cuda:1`.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: the checkpoint's own, except that a CPU without fast
            bfloat16 matrix units computes in float32.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: let code from the model's repository run.
        attention: attention implementation; None leaves the choice (usually `sdpa`) to transformers.
        device_map: for a model that does not fit one device, as transformers has it: `auto` fills the GPUs, then the
            CPU's memory, then the disk; or a device for each part. Overrides `device`.
        max_memory: what `device_map` may use of each device, as in `{0: "60GiB", "cpu": "200GiB"}`.
        offload_folder: where weights are written that `device_map` sends to the disk and that are not stored as they
            are used.
        tp_plan: `auto` splits every layer over the processes of a `torchrun`, as the family's own plan says; all
            processes then make the same calls. Overrides `device`.
        progress: told about downloads, hashing and de-quantising.
        notice: told the licence before the demo model's first download.

    Raises:
        UnknownModel: no such name, folder or file.
        UsageError: a dtype, device or placement that cannot be.
        UnsupportedModel: a format or architecture that cannot be read, or no plan to split it by.
        FetchError: a download failed.
        OutOfMemory: the weights do not fit.
    """
    name, target = str(ref), _device(device)
    wanted = _dtype_named(dtype)
    placed = _placement(device_map, max_memory, offload_folder, tp_plan)
    place = _find(name, progress, notice)
    folder: Path | str
    with quiet():
        if isinstance(place, Path) and place.is_file():
            weights = _file_hash(place, progress)
            folder, source, native = _from_gguf(place, weights, progress), f"GGUF file {place.name}", "bfloat16"
        elif isinstance(place, Path):
            folder, source, native = place, f"folder {place}", ""
            weights = _folder_hash(place, progress)
        else:
            folder, source, native, weights = place, f"hub {place}", "", ""
            if progress is not None:
                progress(f"reading {name} from the hub", 0, 0)
        where = {"revision": revision, "trust_remote_code": trust_remote_code}
        with _explained(name):
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(folder, **where)
            checkpoint = DTYPES.get(native) or _as_dtype(getattr(config, "dtype", None)) or torch.float32
            chosen = wanted or (checkpoint if target.type != "cpu" else _cpu_dtype(checkpoint))
            if tp_plan is not None and not getattr(config.get_text_config(), "base_model_tp_plan", None):
                raise UnsupportedModel(f"{name} has no tensor parallel plan: spread it with device_map='auto' instead")
            if isinstance(folder, Path) and not placed:
                _check_room(name, folder, chosen, target)
            model = _auto_class(config, trust_remote_code).from_pretrained(
                folder,
                dtype=chosen,
                use_safetensors=True,
                attn_implementation=attention,
                **placed,
                **where,
            )
            if not placed:
                model = model.to(target)
            tokenizer = _tokenizer(folder, **where)
            if native and tokenizer is not None:  # an earlier version may have kept one that is broken
                with _given_up(Path(folder)):
                    _check_round_trip(tokenizer, Path(place).name)
        if not weights:
            weights = getattr(config, "_commit_hash", None) or _module_hash(model)
    return _loaded(name, model, tokenizer, weights, source)


def adopt(model: Any, tokenizer: Any = None, *, name: str | None = None) -> LoadedModel:
    """A model that the caller already holds, wrapped as if `load` had read it; put into evaluation mode."""
    name = name or getattr(model, "name_or_path", "") or type(model).__name__
    return _loaded(name, model, tokenizer, _module_hash(model), "adopted from memory")


def _loaded(name: str, model: Any, tokenizer: Any, weights: str, source: str) -> LoadedModel:
    from impasto.anatomy import input_device

    model.eval()
    parameter = next(model.parameters())
    setting = Setting(
        model=name,
        weights=weights,
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=input_device(model).type,
        attention=getattr(model.config, "_attn_implementation", None) or "eager",
        masking=next(iter(MASKINGS)) if predicts_masked(model) else "",
    )
    text = model.config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    if not isinstance(layers, int) or layers < 1:
        raise UnsupportedModel(f"{name}: its configuration does not say how many layers it has (num_hidden_layers)")
    return LoadedModel(name, model, tokenizer, setting, layers, source)


# Which model ----------------------------------------------------------------------------------------------------


def _find(name: str, progress: fetch.Progress | None, notice: fetch.Notice | None) -> Path | str:
    """A GGUF file, a folder with a configuration, or a hub id."""
    if name == "demo":
        return next(fetch.ensure("demo", progress=progress, notice=notice).glob("*.gguf"))
    path = Path(name).expanduser()
    if path.is_file():
        with path.open("rb") as stream:
            if stream.read(4) == b"GGUF":
                return path
        raise UnknownModel(f"{name} is a file but not a GGUF: give a .gguf file or the folder of a safetensors model")
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return files[0]
        found = f"{len(files)} GGUF files: name one" if files else "neither config.json nor a .gguf file"
        raise UnknownModel(f"the folder {name} has {found}")
    if path.suffix == ".gguf" or not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name):
        raise UnknownModel(f"no model {name!r}: no such file or folder, and not a hub id; `demo` always works")
    return name


def predicts_masked(model: Any) -> bool:
    """Whether a model predicts masked tokens from both sides.

    It does if transformers, or the configuration of a model with its own code, lists its class as a masked language
    model, and if it is not used as a decoder.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    config = model.config
    if getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False):
        return False
    remote = getattr(config, "auto_map", None) or {}
    own = str(remote.get("AutoModelForMaskedLM", "")).rpartition(".")[2]
    known = set(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return bool({cls.__name__ for cls in type(model).__mro__} & (known | {own}))


def _auto_class(config: Any, trust_remote_code: bool) -> Any:
    """The auto class that builds the architecture which the checkpoint was saved from.

    A language model if the configuration names no architecture (a masked one before a causal one unless it is meant as
    a decoder: where there are both, the checkpoints are encoders), the bare model if it is none of those known here.
    """
    import transformers

    kinds = [
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForMaskedLM,
        transformers.AutoModelForSequenceClassification,
        transformers.AutoModelForImageClassification,
    ]
    remote = getattr(config, "auto_map", None) or {}
    if trust_remote_code:
        for kind in kinds:
            if kind.__name__ in remote:
                return kind
    saved = set(getattr(config, "architectures", None) or ())
    if not saved and not (getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)):
        kinds[:2] = kinds[1::-1]
    for kind in kinds:
        built = kind._model_mapping.get(type(config), None)
        classes = built if isinstance(built, tuple) else (built,)
        if any(cls is not None and (not saved or cls.__name__ in saved) for cls in classes):
            return kind
    return transformers.AutoModel


def _tokenizer(folder: Path | str, **where: Any) -> Any:
    """The tokenizer, or None where there is none."""
    from transformers import AutoTokenizer

    if isinstance(folder, Path) and not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, **where)
    except (OSError, ValueError, KeyError):
        return None


# Where and in which numbers ------------------------------------------------------------------------------------


def _placement(
    device_map: str | Mapping[str, Any] | None,
    max_memory: Mapping[int | str, int | str] | None,
    offload_folder: Path | str | None,
    tp_plan: str | None,
) -> dict[str, Any]:
    """The options of `from_pretrained` that spread a model; none for a model on one device."""
    if tp_plan is None:
        options = {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
        return {name: value for name, value in options.items() if value is not None} if device_map else {}
    if device_map:
        raise UsageError("give device_map or tp_plan, not both: the one spreads whole layers, the other splits each")
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise UsageError(
            "tp_plan splits every layer over several processes, and this is one: start them with "
            "`torchrun --nproc-per-node N`"
        )
    from transformers.distributed import DistributedConfig

    if "tp_plan" not in DistributedConfig.__dataclass_fields__:
        raise UsageError("tp_plan needs a newer transformers: pip install -U transformers")
    return {"distributed_config": DistributedConfig(tp_plan=tp_plan)}


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as problem:
        raise UsageError(f"no device {name!r}: one of auto, cpu, cuda, cuda:1, mps") from problem
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"no device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices here")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(f"no device {name!r}: torch has no MPS here")
    return device


def _dtype_named(name: str) -> torch.dtype | None:
    if name == "auto":
        return None
    full = _SHORT.get(name, name).removeprefix("torch.")
    if full not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}: one of auto, {', '.join(DTYPES)}")
    return DTYPES[full]


def _as_dtype(value: Any) -> torch.dtype | None:
    """A configuration's dtype, which may be a text or a torch dtype."""
    return value if isinstance(value, torch.dtype) else DTYPES.get(str(value))


def _cpu_dtype(checkpoint: torch.dtype) -> torch.dtype:
    """bfloat16 for a half-precision checkpoint on a CPU that multiplies bfloat16 matrices natively, else float32."""
    asks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    fast = any(ask() for ask in asks if ask is not None)
    return torch.bfloat16 if fast and checkpoint is not torch.float32 else torch.float32


def _check_room(name: str, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse before loading what cannot fit; says nothing where free memory is not known."""
    parameters = 0
    for file in folder.glob("*.safetensors"):
        parameters += sum(_elements(entry["shape"]) for entry in _header(file).values())
    need, free = parameters * dtype.itemsize, _free_memory(device)
    if free is not None and need > free:
        raise OutOfMemory(
            f"{name} needs {fetch.megabytes(need)} for its weights in {str(dtype).removeprefix('torch.')} and "
            f"{device.type} has {fetch.megabytes(free)} free: try --dtype bfloat16, another device or a smaller model"
        )


def _header(file: Path) -> dict[str, Any]:
    """Names, dtypes and shapes of a safetensors file, without its tensors."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _elements(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if device.type == "cpu" and meminfo.exists():
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        return int(found[1]) * 1024 if found else None
    return None


# GGUF ---------------------------------------------------------------------------------------------------------


def _from_gguf(file: Path, sha256: str, progress: fetch.Progress | None) -> Path:
    """A folder in the cache with the de-quantised model and its tokenizer; made on the first call."""
    final = fetch.cache_root() / "dequantised" / sha256[:24]
    if final.is_dir():
        return final
    with (
        fetch.writing(final.parent),
        fetch.locked(final.parent / f".{final.name}.lock", progress),
    ):
        if final.is_dir():
            return final
        if progress is not None:
            progress(f"de-quantising {file.name} (once, about a minute)", 0, 0)
        with fetch.staged(final) as staging:
            with _explained(file.name):
                _dequantise(file, staging / "model")
            (staging / "model").rename(final)
    return final


def _dequantise(file: Path, folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    with _parsed_once(), contextlib.redirect_stderr(io.StringIO()):
        config = AutoConfig.from_pretrained(**where)
        kind = _auto_class(config, trust_remote_code=False)
        with torch.device("meta"):
            size = sum(tensor.numel() for tensor in kind.from_config(config).parameters())
        dtype = torch.float32 if 4 * size <= EXACT else torch.bfloat16
        model = kind.from_pretrained(**where, config=config, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(**where, config=config)
    _check_round_trip(tokenizer, file.name)
    # The model still carries its quantiser and cannot be saved: put its tensors into a bare one of the same class.
    config = model.config
    for name in ("quantization_config", "_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    with torch.device("meta"):
        bare = type(model)(config)
    bare.load_state_dict(model.state_dict(), assign=True)
    bare.tie_weights()
    bare.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _given_up(folder: Path) -> Iterator[None]:
    """Remove a de-quantised model that turns out to be unusable, so that it is made anew the next time."""
    try:
        yield
    except UnsupportedModel:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _check_round_trip(tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer that loses text, or spells it.

    Some versions of transformers make of some GGUF files a tokenizer that never joins letters to words, and may drop
    those it does not know: every text becomes several times as long, and all numbers are wrong without a word. A large
    vocabulary has the words of a plain sentence, or most of their parts; a small one may be of single signs.
    """
    ids = tokenizer.encode(PLAIN, add_special_tokens=False)
    back = tokenizer.decode(ids, skip_special_tokens=True)
    spelt = len(ids) > (0.75 if len(tokenizer) > LARGE else 1) * len(PLAIN)
    if spelt or back.strip().lower() != PLAIN.lower():
        import transformers

        how = f"in {len(ids)} pieces" if spelt else f"as {back!r}"
        raise UnsupportedModel(
            f"transformers {transformers.__version__} makes a broken tokenizer of {name} (it reads {PLAIN!r} {how}): "
            "upgrade with `pip install -U transformers`, or load the model from its original files"
        )


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Let transformers parse a GGUF file's metadata once instead of once for config, tokenizer and tensors each.

    The parser spends its time in slicing a memory map for every token of the vocabulary; a plain view of the same
    bytes halves that. Together 35 s instead of 130 s for a vocabulary of 262,144 on one slow core; the tensors
    are bit-equal.
    """
    import gguf
    import numpy as np

    class PlainReader(gguf.GGUFReader):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = mapped.view(np.ndarray)

    original, readers = gguf.GGUFReader, dict[str, Any]()

    def reader(path: Any, mode: str = "r") -> Any:
        if str(path) not in readers:
            readers[str(path)] = PlainReader(path, mode)
        return readers[str(path)]

    gguf.GGUFReader = reader
    try:
        yield
    finally:
        gguf.GGUFReader = original


# Which weights -------------------------------------------------------------------------------------------------


def _file_hash(file: Path, progress: fetch.Progress | None) -> str:
    """SHA-256 of a file, remembered in the cache for as long as its path, size and time do not change."""
    stat = file.stat()
    key = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    memory = fetch.cache_root() / "hashes" / hashlib.sha256(key.encode()).hexdigest()[:24]
    with contextlib.suppress(OSError):
        if len(known := memory.read_text().strip()) == 64:
            return known
    found = fetch.file_sha256(file, progress, f"hashing {file.name}")
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        memory.parent.mkdir(parents=True, exist_ok=True)
        new = memory.with_suffix(f".{os.getpid()}")
        new.write_text(found)
        new.replace(memory)
    return found


def _folder_hash(folder: Path, progress: fetch.Progress | None) -> str:
    """One hash over the configuration and all weight files of a folder."""
    hasher = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        hasher.update(f"{file.name}:{_file_hash(file, progress)}".encode())
    return hasher.hexdigest()


def _module_hash(model: Any) -> str:
    """One hash over names, shapes, dtypes and bytes of a model's tensors."""
    from impasto.anatomy import at_hand

    hasher = hashlib.sha256()
    for name, known in sorted(model.state_dict().items()):
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        with at_hand(module):
            tensor = getattr(module, own) if known.device.type == "meta" else known
            hasher.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
            hasher.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


# Quiet, and clear when it fails --------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' and the hub client's progress bars, log lines and warnings, and restore them."""
    from logging import getLogger

    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    level, bars, hub_bars = logging.get_verbosity(), logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    hub = getLogger("huggingface_hub")  # it tells of every try to reach the hub
    hub_level = hub.level
    hub.setLevel(logging.CRITICAL)
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what transformers and the hub client raise while reading `name` into one line that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as problem:
        raise OutOfMemory(f"{name} does not fit: try --dtype bfloat16, another device or a smaller model") from problem
    except ImpastoError:
        raise
    except Exception as problem:  # tokenizers raises bare ones
        kinds, text = _chain(problem)
        if isinstance(problem, OSError) and problem.errno is not None:
            raise
        if kinds & {"GatedRepoError"} or "gated repo" in text:
            raise FetchError(
                f"{name} is gated: accept its terms on its hub page, then log in with `hf auth login` or set HF_TOKEN"
            ) from problem
        if kinds & {"RepositoryNotFoundError", "RevisionNotFoundError", "HFValidationError"}:
            raise UnknownModel(
                f"no model {name!r}: not a folder or file here, and the hub has no such name or revision "
                "(a private one needs HF_TOKEN)"
            ) from problem
        if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError"} or (
            "connect to" in text
        ):
            raise FetchError(
                f"cannot reach the hub for {name!r}, and it is not in the hub's cache here: "
                "give a local folder, a .gguf file or `demo`"
            ) from problem
        if "safetensors" in text and ("no file named" in text or "does not appear to have" in text):
            raise UnsupportedModel(
                f"{name} has no safetensors weights; pickled ones are never read: convert it to safetensors first"
            ) from problem
        if "trust_remote_code" in text:
            raise UsageError(
                f"{name} brings its own code, which runs only with --trust-remote-code (read it first)"
            ) from problem
        raise UnsupportedModel(f"{name} cannot be loaded: {_first_line(problem)}") from problem


def _first_line(problem: Exception) -> str:
    text = str(problem).strip()
    return text.splitlines()[0][:300] if text else type(problem).__name__


def _chain(problem: BaseException | None) -> tuple[set[str], str]:
    """Class names (with bases) and texts of an exception and of everything that it came from."""
    names: set[str] = set()
    texts: list[str] = []
    while problem is not None:
        names |= {cls.__name__ for cls in type(problem).__mro__}
        texts.append(str(problem))
        problem = problem.__cause__ or problem.__context__
    return names, "\n".join(texts)
