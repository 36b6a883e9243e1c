"""Every environment variable that proxy_vllm reads, and what it sets in response.

``PROXY_VLLM_CPU_RUNNER``
    ``v1`` (default): on a CPU the V1 runner, as plain vLLM.
    ``v2``: Model Runner V2 on a CPU, its Triton kernels under Triton's interpreter. This is the
    GPU's code path for tests: exact, and hundreds of times slower than a GPU.
``PROXY_VLLM_BASE_API_KEY``
    The key of a base that lives elsewhere (``--base-url``). Never an argument, so that it stands in
    no list of processes and in no log.
``PROXY_VLLM_TOXICITY_CLASSIFIER``
    The text classifier of the evaluation's ToxiGen task; ``proxy-vllm eval --classifier`` sets it.
``PROXY_VLLM_ENDS_WITH_PARENT``
    Set by proxy_vllm itself, for the processes of its engines: see ``proxy_vllm.lifetime``.
"""

import os
import sys
from pathlib import Path

from proxy_vllm.errors import UserError

CPU_RUNNER = "PROXY_VLLM_CPU_RUNNER"
BASE_API_KEY = "PROXY_VLLM_BASE_API_KEY"
TOXICITY_CLASSIFIER = "PROXY_VLLM_TOXICITY_CLASSIFIER"
ENDS_WITH_PARENT = "PROXY_VLLM_ENDS_WITH_PARENT"

# Holds a distribution that declares the Triton backend `cpu`, which vLLM asks for before it uses
# Triton on a CPU. It must be visible when `triton` is imported, in worker processes too, and must
# not be visible otherwise (vLLM would switch every CPU user to Model Runner V2): hence a folder
# that enters PYTHONPATH only in this mode, rather than an entry point of this package.
_INTERPRETER_SITE = Path(__file__).with_name("cpu_interpreter")


def cpu_runner() -> str:
    """Return the runner asked for on CPU machines, ``"v1"`` or ``"v2"``."""
    value = os.environ.get(CPU_RUNNER, "v1").strip().lower() or "v1"
    if value not in ("v1", "v2"):
        raise UserError(f"{CPU_RUNNER}={value!r} is not known: use 'v1' or 'v2'")
    return value


def base_api_key() -> str | None:
    """The key of the base's endpoint; None where it needs none."""
    return os.environ.get(BASE_API_KEY) or None


def toxicity_classifier() -> str | None:
    """Folder or hub name of the classifier of ToxiGen's answers; None where none is named."""
    return os.environ.get(TOXICITY_CLASSIFIER) or None


def prepare_process() -> None:
    """Make this process, and those it will spawn, fit for the runner asked for.

    Runs when ``proxy_vllm`` is imported, and does nothing unless ``PROXY_VLLM_CPU_RUNNER=v2``. A
    value that is not known is refused where an engine is made: imports should not fail.

    Raises:
        UserError: Triton was imported before ``proxy_vllm``, too early for the mode.
    """
    if os.environ.get(CPU_RUNNER, "").strip().lower() != "v2":
        return
    site = str(_INTERPRETER_SITE)
    if site not in sys.path:
        triton = sys.modules.get("triton.backends")
        if triton is not None and "cpu" not in triton.backends:
            raise UserError(f"{CPU_RUNNER}=v2 needs `import proxy_vllm` before vllm and triton")
        sys.path.insert(0, site)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if site not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([site, *filter(None, paths)])
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    # Dynamo would trace into the interpreter's Python.
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
