"""Tiny random models of many families of decoders, with one vocabulary."""

from pathlib import Path
from typing import Any

import torch
from tiny_models import save_tokenizer

VOCAB = 111
LAYERS = 4
SLIDES, FULL = "sliding_attention", "full_attention"
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED_MOE = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    **ROUTED_MOE,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
LINEAR = {
    "layer_types": ["linear_attention"] * 3 + [FULL],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def config_of(family: str, small: bool = False) -> Any:
    """The Transformers configuration of a family; small members differ in heads and window."""
    import transformers as hf

    window = {"sliding_window": 8 if small else 16}
    mixed = {**window, "layer_types": [SLIDES, SLIDES, SLIDES, FULL]}
    every = {
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "hidden_size": 64,
        "num_hidden_layers": LAYERS,
    }
    shape = {
        **every,
        "initializer_range": 0.2,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1 if small else 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
    }
    tied = {**shape, "tie_word_embeddings": True}
    headless = {k: v for k, v in shape.items() if k != "head_dim"}
    latent = {**headless, **LATENT, "num_key_value_heads": 2}
    scores = {"query_pre_attn_scalar": 32}
    families = {
        "llama": lambda: hf.LlamaConfig(**shape),
        "qwen3": lambda: hf.Qwen3Config(**shape),
        "mistral_window": lambda: hf.MistralConfig(**shape, **window),
        "gemma2": lambda: hf.Gemma2Config(
            **tied, **window, **scores, attn_logit_softcapping=None, final_logit_softcapping=30.0
        ),
        "gemma3": lambda: hf.Gemma3TextConfig(
            **tied, **mixed, **scores, final_logit_softcapping=30.0
        ),
        "gemma4": lambda: hf.Gemma4TextConfig(
            **tied,
            **mixed,
            global_head_dim=64,
            num_global_key_value_heads=1,
            hidden_size_per_layer_input=0,
            num_kv_shared_layers=0,
        ),
        "olmo3": lambda: hf.Olmo3Config(**headless, **mixed),
        "cohere2": lambda: hf.Cohere2Config(**tied, **mixed),
        "exaone4": lambda: hf.Exaone4Config(**shape, **mixed, sliding_window_pattern="LLLG"),
        "gpt_oss": lambda: hf.GptOssConfig(
            **shape,
            **window,
            **LOCAL_MOE,
            layer_types=[SLIDES, FULL] * 2,
        ),
        "llama4": lambda: hf.Llama4TextConfig(
            **shape,
            intermediate_size_mlp=128,
            num_local_experts=4,
            num_experts_per_tok=1,
            attention_chunk_size=32,
            layer_types=["chunked_attention"] * 3 + [FULL],
            no_rope_layers=[1, 1, 1, 0],
            interleave_moe_layer_step=2,
            use_qk_norm=True,
        ),
        "mixtral": lambda: hf.MixtralConfig(**shape, **LOCAL_MOE, sliding_window=None),
        "qwen3_moe": lambda: hf.Qwen3MoeConfig(
            **shape, **MOE, decoder_sparse_step=1, norm_topk_prob=True
        ),
        "olmoe": lambda: hf.OlmoeConfig(**headless, num_experts=4, num_experts_per_tok=2),
        "glm4_moe": lambda: hf.Glm4MoeConfig(**shape, **ROUTED_MOE),
        "deepseek_v2": lambda: hf.DeepseekV2Config(
            **latent, q_lora_rank=None, topk_method="greedy", head_dim=64
        ),
        "deepseek_v3": lambda: hf.DeepseekV3Config(
            **latent, q_lora_rank=32, topk_method="noaux_tc", scoring_func="sigmoid"
        ),
        "granite4": lambda: hf.GraniteMoeHybridConfig(
            **headless,
            **MAMBA,
            mamba_expand=2,
            layer_types=["mamba"] * 3 + ["attention"],
            num_local_experts=0,
            num_experts_per_tok=0,
            shared_intermediate_size=128,
            position_embedding_type="rope",
            attention_multiplier=0.176,
            logits_scaling=0.7,
        ),
        "nemotron_h": lambda: hf.NemotronHConfig(
            **shape,
            layers_block_type=["mamba", "attention", "mlp", "mamba"],
            mamba_num_heads=4,
            mamba_head_dim=32,
            ssm_state_size=16,
            n_groups=1,
        ),
        "falcon_h1": lambda: hf.FalconH1Config(
            **shape, **MAMBA, mamba_d_ssm=128, lm_head_multiplier=0.7
        ),
        "mamba2": lambda: hf.Mamba2Config(
            **every, num_heads=4, head_dim=32, state_size=16, n_groups=1, expand=2
        ),
        "lfm2": lambda: hf.Lfm2Config(
            **headless,
            layer_types=["conv", "conv", FULL, "conv"],
            conv_L_cache=3,
            conv_dim=64,
            block_dim=64,
            block_ff_dim=128,
            block_multiple_of=32,
            block_ffn_dim_multiplier=1.0,
            block_auto_adjust_ff_dim=False,
        ),
        "qwen3_next": lambda: hf.Qwen3NextConfig(
            **shape, **LINEAR, **MOE, shared_expert_intermediate_size=64
        ),
        "qwen3_5": lambda: hf.Qwen3_5TextConfig(**shape, **LINEAR),
        "gemma3_wrapper": lambda: hf.Gemma3Config(
            text_config=config_of("gemma3", small).to_dict(),
            vision_config=VISION,
            mm_tokens_per_image=4,
            image_token_index=110,
            boi_token_index=108,
            eoi_token_index=109,
            tie_word_embeddings=True,
        ),
        "mistral3_wrapper": lambda: hf.Mistral3Config(
            text_config=hf.MistralConfig(**shape, sliding_window=None).to_dict(),
            vision_config={**VISION, "model_type": "pixtral", "head_dim": 16},
            image_token_index=110,
            tie_word_embeddings=False,
        ),
    }
    return families[family]()


def make_family(folder: Path, family: str, seed: int, small: bool = False) -> str:
    """Write a random model of a family and its tokenizer, and return the folder."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(seed)
    auto = AutoModelForImageTextToText if family.endswith("_wrapper") else AutoModelForCausalLM
    model = auto.from_config(config_of(family, small)).to(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Wide, so that logits differ clearly between tokens.
            if parameter.dim() >= 2 and parameter.std() < 0.05:
                parameter.normal_(0, 0.2)
            if name.endswith("sinks"):
                parameter.normal_(0, 1.0)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    save_tokenizer(folder, VOCAB)
    return str(folder)


def make_family_trio(root: Path, base: str, small: str) -> dict[str, str]:
    return {
        "model": make_family(root / "base", base, 1),
        "expert": make_family(root / "expert", small, 2, small=True),
        "antiexpert": make_family(root / "antiexpert", small, 3, small=True),
    }


def load(folder: str) -> torch.nn.Module:
    """A model for the Transformers loop, a wrapper's as the text model that it is."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    wrapped = hasattr(AutoConfig.from_pretrained(folder), "text_config")
    auto = AutoModelForImageTextToText if wrapped else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.vocab_size = VOCAB
    return model
