"""What requests may ask for beside drafts: everything."""

from typing import Any

from proxy_vllm.config import ProxyConfig


def admit_every_parameter(engine: Any) -> None:
    """Let requests of a drafting engine name min_p and logit_bias.

    vLLM's front end refuses both beside any speculation, since its own verification leaves them
    out; ours draws by them.

    Args:
        engine: vLLM's ``LLMEngine`` or ``AsyncLLM``.
    """
    if ProxyConfig.from_vllm_config(engine.vllm_config).expert_drafts:
        # Read for this check alone.
        engine.input_processor.speculative_config = None
