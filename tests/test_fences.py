"""The rules of the house (docs/architecture.md): who may import whom, and which library may be imported where.

`violations` reads the imports of a package from its source, those inside functions too, without importing it.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxcats

PACKAGE = Path(jaxcats.__path__[0])
ENTRIES = 16  # files and folders that the package may have at its top
ORDER = ["common", "core", "data", "models", "plots", "train", "evaluate", "export", "learner"]  # then the commands

# Library -> the only files or folders (with a slash) that may import it. Linen is a part of flax.
OWNERS = {
    "tensorflow": ["data/pipeline.py"],
    "flax": ["models/"],
    "orbax": ["train/checkpoint.py"],
    "matplotlib": ["plots/"],
    "jsonargparse": ["common/cli.py"],
    "tensorboardX": ["train/run_folder.py"],
    "huggingface_hub": ["models/hub.py"],
    "pickle": ["models/torch_file.py"],  # with a `find_class` that refuses everything but tensors
    **{name: [] for name in ("cloudpickle", "dill", "joblib", "shelve", "torch")},  # these can run code from a file
}
CORE_MAY_IMPORT = {"jax", "optax", "numpy", *sys.stdlib_module_names}

# Modules that import by a name that is computed, or by a string; "?" is a name that only running shows.
HIDDEN_IMPORTS = {
    "jaxcats": ["?"],  # the public names, loaded at first use
    "jaxcats.common.cli": ["?", "?"],  # the commands
    "jaxcats.train.__main__": ["jaxcats.export.finish"],  # what follows a training stands to the right of train
}
# Leaf functions take plain arguments and not a Config; data/ shares the rules for data.labels with its validation.
CONFIG_NAMES = {f"jaxcats.common.config.{name}" for name in ("TABLES", "compiled", "label_kind")}


def violations(package: Path, hidden_imports: dict[str, list[str]]) -> list[str]:
    """One sentence for each import in a package that breaks a rule of the house."""
    files = {_module(path, package): path for path in sorted(package.rglob("*.py"))}
    graph = {module: _imported_modules(path, set(files)) for module, path in files.items()}
    mains = {module for module in files if module.endswith(".__main__") or (_rank(module) == len(ORDER))}
    broken = []
    for module, path in files.items():
        relative, names = path.relative_to(package).as_posix(), set(_imports(path))
        folder = relative.split("/")[0]
        for other in graph[module]:
            if _rank(other) > _rank(module) and module != package.name:
                broken.append(f"{module} imports {other}: against the direction")
            if other in mains:
                broken.append(f"{module} imports {other}: a command")
            if other == package.name and not names & {package.name, f"{package.name}.__version__"}:
                broken.append(f"{module} imports a public name from {package.name}")
        hidden = list(_hidden_imports(path))
        if hidden != hidden_imports.get(module, []):
            broken.append(f"{module} imports by name: {', '.join(hidden)}")
        for library, owners in OWNERS.items():
            is_owner = any(relative == owner or relative.startswith(owner) for owner in owners)
            if not is_owner and any(_is_in(name, library) for name in names):
                broken.append(f"{module} imports {library}")
        if folder == "core":
            foreign = {n for n in names if n.split(".")[0] not in CORE_MAY_IMPORT and not _is_in(n, "jaxcats.core")}
            broken += [f"{module} imports {name}: not for core" for name in sorted(foreign)]
        if folder in ("core", "data", "models", "plots"):
            config = {name for name in names if _is_in(name, "jaxcats.common.config")}
            broken += [
                f"{module} imports {name}: a leaf" for name in config if folder != "data" or name not in CONFIG_NAMES
            ]
    broken += [f"a circle of files: {' -> '.join(circle)}" for circle in _circles(graph)]
    folders: dict[str, set[str]] = {}
    for module, others in graph.items():
        folders.setdefault(_folder(module), set()).update(set(map(_folder, others)) - {_folder(module)})
    return broken + [f"a circle of folders: {' -> '.join(circle)}" for circle in _circles(folders)]


def _module(path: Path, package: Path) -> str:
    return ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")


def _folder(module: str) -> str:
    return ".".join(module.split(".")[:2])


def _rank(module: str) -> int:
    """Where a module stands in the direction; the package itself comes first, its commands come last."""
    top = module.split(".")[1] if "." in module else None
    return ORDER.index(top) if top in ORDER else -1 if top is None else len(ORDER)


def _is_in(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _imports(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports at run time; `from a import b` is a.b."""
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import, which this test can't follow"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _hidden_imports(path: Path) -> Iterator[str]:
    """The argument of every call of `import_module` and `__import__` in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if function in ("import_module", "__import__"):
                name = node.args[0] if node.args else None
                yield str(name.value) if isinstance(name, ast.Constant) else "?"


def _imported_modules(path: Path, modules: set[str]) -> set[str]:
    """The modules among `modules` that a file imports: a.b.c is the module a.b where there is no module a.b.c."""
    found = set()
    for name in _imports(path):
        while name and name not in modules:
            name = name.rpartition(".")[0]
        found |= {name} - {""}
    return found


def _circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Paths that lead back to where they begin, one for each edge that closes one in a depth-first search."""
    circles: list[list[str]] = []
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> None:
        if node in path:
            circles.append([*path[path.index(node) :], node])
        elif node not in done:
            for other in sorted(graph.get(node, ())):
                visit(other, [*path, node])
            done.add(node)

    for node in graph:
        visit(node, [])
    return circles


