"""A user's own file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders.model_files import USER_FILE, make_spec

from robust_prune.errors import UsageError
from robust_prune.models import registry, user_file


def test_user_function_is_called_with_what_it_accepts(user_file: Path) -> None:
    model = registry.build(make_spec(f"{user_file}:make_model", kwargs={"width": 4}))
    assert model.backbone.conv.out_channels == 4 and model.backbone.head.out_features == 7
    assert registry.build(make_spec(f"{user_file}:fixed")).backbone.head.out_features == 7


def test_user_file_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour_blocks.py").write_text("from torch import nn\nhead = nn.Linear\n")
    path = tmp_path / "with_import.py"
    path.write_text(
        "from torch import nn\nfrom neighbour_blocks import head\n"
        "def make(num_classes): return nn.Sequential(nn.Flatten(), head(3072, num_classes))\n"
    )
    assert registry.build(make_spec(f"{path}:make"))(torch.rand(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("broken", r"my_model.py:22: KeyError: 'key'"),
        ("make_modle", "Did you mean make_model"),
        ("tuple_out", "logits alone"),
        ("not_a_module", "must return a torch.nn.Module, got int"),
    ],
)
def test_errors_in_a_users_file_are_named(user_file: Path, function: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        registry.build(make_spec(f"{user_file}:{function}"))


def test_errors_while_importing_and_running_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("import torch\n\ndef make(:\n    pass\n")
    with pytest.raises(UsageError, match=r"bad.py:3: SyntaxError"):
        registry.build(make_spec(f"{path}:make"))
    path.write_text("import torch\nimport no_such_package_here\n")
    with pytest.raises(UsageError, match=r"bad.py:2: ModuleNotFoundError"):
        registry.build(make_spec(f"{path}:make"))
    path.write_text(
        "from torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n        return x @ 3\n"
        "def make():\n    return Net()\n"
    )
    with pytest.raises(UsageError, match=r"cannot run on 3x32x32 images: .*bad.py:4: TypeError"):
        registry.build(make_spec(f"{path}:make"))


def test_wrong_number_of_classes_is_seen_at_once(user_file: Path) -> None:
    with pytest.raises(UsageError, match=r"logits \(1, 9\), but gave \(1, 7\)"):
        registry.build(make_spec(f"{user_file}:fixed", num_classes=9))


def test_a_changed_user_file_is_refused(user_file: Path) -> None:
    spec = make_spec(f"{user_file}:make_model")
    assert len(spec.source_sha256) == 64
    user_file.write_text(USER_FILE + "\n# touched\n")
    with pytest.raises(UsageError, match="has changed"):
        registry.build(spec)


def test_a_file_without_a_function_is_explained(user_file: Path) -> None:
    with pytest.raises(UsageError, match="names no function"):
        make_spec(str(user_file))


def test_a_file_that_changes_while_it_is_used_is_named(tmp_path: Path) -> None:
    path = tmp_path / "loss.py"
    path.write_text("def mine(): ...\n")
    names = ("n_fgsm", f"{path}:mine")
    before = user_file.versions(*names)
    user_file.check_unchanged(names, before)
    path.write_text("def mine(): return 1\n")
    with pytest.raises(UsageError, match=r"loss\.py:mine, or a file that it imports, was changed during the run"):
        user_file.check_unchanged(names, before)
