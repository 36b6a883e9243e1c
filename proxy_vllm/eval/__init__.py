"""Evaluation through EleutherAI's lm-evaluation-harness (the extra ``eval``).

``proxy-vllm eval`` is the command; ``python -m proxy_vllm.eval`` is the harness's own command with
the model ``proxy_vllm`` registered. docs/evaluate.md has the tasks and files.
"""

from pathlib import Path

from proxy_vllm.errors import UserError

# The paper's tasks, for the harness's ``--include_path``.
TASKS = Path(__file__).with_name("tasks")


def check_installed() -> None:
    """Raise ``UserError`` where the harness is not installed."""
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"evaluation needs the lm-evaluation-harness ({error}): pip install 'proxy_vllm[eval]'"
        ) from None
