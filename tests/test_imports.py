"""Imports run downward only, and implementations of one op never import one another."""

import ast
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent

# From the ground up; a module may import its own storey and those below.
STOREYS = [
    ["attention_jax.about", "attention_jax.choices", "attention_jax.masks", "attention_jax.biases",
     "attention_jax.positions", "attention_jax.caches", "attention_jax.layers", "attention_jax.feature_maps"],
    ["attention_jax.ops"],
    ["attention_jax.mixers"],
    ["attention_jax.model"],
    ["attention_jax.generation", "attention_jax.catalogue"],
    ["attention_jax"],
    ["attention_jax.benchmarks"],
    ["train"],
    ["scripts"],
]  # fmt: skip

# The ground floor of an op's folder, and its roof; what is between are implementations.
OP_SHARED, OP_ROOF = {"common", "blocks", "tiles"}, {"api", "__init__"}
# What every mixer may use: the contract, what the softmax family, recurrences and linear attention share.
MIXERS_SHARED = {f"attention_jax.mixers.{name}" for name in ("base", "parts", "recurrent", "linear_parts")}


def _storey(module: str) -> int:
    best = [(len(name), level) for level, names in enumerate(STOREYS) for name in names
            if module == name or module.startswith(name + ".")]  # fmt: skip
    assert best, f"{module} has no storey: add it to the table"
    return max(best)[1]


def _imports(path: pathlib.Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return [name for name in found if name.split(".")[0] in ("attention_jax", "train", "scripts", "tests")]


def _modules():
    for folder in ("attention_jax", "train", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


def test_imports_run_downward():
    upward = [
        f"{module} imports {name}"
        for module, path in _modules()
        for name in _imports(path)
        if _storey(name) > _storey(module)
    ]
    assert not upward, upward


def test_implementations_do_not_import_one_another():
    sideways = []
    for module, path in _modules():
        parts = module.split(".")
        if parts[:2] != ["attention_jax", "ops"] or len(parts) < 4 or parts[3] in OP_ROOF:
            continue
        for name in _imports(path):
            other = name.split(".")
            if other[:3] == parts[:3] and other[3] not in OP_SHARED | {parts[3]}:
                sideways.append(f"{module} imports {name}")
    assert not sideways, sideways


def test_mixers_do_not_import_one_another():
    for module, path in _modules():
        if module.startswith("attention_jax.mixers.") and module not in MIXERS_SHARED:
            others = [n.rsplit(".", 1)[0] for n in _imports(path) if n.startswith("attention_jax.mixers.")]
            assert MIXERS_SHARED.issuperset(others), (module, others)


def test_the_library_needs_no_training_packages():
    """`import attention_jax` pulls in jax, flax and numpy, but nothing of the `train` extra by itself."""
    used = {name.split(".")[0] for path in (ROOT / "attention_jax").rglob("*.py")
            for name in _all_imports(path)}  # fmt: skip
    # Inside functions, so that only drawing and timing beside peers need them: matplotlib, torch, tokamax.
    known = {"attention_jax", "jax", "flax", "numpy", "matplotlib", "torch", "tokamax"}
    assert used <= known | set(sys.stdlib_module_names), used


def _all_imports(path: pathlib.Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.append(node.module)
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


def test_public_names_import():
    code = "import attention_jax; [getattr(attention_jax, name) for name in attention_jax.__all__]"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT, timeout=120)
