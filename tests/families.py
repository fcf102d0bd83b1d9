"""A table of tiny models, one per family, built from configs: what every law about models is tested on.

Six layers of width 64 with random weights; the seed and a little noise on every parameter make their outputs differ
visibly. `build(name)` caches nothing, so a test may change the model it gets; `shared(name)` gives everyone the same.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForMaskedLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

DEPTH = 6
VOCABULARY = 200
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 8,
    "n_embd": 64,
    "n_layer": DEPTH,
    "n_head": 4,
    "n_inner": 128,
    "n_positions": 128,
    "n_ctx": 128,
    "d_model": 64,
    "ffn_dim": 128,
    "word_embed_proj_dim": 64,
    "num_local_experts": 4,
    "num_experts": 4,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
}

# What a family needs beside SIZES; None takes a key away.
SPECIAL: dict[str, dict[str, Any]] = {
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "gpt_neo": {
        "attention_types": [[["global", "local"], DEPTH // 2]],
        "num_layers": DEPTH,
        "num_heads": 4,
        "window_size": 8,
    },
    "mpt": {"n_layers": DEPTH, "n_heads": 4, "max_seq_len": 128},
    "bloom": {},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": False, "parallel_attn": True, "alibi": False},
    "deepseek_v3": {
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "head_dim": None,
    },
    "xglm": {"num_layers": DEPTH, "attention_heads": 4},
    "distilbert": {"dim": 64, "n_layers": DEPTH, "n_heads": 4, "hidden_dim": 128},
    "electra": {"embedding_size": 64},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * (DEPTH // 2)},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 8,
        "hidden_size_per_layer_input": 8,
        "intermediate_size": [128] * DEPTH,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * DEPTH,
        "layer_types": ["sliding_attention", "full_attention"] * (DEPTH // 2),
    },
    "gemma2": {"layer_types": ["sliding_attention", "full_attention"] * (DEPTH // 2)},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * (DEPTH // 2)},
    "gemma4_text": {
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention"] * (DEPTH // 2),
    },
    "vit": {"image_size": 16, "patch_size": 4, "num_channels": 3},
}

DECODERS = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "mistral",
    "mixtral",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "stablelm",
    "olmo",
    "olmo2",
    "starcoder2",
    "cohere",
    "cohere2",
    "granite",
    "qwen2_moe",
    "qwen3_moe",
    "smollm3",
    "gpt_oss",
    "xglm",
    "nemotron",
    "glm",
    "glm4",
    "persimmon",
    "helium",
    "exaone4",
    "ernie4_5",
    "hunyuan_v1_dense",
    "seed_oss",
    "arcee",
    "apertus",
    "lfm2",
    "llama4_text",
    "gemma3n_text",
    "gemma4_text",
    "gptj",
    "bloom",
    "falcon",
    "codegen",
    "mpt",
    "gpt_neo",
    "deepseek_v3",
)
ENCODERS = ("bert", "roberta", "distilbert", "electra", "modernbert", "deberta-v2")
VISION = ("vit",)
FAMILIES = DECODERS + ENCODERS + VISION


def config(family: str, **changes: Any) -> Any:
    """The tiny config of a family, with every key of SIZES that the family knows."""
    cls = CONFIG_MAPPING[family]
    keys = set(inspect.signature(cls.__init__).parameters)
    for base in cls.__mro__:
        keys |= set(getattr(base, "__annotations__", {})) | set(getattr(base, "attribute_map", {}))
    wanted = {k: v for k, v in SIZES.items() if k in keys} | SPECIAL.get(family, {}) | changes
    return cls(**{k: v for k, v in wanted.items() if v is not None})


def build(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny random model of a family in evaluation mode; parameters perturbed so that every layer matters."""
    torch.manual_seed(0)
    made = config(family, **changes)
    auto = AutoModelForCausalLM
    if family in ENCODERS:
        auto = AutoModelForMaskedLM
    elif family in VISION:
        auto = AutoModelForImageClassification
    model = auto.from_config(made).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.to(dtype)


def inputs(family: str, batch: int = 2, length: int = 24) -> dict[str, torch.Tensor]:
    """A batch of inputs, without padding."""
    generator = torch.Generator().manual_seed(2)
    if family in VISION:
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    return {"input_ids": torch.randint(3, VOCABULARY, (batch, length), generator=generator)}


@functools.cache
def shared(family: str) -> Any:
    """The model of a family that all tests share; a test that uses it leaves it as it was."""
    return build(family)
