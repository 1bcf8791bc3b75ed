"""Imports run downward only and never in a circle; implementations of one op do not import one another.

Every import counts: those at the top of a module, those inside functions and under TYPE_CHECKING, and those
in strings that are run as code in another process.
"""

import ast
import functools
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
TOP = ("attention_jax", "train", "scripts", "tests")

# From the lowest up; a module may import its own layer and those below.
LAYERS = [
    [
        "attention_jax.about",
        "attention_jax.choices",
        "attention_jax.disk",
        "attention_jax.dtypes",
        "attention_jax.gguf_header",
        "attention_jax.hints",
        "attention_jax.kinds",
        "attention_jax.optional",
    ],
    ["attention_jax.masks", "attention_jax.biases", "attention_jax.positions", "attention_jax.feature_maps"],
    ["attention_jax.caches", "attention_jax.tokenizers"],
    ["attention_jax.ops"],
    ["attention_jax.layers"],
    ["attention_jax.mixers", "attention_jax.drop_in"],
    ["attention_jax.feed_forwards"],
    ["attention_jax.model"],
    ["attention_jax.generation", "attention_jax.catalogue", "attention_jax.pretrained"],
    ["attention_jax"],
    ["attention_jax.benchmarks"],
    ["train"],
    ["scripts"],
    ["tests"],
]
# Imports that run upward, each with its reason.
UPWARD = {
    ("scripts.tune", "tests.aot_gpu"): "compiles candidates with the tests' compiler for an absent H100",
}

# In an op's folder: what its implementations share, and what imports them. The rest are implementations.
OP_SHARED, OP_ENTRY = {"common", "blocks", "chunked_plan", "tiles"}, {"api", "__init__"}
# What every mixer may use: the contract, what the softmax family, recurrences and linear attention share.
MIXERS_SHARED = {
    f"attention_jax.mixers.{name}" for name in ("base", "parts", "softmax_parts", "recurrent", "linear_parts")
}

_IMPORT = re.compile(r"(?:^|[\n;])\s*(?:from\s+([\w.]+)\s+import\s+([\w ,]+)|import\s+([\w.]+))")


def _modules() -> dict[str, pathlib.Path]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for folder in TOP
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


MODULES = _modules()
_parse = functools.cache(ast.parse)


def _layer(module: str) -> int:
    best = [(len(name), level) for level, names in enumerate(LAYERS) for name in names
            if module == name or module.startswith(name + ".")]  # fmt: skip
    assert best, f"{module} belongs to no layer: add it to LAYERS"
    return max(best)[1]