def test_every_import_keeps_the_rules_of_the_house():
    assert violations(PACKAGE, HIDDEN_IMPORTS) == []


def test_the_top_of_the_package_stays_small():
    entries = [p.name for p in PACKAGE.iterdir() if p.name not in ("__pycache__", "py.typed")]
    assert len(entries) <= ENTRIES, sorted(entries)
    assert set(ORDER) <= set(entries)


@pytest.mark.parametrize("library", [library for library, owners in OWNERS.items() if owners and library != "pickle"])
def test_each_fence_has_something_behind_it(library):
    names = [name for path in PACKAGE.rglob("*.py") for name in _imports(path)]
    assert any(_is_in(name, library) for name in names), f"no file imports {library}: remove its fence"


PLANTED = [
    ("common/io.py", "from jaxcats.train import loop", "jaxcats.common.io imports jaxcats.train.loop: against"),
    (
        "common/io.py",
        "def f():\n    import jaxcats.train.loop",
        "jaxcats.common.io imports jaxcats.train.loop: against",
    ),
    ("train/loop.py", "def f():\n    from jaxcats import predict", "imports jaxcats.predict: a command"),
    ("predict.py", "from jaxcats.train.__main__ import main", "imports jaxcats.train.__main__: a command"),
    ("predict.py", "from jaxcats import load", "imports a public name"),
    (
        "train/__main__.py",
        "import importlib\nimportlib.import_module('jaxcats.export.finish')",
        "imports by name: jaxcats.export",
    ),
    (
        "train/loop.py",
        "from importlib import import_module\nimport_module('json')",
        "jaxcats.train.loop imports by name: json",
    ),
    (
        "train/loop.py",
        "def f():\n    from jaxcats.train.step import g",
        "a circle of files: jaxcats.train.loop -> jaxcats.train.step",
    ),
    ("common/io.py", "from jaxcats.train import loop", "a circle of folders: jaxcats.common -> jaxcats.train"),
    ("train/loop.py", "import tensorflow.data as tfd", "jaxcats.train.loop imports tensorflow"),
    ("train/loop.py", "if True:\n    from flax import linen", "jaxcats.train.loop imports flax"),
    ("train/loop.py", "import torch", "jaxcats.train.loop imports torch"),
    ("core/mesh.py", "import scipy", "jaxcats.core.mesh imports scipy: not for core"),
    ("core/mesh.py", "from jaxcats.common import io", "imports jaxcats.common.io: not for core"),
    ("data/files.py", "from jaxcats.common.config import Config", "imports jaxcats.common.config.Config: a leaf"),
]


@pytest.mark.parametrize(("file", "code", "sentence"), PLANTED)
def test_a_planted_violation_is_caught(tmp_path, file, code, sentence):
    package = tmp_path / "jaxcats"
    allowed = "import importlib\nimportlib.import_module('jaxcats.export.finish')\n"
    for name, text in {
        "__init__.py": "",
        "common/io.py": "import os\n",
        "common/config.py": "class Config: ...\ndef label_kind(labels): ...\n",
        "core/mesh.py": "import jax\nfrom jaxcats.core import state\n",
        "core/state.py": "import numpy as np\n",
        "data/files.py": "from typing import TYPE_CHECKING\nfrom jaxcats.common.config import label_kind\n"
        "if TYPE_CHECKING:\n    from jaxcats.train import loop\n",
        "train/__main__.py": f"from jaxcats.train import loop\n{allowed}",
        "train/loop.py": "from jaxcats.common import io\n",
        "train/step.py": "from jaxcats.train import loop\n",
        "export/finish.py": "from jaxcats.train.loop import f\n",
        "predict.py": "from jaxcats.common import io\n",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    hidden = {"jaxcats.train.__main__": ["jaxcats.export.finish"]}
    assert violations(package, hidden) == []
    with (package / file).open("a") as open_file:
        open_file.write(code + "\n")
    assert any(sentence in violation for violation in violations(package, hidden)), violations(package, hidden)


TRAINING = ["flax", "jsonargparse", "optax", "orbax", "tensorflow", "yaml"]
HEAVY = [*TRAINING, "huggingface_hub", "jax", "matplotlib", "tensorboardX"]


@pytest.mark.parametrize(
    ("statement", "libraries"),
    [
        ("import jaxcats", [*HEAVY, "numpy", "PIL"]),
        ("jaxcats.Config, jaxcats.main, jaxcats.train_main, jaxcats.UserError", HEAVY),
        ("import jaxcats.evaluate.__main__, jaxcats.predict, jaxcats.doctor, jaxcats.weights, jaxcats.compare", HEAVY),
        ("import jaxcats.data.index, jaxcats.data.labels, jaxcats.train.run_folder, jaxcats.evaluate.metrics", HEAVY),
        ("jaxcats.load", TRAINING),
        ("import jaxcats.core.step, jaxcats.core.scan", sorted(set(HEAVY) - {"jax", "optax"})),
        (
            "import jaxcats.train.loop, jaxcats.train.experiment, jaxcats.train.drivers",
            ["tensorflow", "matplotlib", "tensorboardX", "huggingface_hub"],
        ),
    ],
)
def test_an_import_loads_only_what_it_needs(statement, libraries):
    """In a process of its own, because this one has loaded everything."""
    code = f"import sys, jaxcats; {statement}; print(*sorted(set({libraries!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
