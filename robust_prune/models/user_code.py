"""A user's Python file with the modules that it imports from its own folder: identified as a whole, and run apart.

The imports are found in the source, also those inside functions, so that the code is known before it is run. What runs
is what was read. Modules of the user's folder are registered under a name of their own, and only import statements of
the user's code see them: files such as ``random.py`` in that folder, and equal names in two folders, do no harm.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import importlib
import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import UsageError

MOST_FILES = 1000
_PREFIX = "robust_prune_user_"
# A file of the user's folder never stands in for a module of Python or for a package that this one runs on.
_INSTALLED = sys.stdlib_module_names | {
    "PIL", "accelerate", "cyclopts", "jinja2", "matplotlib", "numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript",
    "pyautoattack", "pydantic", "rich", "robust_prune", "safetensors", "timm", "torch", "torch_pruning", "torchvision",
    "yaml",
}  # fmt: skip
_BY_NAME = frozenset(
    {"__import__", "exec", "import_module", "run_module", "run_path", "spec_from_file_location", "SourceFileLoader"}
)
"""Functions that may import any file of the folder, so that the source does not say which; so may ``sys.path``."""


@dataclass(frozen=True)
class UserCode:
    """A user's file and the files of its folder that it may import, as they were read.

    Attributes:
        path: the file.
        files: contents of all files by path, including `path`.
        places: folders in which absolute imports look: that of the file and, for a file of a package, that of the
            outermost package.
        package: dotted name of the package to which the relative imports of the file refer; empty for a file without.
    """

    path: Path
    files: Mapping[Path, bytes] = field(repr=False)
    places: tuple[Path, ...]
    package: str

    @cached_property
    def sha256(self) -> str:
        """SHA-256 (hex) of the file or, if it imports others, of the names and contents of all of them."""
        if len(self.files) == 1:
            return hashlib.sha256(self.files[self.path]).hexdigest()
        parts = {self._name(file): hashlib.sha256(content).hexdigest() for file, content in self.files.items()}
        return hashlib.sha256("\n".join(f"{name} {parts[name]}" for name in sorted(parts)).encode()).hexdigest()

    @property
    def helpers(self) -> tuple[str, ...]:
        """Names of the other files, relative to the folder of the file."""
        return tuple(sorted(self._name(file) for file in self.files if file != self.path))

    def place_of(self, name: str) -> int | None:
        """Return the index in `places` where an absolute import of `name` is found; None if it is not the user's."""
        top = name.partition(".")[0]
        if top in _INSTALLED:
            return None
        for index, place in enumerate(self.places):
            spec = _find(top, [str(place)])
            # As in Python, a folder without __init__.py gives way to an installed package.
            if spec is not None and (spec.origin is not None or not _is_installed(top, self.places)):
                return index
        return None

    def hint(self, error: BaseException) -> str:
        """Return a remedy for an import that found an installed module in place of the user's, or an empty string."""
        top = (getattr(error, "name", None) or "").partition(".")[0]
        own = self.path.parent / f"{top}.py"
        if not isinstance(error, ImportError) or top not in _INSTALLED or not own.is_file():
            return ""
        return f". Rename {own.name}: the installed module of that name comes first"

    def _name(self, file: Path) -> str:
        return Path(os.path.relpath(file, self.path.parent)).as_posix()


