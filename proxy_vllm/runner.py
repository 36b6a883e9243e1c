"""Model Runner V2 for proxy-tuned models."""

from vllm.v1.worker.gpu.model_runner import GPUModelRunner


class ProxyModelRunner(GPUModelRunner):
    """vLLM's Model Runner V2; the place where sampling meets the three members' logits."""
