"""Files that are the old one or the new one."""

import json
import subprocess
import sys

import pytest

from jaxcats.common.io import write_bytes, write_json, write_text


def test_what_is_written_is_read_back(tmp_path):
    write_json(tmp_path / "a.json", {"class": "é", "n": [1, 0.1 + 0.2, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"class": "é", "n": [1, 0.1 + 0.2, None]}
    write_text(tmp_path / "new" / "folder" / "b.txt", "été \udcff\n")  # a file name that is not UTF-8 keeps its byte
    assert (tmp_path / "new" / "folder" / "b.txt").read_bytes() == "été ".encode() + b"\xff\n"


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"new")
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


NOTEBOOK = """
import sys, types, warnings
warnings.simplefilter("error")
shell = type("ZMQInteractiveShell", (), {"config": {"IPKernelApp": {}}})()
sys.modules["IPython"] = types.SimpleNamespace(get_ipython=lambda: shell, version_info=(9,))
sys.modules["ipywidgets"] = None
"""


@pytest.mark.parametrize(("before", "shows"), [("", False), (NOTEBOOK, True)], ids=["no terminal", "notebook"])
def test_the_progress_bar_counts_images_where_somebody_looks(before, shows):
    program = f"{before}\nfrom jaxcats.common.io import progress_bar\nwith progress_bar(total=3) as bar: bar.update(3)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert ("img/s" in done.stderr) is shows
    assert "Warning" not in done.stderr


def test_a_long_name_has_room_for_its_temporary(tmp_path):
    path = tmp_path / ("x" * 240 + ".json")
    write_json(path, 1)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
