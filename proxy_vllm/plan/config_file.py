"""The one file that a plan reads of each model: `config.json`, from a folder or from the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from proxy_vllm.errors import UserError

ConfigSource: TypeAlias = Any
"""A model folder, a config.json, a hub name, a config's dict, or an object with `to_dict()`."""


def load_config(source: ConfigSource) -> dict[str, Any]:
    """The `config.json` of a local folder or a hub repository, or a config object, as a dict.

    Of a hub repository that one file is fetched. Raises `UserError` when it cannot be had.
    """
    if isinstance(source, Mapping):
        return dict(source)
    if hasattr(source, "to_dict"):
        return source.to_dict()
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise UserError(f"{source}: no config.json in this folder; give a model folder")
    elif not path.is_file():
        path = _hub_config(str(source))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: cannot read {path.name} as JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{source}: {path.name} holds no JSON object; give a model folder")
    return config


def _hub_config(name: str) -> Path:
    hint = "give a local model folder, or the name of a hub repository that you can read"
    # A hub name is "owner/name" or "name"; anything else can only be a path.
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local or not name.strip():
        raise UserError(f"{name or repr(name)}: no such model folder; {hint}")
    import huggingface_hub as hub

    try:
        cached = hub.try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return Path(cached)
        # Without this a name that the hub does not have, or no network, is retried for 20 seconds.
        hub.get_hf_file_metadata(hub.hf_hub_url(name, "config.json"))
        return Path(hub.hf_hub_download(name, "config.json"))
    except Exception as error:  # the hub client's own kinds, its HTTP library's, and ValueError
        reason = (str(error).strip().splitlines() or [""])[0].partition(" (Request ID")[0]
        why = f"{type(error).__name__}: {reason.rstrip('.')}"
        raise UserError(
            f"{name}: no such folder here, and the hub gave no config.json ({why}); {hint}"
        ) from None
