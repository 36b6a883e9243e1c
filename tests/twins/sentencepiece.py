"""Families with SentencePiece tokenizers: Llama 2, Tulu 2, Gemma, Mistral."""

from twins import templates
from twins.family import LLAMA_CONFIG, Family, Surface
from twins.vocabulary import Vocabulary

_LLAMA2_TOKENIZER = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "legacy": False,
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
}
_LLAMA2_CONFIG = {
    **LLAMA_CONFIG,
    "bos_token_id": "<s>",
    "eos_token_id": "</s>",
    "rope_scaling": None,
}
_LLAMA2_GENERATION = {"bos_token_id": "<s>", "eos_token_id": "</s>", "pad_token_id": "<unk>"}
_LLAMA2_SAMPLING = {"do_sample": True, "max_length": 4096, "temperature": 0.6, "top_p": 0.9}
_LLAMA2_BASE = Surface(
    generation={**_LLAMA2_GENERATION, **_LLAMA2_SAMPLING},
    tokenizer={**_LLAMA2_TOKENIZER, "pad_token": None},
)

LLAMA2 = Family(
    names=(
        "meta-llama/Llama-2-13b-hf",
        "meta-llama/Llama-2-7b-chat-hf",
        "meta-llama/Llama-2-7b-hf",
    ),
    vocabulary=Vocabulary("sentencepiece", first=("<unk>", "<s>", "</s>")),
    config=_LLAMA2_CONFIG,
    base=_LLAMA2_BASE,
    tuned=Surface(
        generation={**_LLAMA2_GENERATION, **_LLAMA2_SAMPLING},
        tokenizer={**_LLAMA2_TOKENIZER, "pad_token": None},
        template=templates.LLAMA2,
    ),
    ends=("</s>",),
    adds_bos=True,
)

# Tuned from Llama 2 with a pad token of its own: 32001 tokens over a base of 32000.
TULU = Family(
    names=("meta-llama/Llama-2-70b-hf", "allenai/tulu-2-7b", "meta-llama/Llama-2-7b-hf"),
    vocabulary=LLAMA2.vocabulary,
    config=_LLAMA2_CONFIG,
    base=_LLAMA2_BASE,
    tuned=Surface(
        config={"pad_token_id": "<pad>"},
        generation={
            "_from_model_config": True,
            **{**_LLAMA2_GENERATION, "pad_token_id": "<pad>"},
        },
        tokenizer={**_LLAMA2_TOKENIZER, "pad_token": "<pad>"},
        template=templates.text_roles(bos=False),
        more=("<pad>",),
    ),
    ends=("</s>",),
    adds_bos=True,
)

_GEMMA_TURNS = ("<start_of_turn>", "<end_of_turn>")
_GEMMA_TOKENS = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]"),
    *(f"<unused{i}>" for i in range(12)),
    *_GEMMA_TURNS,
)
_GEMMA_TOKENIZER = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<bos>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "sp_model_kwargs": {},
    "spaces_between_special_tokens": False,
    "tokenizer_class": "GemmaTokenizer",
    "unk_token": "<unk>",
    "use_default_system_prompt": False,
}
_GEMMA_IDS = {"bos_token_id": "<bos>", "pad_token_id": "<pad>"}

# The tokenizer's end token is <eos> in both; only the tuned generation_config names <end_of_turn>.
GEMMA = Family(
    names=("google/gemma-7b", "google/gemma-2b-it", "google/gemma-2b"),
    vocabulary=Vocabulary("gemma", first=_GEMMA_TOKENS, plain=frozenset(_GEMMA_TOKENS[4:])),
    config={
        "architectures": ["GemmaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **_GEMMA_IDS,
        "eos_token_id": "<eos>",
        "head_dim": 32,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "model_type": "gemma",
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "use_cache": True,
    },
    base=Surface(
        generation={"_from_model_config": True, **_GEMMA_IDS, "eos_token_id": "<eos>"},
        tokenizer=_GEMMA_TOKENIZER,
    ),
    tuned=Surface(
        generation={
            "_from_model_config": True,
            **_GEMMA_IDS,
            "eos_token_id": ["<eos>", "<end_of_turn>"],
        },
        tokenizer={**_GEMMA_TOKENIZER, "additional_special_tokens": list(_GEMMA_TURNS)},
        template=templates.GEMMA,
        flags=dict.fromkeys(_GEMMA_TURNS, True),
    ),
    ends=("<end_of_turn>", "<eos>"),
    padding={"large": 32, "small": 32},
    adds_bos=True,
)

_MISTRAL_TOKENS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]"),
    *("[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    *(f"[control_{i}]" for i in range(8, 24)),
)
_MISTRAL_SURFACE = {
    "generation": {"_from_model_config": True, "bos_token_id": "<s>", "eos_token_id": "</s>"},
    "tokenizer": _LLAMA2_TOKENIZER,
}

MISTRAL = Family(
    names=(
        "mistralai/Mistral-Large-Base",
        "mistralai/Mistral-7B-Instruct-v0.3",
        "mistralai/Mistral-7B-v0.3",
    ),
    vocabulary=Vocabulary("sentencepiece", first=_MISTRAL_TOKENS),
    config={
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": "<s>",
        "eos_token_id": "</s>",
        "hidden_act": "silu",
        "model_type": "mistral",
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
    },
    base=Surface(**_MISTRAL_SURFACE),
    tuned=Surface(**_MISTRAL_SURFACE, template=templates.MISTRAL),
    ends=("</s>",),
    adds_bos=True,
    tool_parser="mistral",
)
