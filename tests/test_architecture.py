"""The architecture as law: the tree obeys every rule, and every rule catches the violations planted for it.

Owns the planted trees; the rules are in `tests/architecture_law.py`. Invariant: a rule without a planted violation
fails `test_every_rule_has_a_planted_violation`.
"""

import re
from pathlib import Path

import pytest

from tests.architecture_law import LAW
from tests.import_graph import product_modules
from tests.live_server import REPO_ROOT

DOC = '"""Planted."""\n'

# (rule, files of a tree that breaks it)
PLANTED: list[tuple[str, dict[str, str]]] = [
    ("imports_go_down", {"serve/model/a.py": "from serve.engine.plan import Row", "serve/engine/plan.py": "Row = 1"}),
    ("imports_go_down", {"serve/engine/a.py": "import serve.api.b", "serve/api/b.py": ""}),
    ("imports_go_down", {"serve/engine/a.py": "def f():\n    import serve.api.b", "serve/api/b.py": ""}),
    ("imports_go_down", {"serve/api/a.py": "import serve.trainer.b", "serve/trainer/b.py": ""}),
    ("imports_go_down", {"adapters_store/a.py": "import serve.errors", "serve/errors.py": ""}),
    ("imports_go_down", {"kernels/adapter_kernels/a.py": "import serve.messages", "serve/messages.py": ""}),
    ("imports_go_down", {"loadtest/a.py": "from serve import errors", "serve/errors.py": "", "serve/__init__.py": ""}),
    ("imports_go_down", {"serve/attic/a.py": ""}),
    (
        "imports_have_no_cycle",
        {"serve/engine/a.py": "import serve.engine.b", "serve/engine/b.py": "import serve.engine.a"},
    ),
    (
        "imports_have_no_cycle",
        {
            "serve/engine/a.py": "from serve.engine.b import x",
            "serve/engine/b.py": "from serve.engine import c\nx = 1",
            "serve/engine/c.py": "def f():\n    from serve.engine.a import y",
            "serve/engine/__init__.py": "",
        },
    ),
    ("torch_stays_behind_the_engine", {"serve/engine/scheduler.py": "import torch"}),
    ("torch_stays_behind_the_engine", {"serve/engine/scheduler.py": "def f():\n    from torch import nn"}),
    (
        "torch_stays_behind_the_engine",
        {"serve/api/a.py": "import serve.engine.b", "serve/engine/b.py": "import adapter_kernels.c"}
        | {"kernels/adapter_kernels/c.py": "import torch"},
    ),
    (
        "torch_stays_behind_the_engine",
        {"serve/api/a.py": "from serve.engine.plan import Row", "serve/engine/plan.py": "Row = 1"}
        | {"serve/engine/__init__.py": "import serve.engine.runner", "serve/engine/runner.py": "import torch"},
    ),
    ("torch_stays_behind_the_engine", {"adapters_store/a.py": "from safetensors.torch import load_file"}),
    ("torch_stays_behind_the_engine", {"serve/cli/a.py": "import transformers"}),
    ("torch_stays_behind_the_engine", {"serve/probe/a.py": "import torch"}),
    ("torch_stays_behind_the_engine", {"serve/tenants/a.py": "import torch"}),
    ("imports_go_down", {"serve/tenants/a.py": "import serve.api.b", "serve/api/b.py": ""}),
    ("imports_go_down", {"serve/probe/a.py": "import serve.engine.b", "serve/engine/b.py": ""}),
    ("triton_stays_in_its_room", {"serve/engine/runner.py": "import triton"}),
    ("triton_stays_in_its_room", {"kernels/adapter_kernels/a.py": "import triton.language as tl"}),
    ("gpu_check_needs_few_packages", {"scripts/gpu_check.py": "import httpx"}),
    (
        "gpu_check_needs_few_packages",
        {
            "scripts/gpu_check_engine.py": "from tests.engine import cases",
            "tests/engine/cases.py": "import serve.model.a",
        }
        | {"serve/model/a.py": "def f():\n    import msgspec"},
    ),
    ("imports_are_absolute", {"serve/engine/a.py": "from . import b", "serve/engine/b.py": ""}),
    ("imports_are_absolute", {"serve/engine/a.py": "from kernels.adapter_kernels import route"}),
    ("kernels_is_no_package", {"kernels/__init__.py": ""}),
    ("files_and_functions_are_short", {"serve/engine/a.py": "x = 1\n" * 301}),
    ("files_and_functions_are_short", {"tests/test_a.py": "x = 1\n" * 401}),
    ("files_and_functions_are_short", {"serve/engine/a.py": "def f():\n" + "    x = 1\n" * 60}),
    ("files_and_functions_are_short", {"kernels/adapter_kernels/a.py": "def f():\n" + "    x = 1\n" * 100}),
    ("names_say_what_it_is", {"serve/engine/utils.py": ""}),
    ("names_say_what_it_is", {"serve/engine/base.py": ""}),
    ("names_say_what_it_is", {"tests/helpers.py": ""}),
    ("names_say_what_it_is", {"serve/engine/a.py": "class AdapterManager: ..."}),
    ("nothing_foreign_is_executed", {"serve/model/a.py": "import pickle"}),
    ("nothing_foreign_is_executed", {"serve/model/a.py": "import torch\ntorch.load('x')"}),
    ("nothing_foreign_is_executed", {"serve/model/a.py": "from torch import load"}),
    ("nothing_foreign_is_executed", {"serve/model/a.py": "import torch\ntorch.load('x', weights_only=True)"}),
    ("nothing_foreign_is_executed", {"adapters_store/convert/unpickle.py": "import torch\ntorch.load('x')"}),
    ("torch_stays_behind_the_engine", {"adapters_store/convert/peft.py": "import torch"}),
    ("nothing_foreign_is_executed", {"serve/model/a.py": "eval('1')"}),
    ("nothing_foreign_is_executed", {"serve/model/a.py": "exec('1')"}),
    ("nothing_foreign_is_executed", {"scripts/a.py": "import yaml\nyaml.load('x')"}),
    ("nothing_foreign_is_executed", {"scripts/a.py": "f(trust_remote_code=True)"}),
    ("nothing_foreign_is_executed", {"serve/engine/a.py": "import subprocess\nsubprocess.run('ls', shell=True)"}),
    ("nothing_foreign_is_executed", {"serve/engine/a.py": "import numpy\nnumpy.load('x', allow_pickle=True)"}),
    ("nothing_foreign_is_executed", {"serve/engine/a.py": "socket.recv_pyobj()"}),
    ("environment_is_read_at_the_root", {"serve/engine/a.py": "import os\nx = os.environ['HOME']"}),
    ("environment_is_read_at_the_root", {"serve/api/a.py": "from os import getenv"}),
    ("pydantic_stays_in_schemas", {"serve/api/chat.py": "from pydantic import BaseModel"}),
    ("pydantic_stays_in_schemas", {"serve/cli/a.py": "import pydantic_settings"}),
    ("modules_say_what_they_own", {"serve/api/chat.py": "#no docstring\nx = 1"}),
    ("modules_say_what_they_own", {"serve/api/__init__.py": "def f(): ..."}),
    ("modules_hold_no_state", {"serve/engine/a.py": "cache = {}"}),
    ("modules_hold_no_state", {"serve/engine/a.py": "seen: list[int] = []"}),
    ("modules_hold_no_state", {"serve/engine/a.py": "import collections\nby_id = collections.defaultdict(list)"}),
    ("modules_hold_no_state", {"serve/engine/a.py": "n = 0\ndef f():\n    global n\n    n += 1"}),
    ("errors_are_never_swallowed", {"serve/engine/a.py": "try:\n    f()\nexcept Exception:\n    pass"}),
    ("errors_are_never_swallowed", {"serve/engine/a.py": "try:\n    f()\nexcept:\n    f()"}),
]

