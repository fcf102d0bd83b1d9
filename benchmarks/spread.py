"""What one decoded token costs on several GPUs: groups spread over them, against tensor parallelism, in one run.

    NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 benchmarks/spread.py --shapes 7b,70b --output spread.json

Models have the given shapes and random weights, made on the device; of the larger shape only a few layers, so that all
that is compared fits side by side (`layers` in the file says how many). The middle layers stand in one parallel group.

    one           every process runs the whole model by itself
    spread        series layers whole in every process, the group's members shared (`team=`)
    split+spread  series layers split over the processes (`impasto.spread.split`), the group's members shared
    split         every layer split in the same way, no group
    tp            every layer split by transformers (`tp_plan="auto"`), with and without the group

`/modules` is the model's own code recorded as one CUDA graph, `/compiled` the same through torch's compiler, `/eager`
is `generate` as it is, `/hf-compiled` with a static cache, which transformers then compiles. After all are built, each
of several rounds measures every one of them; every sample is kept. Times are those of process 0. Recorded too: what a
sum over the processes costs by itself, whether greedy tokens are those of one process (`law`, in float32), the
bandwidth reached, clocks, and what building cost.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

import decode
from decode import CUDA, DEVICE, SHAPES, TAIL, Ours, Theirs, quantiles, timed
from impasto.fast import fast
from impasto.graphs import Cuda
from impasto.hardware import machine
from impasto.runtime import scheduled
from impasto.schedule import Schedule
from impasto.shares import plan
from impasto.spread import keep, split
from impasto.steps import leaves
from impasto.teams import Processes, join

LARGE = LlamaConfig(
    hidden_size=8192,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    intermediate_size=28672,
    vocab_size=128256,
    max_position_embeddings=32768,
)
DEPTHS = {"7b": 32, "70b": 80, "tiny": 14}
LAYERS = {"7b": 32, "70b": 16, "tiny": 14}  # of these: models that are compared lie side by side
GROUPED = {"7b": 12, "70b": 8, "tiny": 8}  # how many of them, in the middle, stand in the group
LAW_LAYERS = 6
RECORDED = {"modules": "off", "compiled": "inductor"}  # modes of `fast`
EAGER = ("one/identity/eager", "spread/group/eager", "split+spread/group/eager", "tp/identity/eager")
ROUNDS_EAGER = 2  # rounds in which `generate` takes part; its tokens take long
RESERVE = 20.0  # seconds kept for measuring while building


def config(shape: str, layers: int) -> Any:
    """The configuration of a shape with so many layers."""
    made = LARGE if shape == "70b" else SHAPES[shape]()
    changed = made.to_dict() | {"num_hidden_layers": layers}
    return type(made).from_dict(changed)


def schedules(layers: int, grouped: int) -> dict[str, str]:
    """The model's own order, and the middle layers as one group."""
    a = (layers - grouped) // 2
    return {"identity": f"0:{layers}", "group": f"0:{a} {{{a}:{a + grouped}}} {a + grouped}:{layers}"}


def build(shape: str, layers: int, dtype: torch.dtype) -> Any:
    """A model of a shape with random weights, the same in every process."""
    torch.manual_seed(0)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config(shape, layers), dtype=dtype).eval()
    return endless(model)


def endless(model: Any) -> Any:
    """The model, which then never ends a text by itself."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def build_tp(shape: str, layers: int, dtype: torch.dtype) -> Any:
    """The same shape, split by transformers as the family's own plan says; each process makes only its part."""
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(
        None,
        config=config(shape, layers),
        state_dict={},
        dtype=dtype,
        distributed_config=DistributedConfig(tp_plan="auto"),
    )
    return endless(model.eval())


def own_bytes(model: Any, decoder: Any) -> dict[str, int]:
    """Weights of the layer calls of this process, of the head, and all slots, in bytes; each a step must read."""

    def weights(module: torch.nn.Module) -> int:
        here = [p.to_local() if hasattr(p, "to_local") else p for p in module.parameters()]
        return sum(p.nbytes for p in here)

    player = decoder.program.player
    return {
        "layers": sum(weights(player.body.layers[call.layer]) for call in leaves(player.steps)),
        "head": weights(model.get_output_embeddings()),
        "keys": decoder.program.memory.nbytes,
    }


