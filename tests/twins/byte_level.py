"""Families with byte-level tokenizers: Qwen 2.5 and 3, Llama 3.1, OLMo 2, SmolLM 2."""

from typing import Any

from twins import templates
from twins.family import LLAMA_CONFIG, Family, Surface
from twins.vocabulary import Vocabulary

_QWEN_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>"),
    *("<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
_QWEN_PLAIN = frozenset(_QWEN_TOKENS[14:])
_QWEN3_PLAIN = ("<tool_response>", "</tool_response>", "<think>", "</think>")
_QWEN_TOKENIZER = {
    "add_bos_token": False,
    "add_prefix_space": False,
    "additional_special_tokens": list(_QWEN_TOKENS[1:14]),
    "bos_token": None,
    "clean_up_tokenization_spaces": False,
    "errors": "replace",
    "pad_token": "<|endoftext|>",
    "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}
_QWEN_BASE_GENERATION = {
    "bos_token_id": "<|endoftext|>",
    "do_sample": False,
    "eos_token_id": "<|endoftext|>",
    "max_new_tokens": 2048,
}
_QWEN_CONFIG = {
    "attention_dropout": 0.0,
    "bos_token_id": "<|endoftext|>",
    "hidden_act": "silu",
    "max_window_layers": 28,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "use_cache": True,
    "use_sliding_window": False,
}


def _qwen_generation(**sampling: float) -> dict[str, Any]:
    return {
        "bos_token_id": "<|endoftext|>",
        "do_sample": True,
        "eos_token_id": ["<|im_end|>", "<|endoftext|>"],
        "pad_token_id": "<|endoftext|>",
        **sampling,
    }


# Its base models have a chat template too; what they lack is the end token of a turn.
QWEN25 = Family(
    names=("Qwen/Qwen2.5-14B", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-1.5B"),
    vocabulary=Vocabulary("byte-level", last=_QWEN_TOKENS, plain=_QWEN_PLAIN),
    config={
        **_QWEN_CONFIG,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "sliding_window": 131072,
    },
    base=Surface(
        config={"eos_token_id": "<|endoftext|>"},
        generation=_QWEN_BASE_GENERATION,
        tokenizer={**_QWEN_TOKENIZER, "eos_token": "<|endoftext|>"},
        template=templates.chatml("You are a helpful assistant."),
    ),
    tuned=Surface(
        config={"eos_token_id": "<|im_end|>"},
        generation=_qwen_generation(repetition_penalty=1.05, temperature=0.7, top_p=0.8, top_k=20),
        tokenizer={**_QWEN_TOKENIZER, "eos_token": "<|im_end|>"},
        template=templates.chatml(
            "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        ),
    ),
    ends=("<|im_end|>", "<|endoftext|>"),
    large={"tie_word_embeddings": False},
    small={"tie_word_embeddings": True},
    padding={"large": 128, "small": 32},  # 152064 and 151936
    tool_parser="hermes",
)

QWEN3 = Family(
    names=("Qwen/Qwen3-14B-Base", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B-Base"),
    vocabulary=Vocabulary(
        "byte-level",
        last=(*_QWEN_TOKENS, *_QWEN3_PLAIN),
        plain=_QWEN_PLAIN | frozenset(_QWEN3_PLAIN),
    ),
    config={
        **_QWEN_CONFIG,
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 32,
        "model_type": "qwen3",
        "rope_scaling": None,
        "sliding_window": None,
    },
    base=Surface(
        config={"eos_token_id": "<|endoftext|>"},
        generation=_QWEN_BASE_GENERATION,
        tokenizer={**_QWEN_TOKENIZER, "eos_token": "<|endoftext|>"},
        template=templates.chatml(None, thinks=True),
    ),
    tuned=Surface(
        config={"eos_token_id": "<|im_end|>"},
        generation=_qwen_generation(temperature=0.6, top_k=20, top_p=0.95),
        tokenizer={**_QWEN_TOKENIZER, "eos_token": "<|im_end|>"},
        template=templates.chatml(None, thinks=True),
    ),
    ends=("<|im_end|>", "<|endoftext|>"),
    large={"tie_word_embeddings": False},
    small={"tie_word_embeddings": True},
    padding={"large": 32, "small": 32},
    tool_parser="hermes",
    reasoning_parser="qwen3",
)


def _llama3_tokens(names: dict[int, str]) -> tuple[str, ...]:
    """256 special tokens of Llama 3, here 24: what has no name is reserved, counted by itself."""
    tokens, reserved = [], 0
    for i in range(24):
        if i not in names:
            names = {**names, i: f"<|reserved_special_token_{reserved}|>"}
            reserved += 1
        tokens.append(names[i])
    return tuple(tokens)


_LLAMA30 = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
_LLAMA31 = {**_LLAMA30, 4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}
LLAMA30_TOKENS, LLAMA31_TOKENS = _llama3_tokens(_LLAMA30), _llama3_tokens(_LLAMA31)
_LLAMA3_TOKENIZER = {
    "bos_token": "<|begin_of_text|>",
    "clean_up_tokenization_spaces": True,
    "model_input_names": ["input_ids", "attention_mask"],
    "tokenizer_class": "PreTrainedTokenizerFast",
}
_LLAMA31_ENDS = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]

LLAMA31 = Family(
    names=(
        "meta-llama/Llama-3.1-70B",
        "meta-llama/Llama-3.1-8B-Instruct",
        "meta-llama/Llama-3.1-8B",
    ),
    vocabulary=Vocabulary("byte-level", last=LLAMA31_TOKENS),
    config={
        **LLAMA_CONFIG,
        "bos_token_id": "<|begin_of_text|>",
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 512,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
    },
    base=Surface(
        config={"eos_token_id": "<|end_of_text|>"},
        generation={
            "bos_token_id": "<|begin_of_text|>",
            "do_sample": True,
            "eos_token_id": "<|end_of_text|>",
            "temperature": 0.6,
            "top_p": 0.9,
        },
        tokenizer={**_LLAMA3_TOKENIZER, "eos_token": "<|end_of_text|>"},
    ),
    tuned=Surface(
        config={"eos_token_id": _LLAMA31_ENDS},
        generation={
            "bos_token_id": "<|begin_of_text|>",
            "do_sample": True,
            "eos_token_id": _LLAMA31_ENDS,
            "temperature": 0.6,
            "top_p": 0.9,
        },
        tokenizer={**_LLAMA3_TOKENIZER, "eos_token": "<|eot_id|>"},
        template=templates.LLAMA3,
    ),
    ends=("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
    adds_bos=True,
    tool_parser="llama3_json",
)

_OLMO_TOKENS = (
    *("<|extra_id_0|>", "<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("|||PHONE_NUMBER|||", "|||EMAIL_ADDRESS|||", "|||IP_ADDRESS|||", "<|im_start|>"),
    *("<|im_end|>", *(f"<|extra_id_{i}|>" for i in range(1, 11)), "<|endofprompt|>", "<|pad|>"),
)
_OLMO_TOKENIZER = {
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|endoftext|>",
    "pad_token": "<|pad|>",
    "tokenizer_class": "GPT2Tokenizer",
    "unk_token": "<|endoftext|>",
}

# ChatML tokens are in the vocabulary, but its chats write roles as text and end with end of text.
OLMO2 = Family(
    names=(
        "allenai/OLMo-2-1124-13B",
        "allenai/OLMo-2-0425-1B-Instruct",
        "allenai/OLMo-2-0425-1B",
    ),
    vocabulary=Vocabulary(
        "byte-level",
        last=_OLMO_TOKENS,
        plain=frozenset(t for t in _OLMO_TOKENS if "extra_id" in t or "|||" in t),
    ),
    config={
        "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": "<|endoftext|>",
        "hidden_act": "silu",
        "model_type": "olmo2",
        "pad_token_id": "<|pad|>",
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "use_cache": False,
    },
    base=Surface(
        generation={
            "_from_model_config": True,
            "eos_token_id": "<|endoftext|>",
            "pad_token_id": "<|pad|>",
        },
        tokenizer={**_OLMO_TOKENIZER, "bos_token": None},
    ),
    tuned=Surface(
        generation={
            "_from_model_config": True,
            "eos_token_id": "<|endoftext|>",
            "pad_token_id": "<|pad|>",
        },
        tokenizer={**_OLMO_TOKENIZER, "bos_token": "<|endoftext|>"},
        template=templates.text_roles(bos=True),
    ),
    ends=("<|endoftext|>",),
    padding={"large": 64, "small": 64},  # 100278 tokens in 100352 columns
)

_SMOL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>"),
    *("<filename>", "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>"),
    *("<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>"),
    *("<jupyter_script>", "<empty_output>"),
)
_SMOL_TOKENIZER = {
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "tokenizer_class": "GPT2Tokenizer",
    "unk_token": "<|endoftext|>",
    "vocab_size": 49152,
}

SMOLLM2 = Family(
    names=(
        "HuggingFaceTB/SmolLM2-1.7B",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "HuggingFaceTB/SmolLM2-135M",
    ),
    vocabulary=Vocabulary("byte-level", first=_SMOL_TOKENS),
    config={
        **LLAMA_CONFIG,
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
    },
    base=Surface(
        config={"bos_token_id": "<|endoftext|>", "eos_token_id": "<|endoftext|>"},
        generation={
            "_from_model_config": True,
            "bos_token_id": "<|endoftext|>",
            "eos_token_id": "<|endoftext|>",
        },
        tokenizer={
            **_SMOL_TOKENIZER,
            "additional_special_tokens": list(_SMOL_TOKENS),
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
        },
    ),
    tuned=Surface(
        config={
            "bos_token_id": "<|im_start|>",
            "eos_token_id": "<|im_end|>",
            "pad_token_id": "<|im_end|>",
        },
        generation={
            "_from_model_config": True,
            "bos_token_id": "<|im_start|>",
            "eos_token_id": "<|im_end|>",
            "pad_token_id": "<|im_end|>",
        },
        tokenizer={
            **_SMOL_TOKENIZER,
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
        },
        template=templates.chatml("You are a helpful AI assistant named SmolLM."),
    ),
    ends=("<|im_end|>",),
)
