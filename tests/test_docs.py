"""The documentation agrees with the code: Python runs, YAML loads, links exist, tables equal their JSON.

A line `print(...)  # -> text` of a page states what it prints; where a block states anything, it must state
all that it prints.
"""

import ast
import contextlib
import dataclasses
import io
import re
import runpy
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from attention_jax import LanguageModel, catalogue
from attention_jax.masks import parse
from attention_jax.mixers import Context, base
from train import config as configuration
from train.config import yaml_text

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]}


_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# What a page shows at full size runs smaller here.
_SMALLER = {
    "README.md": {"4096": "512", "num_layers=4": "num_layers=2", "max_new_tokens=20": "max_new_tokens=5"}
}

# Where a reader may copy any one block: each runs in a module of its own.
_ALONE = {"README.md"}

_STATED = re.compile(r"^\s*print\(.*\)  # -> (.*)$")


def blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """(line of its first line, text) of every block of a language, in order."""
    text = path.read_text("utf-8")
    return [
        (text[: match.start(2)].count("\n"), match[2])
        for match in _FENCE.finditer(text)
        if match[1] == language
    ]


def run_page(name: str, path: Path) -> None:
    """The page's Python, in order, in one module of its own (`_ALONE`: one per block).

    AssertionError where it prints other words.
    """
    smaller = _SMALLER.get(name, {})
    assert all(shown in path.read_text("utf-8") for shown in smaller), f"_SMALLER[{name!r}] is outdated"
    module = types.ModuleType(re.sub(r"\W", "_", name))
    kinds = base.mixer_kinds()
    sys.modules[module.__name__] = module  # where dataclasses look up what annotations mean
    try:
        for line, text in blocks(path, "python"):
            for shown, size in smaller.items():
                text = text.replace(shown, size)
            scope = {"__name__": module.__name__} if name in _ALONE else vars(module)
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                # Blank lines in front: a traceback names the page's own line.
                exec(compile("\n" * line + text, str(path), "exec"), scope)
            stated = [match[1] for row in text.splitlines() if (match := _STATED.match(row))]
            if stated:
                assert printed.getvalue().splitlines() == stated, f"{name}:{line + 1}"
    finally:
        del sys.modules[module.__name__]
        base.MixerConfig._members.clear()  # a page's own mixers are not the library's
        base.MixerConfig._members.update(kinds)


MECHANISMS = [name for name in PAGES if re.match("docs/(mixers|masks|scores|positions)/", name)]
PYTHON = [name for name, path in PAGES.items() if blocks(path, "python")]
# What these run takes seconds to compile.
_LONG = {f"docs/mixers/{name}.md" for name in (
    "deltanet", "gated_deltanet", "gla", "hedgehog", "kda", "linformer", "mamba2", "mla", "nsa",
    "nystromformer", "performer",
)} | {f"docs/{name}.md" for name in ("drop_in", "extend", "generation", "linen")}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in _LONG else name for name in PYTHON]
)
def test_python_runs(name):
    run_page(name, PAGES[name])