class Recorded(Ours):
    """A decoder of this process, in a team or alone; its recorded steps can be replayed when its model is free."""

    def __init__(self, name: str, model: Any, schedule: str, mode: str, team: Processes | None) -> None:
        super().__init__(name, schedule, mode)
        self.model, self.team = model, team

    def build(self, prompt: list[int], context: int) -> dict[str, Any]:  # type: ignore[override]
        """Compile and read the prompt; returns what that took and what a step reads."""
        began = time.perf_counter()
        with fast(
            self.model,
            self.schedule,
            context=context,
            buckets=[context],
            compile=RECORDED[self.mode],  # type: ignore[arg-type]
            team=self.team,
        ) as decoder:
            decoder.prefill([prompt])
            decoder.step()
            amounts = own_bytes(self.model, decoder)
        self.decoder = decoder
        self.restart()
        report = dataclasses.asdict(decoder.report)
        return {"report": report, "build_seconds": time.perf_counter() - began, "bytes": amounts}


class Generated(Theirs):
    """`generate` under a schedule, in a team or alone; the model as it is where no schedule is given."""

    def __init__(
        self, name: str, model: Any, prompt: list[int], schedule: str | None, team: Processes | None, **options: Any
    ) -> None:
        super().__init__(name, model, prompt, **options)
        self.schedule, self.team = schedule, team

    def build(self) -> dict[str, Any]:
        """Warm up; seconds that took."""
        return {"build_seconds": decode.seconds(lambda: self.generate(TAIL if self.options else 4))}

    def generate(self, count: int) -> Any:
        """Exactly `count` new tokens."""
        if self.schedule is None:
            return super().generate(count)
        with scheduled(self.model, self.schedule, team=self.team):
            return super().generate(count)


def tokens(model: Any, schedule: str, prompt: list[int], count: int, team: Processes | None) -> tuple[list[int], Any]:
    """Greedy tokens of the plain runtime, and the logits they were chosen by."""
    ids, cache, found, logits = torch.tensor([prompt], device=DEVICE), DynamicCache(config=model.config), [], []
    with torch.no_grad(), scheduled(model, schedule, team=team):
        for _ in range(count):
            logits.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1].float())
            found.append(int(logits[-1].argmax()))
            ids = torch.tensor([[found[-1]]], device=DEVICE)
    return found, torch.stack(logits)


def law(shape: str, team: Processes, modes: list[str]) -> dict[str, Any]:
    """In float32, on a few layers: tokens and logits of the processes together beside those of one."""
    text = schedules(LAW_LAYERS, 3)["group"] + " {1 2 4}x2 sum{2 3, 4}"
    whole = build(shape, LAW_LAYERS, torch.float32)
    prompt = list(range(5, 62))
    wanted, logits = tokens(whole, text, prompt, 24, None)
    found: dict[str, Any] = {"schedule": text, "layers": LAW_LAYERS, "tokens": len(wanted)}
    for name in ("spread", "split+spread"):
        if name == "split+spread":
            split(whole, text, team)
            keep(whole, text, team)
        got, others = tokens(whole, text, prompt, 24, team)
        error = float((others - logits).norm() / logits.norm())
        found[name] = {"equal": got == wanted, "error": error}
        for mode in [mode for mode in modes if mode in RECORDED][: 2 if name == "split+spread" else 1]:
            with fast(whole, text, context=128, compile=RECORDED[mode], team=team) as decoder:  # type: ignore[arg-type]
                got = list(decoder.generate([prompt], 24, ends=())[0])
            found[f"{name}/{mode}"] = {"equal": got == wanted, "error": decoder.report.error}
    return found


