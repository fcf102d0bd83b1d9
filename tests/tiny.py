"""A tiny tokenizer, tiny random models and rows of benchmarks, made on the spot: no test needs a download."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>")
MASKING = ("<pad>", "<cls>", "<sep>", "<mask>")


def tiny_tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte (259 in all) that reads any text; puts `<s>` in front unless told not to."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=256
    )


def masking_tokenizer() -> PreTrainedTokenizerFast:
    """The same for encoders: one token per byte behind four special ones; `<cls>` and `<sep>` around every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*MASKING, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>", special_tokens=[(name, vocabulary[name]) for name in ("<cls>", "<sep>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        cls_token="<cls>",
        sep_token="<sep>",
        mask_token="<mask>",
        model_max_length=128,
    )


def tiny_model(family: str = "llama", *, seed: int = 0, layers: int = 4, **overrides: Any) -> Any:
    """A causal language model with random weights in float32, spread widely enough that its choices differ."""
    sizes = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**sizes, **overrides})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tiny_folder(folder: Path, **options: Any) -> Path:
    """`folder` with a tiny model and its tokenizer, as `save_pretrained` leaves them."""
    tiny_model(**options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def facts(answers: Sequence[str], relations: Sequence[str] = ("",)) -> list[dict[str, Any]]:
    """Forty rows of the LASER task of facts, each in two wordings; answers and relations in turns."""
    return [
        {
            "case_id": i,
            "prompt": f"Thing {i} is",
            "subject": f"Thing {i}",
            "target_true": answers[i % len(answers)],
            "paraphrase_prompt": f"They say thing {i} is",
            "relation": relations[i % len(relations)],
        }
        for i in range(40)
    ]


def claims() -> list[dict[str, Any]]:
    """Sixty rows of the LASER task of claims."""
    return [{"claim": f"Claim {i}", "label": ("SUPPORTS", "REFUTES")[i % 2]} for i in range(60)]


@contextlib.contextmanager
def laser_data(folder: Path, **benchmarks: Sequence[Mapping[str, Any]]) -> Iterator[pytest.MonkeyPatch]:
    """Rows of benchmarks in a folder that the environment names, with a cache of its own, for a `with` block."""
    for name, rows in benchmarks.items():
        write_rows(folder / name / "rows.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMPASTO_DATA", str(folder))
        patch.setenv("IMPASTO_CACHE", str(folder / "cache"))
        yield patch


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
