"""A user's file and what it imports from its folder: one identity, run apart from everything else."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from builders.model_files import make_spec
from torch import nn

from robust_prune.errors import UsageError
from robust_prune.models import registry, user_code, user_file

NET = """
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(3072, num_classes)

    def forward(self, x):
        return self.head(x.flatten(1)) * {scale}
"""
MODEL = "{imports}\n\n\ndef make(num_classes):\n    return Net(num_classes)\n"


def write(folder: Path, files: dict[str, str]) -> Path:
    """Write files and return ``model.py``."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / "model.py"


def scale_of(path: Path) -> float:
    """What the network of `path` multiplies its logits by."""
    model = registry.build(make_spec(f"{path}:make")).eval()
    with torch.no_grad():
        nn.init.zeros_(model.backbone.head.weight)
        nn.init.ones_(model.backbone.head.bias)
        return float(model(torch.zeros(1, 3, 32, 32))[0, 0])


def names(path: Path) -> tuple[str, ...]:
    return user_code.read(path).helpers


def test_a_file_without_helpers_keeps_its_plain_hash(tmp_path: Path) -> None:
    path = write(tmp_path, {"model.py": NET.format(scale=1), "other.py": "x = 1\n", "json.py": "x = 1\n"})
    path.write_text("import json\n" + path.read_text())
    assert user_file.sha256(f"{path}:make") == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("files", "helpers"),
    [
        ({"model.py": "import body", "body.py": ""}, ["body.py"]),
        ({"model.py": "import body as b, far.net", "body.py": "", "far/net.py": ""}, ["body.py", "far/net.py"]),
        ({"model.py": "def f():\n    from b import Net", "b.py": "import more", "more.py": ""}, ["b.py", "more.py"]),
        ({"model.py": "from .body import Net", "body.py": ""}, ["body.py"]),
        (
            {"model.py": "from nets.wide import W", "nets/__init__.py": "", "nets/wide.py": "from . import layers\n"
             "from .layers import L", "nets/layers.py": "", "nets/unused.py": ""},
            ["nets/__init__.py", "nets/layers.py", "nets/wide.py"],
        ),
        (
            {"model.py": "from nets import *", "nets/__init__.py": "", "nets/a.py": ""},
            ["nets/__init__.py", "nets/a.py"],
        ),
        ({"model.py": "import torch, random", "torch.py": "", "random.py": ""}, []),
        (
            {"model.py": "import importlib\nn = 'a'\nm = importlib.import_module(n)", "a.py": "", "sub/b.py": "",
             ".hidden/c.py": "", "env/pyvenv.cfg": "", "env/d.py": ""},
            ["a.py", "sub/b.py"],
        ),
        ({"model.py": "from importlib import import_module as im\nim('a')", "a.py": ""}, ["a.py"]),
        ({"model.py": "import body\nimport gone", "body.py": "import model\ndef f(:"}, ["body.py"]),
    ],
)  # fmt: skip
def test_imports_are_found_in_the_source(tmp_path: Path, files: dict[str, str], helpers: list[str]) -> None:
    path = write(tmp_path, files)
    before = user_file.versions(f"{path}:make")
    assert list(names(path)) == helpers
    for helper in helpers:
        (tmp_path / helper).write_text((tmp_path / helper).read_text() + "\n# changed\n")
        assert user_file.versions(f"{path}:make") != before, helper
        before = user_file.versions(f"{path}:make")
    (tmp_path / "unrelated_notes.txt").write_text("x")
    assert user_file.versions(f"{path}:make") == before


def test_the_hash_does_not_depend_on_where_the_folder_is(tmp_path: Path) -> None:
    files = {"model.py": "import body", "body.py": ""}
    one, other = (write(tmp_path / name, files) for name in ("one", "other"))
    assert user_file.sha256(f"{one}:make") == user_file.sha256(f"{other}:make")
    (tmp_path / "other" / "body.py").rename(tmp_path / "other" / "bodies.py")
    other.write_text("import bodies")
    assert user_file.sha256(f"{one}:make") != user_file.sha256(f"{other}:make")


def test_equal_names_in_two_folders_stay_apart_and_an_edit_is_seen(tmp_path: Path) -> None:
    made = {}
    for name, scale in (("a", 2), ("b", 3)):
        files = {"model.py": MODEL.format(imports="from body import Net"), "body.py": NET.format(scale=scale)}
        made[name] = write(tmp_path / name, files)
    assert [scale_of(made[name]) for name in "aba"] == [2, 3, 2]
    spec = make_spec(f"{made['a']}:make")
    (tmp_path / "a" / "body.py").write_text(NET.format(scale=5))  # of the same length, within the same second
    assert scale_of(made["a"]) == 5
    with pytest.raises(UsageError, match=r"a file that it imports: body\.py\) has changed"):
        registry.build(spec)
    assert not (tmp_path / "a" / "__pycache__").exists()
    assert "body" not in sys.modules


LAZY = """
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        {inside}
        self.head = nn.Linear(3072, num_classes)

    def forward(self, x):
        {inside}
        return self.head(x.flatten(1)) * scale
"""


