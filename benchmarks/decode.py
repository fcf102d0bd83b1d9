"""What one decoded token costs: recipes compiled by `impasto.fast` against the model's own `generate`, in one process.

    python benchmarks/decode.py --shapes 0.5b,7b --output decode.json
    python benchmarks/decode.py --shapes 0.5b --parts identity,parallel --modes compiled --budget-seconds 240

Models have the given shapes and random weights. Everything that is compared runs on the same model in the same
process, in turns: after all variants are built, each of several rounds measures every one of them. Recorded are every
sample, the clocks and throttling reasons before and after each round, the bandwidth and matrix rate that the device
reached in this run, and what building cost. A variant that fails is recorded with its error, and the rest goes on; the
file is written anew after every part. The last thing printed is a table.

Decoding is measured at `--context` columns: a prompt of context - 64 tokens, then steps, each between two CUDA events.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from impasto import rows
from impasto.fast import Branches, Decoder, fast
from impasto.hardware import machine
from impasto.pieces import Compile
from impasto.runtime import scheduled
from impasto.surgery import edited
from impasto.taps import tapped

SHAPES: dict[str, Callable[[], Any]] = {
    "0.5b": lambda: Qwen2Config(
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        vocab_size=151936,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
    ),
    "1b": lambda: LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=8192,
        vocab_size=128256,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
    ),
    "7b": lambda: LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        intermediate_size=11008,
        vocab_size=32000,
        max_position_embeddings=32768,
    ),
    "tiny": lambda: LlamaConfig(
        hidden_size=64,
        num_hidden_layers=14,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=256,
        max_position_embeddings=4096,
    ),
}
PARTS = ("law", "hf", "hf-compiled", "identity", "skip", "parallel", "loop", "branches", "factored", "ttft")
OPTIONS: dict[str, dict[str, Any]] = {  # of torch's compiler, by mode
    "combo": {"combo_kernels": True},
    "tuned": {"coordinate_descent_tuning": True},
    "autotuned": {"max_autotune_pointwise": True},
}
PLAIN = "plain"  # products by torch's compiler alone: what layers in series cost without kernels of ours for them
TAIL = 64  # columns left for decoded tokens
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def schedules(layers: int) -> dict[str, str]:
    """Schedules over the middle 12 layers: in series, in parallel, looped, in branches, skipped."""
    a = (layers - 12) // 2
    b = a + 12
    pairs = ", ".join(f"{i} {i + 1}" for i in range(a, b, 2))
    return {
        "identity": f"0:{layers}",
        "skip": f"0:{a} {b}:{layers}",
        "parallel": f"0:{a} {{{a}:{b}}} {b}:{layers}",
        "loop-series": f"0:{a} ({a}:{b})x2 {b}:{layers}",
        "loop": f"0:{a} {{{a}:{b}}}x2 {b}:{layers}",
        "branches": f"0:{a} {{{pairs}}} {b}:{layers}",
    }


def wait() -> None:
    """Return when the device has done all it was given."""
    if CUDA:
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any]) -> float:
    """Seconds on the host until the device has done `work`."""
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def timed(work: Callable[[], Any], count: int) -> list[float]:
    """Milliseconds of `count` calls, each between two events on the device."""
    if not CUDA:
        return [seconds(work) * 1e3 for _ in range(count)]
    new: Callable[..., Any] = torch.cuda.Event
    events = [[new(enable_timing=True) for _ in range(2)] for _ in range(count)]
    wait()
    for before, after in events:
        before.record()
        work()
        after.record()
    wait()
    return [before.elapsed_time(after) for before, after in events]


def clocks() -> dict[str, str]:
    """Clocks, temperature, power and throttling reasons, as the driver gives them now."""
    fields = "clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active,utilization.gpu,pstate"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, timeout=10
        )
        return dict(zip(fields.split(","), (v.strip() for v in answer.stdout.strip().split(",")), strict=False))
    return {}


def roofline() -> dict[str, float]:
    """Bytes per second of a large copy (read and written) and of a large matrix-vector product; bf16 matrix rate."""
    size = 2**30 if CUDA else 2**24
    source = torch.randn(size, device=DEVICE).to(torch.bfloat16)
    target = torch.empty_like(source)
    matrix, vector = source.view(-1, 8192), torch.randn(8192, device=DEVICE).to(torch.bfloat16)
    side = 8192 if CUDA else 256
    left, right = (torch.randn(side, side, device=DEVICE).to(torch.bfloat16) for _ in range(2))
    found = {}
    works: list[tuple[str, Callable[[], Any], int]] = [
        ("copy_bytes_per_second", lambda: target.copy_(source), 2 * source.nbytes),
        ("read_bytes_per_second", lambda: torch.mv(matrix, vector), source.nbytes),
        ("matmul_flops", lambda: left @ right, 2 * side**3),
    ]
    for name, work, amount in works:
        for _ in range(3):
            work()
        found[name] = amount / (statistics.median(timed(work, 10)) / 1e3)
    return found


def quantiles(samples: list[float]) -> dict[str, float]:
    """Median, 5 % and 95 % quantiles and number of samples."""
    ordered = sorted(samples)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return {"median": statistics.median(ordered), "q05": at(0.05), "q95": at(0.95), "n": len(ordered)}


def build(shape: str, dtype: torch.dtype, layers: int | None = None) -> Any:
    """A model of a shape with random weights, which never ends a text by itself."""
    config = SHAPES[shape]()
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    torch.manual_seed(0)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def bytes_per_token(model: Any, decoder: Decoder) -> dict[str, int]:
    """Weights and keys that one step must read; thin products count as they run."""
    from impasto.steps import leaves

    def weights(module: torch.nn.Module) -> int:
        total = sum(p.nbytes for p in module.parameters())
        for child in module.modules():
            run = vars(child).get("forward")
            if run is not None:  # runs as two thin products instead of its weight
                held = [c.cell_contents for c in getattr(run, "__closure__", None) or ()]
                held += list(vars(run).values()) if hasattr(run, "__dict__") else []
                thin = [t for t in held if isinstance(t, torch.Tensor) and t.dim() == 2]
                whole: Any = child.weight
                total += sum(t.nbytes for t in thin) - (whole.nbytes if thin else 0)
        return total

    program = decoder.program
    calls = list(leaves(program.player.schedule.steps))
    head = model.get_output_embeddings().weight.nbytes
    return {
        "layers": sum(weights(program.body.layers[call.layer]) for call in calls),
        "head": head,
        "keys": program.memory.nbytes,
    }


class Ours:
    """One recipe through `fast`; recorded steps can be replayed after its model is free again."""

    def __init__(
        self, name: str, schedule: str, mode: str, rank: str | None = None, branches: Branches = "stacked"
    ) -> None:
        self.name, self.schedule, self.mode, self.rank, self.branches = name, schedule, mode, rank, branches

    def build(self, model: Any, prompt: list[int], context: int) -> dict[str, Any]:
        """Compile the recipe and read the prompt; returns what that took and what a step reads."""
        began = time.perf_counter()
        with contextlib.ExitStack() as stack:
            if self.rank is not None:
                report = stack.enter_context(
                    edited(model, [f"*.mlp.*@{self.rank}"], svd="lowrank", niter=1, form="factored")
                )
                assert all(one.form == "factored" for one in report.touched)
            edits_seconds = time.perf_counter() - began
            if self.mode == PLAIN:
                stack.enter_context(mock.patch.object(rows, "LEAST", sys.maxsize))
            decoder = stack.enter_context(
                fast(
                    model,
                    self.schedule,
                    context=context,
                    buckets=[context],
                    branches=self.branches,
                    compile="off" if self.mode == "modules" else "inductor",
                    options=OPTIONS.get(self.mode),
                )
            )
            decoder.prefill([prompt])
            decoder.step()
            amounts = bytes_per_token(model, decoder)
            total = time.perf_counter() - began
        self.decoder = decoder
        self.restart()
        return {
            "report": dataclasses.asdict(decoder.report),
            "build_seconds": total,
            "edit_seconds": edits_seconds,
            "bytes": amounts,
        }

    def restart(self) -> None:
        """Back to the end of the prompt."""
        decoder = self.decoder
        decoder.filled = decoder.begun
        decoder.program.clock.position.fill_(decoder.begun)

    def measure(self, count: int) -> list[float]:
        """Milliseconds of `count` steps behind the prompt."""
        self.restart()
        if CUDA:
            return timed(self.decoder.step, count)
        program = self.decoder.program
        with torch.no_grad(), tapped(program.body.layers, program.player):  # nothing was recorded: the model runs
            return timed(self.decoder.step, count)


class Theirs:
    """The model's own `generate`: milliseconds per token from runs of many tokens and of one."""

    def __init__(self, name: str, model: Any, prompt: list[int], **options: Any) -> None:
        self.name, self.model, self.options = name, model, options
        self.ids = torch.tensor([prompt], device=DEVICE)

    def generate(self, count: int) -> Any:
        """Exactly `count` new tokens."""
        with torch.no_grad():
            return self.model.generate(
                self.ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, **self.options
            )

    def build(self) -> dict[str, Any]:
        """Warm up; seconds that took."""
        return {"build_seconds": seconds(lambda: [self.generate(TAIL) for _ in range(2)])}

    def measure(self, count: int) -> list[float]:
        """Milliseconds per token, one sample; `count` is for others."""
        first = seconds(lambda: self.generate(1))
        many = seconds(lambda: self.generate(TAIL))
        return [(many - first) / (TAIL - 1) * 1e3]


