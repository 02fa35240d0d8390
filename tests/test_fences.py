"""Which file may import what: the walls that keep start-up fast and a library's swap cheap."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxcats

PACKAGE = Path(jaxcats.__path__[0])
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at its top or inside functions; `from a import b` gives a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide from this test"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def importers(library: str) -> set[str]:
    return {
        name for name, path in FILES.items() if any(i == library or i.startswith(library + ".") for i in imports(path))
    }


def test_the_scan_sees_imports_of_every_form(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("import a.b as c, d\nfrom e import f\ndef g():\n    if g:\n        from h.i import j as k\n")
    assert imports(file) == {"a.b", "d", "e.f", "h.i.j"}


@pytest.mark.parametrize(
    ("library", "owner"),
    [
        ("tensorflow", "data/pipeline.py"),
        ("flax", "models/"),
        ("orbax", "storage/checkpoint.py"),
        ("matplotlib", "results/plots/"),
        ("jsonargparse", "cli.py"),
        ("tensorboardX", "storage/log.py"),
        ("huggingface_hub", "models/hub.py models/transfer.py"),
    ],
)
def test_a_library_stays_behind_its_wall(library, owner):
    found, owners = importers(library), owner.split()
    assert all(any(name == o or (o.endswith("/") and name.startswith(o)) for o in owners) for name in found), found
    assert found  # a wall around nothing would be a slip of this test


@pytest.mark.parametrize("library", ["pickle", "cPickle", "cloudpickle", "dill", "joblib", "torch", "shelve"])
def test_nothing_imports_what_can_run_code_from_a_file(library):
    assert importers(library) == ({"models/torch_file.py"} if library == "pickle" else set())


def test_the_core_stands_alone():
    allowed = {"jax", "optax", "numpy", *sys.stdlib_module_names}
    for name, path in FILES.items():
        if name.startswith("core/"):
            strange = {i for i in imports(path) if i.split(".")[0] not in allowed and not i.startswith("jaxcats.core")}
            assert not strange, f"{name} imports {strange}"


def test_the_configuration_is_read_without_jax_or_tensorflow():
    for name in ("config.py", "errors.py", "cli.py"):
        assert not {i.split(".")[0] for i in imports(FILES[name])} & {"jax", "numpy", "optax", "tensorflow"}, name


def test_leaf_folders_do_not_know_the_configuration():
    """Leaf functions take plain arguments, so that they can be used without a Config."""
    for name in importers("jaxcats.common.config"):
        assert name.split("/")[0] not in ("core", "data", "models", "results", "storage"), name


# What a module may not load, even through others; a subprocess, because this one has loaded everything.
HEAVY = ["flax", "jax", "matplotlib", "optax", "orbax", "tensorflow", "tensorboardX", "huggingface_hub"]


@pytest.mark.parametrize(
    ("modules", "lightly"),
    [
        (["cli", "config", "errors", "train", "evaluate", "weights", "results.metrics"], HEAVY),
        (["data.index", "data.images", "data.labels", "train.run_folder"], HEAVY),
        (["core.step", "core.scan", "core.state", "core.optim"], sorted(set(HEAVY) - {"jax", "optax"})),
        (["fit", "job", "inputs"], ["tensorflow", "matplotlib", "tensorboardX", "huggingface_hub"]),
    ],
    ids=["commands", "files", "core", "runs"],
)
def test_importing_stays_light(modules, lightly):
    code = (
        f"import sys, {', '.join('jaxcats.' + m for m in modules)}; print(*sorted(set({lightly!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_files_stay_small_enough_to_read():
    long = {name: n for name, path in FILES.items() if (n := len(path.read_text(encoding="utf-8").splitlines())) > 330}
    assert not long


def test_the_tests_that_the_readme_names_exist():
    root = Path(__file__).parents[1]
    named = re.findall(r"`(tests/[a-z_/]+\.py)::(test_\w+)`", (root / "README.md").read_text(encoding="utf-8"))
    assert len(named) > 15
    for file, test in named:
        assert f"def {test}(" in (root / file).read_text(encoding="utf-8"), test
