#!/usr/bin/env python
"""The compat table against the source of any vLLM: a wheel, a folder, or a version of the index.

    python tests/compat/source_check.py 0.33.0
    python tests/compat/source_check.py vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl

Nothing of that vLLM is installed or imported, so a build for another device can be read too. Each
line names a symbol that is gone or changed and our file that needs it; the exit status is 1 if
there is one. The tests of this folder check more, on a vLLM that is installed.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from test_vllm_internals import imports, rows
from vllm_symbols import ATTRIBUTES, CALLS, HOOKS, OVERRIDES

ROOT = Path(__file__).resolve().parents[2]
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
# Bases outside vLLM whose instances have names that no source of ours or of vLLM's shows.
_NAMED_TUPLE = {"_replace", "_fields", "_asdict", "_make"}
_MAPPING = {"items", "keys", "values", "get"}
_MODULE = {"device", "parameters", "named_parameters", "modules", "named_modules", "forward"}


@dataclass
class Found:
    """A definition, and the module that holds it."""

    module: str
    node: ast.AST
    owner: Found | None = None
    """The class of a method."""


@dataclass
class Source:
    """Python modules as text: those of one vLLM, and ours."""

    read: Callable[[str], str | None]  # a path such as vllm/config/model.py -> text
    trees: dict[str, ast.Module | None] = field(default_factory=dict)

    def tree(self, module: str) -> ast.Module | None:
        if module not in self.trees:
            path = module.replace(".", "/")
            text = self.read(f"{path}.py")
            text = self.read(f"{path}/__init__.py") if text is None else text
            self.trees[module] = None if text is None else ast.parse(text)
        return self.trees[module]

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = self.read(f"{module.replace('.', '/')}/__init__.py") is not None
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + (1 if is_package else 0)]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def name(self, module: str, name: str, seen: tuple[str, ...] = ()) -> Found | None:
        """The definition that `name` stands for in `module`, through imports."""
        tree = self.tree(module)
        if tree is None or f"{module}:{name}" in seen:
            return None
        seen = (*seen, f"{module}:{name}")
        stars = []
        for node in statements(tree.body):
            if isinstance(node, ast.ClassDef | FunctionNode) and node.name == name:
                return Found(module, node)
            if isinstance(node, ast.ImportFrom):
                target = self._absolute(module, node)
                for alias in node.names:
                    if alias.name == "*":
                        stars.append(target)
                    elif (alias.asname or alias.name) == name:
                        return self._imported(module, node, target, alias.name, seen)
            if isinstance(node, ast.Import) and any(
                (a.asname or a.name.split(".")[0]) == name for a in node.names
            ):
                return Found(module, node)
            if name in assigned(node):
                return self._lazy(module, node, name, seen) or Found(module, node)
        for target in stars:
            if found := self.name(target, name, seen):
                return found
        for node in statements(tree.body):  # vllm/__init__.py: {"LLM": ".entrypoints.llm:LLM"}
            if found := self._lazy(module, node, name, seen):
                return found
        submodule = f"{module}.{name}"
        return (
            Found(submodule, self.tree(submodule) or ast.Module([], []))
            if self.tree(submodule)
            else None
        )

    def _imported(
        self, module: str, node: ast.ImportFrom, target: str, name: str, seen: tuple[str, ...]
    ) -> Found | None:
        if target.split(".")[0] not in ("vllm", "proxy_vllm"):
            return Found(module, node)
        return self.name(target, name, seen)

    def _lazy(self, module: str, node: ast.stmt, name: str, seen: tuple[str, ...]) -> Found | None:
        """What a table of lazy imports names: `{"LLM": ".entrypoints.llm:LLM"}`."""
        value = getattr(node, "value", None)
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(value, ast.Dict):
            return None
        for key, entry in zip(value.keys, value.values):
            if isinstance(key, ast.Constant) and key.value == name:
                text = entry.value if isinstance(entry, ast.Constant) else None
                if isinstance(text, str) and text.startswith(".") and ":" in text:
                    target, _, attribute = text.partition(":")
                    return self.name(module + target, attribute, seen)
        return None

    def find(self, symbol: str) -> Found | None:
        """The definition named ``module:qualified.name``."""
        module, _, name = symbol.partition(":")
        if not name:
            tree = self.tree(module)
            return None if tree is None else Found(module, tree)
        first, *rest = name.split(".")
        found = self.name(module, first)
        for part in rest:
            if found is None or not isinstance(found.node, ast.ClassDef):
                return found
            found = self.member(found, part)
        return found

    def bases(self, cls: Found) -> Iterator[Found]:
        """The class and those it inherits from, as far as the source shows them."""
        yield cls
        assert isinstance(cls.node, ast.ClassDef)
        for base in cls.node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            parts = ast.unparse(base).split(".")
            found = self.name(cls.module, parts[0])
            if found is not None and isinstance(found.node, ast.ClassDef):
                yield from self.bases(found)

    def member(self, cls: Found, name: str) -> Found | None:
        for base in self.bases(cls):
            for node in statements(base.node.body):  # type: ignore[attr-defined]
                named = isinstance(node, FunctionNode | ast.ClassDef) and node.name == name
                if named or name in assigned(node):
                    return Found(base.module, node, owner=base)
        return None

    def attributes(self, cls: Found) -> set[str]:
        """Names of a class and its bases, with those that their methods set on `self`."""
        names: set[str] = set()
        for base in self.bases(cls):
            outside = {ast.unparse(b).split("[")[0] for b in base.node.bases}  # type: ignore
            names |= _NAMED_TUPLE if "NamedTuple" in outside else set()
            names |= _MAPPING if outside & {"dict", "Mapping", "UserDict"} else set()
            names |= _MODULE if outside & {"nn.Module", "torch.nn.Module", "Module"} else set()
            for node in ast.walk(base.node):
                if isinstance(node, FunctionNode | ast.ClassDef):
                    names.add(node.name)
                elif isinstance(node, ast.stmt):
                    names |= assigned(node)
                if (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.ctx, ast.Store)
                    and isinstance(node.value, ast.Name)
                    and node.value.id == "self"
                ):
                    names.add(node.attr)
        return names

    def parameters(self, found: Found) -> ast.arguments | None:
        """Parameters of a function, or of a class's constructor; None where none are shown."""
        if isinstance(found.node, FunctionNode):
            return found.node.args
        if not isinstance(found.node, ast.ClassDef):
            return None
        init = self.member(found, "__init__")
        if init is not None and isinstance(init.node, FunctionNode):
            return init.node.args
        fields: dict[str, None] = {}
        for base in reversed(list(self.bases(found))):
            for node in base.node.body:  # type: ignore[attr-defined]
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    fields[node.target.id] = None
        if not fields:
            return None
        args = [ast.arg(name) for name in ("self", *fields)]
        return ast.arguments([], args, None, [], [], None, [ast.Constant(None)] * len(fields))


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module or class, those inside `if`, `try` and `with` too."""
    for node in body:
        yield node
        for inner in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from statements(getattr(node, inner, []))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from statements(handler.body)


def assigned(node: ast.AST) -> set[str]:
    """Names that an assignment binds."""
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    else:
        return set()
    return {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}


def bind(parameters: ast.arguments, positional: int, keywords: list[str]) -> str | None:
    """Why a call with these arguments does not fit, or None."""
    names = [a.arg for a in (*parameters.posonlyargs, *parameters.args)]
    only = {a.arg: value for a, value in zip(parameters.kwonlyargs, parameters.kw_defaults)}
    if positional > len(names) and parameters.vararg is None:
        return f"takes {len(names)} positional arguments, {positional} are passed"
    bound = set(names[:positional])
    for keyword in keywords:
        if keyword in bound or (keyword not in {*names, *only} and parameters.kwarg is None):
            return f"takes no keyword {keyword}"
    needed = names[: len(names) - len(parameters.defaults)]
    needed += [name for name, default in only.items() if default is None]
    missing = [n for n in needed if n not in bound and n not in keywords]
    return f"needs {', '.join(missing)}" if missing else None


def calls(function: ast.AST) -> dict[str, set[str]]:
    """Calls in a function's body: dotted name -> keywords passed."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            keywords = {k.arg for k in node.keywords if k.arg}
            found.setdefault(ast.unparse(node.func), set()).update(keywords)
    return found


