"""proxy_vllm: proxy-tuned generation on vLLM (base + alpha * (expert - antiexpert))."""
