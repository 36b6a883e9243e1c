"""The examples of README.md and docs/, with twins in the place of the models that they name."""

import dataclasses
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from twins.families import FAMILIES
from twins.write import write_twins

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HERE_DOCUMENT = re.compile(r"^cat > (\S+) <<'(\w+)'\n(.*?)^\2$", re.MULTILINE | re.DOTALL)
_HUB_NAME = re.compile(
    r"\b(?:Qwen|meta-llama|allenai|google|mistralai|HuggingFaceTB|deepseek-ai)/[\w.-]*\w"
)
_TUNED = re.compile(r"Instruct|chat|-it\b|tulu|SFT", re.IGNORECASE)
_PLACEHOLDERS = {
    "model": ("BASE",),
    "expert": ("E", "EXPERT"),
    "antiexpert": ("A", "ANTIEXPERT"),
}


@dataclass(frozen=True)
class Example:
    """One fenced block."""

    document: str
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    @cached_property
    def files(self) -> dict[str, str]:
        """What a shell block writes with `cat > FILE <<'END'`."""
        return {match[1]: match[3] for match in _HERE_DOCUMENT.finditer(self.code)}

    @cached_property
    def commands(self) -> list[list[str]]:
        """The words of each command of a shell block but those that write files."""
        lines = _HERE_DOCUMENT.sub("", self.code).replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def examples(language: str) -> list[Example]:
    found = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Example(str(path.relative_to(ROOT)), line, match[1].lower(), match[2]))
    return [e for e in found if e.language == language]


def example(document: str, part: str) -> Example:
    """The one block of a document that holds ``part``."""
    blocks = {e for kind in ("python", "sh", "yaml", "json") for e in examples(kind)}
    (found,) = (e for e in blocks if e.document == document and part in e.code)
    return found


class Twins:
    """Folders of twins by the hub names of real models; written when they are first asked for."""

    def __init__(self, root: Path, heads: int | None = None) -> None:
        """With ``heads``, twins have as many as tensor-parallel sizes need, and do not run."""
        self.root, self.heads = root, heads
        self.written: dict[str, dict[str, str]] = {}

    def of(self, family: str) -> dict[str, str]:
        if family not in self.written:
            twin = FAMILIES[family]
            if self.heads is not None:
                heads = {"num_attention_heads": self.heads, "num_key_value_heads": self.heads}
                twin = dataclasses.replace(
                    twin, large={**twin.large, **heads}, small={**twin.small, **heads}
                )
            self.written[family] = write_twins(twin, self.root / family)
        return self.written[family]

    def fill(self, code: str, family: str = "qwen2.5") -> str:
        """The code with folders for hub names, and for BASE, E and A of the family."""
        # The largest model that is not tuned is the base.
        plain = {n for n in _HUB_NAME.findall(code) if not _TUNED.search(n)}
        bases = {max(group, key=_billions) for group in _by_family(plain)}

        def folder(name: str) -> str:
            role = "expert" if _TUNED.search(name) else "model" if name in bases else "antiexpert"
            return self.of(family_of(name))[role]

        code = _HUB_NAME.sub(lambda match: folder(match[0]), code)
        for role, words in _PLACEHOLDERS.items():
            for word in words:
                code = re.sub(rf"(?<![\w./$-]){word}(?![\w./=-])", self.of(family)[role], code)
        return code

    def fill_ids(self, text: str) -> str:
        """The text with the twin's ids for those of Qwen 2.5's special tokens."""
        tokenizer = Tokenizer.from_file(str(Path(self.of("qwen2.5")["model"]) / "tokenizer.json"))
        first = tokenizer.token_to_id("<|endoftext|>")
        return re.sub(r"\b1516\d\d\b", lambda m: str(int(m[0]) - 151643 + first), text)


def family_of(name: str) -> str:
    """The family of twins for a hub name."""
    for family, part in (
        ("qwen2.5", "Qwen2.5"),
        ("qwen3", "Qwen3"),
        ("llama-3.1", "Llama-3"),
        ("llama-2", "Llama-2"),
        ("tulu-2", "tulu"),
        ("olmo-2", "OLMo-2"),
        ("gemma", "gemma"),
        ("mistral", "istral"),
        ("smollm2", "SmolLM2"),
    ):
        if part in name:
            return family
    raise KeyError(f"no twin for {name}: tests/twins/examples.py")


def _by_family(names: set[str]) -> Iterator[set[str]]:
    for family in {family_of(name) for name in names}:
        yield {name for name in names if family_of(name) == family}


def _billions(name: str) -> float:
    size = re.search(r"(\d+(?:\.\d+)?)([bm])\b", name.lower().split("/")[1].replace("-hf", " "))
    return 0 if size is None else float(size[1]) / (1000 if size[2] == "m" else 1)