def check(source: Source) -> Iterator[str]:
    """One line for each symbol that is gone or changed."""
    for symbol, file in imports():
        if source.find(symbol) is None:
            yield f"{symbol} is gone: {file} imports it"
    for symbol, file, names in rows(ATTRIBUTES):
        found = source.find(symbol)
        if found is None or not isinstance(found.node, ast.ClassDef):
            yield f"{symbol} is gone: {file} uses {names}"
        elif missing := sorted(set(names.split()) - source.attributes(found)):
            yield f"{symbol} has no {', '.join(missing)}: {file} uses that"
    for symbol, file, arguments in rows(CALLS):
        found = source.find(symbol)
        positional, *keywords = arguments.split()
        if found is None:
            yield f"{symbol} is gone: {file} calls it"
            continue
        count = int(positional.removeprefix("/")) + isinstance(found.node, ast.ClassDef)
        parameters = source.parameters(found)
        if parameters and (why := bind(parameters, count, keywords)):
            yield f"{symbol} {why}: {file} calls it"
    for ours, names in OVERRIDES.items():
        yield from overrides(source, ours, names)
    for symbol, call, keywords in rows(HOOKS):
        found = source.find(symbol)
        if found is None:
            yield f"{symbol} is gone: it reaches our {call}"
            continue
        made = calls(found.node)
        if call not in made:
            yield f"{symbol} does not call {call}, where our override is reached"
        elif missing := sorted(set(keywords.split()) - made[call]):
            yield f"{symbol} calls {call} without {', '.join(missing)}, as our override needs"


