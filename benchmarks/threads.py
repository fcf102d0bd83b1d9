"""Whether members of a parallel group should share a CPU's cores: one after another with all cores, or side by side.

    python benchmarks/threads.py demo --layers 5:13 --output threads.json

The layers of the group are called on one hidden state, as `{5:13}` does, without a cache: *series* runs member after
member, each with all cores; *side by side* gives every core one thread of Python, which runs members with that core
alone. In turns, for one new token (`--tokens 1`, what decoding does) and for prompts; ratios are medians and quartiles
of pairs. Outputs are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from impasto.anatomy import anatomy, quietly
from impasto.hardware import machine
from impasto.levels import record
from impasto.models import load
from impasto.taps import hidden_of, real_call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--layers", default="5:13", help="first and last plus one")
    parser.add_argument("--tokens", default="1,16,128")
    parser.add_argument("--batch-sizes", default="1,8")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("threads.json"))
    chosen = parser.parse_args()
    cores = torch.get_num_threads()
    first, last = map(int, chosen.layers.split(":"))
    found: dict[str, Any] = {"machine": machine(torch.device("cpu")), "options": vars(chosen) | {"output": ""}}
    found["cases"] = []
    with ThreadPoolExecutor(cores, initializer=lambda: torch.set_num_threads(1)) as pool, torch.inference_mode():
        for dtype in chosen.dtypes.split(","):
            model = load(chosen.model, dtype=dtype, device="cpu").model
            body = anatomy(model)
            for rows in map(int, chosen.batch_sizes.split(",")):
                for tokens in map(int, chosen.tokens.split(",")):
                    ids = torch.randint(10, 1000, (rows, tokens), generator=torch.Generator().manual_seed(0))
                    with quietly(model):
                        hidden, contexts = record(model, body, {"input_ids": ids, "use_cache": False})

                    def member(index: int, hidden: Tensor = hidden, contexts: Any = contexts) -> Tensor:
                        args, kwargs = contexts[index].join(hidden)
                        return hidden_of(real_call(body.layers[index], args, kwargs))  # noqa: B023

                    def aside(index: int, member: Callable[[int], Tensor] = member) -> Tensor:
                        with torch.inference_mode():
                            return member(index)

                    def series(member: Callable[[int], Tensor] = member) -> Tensor:
                        return torch.stack([member(i) for i in range(first, last)]).mean(0)

                    def beside(aside: Callable[[int], Tensor] = aside) -> Tensor:
                        return torch.stack(list(pool.map(aside, range(first, last)))).mean(0)

                    one, other = series(), beside()
                    difference = float((one - other).norm() / one.norm())
                    samples: dict[str, list[float]] = {"series": [], "beside": []}
                    ways: dict[str, Callable[[], Tensor]] = {"series": series, "beside": beside}
                    for number in range(chosen.rounds):
                        for name in sorted(ways, reverse=bool(number % 2)):
                            began = time.perf_counter()
                            ways[name]()
                            samples[name].append(time.perf_counter() - began)
                    pairs = sorted(a / b for a, b in zip(samples["series"], samples["beside"], strict=True))
                    low, ratio, high = statistics.quantiles(pairs, n=4)
                    found["cases"].append(
                        {"dtype": dtype, "rows": rows, "tokens": tokens, "difference": difference}
                        | {"series_over_beside": [ratio, low, high], "samples": samples}
                    )
                    print(
                        f"{dtype}, {rows} x {tokens} tokens: in series {statistics.median(samples['series']) * 1e3:.2f}"
                        f" ms, side by side {statistics.median(samples['beside']) * 1e3:.2f} ms; {ratio:.2f} times "
                        f"faster ({low:.2f} to {high:.2f}); outputs differ by {difference:.2g} of their norm",
                        flush=True,
                    )
                    chosen.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
