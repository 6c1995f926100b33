"""What is packed."""

from __future__ import annotations

from pathlib import Path

import pytest

from robust_prune import cli


def test_the_package_list_is_complete():
    import tomllib

    root = Path(cli.__file__).parent.parent
    project = root / "pyproject.toml"
    if not project.exists():
        pytest.skip("not a source checkout")
    listed = set(tomllib.loads(project.read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(p.parent.relative_to(root).parts) for p in (root / "robust_prune").rglob("*.py")}
    assert listed == found | {"robust_prune.recipes", "robust_prune.data.sample"}


def test_no_module_hides_a_public_function() -> None:
    """A module of the package becomes its attribute as soon as it is imported."""
    import robust_prune as rp

    modules = {path.stem for path in Path(rp.__file__).parent.iterdir() if not path.name.startswith("_")}
    assert not modules & set(rp.__all__)
    rp.compress  # noqa: B018  # imports nearly all of them
    assert all(callable(getattr(rp, name)) for name in rp.__all__ if name != "__version__")