@pytest.mark.parametrize(
    "inside", ["from late import scale", "from .late import scale", "import late; scale = late.scale",
               "import importlib; scale = importlib.import_module('la' + 'te').scale"],
)  # fmt: skip
def test_imports_inside_functions_work_when_they_run(tmp_path: Path, inside: str) -> None:
    for name, scale in (("a", 2), ("b", 3), ("c", 4)):
        body = LAZY.format(inside=inside)
        files = {
            "model.py": MODEL.format(imports="from body import Net"),
            "body.py": body,
            "late.py": f"scale = {scale}",
        }
        assert scale_of(write(tmp_path / name, files)) == scale
    # What was read is what runs, also if it is imported later.
    files = {
        "model.py": NET.format(scale="__import__('late').scale") + MODEL.format(imports=""),
        "late.py": "scale = 7",
    }
    spec = make_spec(f"{write(tmp_path / 'd', files)}:make")
    model = registry.build(spec, check=False)
    (tmp_path / "d" / "late.py").write_text("scale = 8")
    with pytest.raises(UsageError, match="has changed"):
        registry.build(spec)
    nn.init.zeros_(model.backbone.head.weight)
    nn.init.ones_(model.backbone.head.bias)
    assert torch.equal(model(torch.zeros(1, 3, 32, 32)), torch.full((1, 7), 7.0))


def test_a_package_with_relative_imports_runs(tmp_path: Path) -> None:
    common = "from . import DEPTH\n" + NET.format(scale="DEPTH")
    write(tmp_path, {
        "zoo/__init__.py": "DEPTH = 2\n", "zoo/common.py": common,
        "zoo/nets/__init__.py": "", "zoo/nets/model.py": MODEL.format(imports="from ..common import Net"),
    })  # fmt: skip
    path = tmp_path / "zoo" / "nets" / "model.py"
    assert names(path) == ("../__init__.py", "../common.py", "__init__.py")
    assert scale_of(path) == 2


def test_absolute_imports_through_the_files_own_package_run(tmp_path: Path) -> None:
    model = MODEL.format(imports="from zoo.body import Net")
    write(tmp_path, {"zoo/__init__.py": "", "zoo/body.py": NET.format(scale=3), "zoo/model.py": model})
    assert scale_of(tmp_path / "zoo" / "model.py") == 3


def test_a_relative_import_beyond_the_package_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"model.py": "\nfrom ..body import Net\n"})
    with pytest.raises(UsageError, match=r"model\.py:2: ImportError: attempted relative import beyond top-level"):
        registry.build(make_spec(f"{path}:make"))


def test_files_named_like_installed_modules_do_no_harm(tmp_path: Path) -> None:
    bad = dict.fromkeys(("random.py", "torch.py", "queue.py", "timm.py", "numpy.py"), "raise RuntimeError('not me')\n")
    imports = "import random, queue, torch, numpy\nfrom body import Net"
    path = write(tmp_path, {"model.py": MODEL.format(imports=imports), "body.py": NET.format(scale=2), **bad})
    assert scale_of(path) == 2 and names(path) == ("body.py",)
    write(tmp_path, {"model.py": "from code import Net\n", "code.py": NET.format(scale=2)})
    with pytest.raises(UsageError, match=r"model\.py:1: ImportError: .* Rename code\.py"):
        registry.build(make_spec(f"{path}:make"))


def test_a_data_folder_gives_way_to_an_installed_package(tmp_path: Path) -> None:
    model = MODEL.format(imports="import pluggy\nfrom body import Net\npluggy.PluginManager")
    path = write(tmp_path, {"model.py": model, "pluggy/data.txt": "", "body.py": NET.format(scale=2)})
    assert scale_of(path) == 2


def test_a_helper_that_fails_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, {"model.py": "import body\n", "body.py": "x = 1\ny = {}['key']\n"})
    with pytest.raises(UsageError, match=r"model\.py cannot be run: .*body\.py:2: KeyError"):
        registry.build(make_spec(f"{path}:make"))
    path.write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(UsageError, match=r"model\.py:2: SystemExit: 3"):
        registry.build(make_spec(f"{path}:make"))


def test_code_that_was_not_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"model.py": "open(__file__[:-8] + 'made.py', 'w').close()\nimport made\n"})
    with pytest.raises(UsageError, match=r"imports .*made\.py, which was not seen when its code was read"):
        registry.build(make_spec(f"{path}:make"))


def test_too_many_files_to_follow_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_code, "MOST_FILES", 3)
    path = write(tmp_path, {"model.py": "import importlib\nimportlib.import_module", **{f"{n}.py": "" for n in "abcd"}})
    with pytest.raises(UsageError, match=r"more than 3 Python files below .*to a folder of its own"):
        make_spec(f"{path}:make")


def test_losses_and_tiers_are_identified_with_their_helpers_too(tmp_path: Path) -> None:
    path = write(
        tmp_path, {"model.py": "def loss():\n    from terms import term\n    return term\n", "terms.py": "term = 1"}
    )
    assert user_file.load_function(f"{path}:loss")() == 1
    before = user_file.versions(f"{path}:loss")
    (tmp_path / "terms.py").write_text("term = 2")
    assert user_file.versions(f"{path}:loss") != before
    assert user_file.load_function(f"{path}:loss")() == 2


def test_modules_of_the_users_own_program_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = ModuleType("body")
    monkeypatch.setitem(sys.modules, "body", theirs)
    path = write(tmp_path, {"model.py": MODEL.format(imports="from body import Net"), "body.py": NET.format(scale=2)})
    assert scale_of(path) == 2 and sys.modules["body"] is theirs
