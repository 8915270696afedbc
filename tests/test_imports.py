"""Imports run one way, jobs -> pipeline -> tokenizer -> schemas, and the command line stays quick to start."""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["schemas", "tokenizer", "pipeline", "jobs"]
"""Each may import from those before it."""
STANDARD_LIBRARY_SCHEMAS = {"schemas", "schemas.errors"}
"""What the tokenizer may take: it must load where neither pydantic nor pyarrow is installed."""
HOMES = {
    "ray": {"jobs"},
    "typer": {"jobs"},
    "rich": {"jobs"},
    "av": {"pipeline", "jobs.demo_corpus"},
    "fsspec": {"pipeline", "tokenizer.checkpoint"},
    "simplejpeg": {"pipeline"},
    "jinja2": {"jobs.report"},
}
"""The packages or modules that may import a library."""

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for layer in LAYERS
    for path in sorted((ROOT / layer).rglob("*.py"))
}


def imports(path: Path, *, everywhere: bool) -> Iterator[str]:
    """Names that a file imports: at its top level, or also inside functions.  `TYPE_CHECKING` blocks never run."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)


def project_imports(module: str, *, everywhere: bool) -> set[str]:
    return {name for name in imports(MODULES[module], everywhere=everywhere) if name in MODULES and name != module}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards_only(module):
    layer = LAYERS.index(module.partition(".")[0])
    for name in project_imports(module, everywhere=True):
        assert LAYERS.index(name.partition(".")[0]) <= layer, f"{module} imports {name}"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("tokenizer")])
def test_the_tokenizer_takes_only_what_needs_the_standard_library(module):
    taken = {name for name in project_imports(module, everywhere=True) if name.startswith("schemas")}
    assert taken <= STANDARD_LIBRARY_SCHEMAS


def test_no_modules_import_each_other_in_a_circle():
    graphlib.TopologicalSorter({name: project_imports(name, everywhere=False) for name in MODULES}).prepare()


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_only_where_it_belongs(library):
    users = {
        module
        for module, path in MODULES.items()
        if any(name.partition(".")[0] == library for name in imports(path, everywhere=True))
    }
    strangers = {name for name in users if not {name, name.partition(".")[0]} & HOMES[library]}
    assert not strangers


def test_the_tokenizer_imports_fsspec_only_inside_functions():
    for module, path in MODULES.items():
        if module.startswith("tokenizer"):
            assert "fsspec" not in {name.partition(".")[0] for name in imports(path, everywhere=False)}, module


def modules_after(statement: str) -> set[str]:
    """Names of all modules that are loaded in a fresh interpreter after `statement`."""
    code = f"{statement}\nimport sys, json; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("package", ["tokenizer", "tokenizer.bsqvit", "pipeline", "pipeline.worker"])
def test_a_package_loads_within_a_second_of_torch_and_without_ray(package):
    loaded = modules_after(f"import {package}")
    assert not {"ray", "typer", "webdataset"} & loaded
    # Processor time, for other programs share the machine.
    code = f"import torch, time; begun = time.process_time(); import {package}; print(time.process_time() - begun)"
    assert float(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT)) < 1.0


@pytest.mark.parametrize("name", ["TokenDataset", "TokenLoader", "Mixture", "SequenceFormat", "Pack"])
def test_a_trainer_loads_tokens_without_decoders(name):
    loaded = modules_after(f"from pipeline import {name}")
    assert not {"av", "simplejpeg", "PIL", "webdataset", "ray", "typer", "boto3"} & loaded


def test_the_package_itself_loads_nothing():
    assert not {"torch", "numpy", "pyarrow", "pipeline.loader"} & modules_after("import pipeline")


def test_the_tokenizer_loads_without_what_a_gpu_machine_may_lack():
    blocked = "import sys; sys.modules.update(dict.fromkeys(['pydantic', 'pyarrow', 'av', 'fsspec', 'yaml', 'ray']))"
    assert "tokenizer.bsqvit" in modules_after(f"{blocked}\nimport tokenizer.bsqvit, tokenizer.checkpoint")


def test_help_loads_neither_torch_nor_ray_and_comes_at_once():
    statement = "from jobs.cli import run\nassert run(['tokenize', '--help']) == 0\nassert run(['--help']) == 0"
    assert not {"torch", "ray", "pyarrow", "numpy", "av"} & modules_after(statement)
    code = "import sys, time; from jobs.cli import run; run(['--help']); print(time.process_time(), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert float(done.stderr) < 1.0  # 0.3 s here