def plain_tokens(model: Any, schedule: str, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy tokens of the plain runtime, and how far the likeliest logit was ahead, relative to their spread."""
    from transformers.cache_utils import DynamicCache

    tokens, margins = [], []
    ids, cache = torch.tensor([prompt], device=DEVICE), DynamicCache(config=model.config)
    with torch.no_grad(), scheduled(model, schedule):
        for _ in range(count):
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].float()
            best = logits.topk(2).values
            margins.append(float((best[0] - best[1]) / logits.std()))
            tokens.append(int(logits.argmax()))
            ids = torch.tensor([[tokens[-1]]], device=DEVICE)
    return tokens, margins


def compared(got: list[int], expected: list[int], margins: list[float]) -> dict[str, Any]:
    """Whether tokens are equal, and how close a call the first difference was."""
    differ = next((i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b), None)
    return {
        "equal": differ is None,
        "tokens": len(expected),
        "distinct": len(set(expected)),
        "first_difference": differ,
        "margin_there": None if differ is None else margins[differ],
        "smallest_margin": min(margins),
    }


def law(shape: str, modes: list[str], context: int) -> dict[str, Any]:
    """In float32, on a model of 14 layers of the shape: tokens equal to the plain runtime's and to `generate`'s."""
    model = build(shape, torch.float32, layers=14)
    prompt = torch.randint(10, model.config.vocab_size - 10, (57,), generator=torch.Generator().manual_seed(1)).tolist()
    found: dict[str, Any] = {}
    own = Theirs("hf", model, prompt).generate(48)[0, len(prompt) :].tolist()
    for name, schedule in schedules(14).items():
        expected, margins = plain_tokens(model, schedule, prompt, 48)
        if name == "identity":
            found["hf"] = compared(expected, own, margins)
        for mode in modes:
            key = f"{name}/{mode}"
            try:
                how: Compile = "off" if mode == "modules" else "inductor"
                with fast(
                    model, schedule, context=min(context, 256), compile=how, options=OPTIONS.get(mode)
                ) as decoder:
                    got = list(decoder.generate([prompt], 48, ends=())[0])
                found[key] = compared(got, expected, margins) | {"error": decoder.report.error}
            except Exception as problem:
                found[key] = {"failed": f"{type(problem).__name__}: {problem}"[:600]}
            print(f"  law {key}: {found[key]}", flush=True)
    return found


def ttft(shape: str, model: Any, rounds: int, length: int = 128) -> dict[str, Any]:
    """Milliseconds from a prompt of `length` tokens to its first new token on the host."""
    prompt = torch.randint(10, model.config.vocab_size - 10, (length,)).tolist()
    peer = Theirs("hf", model, prompt)
    samples: dict[str, list[float]] = {"hf": [], "ours": []}
    with fast(model, context=length + TAIL) as decoder:
        for _ in range(3):
            decoder.prefill(peer.ids).tolist()
    for _ in range(3):
        peer.generate(1)
    program = decoder.program
    for _ in range(rounds * 5):
        samples["hf"].append(seconds(lambda: peer.generate(1).tolist()) * 1e3)
        # what was not recorded runs on the tapped model
        with contextlib.nullcontext() if CUDA else tapped(program.body.layers, program.player):
            samples["ours"].append(seconds(lambda: decoder.prefill(peer.ids).tolist()) * 1e3)
    return {name: {"samples": values, **quantiles(values)} for name, values in samples.items()}


def profile(variant: Ours, steps: int = 3) -> list[dict[str, Any]]:
    """The kernels of one step: how often, and how many microseconds in all."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    variant.restart()
    with profiler(activities=[ProfilerActivity.CUDA]) as heard:
        for _ in range(steps):
            variant.decoder.step()
        wait()
    rows = [
        {"kernel": event.key[:100], "calls": event.count / steps, "us": event.self_device_time_total / steps}
        for event in heard.key_averages()
        if event.self_device_time_total > 0
    ]
    return sorted(rows, key=lambda row: -row["us"])


def variants_of(parts: list[str], modes: list[str], layers: int) -> Iterator[Ours]:
    """Every recipe of the parts asked for, in every mode."""
    known = schedules(layers)
    for mode in modes:
        for part, names in (
            ("identity", ("identity",)),
            ("skip", ("skip",)),
            ("parallel", ("parallel",)),
            ("loop", ("loop-series", "loop")),
            ("branches", ("branches",)),
        ):
            if part in parts:
                chosen = [name for name in names if mode != PLAIN or name in ("identity", "skip", "loop-series")]
                yield from (Ours(f"{name}/{mode}", known[name], mode) for name in chosen)
        if mode == PLAIN:
            continue
        if "parallel" in parts and mode != "modules":
            yield Ours(f"parallel, streams/{mode}", known["parallel"], mode, branches="streams")
        if "parallel" in parts:
            yield Ours(f"parallel, one stream/{mode}", known["parallel"], mode, branches="series")
        if "factored" in parts:
            yield Ours(f"factored/{mode}", known["identity"], mode, rank="0.1")


class Run:
    """One run of the benchmark: what is asked, what was found, and the time that is left."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen = chosen
        self.began = time.perf_counter()
        self.found: dict[str, Any] = {
            "machine": machine(DEVICE),
            "options": {k: str(v) for k, v in vars(chosen).items()},
            "shapes": {},
        }

    @property
    def spent(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self.began

    def left(self, need: float = 0.0) -> bool:
        """Whether so many seconds are left."""
        return self.spent + need < float(self.chosen.budget_seconds)

    def still(self) -> None:
        """Leave the part that begins here where no time is left for it."""
        if not self.left():
            raise _Skipped

    def save(self) -> None:
        """Write all that was found so far."""
        self.chosen.output.write_text(json.dumps(self.found, indent=1))

    @contextlib.contextmanager
    def part(self, where: dict[str, Any], name: str, builds: bool = True) -> Iterator[None]:
        """Record what goes wrong inside instead of ending the run; behind what builds, memory is freed."""
        print(f"[{self.spent:6.1f} s] {name}", flush=True)
        try:
            yield
        except _Skipped:
            where[name] = {"skipped": "the time is used up"}
            print("  skipped: the time is used up", flush=True)
        except Exception as problem:
            where[name] = {
                "failed": f"{type(problem).__name__}: {problem}"[:2000],
                "trace": traceback.format_exc()[-3000:],
            }
            print(f"  FAILED {type(problem).__name__}: {str(problem)[:400]}", flush=True)
        if builds:
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
        self.save()

    def shape(self, shape: str) -> None:
        """All parts for one shape."""
        chosen, parts, modes = self.chosen, self.chosen.parts.split(","), self.chosen.modes.split(",")
        here: dict[str, Any] = {"variants": {}, "failures": {}, "clocks": []}
        self.found["shapes"][shape] = here
        if "law" in parts:
            with self.part(here["failures"], "law"):
                self.still()
                here["law"] = law(shape, [mode for mode in modes if mode != PLAIN], chosen.context)
        model = build(shape, torch.bfloat16)
        prompt = torch.randint(10, model.config.vocab_size - 10, (chosen.context - TAIL,)).tolist()
        ready: list[Any] = []
        for variant in variants_of(parts, modes, model.config.num_hidden_layers):
            with self.part(here["failures"], f"build {variant.name}"):
                self.still()
                here["variants"][variant.name] = {
                    "schedule": variant.schedule,
                    **variant.build(model, prompt, chosen.context),
                }
                ready.append(variant)
                self.warm(variant, here["variants"][variant.name])
        if "ttft" in parts:
            with self.part(here["failures"], "ttft"):
                self.still()
                here["ttft"] = ttft(shape, model, chosen.rounds)
        for part, options in (("hf", {}), ("hf-compiled", {"cache_implementation": "static"})):
            if part in parts:
                with self.part(here["failures"], f"build {part}"):
                    self.still()
                    peer = Theirs(part, model, prompt, **options)
                    here["variants"][part] = peer.build()
                    ready.append(peer)
        for number in range(chosen.rounds):
            here["clocks"].append(clocks())
            for variant in ready:
                with self.part(here["failures"], f"round {number} {variant.name}", builds=False):
                    self.still()
                    samples = variant.measure(chosen.steps)
                    here["variants"][variant.name].setdefault("samples", []).extend(samples)
        here["clocks"].append(clocks())
        if chosen.profile and CUDA:
            for variant in ready:
                if isinstance(variant, Ours):
                    with self.part(here["failures"], f"profile {variant.name}", builds=False):
                        self.still()
                        rows = here["variants"][variant.name]["kernels"] = profile(variant)
                        for row in rows[: chosen.profile]:
                            print(f"  {row['us']:8.1f} us {row['calls']:6.1f}x {row['kernel']}", flush=True)
        for result in here["variants"].values():
            if result.get("samples"):
                result["ms"] = quantiles(result["samples"])

    def warm(self, variant: Ours, into: dict[str, Any]) -> None:
        """Try a variant that was just built, and print what building took."""
        into["first_ms"] = statistics.median(variant.measure(5))
        report = into["report"]
        print(
            f"  {into['first_ms']:.3f} ms; built in {into['build_seconds']:.1f} s "
            f"({', '.join(f'{k} {v:.1f}' for k, v in report['seconds'].items())}); error {report['error']:.2g}; "
            f"{report['regions']} regions, {report['kernels']} kinds, {report['streams']} streams",
            flush=True,
        )

    def table(self) -> None:
        """Print what was found."""
        bandwidth = self.found.get("roofline", {}).get("copy_bytes_per_second", float("nan"))
        print(f"\n{self.found['machine']['gpu']}; roofline {self.found.get('roofline')}")
        for shape, here in self.found["shapes"].items():
            print(f"\n{shape:28} ms/token    q05    q95   weights/bw  share   build s")
            for name, result in here["variants"].items():
                if "ms" not in result:
                    continue
                amounts = result.get("bytes")
                floor = (amounts["layers"] + amounts["head"]) / bandwidth * 1e3 if amounts else float("nan")
                ms = result["ms"]
                print(
                    f"{name:28} {ms['median']:8.3f} {ms['q05']:6.3f} {ms['q95']:6.3f} {floor:10.3f} "
                    f"{floor / ms['median']:8.2f} {result['build_seconds']:8.1f}"
                )
            for mode in self.chosen.modes.split(","):
                self.ratios(here["variants"], mode, bandwidth)
            if "ttft" in here:
                print(
                    f"TTFT 128: hf {here['ttft']['hf']['median']:.2f} ms, ours {here['ttft']['ours']['median']:.2f} ms"
                )
            if "law" in here:
                wrong = [k for k, v in here["law"].items() if not v.get("equal")]
                print(f"law: {len(here['law']) - len(wrong)} of {len(here['law'])} equal; not: {wrong}")
            for name, problem in here["failures"].items():
                print(f"failed: {name}: {str(problem.get('failed', problem))[:160]}")

    def ratios(self, variants: dict[str, Any], mode: str, bandwidth: float) -> None:
        """Print what groups cost beside the same layers in series and beside reading their weights."""
        ms = {name: v["ms"]["median"] for name, v in variants.items() if "ms" in v}
        bytes_of = {name: v["bytes"]["layers"] for name, v in variants.items() if "bytes" in v}
        skip = f"skip/{mode}"
        for group, series in (("parallel", "identity"), ("branches", "identity"), ("loop", "loop-series")):
            names = (f"{group}/{mode}", f"{series}/{mode}", skip)
            if all(name in ms for name in names):
                cost, whole = ms[names[0]] - ms[skip], ms[names[1]] - ms[skip]
                floor = (bytes_of[names[0]] - bytes_of[skip]) / bandwidth * 1e3
                print(
                    f"  {mode}: middle 12 as {group}: {cost:.4f} ms, in series {whole:.4f} ms: "
                    f"ratio {cost / whole:.3f}; "
                    f"weights alone {floor:.4f} ms: {cost / floor:.3f} times"
                )
                plain = [f"{name}/{PLAIN}" for name in (series, "skip")]
                if mode != PLAIN and all(name in ms for name in plain):
                    whole = ms[plain[0]] - ms[plain[1]]
                    print(f"    in series by the compiler's products {whole:.4f} ms: ratio {cost / whole:.3f}")
        cut, whole_model = f"factored/{mode}", f"identity/{mode}"
        if cut in ms and whole_model in ms:
            saved = ms[whole_model] - ms[cut]
            predicted = (bytes_of[whole_model] - bytes_of[cut]) / bandwidth * 1e3
            share = saved / predicted
            print(f"  {mode}: factored saves {saved:.3f} ms; its bytes predict {predicted:.3f} ms: {share:.2f}")


class _Skipped(Exception):
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="0.5b,7b")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument(
        "--modes", default="modules,compiled,plain", help="modules, compiled, plain, combo, autotuned, tuned"
    )
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30, help="steps per variant and round")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print the N longest kernels per variant")
    parser.add_argument("--budget-seconds", type=float, default=1e9)
    parser.add_argument("--output", type=Path, default=Path("decode.json"))
    run = Run(parser.parse_args())
    with run.part(run.found, "roofline"):
        run.found["roofline"] = roofline()
        run.found["clocks"] = clocks()
    for shape in run.chosen.shapes.split(","):
        with run.part(run.found.setdefault("failures", {}), shape):
            run.shape(shape)
    run.save()
    run.table()


if __name__ == "__main__":
    main()
