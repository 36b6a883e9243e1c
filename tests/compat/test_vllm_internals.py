"""What proxy_vllm takes from vLLM's inside is there: a failure names the symbol and who needs it.

The pin of vLLM's version (``config.check_vllm_version``, at every start and in every worker) keeps
any other release out. These tests are for the day on which it is raised, and for builds of one
version that differ.
"""

import ast
import dataclasses
import importlib
import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest
from vllm_symbols import ATTRIBUTES, CALLS, HOOKS, OVERRIDES

ROOT = Path(__file__).resolve().parents[2]


def our_files() -> list[Path]:
    found = [*(ROOT / "proxy_vllm").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    return sorted(f for f in found if f.relative_to(ROOT).parts[:2] != ("proxy_vllm", "kernels"))


def imports() -> list[tuple[str, str]]:
    """What our files import from vLLM, anywhere in them: (module:name, first file)."""
    found: dict[str, str] = {}
    for file in our_files():
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm"):
                names = [f"{node.module}:{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [f"{a.name}:" for a in node.names if a.name.split(".")[0] == "vllm"]
            for name in names:
                found.setdefault(name, str(file.relative_to(ROOT)))
    return sorted(found.items())


def find(symbol: str) -> Any:
    """The object named ``module:qualified.name``, unwrapped from ``triton.jit``."""
    module, _, name = symbol.partition(":")
    found = importlib.import_module(module)
    for part in filter(None, name.split(".")):
        found = getattr(found, part)
    return getattr(found, "fn", found)


@pytest.mark.parametrize("symbol, file", imports())
def test_import(symbol, file):
    try:
        find(symbol)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"vLLM has no {symbol}, which {file} imports: {error}")


def attributes(cls: type) -> set[str]:
    """Names of a class and of those it inherits from, with those that their methods set."""
    names = set(dir(cls))
    for base in inspect.getmro(cls):
        names.update(getattr(base, "__annotations__", {}))
        names.update(getattr(base, "_fields", ()))
        if not base.__module__.startswith("vllm"):
            continue
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
            ):
                names.add(node.attr)
    return names


def rows(table: dict[str, dict[str, str]]) -> list[tuple[str, str, str]]:
    return [(symbol, file, names) for symbol, uses in table.items() for file, names in uses.items()]


@pytest.mark.parametrize("symbol, file, names", rows(ATTRIBUTES))
def test_attributes(symbol, file, names):
    missing = sorted(set(names.split()) - attributes(find(symbol)))
    assert not missing, f"vLLM's {symbol} has no {', '.join(missing)}, which {file} uses"


@pytest.mark.parametrize("symbol, file, arguments", rows(CALLS))
def test_calls(symbol, file, arguments):
    positional, *keywords = arguments.split()
    signature = inspect.signature(find(symbol))
    try:
        signature.bind(*[None] * int(positional.removeprefix("/")), **dict.fromkeys(keywords))
    except TypeError as error:
        pytest.fail(f"vLLM's {symbol}{signature} does not take what {file} passes: {error}")


def vllm_method(cls: type, name: str) -> Any:
    """What ``super()`` finds in vLLM's part of a class, or None."""
    for base in cls.__mro__[1:]:
        if base.__module__.startswith("vllm") and name in vars(base):
            return getattr(base, name)
    return None


@pytest.mark.parametrize("ours", OVERRIDES)
def test_overrides(ours):
    """What vLLM calls is still a method of vLLM, and ours takes the same parameters."""
    cls = find(ours)
    defined = {n for n, value in vars(cls).items() if inspect.isroutine(value)}
    for name in OVERRIDES[ours].split():
        assert name in defined, f"{ours} has no {name}: take it out of the table"
        theirs = vllm_method(cls, name)
        if theirs is None and name == "make_empty_intermediate_tensors":
            continue  # a member of vLLM's protocol SupportsPP, see test_pipeline_protocol
        assert theirs is not None, f"vLLM has no {name} for {ours} to override"
        mine = inspect.signature(getattr(cls, name)).parameters
        kinds = {p.kind for p in mine.values()}
        if inspect.Parameter.VAR_KEYWORD in kinds or name == "__init__":
            continue
        for parameter in inspect.signature(theirs).parameters.values():
            taken = parameter.name in mine or parameter.kind is parameter.VAR_KEYWORD
            assert taken, f"vLLM's {name} takes {parameter.name}, and that of {ours} does not"