def overrides(source: Source, ours: str, names: str) -> Iterator[str]:
    cls = source.find(ours)
    if cls is None or not isinstance(cls.node, ast.ClassDef):
        yield f"{ours} is not in our source: the table of overrides is old"
        return
    for name in names.split():
        if name == "__init__":
            continue
        mine = source.member(cls, name)
        theirs = next(
            (
                Found(base.module, node, base)
                for base in source.bases(cls)
                if base.module.startswith("vllm")
                for node in statements(base.node.body)  # type: ignore[attr-defined]
                if isinstance(node, FunctionNode) and node.name == name
            ),
            None,
        )
        if theirs is None:
            if name != "make_empty_intermediate_tensors":  # of a protocol, see the tests
                yield f"vLLM has no {name} for {ours} to override"
            continue
        if mine is None or not isinstance(mine.node, FunctionNode):
            continue
        args = mine.node.args
        if args.kwarg is not None:
            continue
        taken = {a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)}
        their = theirs.node.args  # type: ignore[attr-defined]
        for parameter in (*their.posonlyargs, *their.args, *their.kwonlyargs):
            if parameter.arg not in taken:
                yield f"vLLM's {name} takes {parameter.arg}, and that of {ours} does not"


def reader(vllm: Path) -> Callable[[str], str | None]:
    """Text of modules: ours from this tree, vLLM's from a wheel or a folder that holds `vllm/`."""
    archive = zipfile.ZipFile(vllm) if vllm.is_file() else None
    names = set(archive.namelist()) if archive else set()

    @cache
    def read(path: str) -> str | None:
        if path.startswith("vllm/") and archive is not None:
            return archive.read(path).decode("utf-8") if path in names else None
        file = (vllm if path.startswith("vllm/") else ROOT) / path
        return file.read_text(encoding="utf-8") if file.is_file() else None

    return read


def main() -> int:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        given = Path(sys.argv[1])
        if not given.exists():
            download = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
            subprocess.run([sys.executable, *download, f"vllm=={sys.argv[1]}"], check=True)
            (given,) = Path(folder).glob("*.whl")
        faults = list(check(Source(reader(given))))
    for fault in faults:
        print(fault)
    print(f"{given.name}: {len(faults)} symbols are gone or changed")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