@pytest.mark.parametrize("name", PYTHON)
def test_python_imports_what_there_is(name):
    for _, text in blocks(PAGES[name], "python"):
        imports = [
            node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        exec(compile(ast.Module(imports, []), name, "exec"), {})


def test_long_pages_exist():
    assert _LONG <= set(PYTHON)


@pytest.mark.parametrize("name", [name for name, path in PAGES.items() if blocks(path, "yaml")])
def test_yaml_loads_and_its_model_runs(name):
    for line, text in blocks(PAGES[name], "yaml"):
        # A fragment is a whole configuration whose other keys have their defaults.
        run = configuration.from_dict(yaml_text.parse(text, f"{name}:{line + 1}"))
        assert configuration.from_dict(configuration.to_dict(run)) == run
        # One layer of each mixer tells what four do.
        encoder = run.model.encoder
        model = dataclasses.replace(
            run.model,
            vocab_size=257,
            num_layers=len(run.model.period),
            encoder=encoder and dataclasses.replace(encoder, num_layers=len(encoder.mixers)),
        )
        logits = jax.eval_shape(lambda model=model: _logits(model))
        assert logits.shape == (1, 9, 257), f"{name}:{line + 1}"


def _logits(config):
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    tokens_BT = jnp.zeros((1, 9), jnp.int32)
    memory_BSD = None if config.encoder is None else model.encode(tokens_BT)
    return model(tokens_BT, ctx=Context(memory_BSD=memory_BSD))


def anchors(path: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    path = PAGES[name]
    for target in _LINK.findall(path.read_text("utf-8")):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{name} links to {target}"
        assert found.is_relative_to(ROOT), f"{name} links to {target}, outside the repository"
        if anchor:
            assert anchor in anchors(found), f"{name} links to {target}: no such heading"


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_mechanism_links_its_source_and_its_configuration(name):
    text = PAGES[name].read_text("utf-8")
    targets = _LINK.findall(text)
    assert any("/attention_jax/" in target for target in targets), f"{name} links no source file"
    if "| configuration | none: " not in text:  # which says why
        assert any(re.search(r"/configs/.*\.yaml$", target) for target in targets), f"{name} links no YAML"
    assert blocks(PAGES[name], "python"), f"{name} has no code"
    for what in ("paper", "time", "memory", "decoding keeps", "**When to use it.**"):
        assert what in text, f"{name} does not say: {what}"


_TABLES = runpy.run_path(str(DOCS / "results" / "generate.py"))


@pytest.mark.parametrize("name", _TABLES["TABLES"])
def test_tables_equal_their_json(name):
    written = (DOCS / "results" / f"{name}.md").read_text("utf-8")
    assert written == _TABLES["page"](name), "run `python docs/results/generate.py`"


def test_every_page_picture_and_result_is_linked():
    linked = {
        (path.parent / target.partition("#")[0]).resolve()
        for path in PAGES.values()
        for target in _LINK.findall(path.read_text("utf-8"))
    }
    for path in [path for kind in ("md", "png", "json") for path in DOCS.rglob(f"*.{kind}")]:
        assert path.resolve() in linked or path.name == "index.md", f"nothing links to {path}"


def test_pictures_stand_with_the_commands_that_make_them():
    text = "\n".join(path.read_text("utf-8") for path in PAGES.values())
    commands = re.findall(
        r'^`python scripts/visualize.py mask "(.*)" .*--out docs/pictures/(\S+)`$', text, re.MULTILINE
    )
    for expression, _ in commands:
        parse(expression)
    made = {name for _, name in commands} | {"masks.png"}
    assert made == {path.name for path in (DOCS / "pictures").iterdir()}
    assert "`python scripts/visualize.py masks --out docs/pictures/masks.png`" in text


def test_the_index_names_every_mechanism_with_its_page():
    rows = [row.split("|") for row in (DOCS / "index.md").read_text("utf-8").splitlines() if "|" in row]
    named = {cells[1].strip().strip("`"): cells[2] for cells in rows if len(cells) > 3}
    for entry in catalogue():
        assert entry.name in named, f"docs/index.md has no row for {entry.group} {entry.name}"
        assert _LINK.search(named[entry.name]), f"docs/index.md: {entry.name} has no page"
        page = DOCS / _LINK.search(named[entry.name])[1].partition("#")[0]
        assert not entry.paper or _cited(entry.paper, page), f"{page} does not cite {entry.paper}"


def _cited(paper: str, page: Path) -> bool:
    """Whether a page names the papers of a line of the catalogue."""
    text = page.read_text("utf-8")
    return all(number in text for number in re.findall(r"\d{4}\.\d{5}", paper) or [paper])


def test_a_wrong_statement_of_a_page_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 2\n```\n\n```python\nprint(x)  # -> 3\n```\n")
    with pytest.raises(AssertionError, match="page.md:6"):
        run_page("page.md", page)
    page.write_text(page.read_text().replace("-> 3", "-> 2"))
    run_page("page.md", page)