def test_the_table_of_overrides_is_whole():
    listed = {ours: set(names.split()) for ours, names in OVERRIDES.items()}
    for file in our_files():
        if file.parts[-2] == "kernels" or "cpu_interpreter" in file.parts:
            continue
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        if name.startswith("proxy_vllm.batch.ray"):
            continue  # Ray is an extra, and no class there is one of vLLM's
        for cls in vars(importlib.import_module(name)).values():
            if not inspect.isclass(cls) or cls.__module__ != name:
                continue
            ours = f"{name}:{cls.__name__}"
            for method in [n for n, value in vars(cls).items() if inspect.isroutine(value)]:
                if method.startswith("__") and method != "__init__":
                    continue
                if vllm_method(cls, method) is not None and not issubclass(cls, Exception):
                    assert method in listed.get(ours, ()), f"{ours}.{method} is not in OVERRIDES"


def calls(function: Any) -> dict[str, set[str]]:
    """Calls in a function's body: dotted name -> keywords passed."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))):
        if isinstance(node, ast.Call):
            keywords = {k.arg for k in node.keywords if k.arg}
            found.setdefault(ast.unparse(node.func), set()).update(keywords)
    return found


@pytest.mark.parametrize("function, call, keywords", rows(HOOKS))
def test_hooks_are_called(function, call, keywords):
    made = calls(find(function))
    assert call in made, f"vLLM's {function} does not call {call}, where our override is reached"
    missing = set(keywords.split()) - made[call]
    assert not missing, f"vLLM's {function} calls {call} without {missing}, as our override needs"


def test_the_models_own_state_class():
    """``get_model_state_cls`` of the model is asked for (model.py)."""
    from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

    class Model:
        @staticmethod
        def get_model_state_cls():
            return dict

    assert resolve_model_state_cls(None, Model()) is dict


def test_pipeline_protocol():
    """What ``SupportsPP`` asks of a model is what the composite has (model.py)."""
    from vllm.model_executor.models.interfaces import supports_pp

    from proxy_vllm.composite.model import ProxyTunedForCausalLM

    assert supports_pp(ProxyTunedForCausalLM)


def test_order_of_logits_processors():
    """sampler.py tells vLLM's three by their place; what follows counts as custom."""
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    source = textwrap.dedent(inspect.getsource(Sampler.__init__))
    (made,) = [
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "self.logits_processors"
    ]
    order = [ast.unparse(element) for element in made.elts]
    expected = ["logit_bias_state", "self.penalties_state", "bad_words_state"]
    assert order == [*expected, "*custom_logits_processors"], f"Sampler.logits_processors: {order}"


def test_order_of_logprobs():
    """``merge`` in sampler.py scatters the three tensors that have a row for each request."""
    from vllm.v1.outputs import LogprobsTensors

    first = LogprobsTensors._fields[:3]
    assert first == ("logprob_token_ids", "logprobs", "selected_token_ranks"), first


def test_cpu_worker_makes_its_runner_itself():
    """Why cpu_worker.py makes the runner anew in ``init_device``."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    made = calls(CPUWorker.init_device)
    assert "self._make_model_runner" not in made, "cpu_worker.py need not override init_device"


def test_middlewares_of_the_command_line_see_every_request():
    """admission.py is one of ``args.middleware``, a list (cli/serve.py)."""
    from vllm.entrypoints.launchers.cli_args import FrontendArgs
    from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware

    fields = {field.name: field for field in dataclasses.fields(FrontendArgs)}
    assert fields["middleware"].default_factory() == []
    assert "app.add_middleware" in calls(init_entrypoints_middleware)


def test_the_wait_for_an_engine_swallows_interrupts(tmp_path):
    """Why lifetime.py has ``heed_sigterm``, which can go when this fails."""
    import zmq
    from vllm.utils.network_utils import zmq_socket_ctx

    with zmq_socket_ctx(f"ipc://{tmp_path}/socket", zmq.PULL):
        raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["Latency", "Throughput", "Serve"])
def test_options_of_the_benchmarks(kind):
    """Options that cli/bench.py reads."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from proxy_vllm.cli import bench

    parser = FlexibleArgumentParser()
    getattr(bench, kind).add_cli_args(parser)
    options = {action.dest for action in parser._actions}
    needed = {
        "Latency": "output_json input_len output_len max_model_len model",
        "Throughput": "output_json backend model",
        "Serve": "extra_body metadata num_prompts model save_result save_detailed",
    }
    missing = set(needed[kind].split()) - options
    assert not missing, f"vllm.benchmarks.{kind} has no {missing}, which cli/bench.py reads"