def _imports(source: str) -> list[str]:
    """The names that a module's statements import, wherever they stand: `package.module.name`."""
    found = []
    for node in ast.walk(_parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


def _imports_of_strings(source: str) -> list[str]:
    """What strings import when they are run as code: import statements in them, and names after `-m`."""
    tree, found = _parse(source), []
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(part.value if isinstance(part, ast.Constant) else "_" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            text = node.value
        else:
            continue
        for module, names, whole in _IMPORT.findall(text):
            found += [whole] if whole else [f"{module}.{name.strip()}" for name in names.split(",")]
        if "." in text and text in MODULES:
            found.append(text)
    return found


def _ours(names: list[str]) -> list[str]:
    return [name for name in names if name.split(".")[0] in TOP]


def _module(name: str) -> str:
    """The module that an imported name is or belongs to."""
    while name not in MODULES:
        name = name.rpartition(".")[0]
        assert name, "no module of this project"
    return name


def _graph() -> dict[str, set[str]]:
    """Module to the modules that its statements load: those named, and the packages that hold them."""
    graph = {}
    for module, path in MODULES.items():
        own = {".".join(module.split(".")[:n]) for n in range(1, module.count(".") + 2)}
        found = set()
        for name in map(_module, _ours(_imports(path.read_text()))):
            found |= {".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 2)}
            found |= {name}
        graph[module] = (found - own) & MODULES.keys()
    return graph


def _cycle(graph: dict[str, set[str]]) -> list[str]:
    """Some circle of imports, in order, or nothing."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            for other in sorted(graph[module]):
                if found := visit(other, [*path, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in graph if (found := visit(module, []))), [])


def test_imports_run_downward():
    upward = {
        (module, _module(name))
        for module, path in MODULES.items()
        for source in [path.read_text()]
        for name in _ours(_imports(source) + _imports_of_strings(source))
        if _layer(name) > _layer(module)
    }
    assert upward == set(UPWARD)


def test_no_circle_of_imports():
    assert not _cycle(_graph())


def test_every_way_to_import_is_seen():
    source = '''
"""Like this: import attention_jax.masks"""
import train.cli
if TYPE_CHECKING:
    from attention_jax.ops import sharded
def run(name):
    from train import loop, step
    code = "import json;" f"from tests.cases import {name}, MASKS"
    subprocess.run([sys.executable, "-m", "scripts.tune"])
    subprocess.run([sys.executable, "-c", "import attention_jax.model\\nprint(1)"])
'''
    assert sorted(_ours(_imports(source))) == [
        "attention_jax.ops.sharded", "train.cli", "train.loop", "train.step",
    ]  # fmt: skip
    assert sorted(_ours(_imports_of_strings(source))) == [
        "attention_jax.model", "scripts.tune", "tests.cases.MASKS", "tests.cases._",
    ]  # fmt: skip
    assert _cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert _cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_tests_do_not_import_one_another():
    """What tests share stands in modules of its own: cases, mixers, harness, runs, problems, promises."""
    found = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        if module.startswith("tests.")
        for source in [path.read_text()]
        for name in _ours(_imports(source) + _imports_of_strings(source))
        if any(part.startswith("test_") for part in _module(name).split("."))
    ]
    assert not found


def test_implementations_do_not_import_one_another():
    sideways, seen = [], set()
    for module, path in MODULES.items():
        parts = module.split(".")
        if parts[:2] != ["attention_jax", "ops"] or len(parts) < 4 or parts[3] in OP_ENTRY:
            continue
        seen.add(parts[3])
        for name in _imports(path.read_text()):
            other = name.split(".")
            if other[:3] == parts[:3] and other[3] not in OP_SHARED | {parts[3]}:
                sideways.append(f"{module} imports {name}")
    assert not sideways and {"reference", "chunked", "mosaic_gpu"} <= seen


def test_mixers_do_not_import_one_another():
    mixers = [m for m in MODULES if m.startswith("attention_jax.mixers.") and m not in MIXERS_SHARED]
    assert len(mixers) > 10
    for module in mixers:
        names = _imports(MODULES[module].read_text())
        others = {_module(name) for name in names if name.startswith("attention_jax.mixers.")}
        assert MIXERS_SHARED >= others, (module, others)


def test_no_other_file_knows_a_mechanism():
    """Outside `mixers/` library and trainer import the contract alone; `import *` passes the names on.

    A published architecture is made of certain mechanisms: those files name them.
    """
    registry = "attention_jax.mixers"
    names = _imports(MODULES[registry].read_text())
    contract = {name.rpartition(".")[2] for name in names if name.startswith(f"{registry}.base.")}
    assert "MixerConfig" in contract
    known = {registry, *(f"{registry}.{name}" for name in (*contract, "*", "__all__"))}
    found = {
        f"{module} imports {name}"
        for module, path in MODULES.items()
        if module.startswith(("attention_jax", "train"))
        and not module.startswith((registry, "attention_jax.pretrained"))
        for name in _imports(path.read_text())
        if name.startswith(registry) and name not in known
    }
    assert not found


def test_the_library_needs_no_training_packages():
    """`import attention_jax` pulls in its own requirements, but nothing of the `train` extra by itself."""
    used = {name.split(".")[0] for path in (ROOT / "attention_jax").rglob("*.py")
            for name in _imports(path.read_text())}  # fmt: skip
    # Inside functions, so that only drawing and timing beside peers need them: matplotlib, torch, tokamax.
    known = {
        "attention_jax",
        "jax",
        "flax",
        "numpy",
        "einops",
        "safetensors",
        "matplotlib",
        "torch",
        "tokamax",
    }
    assert used <= known | set(sys.stdlib_module_names)


def test_public_names_import():
    code = (
        "import sys, attention_jax; [getattr(attention_jax, name) for name in attention_jax.__all__];"
        "unneeded = {'matplotlib', 'tokenizers', 'gguf', 'jinja2', 'tiktoken', 'sentencepiece'};"
        "assert not unneeded & set(sys.modules), unneeded & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT, timeout=120)