def read(path: Path) -> UserCode:
    """Return the code of a user's file: the file and, recursively, what it imports from its folder.

    Code that imports by name, as ``importlib.import_module`` does, may import each Python file below its folder, and
    all of them are taken. Data files and modules from other places, such as installed packages, are not included.

    Raises:
        UsageError: a file cannot be read, or there are more than 1000.
    """
    importlib.invalidate_caches()
    path = path.resolve()
    folder = path.parent
    root = next(place for place in (folder, *folder.parents) if not (place / "__init__.py").is_file())
    first = _bytes(path)
    inside = root != folder and any(level for level, _, _ in _imports(_parsed(first)))
    package = ".".join(folder.relative_to(root).parts) if inside else ""
    code = UserCode(path, {}, (folder,) if root == folder else (folder, root), package)
    open_files = [path, *_packages(root, folder)] if inside else [path]
    files: dict[Path, bytes] = {}
    while open_files:
        file = open_files.pop()
        if file in files:
            continue
        files[file] = _bytes(file)
        if len(files) > MOST_FILES:
            raise UsageError(
                f"{path} may import each of more than {MOST_FILES} Python files below {folder}. Move it, with what it "
                "imports, to a folder of its own."
            )
        if file.suffix == ".py":
            tree = _parsed(files[file])
            open_files += _imported(code, file, tree)
            open_files += itertools.islice(_all_below(folder), MOST_FILES + 1) if _imports_by_name(tree) else ()
    return UserCode(path, files, code.places, package)


def run(code: UserCode) -> ModuleType:
    """Return the module of a user's file, which is run once in a process as long as no file changes.

    Raises:
        Exception: whatever the file raises.
        UsageError: it imports a file that is not part of its code.
    """
    label = _registered(code)
    parent = f"{label}_package.{code.package}" if code.package else label
    name = f"{parent}.{code.path.stem.replace('.', '_')}"
    owner = importlib.import_module(parent)
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, code.path, loader=_Loader(name, str(code.path), code, label))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    # Dataclasses and pickle look up their module by name while it runs.
    sys.modules[name] = module
    before = set(sys.modules)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        _ALIASES.update(new for new in sys.modules.keys() - before if _owner(new) != label and _label_of(new) == label)
    setattr(owner, name.rpartition(".")[2], module)
    return module


_RUNNING: dict[str, UserCode] = {}
"""Code that was run in this process, by the name of its module."""
_ALIASES: set[str] = set()
"""Modules that users' code imported by name, and that are known under it to the whole process."""


def _registered(code: UserCode) -> str:
    """Return the name under which the modules of `code` are registered."""
    base = f"{_PREFIX}{code.sha256[:16]}"
    labels = itertools.chain([base], (f"{base}_{number}" for number in itertools.count(2)))
    label = next(label for label in labels if label not in _RUNNING or _RUNNING[label].path == code.path)
    if label not in _RUNNING:
        _RUNNING[label] = code
        for name, place in zip((label, f"{label}_package"), code.places, strict=False):
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(place)]
            sys.modules[name] = module_from_spec(spec)
        for alias in _ALIASES:
            sys.modules.pop(alias, None)
        _ALIASES.clear()
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    return label


def _owner(module_name: str) -> str:
    return module_name.partition(".")[0].removesuffix("_package")


def _label_of(module_name: str, file: str | None = None) -> str:
    """Return the name of the code to which a module belongs, by its own name or its file; empty for none."""
    if _owner(module_name) in _RUNNING:
        return _owner(module_name)
    file = file or getattr(sys.modules.get(module_name), "__file__", None)
    return next((label for label, code in _RUNNING.items() if file and Path(file) in code.files), "")


