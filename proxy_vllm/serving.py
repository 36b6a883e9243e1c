"""`serve run proxy_vllm.serving:app`: the name under which users know `server/ray_serve.py`."""

from proxy_vllm.server.ray_serve import app

__all__ = ["app"]
