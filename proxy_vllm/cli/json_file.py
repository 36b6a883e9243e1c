"""The file that `--json` names: checked before the work begins, and written when it is done."""

import json
import os
from pathlib import Path
from typing import Any

from proxy_vllm.errors import UserError


def check_json_file(file: Path) -> None:
    """Refuse, before minutes of work, a file that cannot be written.

    Raises:
        UserError: with the reason.
    """
    file = file.absolute()
    if not file.parent.is_dir():
        raise UserError(f"--json {file}: no such folder {file.parent}")
    if file.is_dir():
        raise UserError(f"--json {file} is a folder: name a file")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(f"--json {file}: cannot be written to")


def write_json_file(file: Path, numbers: dict[str, Any]) -> None:
    """Write what was found.

    Raises:
        UserError: the file cannot be written, after all.
    """
    try:
        file.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {file}: cannot write ({error.strerror})") from None