class _Finder(MetaPathFinder):
    """Finds the modules of users' code, under the name of that code, and those that it imports by name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        label = _owner(fullname)
        if label not in _RUNNING:
            return self._by_name(fullname)
        code, spec = _RUNNING[label], PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None:
            return spec
        if Path(spec.origin) not in code.files:
            raise UsageError(
                f"{code.path} imports {spec.origin}, which was not seen when its code was read. Import it by an import "
                "statement, and start again."
            )
        if isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(fullname, spec.origin, code, label)
        return spec

    def _by_name(self, fullname: str) -> ModuleSpec | None:
        frame = sys._getframe(2)
        while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("importlib"):
            frame = frame.f_back
        label = _label_of(str(frame.f_globals.get("__name__")), frame.f_globals.get("__file__"))
        home = _home(_RUNNING[label], label, fullname) if label else None
        if home is None:
            return None
        _ALIASES.add(fullname)
        return ModuleSpec(fullname, _Alias(f"{home}.{fullname}"))


class _Loader(SourceFileLoader):
    """Runs what was read when the code was identified, never a cached or a newer file."""

    def __init__(self, fullname: str, path: str, code: UserCode, label: str) -> None:
        super().__init__(fullname, path)
        self.code, self.label = code, label

    def get_code(self, fullname: str) -> Any:
        path = self.get_filename(fullname)
        return self.source_to_code(self.code.files[Path(path)], path)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _importer(self.code, self.label)}
        super().exec_module(module)


class _Alias(Loader):
    """Gives an import by name the module that an import statement of the same code gives."""

    def __init__(self, name: str) -> None:
        self.name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.name)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


_FINDER = _Finder()


def _home(code: UserCode, label: str, name: str) -> str | None:
    place = code.place_of(name)
    return None if place is None else (label, f"{label}_package")[place]


def _importer(code: UserCode, label: str) -> Any:
    """Return the ``__import__`` of a user's module, which looks in the user's folder first."""

    def user_import(
        name: str,
        globals: Mapping[str, object] | None = None,  # the names of Python's own `__import__`
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        home = _home(code, label, name) if level == 0 else None
        if home is None:
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        found = builtins.__import__(f"{home}.{name}", globals, locals, fromlist or (), 0)
        return found if fromlist else sys.modules[f"{home}.{name.partition('.')[0]}"]

    return user_import


def _imported(code: UserCode, file: Path, tree: ast.AST) -> Iterator[Path]:
    for level, module, names in _imports(tree):
        if level:
            where = [str(file.parents[min(level, len(file.parents)) - 1])]
            yield from (found for found in [Path(where[0]) / "__init__.py"] if found.is_file())
        else:
            place = code.place_of(module)
            where = [] if place is None else [str(code.places[place])]
        for part in filter(None, module.split(".")):
            spec = _find(part, where)
            where = [] if spec is None else list(spec.submodule_search_locations or ())
            yield from _file_of(spec)
        for name in names:
            yield from _file_of(_find(name, where))
            if name == "*":
                yield from (found for place in where for found in Path(place).glob("*.py"))


def _imports(tree: ast.AST) -> Iterator[tuple[int, str, list[str]]]:
    """Level, module and names of each import statement, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [alias.name for alias in node.names]


def _imports_by_name(tree: ast.AST) -> bool:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "path" and getattr(node.value, "id", None) == "sys":
            return True
        name = node.name if isinstance(node, ast.alias) else getattr(node, "id", getattr(node, "attr", None))
        if name in _BY_NAME:
            return True
    return False


def _find(name: str, where: Sequence[str]) -> ModuleSpec | None:
    return PathFinder.find_spec(name, list(where)) if where else None


def _file_of(spec: ModuleSpec | None) -> Iterator[Path]:
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin)


def _is_installed(top: str, places: Sequence[Path]) -> bool:
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() not in places]
    spec = _find(top, elsewhere)
    return spec is not None and spec.origin is not None


def _packages(root: Path, folder: Path) -> list[Path]:
    """Return the ``__init__.py`` of all packages from `folder` up to below `root`."""
    inside = [folder, *(parent for parent in folder.parents if parent.is_relative_to(root) and parent != root)]
    return [package / "__init__.py" for package in inside]


def _all_below(folder: Path) -> Iterator[Path]:
    """All Python files below a folder except those of hidden folders, environments and installed packages."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name not in ("__pycache__", "site-packages", "node_modules")
            and not (Path(place) / name / "pyvenv.cfg").exists()
        )
        yield from (Path(place) / name for name in sorted(files) if name.endswith(".py"))


def _parsed(source: bytes) -> ast.AST:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):  # said, with its line, when the file is run
        return ast.Module([], [])


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from error
