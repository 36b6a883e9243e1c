"""LoRA adapters as experts: the expert is a small model plus the adapter that a request names."""