def tried(variant: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """What building a variant took, and what it costs at first."""
    made: dict[str, Any] = variant.build(*arguments)
    return made | {"first_ms": statistics.median(variant.measure(3))}


def sums(team: Processes) -> dict[str, Any]:
    """Microseconds of one sum over the processes, by width and dtype: one after another in one recording."""
    found: dict[str, Any] = {}
    for width in (4096, 8192):
        for dtype in (torch.float32, torch.bfloat16):
            part = torch.zeros(1, 1, width, dtype=dtype, device=DEVICE)

            def work(part: torch.Tensor = part) -> None:
                for _ in range(50):
                    team.sum(part)

            run = Cuda(team.device).record(work, lambda: None) if CUDA else work
            for _ in range(3):
                run()
            samples = [one / 50 * 1e3 for one in timed(run, 10)]
            found[f"{width} {str(dtype).removeprefix('torch.')}"] = {"us": samples, **quantiles(samples)}
    return found


class Run:
    """Everything that is found, written by process 0 after every part; all processes do the same."""

    def __init__(self, chosen: argparse.Namespace, team: Processes) -> None:
        self.chosen, self.team = chosen, team
        self.began = time.perf_counter()
        self.until = float(chosen.budget_seconds)  # seconds after the beginning when the part that runs has to be done
        self.found: dict[str, Any] = {
            "machine": machine(team.device) | {"gpus": team.size, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
            if CUDA
            else machine(team.device) | {"processes": team.size},
            "options": {name: str(value) for name, value in vars(chosen).items()},
            "settings": {n: v for n, v in os.environ.items() if n.startswith("NCCL_")},
            "shapes": {},
            "failures": {},
        }

    def say(self, text: str) -> None:
        """Print, once for all processes."""
        if self.team.rank == 0:
            print(f"[{time.perf_counter() - self.began:6.1f} s] {text}", flush=True)

    def save(self) -> None:
        """Write all that was found so far."""
        if self.team.rank == 0:
            self.chosen.output.write_text(json.dumps(self.found, indent=1))

    def attempt(self, name: str, work: Callable[[], Any], need: float = 0.0) -> Any:
        """What `work` returns; None where it fails in any process, or no time is left in one of them."""
        left = self.until - (time.perf_counter() - self.began) - need
        if self.team.lowest(left) < 0:
            self.found["failures"][name] = "skipped: the time is used up"
            self.say(f"{name}: no time left")
            return None
        problem, made = "", None
        try:
            made = work()
        except Exception as found:
            problem = f"{type(found).__name__}: {found}"[:1500] + "\n" + traceback.format_exc()[-2500:]
        if self.team.lowest(not problem) < 1:
            self.found["failures"][name] = problem or "failed in another process"
            self.say(f"{name}: FAILED {problem[:300] or 'in another process'}")
            made = None
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
        self.save()
        return made

    def shape(self, shape: str) -> None:
        """All parts for one shape."""
        chosen, team = self.chosen, self.team
        layers, grouped, modes = LAYERS[shape], GROUPED[shape], chosen.modes.split(",")
        texts = schedules(layers, grouped)
        here: dict[str, Any] = {"layers": layers, "of": DEPTHS[shape], "schedules": texts, "variants": {}, "clocks": []}
        self.found["shapes"][shape] = here
        found = plan(Schedule.parse(texts["group"]), team.size)
        here["plan"] = found.describe().splitlines()
        here["sent_bytes"] = found.sent(config(shape, layers).hidden_size)
        if shape == chosen.shapes.split(",")[0]:
            here["law"] = self.attempt(f"{shape} law", lambda: law(shape, team, modes))
            self.say(f"{shape} law: {here['law']}")
        generator = torch.Generator().manual_seed(1)
        prompt = torch.randint(10, config(shape, 1).vocab_size - 10, (chosen.context - TAIL,), generator=generator)
        ids: list[int] = prompt.tolist()
        models: dict[str, Any] = {}
        for name, make in (
            ("split+spread", lambda: self.divided(shape, texts["group"])),
            ("split", lambda: self.divided(shape, texts["identity"])),
            ("tp", lambda: build_tp(shape, layers, torch.bfloat16)),
            ("one", lambda: build(shape, layers, torch.bfloat16)),
        ):
            models[name] = self.attempt(f"{shape} {name}", make, RESERVE)
        models["spread"] = models["one"]
        ready: list[Any] = []
        for variant, arguments in self.variants(models, texts, ids):
            made = self.attempt(f"{shape} {variant.name}", lambda v=variant, a=arguments: tried(v, a), RESERVE)
            if made is not None:
                here["variants"][variant.name] = {"schedule": variant.schedule, **made}
                self.say(f"{shape} {variant.name}: {made['first_ms']:.3f} ms, built in {made['build_seconds']:.1f} s")
                ready.append(variant)
        self.until = float("inf")  # what was built is measured
        for number in range(chosen.rounds):
            here["clocks"].append(decode.clocks())
            for variant in ready:
                if number < ROUNDS_EAGER or isinstance(variant, Recorded):
                    name = f"{shape} round {number} {variant.name}"
                    samples = self.attempt(name, lambda v=variant: v.measure(chosen.steps))
                    here["variants"][variant.name].setdefault("samples", []).extend(samples or [])
        here["clocks"].append(decode.clocks())
        for result in here["variants"].values():
            if result.get("samples"):
                result["ms"] = quantiles(result["samples"])

    def variants(
        self, models: dict[str, Any], texts: dict[str, str], ids: list[int]
    ) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        """All that is compared, and what each is built with, in the order of the modes asked for."""
        compared = [("split+spread", "group"), ("spread", "group"), ("one", "identity"), ("one", "group")]
        compared += [("split", "identity"), ("tp", "identity"), ("tp", "group")]
        for mode in self.chosen.modes.split(","):
            for name, schedule in compared:
                model, mates = models[name], None if name in ("one", "tp") else self.team
                label, text = f"{name}/{schedule}/{mode}", texts[schedule]
                if model is None or (name == "tp" and mode == "compiled"):  # our regions hold no split parameters
                    continue
                if mode in RECORDED:
                    yield Recorded(label, model, text, mode, mates), (ids, self.chosen.context)
                elif mode == "eager" and label in EAGER:
                    yield Generated(label, model, ids, None if schedule == "identity" else text, mates), ()
                elif mode == "hf-compiled" and (name, schedule) == ("tp", "identity"):
                    yield Generated(label, model, ids, None, None, cache_implementation="static"), ()

    def divided(self, shape: str, schedule: str) -> Any:
        """A model whose series layers are split over the processes, and whose group's members are where they run."""
        model = build(shape, LAYERS[shape], torch.bfloat16)
        split(model, schedule, self.team)
        keep(model, schedule, self.team)
        return model

    def table(self) -> None:
        """Print what was found."""
        bandwidth = (self.found.get("roofline") or {}).get("copy_bytes_per_second", float("nan"))
        self.say(f"{self.found['machine']}")
        for name, result in (self.found.get("sums") or {}).items():
            self.say(f"one sum of {name}: {result['median']:.1f} us")
        for shape, here in self.found["shapes"].items():
            self.say(f"{shape}, {here['layers']} layers, {here['schedules']['group']}: ms/token, q05, q95, weights/bw")
            for name, result in here["variants"].items():
                if "ms" in result:
                    amounts, ms = result.get("bytes"), result["ms"]
                    floor = (amounts["layers"] + amounts["head"]) / bandwidth * 1e3 if amounts else float("nan")
                    self.say(f"  {name:36} {ms['median']:8.3f} {ms['q05']:8.3f} {ms['q95']:8.3f} {floor:8.3f}")
        for name, problem in self.found["failures"].items():
            self.say(f"  failed: {name}: {problem[:200]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="7b,70b")
    parser.add_argument("--modes", default="modules,eager,compiled", help="modules, eager, compiled, hf-compiled")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30, help="steps per variant and round")
    parser.add_argument("--budget-seconds", type=float, default=180.0)
    parser.add_argument("--output", type=Path, default=Path("spread.json"))
    chosen = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if CUDA:  # a process that fails ends the others soon, not in ten minutes
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        patience = datetime.timedelta(seconds=90)
        dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()), timeout=patience)
    run = Run(chosen, join())
    run.found["roofline"] = run.attempt("roofline", decode.roofline)
    run.found["sums"] = run.attempt("sums", lambda: sums(run.team))
    shapes = chosen.shapes.split(",")
    for number, shape in enumerate(shapes):
        spent = time.perf_counter() - run.began
        run.until = spent + (chosen.budget_seconds - spent) / (len(shapes) - number)
        run.shape(shape)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    run.save()
    run.table()
    run.team.lowest(0)
    os._exit(0)  # recorded sums and their processes hold on to each other; there is nothing left to do


if __name__ == "__main__":
    main()
