"""The harness's own command, with the model and the tasks of this package known to it.

``python -m proxy_vllm.eval --model proxy_vllm --model_args pretrained=BASE,expert=E,antiexpert=A
--tasks gsm_paper``. Harness 0.4.13 asks no installed package for models; later ones read the entry
point ``lm_eval.models``, and then ``lm_eval`` itself does.
"""

import sys

from proxy_vllm.errors import UserError
from proxy_vllm.eval import TASKS, check_installed


def main() -> None:
    check_installed()
    from lm_eval.__main__ import cli_evaluate

    from proxy_vllm.eval import model  # noqa: F401  # registers it

    # An option alone stands for the command `run`.
    runs = len(sys.argv) > 2 and (sys.argv[1] == "run" or sys.argv[1].startswith("-"))
    if runs and not any(word.startswith("--include_path") for word in sys.argv):
        sys.argv += ["--include_path", str(TASKS)]
    cli_evaluate()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"proxy_vllm.eval: error: {error}", file=sys.stderr)
        sys.exit(2)