# what the rules must let pass: the shapes nearest to the violations above
LAWFUL = {
    "serve/__init__.py": "",
    "serve/config.py": DOC + "LIMITS = {'a': 1}",
    "serve/errors.py": DOC + "import serve.config",
    "serve/engine/__init__.py": "",
    "serve/engine/plan.py": DOC + "from serve import errors",
    "serve/engine/runner.py": DOC + "import torch\nfrom adapter_kernels.route import r\nimport serve.engine.plan",
    "serve/engine/worker.py": DOC + "import serve.engine.runner",
    "serve/api/chat.py": DOC + "import serve.engine.plan\nmodel.eval()\npattern.exec('x')",
    "serve/api/schemas_chat.py": DOC + "import pydantic",
    "serve/cli/serve_command.py": DOC + "import os\nimport serve.api.chat\nport = os.environ.get('PORT')",
    "serve/__main__.py": DOC + "import serve.cli.serve_command",
    "adapters_store/base.py": DOC + "import subprocess\nsubprocess.run(['ls'], shell=False)",
    "adapters_store/convert/peft.py": DOC + "import numpy\nimport adapters_store.base",
    "adapters_store/convert/unpickle.py": DOC + "import torch\ntorch.load('x', weights_only=True)",
    "kernels/adapter_kernels/route.py": DOC + "import torch\nr = 1",
    "kernels/adapter_kernels/gpu/shrink.py": DOC + "import triton\nfrom adapter_kernels import route",
    "scripts/gpu_check_grid.py": DOC
    + "import os, torch, triton\nfrom tests.cases import x\nimport serve.engine.runner",
    "scripts/demo.py": DOC + "import httpx",
    "tests/cases.py": DOC + "import numpy\nx = 1",
    "tests/test_a.py": DOC + "import pickle\ntry:\n    f()\nexcept OSError:\n    pass\n" + "x = 1\n" * 390,
}


def plant(root: Path, files: dict[str, str]) -> Path:
    """Write a source tree."""
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return root


@pytest.mark.parametrize("rule", LAW)
def test_the_tree_obeys(rule: str) -> None:
    violations = list(LAW[rule](REPO_ROOT))
    assert not violations, "\n".join([f"{rule}:", *violations])


@pytest.mark.parametrize(("rule", "files"), PLANTED, ids=[f"{rule}-{i}" for i, (rule, _) in enumerate(PLANTED)])
def test_a_planted_violation_is_caught(rule: str, files: dict[str, str], tmp_path: Path) -> None:
    assert list(LAW[rule](plant(tmp_path, files)))


@pytest.mark.parametrize("rule", LAW)
def test_a_lawful_tree_passes(rule: str, tmp_path: Path) -> None:
    assert list(LAW[rule](plant(tmp_path, LAWFUL))) == []


def test_the_plan_names_only_files_that_exist() -> None:
    plan = (REPO_ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    paths = [f"/{module.path}" for module in product_modules(REPO_ROOT).values()]
    named = re.findall(r"`((?:\w+/)*\w+\.py)`", plan)
    assert len(named) > 80
    ours = [name for name in named if not name.startswith("tests/")]
    assert [name for name in ours if not any(path.endswith(f"/{name}") for path in paths)] == []


def test_every_rule_has_a_planted_violation() -> None:
    assert {rule for rule, _ in PLANTED} == set(LAW)
