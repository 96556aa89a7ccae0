"""The architecture as a test: rooms import one way, and heavy packages load only where they may.

Every import of every file is read with `ast`, those inside functions included (a lazy import
is still a dependency between rooms). The list is that of DESIGN section 3; where a room was
moved, the list moved with it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "xdist": ROOT / "xdist",
    "xdist_kernels": ROOT / "kernels" / "xdist_kernels",
    "xdist_launchers": ROOT / "launchers" / "xdist_launchers",
}

# From the ground up: a room may import itself and rooms on lines above it. Rooms on one line
# do not import each other.
ORDER = (
    ("xdist_kernels",),
    ("errors", "console"),
    ("config",),
    ("layout", "balance", "documents", "mask", "dropout"),
    ("cost",),
    ("rank",),
    # A mesh makes its groups through comm.collectives, the only caller of torch.distributed.
    ("comm",),
    ("mesh",),
    ("shard", "grid_shard"),
    ("memory",),
    ("parallel",),
    ("ops",),
    ("nn",),
    # A model may be one of another library: integrations stand below models.
    ("integrations",),
    ("models",),
    ("data",),
    ("checkpoint",),
    # The training loop writes planned bytes beside measured ones, so plan stands below it.
    ("plan",),
    ("train",),
    # Judges runs: it reads their checkpoints and the store.
    ("volume",),
    ("testing",),
    ("certify",),
    ("dry_run",),
    ("xdist_launchers",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# Pure integers build on each other in this order: a layout is balanced by what a mask lets the
# queries of documents see.
WITHIN = {
    ("mask", "documents"),
    ("balance", "documents"),
    ("balance", "mask"),
    ("layout", "documents"),
    ("layout", "mask"),
    ("layout", "balance"),
    # A grid's flattened tokens are a sequence.
    ("grid_shard", "shard"),
}

C10D = {
    "xdist/comm/collectives.py",
    # Makes and leaves the default process groups that collectives.py moves data in.
    "xdist/comm/worlds.py",
    # The backend's own collectives, which engines make through xdist.
    "xdist/comm/flat.py",
    # Only fully_shard's API: it moves through comm/flat.py.
    "xdist/train/engines/fsdp_units.py",
}
RANK_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
OPTIONAL = {
    "deepspeed",
    "ray",
    "mpi4py",
    "triton",
    "flash_attn",
    "nibabel",
    "transformers",
    "tensorboard",
}
# Kernels of several families; those of one family are in its triton*.py.
TRITON = {"kernels/xdist_kernels/rows.py"}


@dataclass(frozen=True)
class Import:
    """One imported module: who, at which line, what, and whether inside a function."""

    file: str
    line: int
    module: str
    local: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def _sources() -> list[tuple[str, Path]]:
    """Every source file with the package it belongs to."""
    return [(name, path) for name, top in PACKAGES.items() for path in sorted(top.rglob("*.py"))]


def _module_name(package: str, path: Path) -> str:
    parts = path.relative_to(PACKAGES[package]).with_suffix("").parts
    return ".".join((package, *(part for part in parts if part != "__init__")))


def _imports(package: str, path: Path) -> list[Import]:
    """All modules a file imports, as absolute dotted names. `from a import b` counts as a.b."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.walk(node)
    }
    here = _module_name(package, path)
    parent = here if path.name == "__init__.py" else here.rpartition(".")[0]
    file = path.relative_to(ROOT).as_posix()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = parent.split(".")[: len(parent.split(".")) - node.level + 1]
                base = ".".join([*up, base] if base else up)
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [Import(file, node.lineno, name, id(node) in inside) for name in names]
    return found


def _room(module: str) -> str | None:
    """The room of a dotted name; None for code that is not ours or for `xdist` itself."""
    first, _, rest = module.partition(".")
    if first in ("xdist_kernels", "xdist_launchers"):
        return first
    if first != "xdist":
        return None
    room = _folded(rest.partition(".")[0])
    return room if room in LEVEL else None


def _folded(name: str) -> str:
    """config.py and the files beside it that share its name are one room."""
    return "config" if name.startswith("config_") else name


ALL = [
    (package, path, imported)
    for package, path in _sources()
    for imported in _imports(package, path)
]


def test_every_file_has_a_room() -> None:
    rooms = {
        _folded(_module_name(package, path).partition(".")[2].partition(".")[0])
        for package, path in _sources()
        if package == "xdist" and path != PACKAGES["xdist"] / "__init__.py"
    }
    assert rooms <= set(LEVEL), f"not on the list of rooms: {sorted(rooms - set(LEVEL))}"


def test_imports_point_one_way() -> None:
    wrong = []
    for package, path, imported in ALL:
        importer = _room(_module_name(package, path))
        target = _room(imported.module)
        if importer is None or target is None or importer == target:
            continue
        if LEVEL[target] < LEVEL[importer] or (importer, target) in WITHIN:
            continue
        wrong.append(f"{imported}, but {importer} stands below {target}")
    assert not wrong, "\n".join(wrong)


def test_xdist_init_imports_no_room_at_load_time() -> None:
    init = PACKAGES["xdist"] / "__init__.py"
    eager = [str(i) for _, path, i in ALL if path == init and not i.local and _room(i.module)]
    assert not eager, "\n".join(eager)


def test_only_collectives_uses_torch_distributed() -> None:
    users = {
        imported.file: str(imported)
        for _, _, imported in ALL
        if imported.module.startswith("torch.distributed")
    }
    users |= {
        path.relative_to(ROOT).as_posix(): f"{path}:{node.lineno} names torch.distributed"
        for _, path in _sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed")
    }
    wrong = {file: text for file, text in users.items() if file not in C10D}
    assert not wrong, "\n".join(wrong.values())


def _environment_reads(path: Path) -> list[tuple[int, str]]:
    """Lines that read a variable of RANK_VARIABLES: environ[...], environ.get, getenv."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            owner, key = ast.unparse(node.value), node.slice
        elif isinstance(node, ast.Call) and node.args:
            owner, key = ast.unparse(node.func), node.args[0]
        else:
            continue
        if ("environ" in owner or "getenv" in owner) and isinstance(key, ast.Constant):
            found.append((node.lineno, str(key.value)))
    return found


def test_only_rank_reads_the_launcher_variables() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} reads {name}"
        for package, path in _sources()
        if package != "xdist_launchers" and path != PACKAGES["xdist"] / "rank.py"
        for line, name in _environment_reads(path)
        if name in RANK_VARIABLES
    ]
    assert not wrong, "\n".join(wrong)


def test_optional_packages_are_imported_in_one_file_inside_a_function() -> None:
    homes: dict[str, set[str]] = {}
    wrong = []
    for _, _, imported in ALL:
        package = imported.module.partition(".")[0]
        # torch ships this door; it imports tensorboard itself.
        if imported.module.startswith("torch.utils.tensorboard"):
            package = "tensorboard"
        if package not in OPTIONAL or package == "triton":
            continue
        homes.setdefault(package, set()).add(imported.file)
        if not imported.local:
            wrong.append(f"{imported} at load time")
    wrong += [f"{name} is imported in {sorted(f)}" for name, f in homes.items() if len(f) > 1]
    assert not wrong, "\n".join(wrong)


def test_triton_loads_with_the_modules_of_kernels_alone() -> None:
    # Triton takes functions as their module loads, so its kernels import it there; then whatever
    # loads such a module is one itself, or does so inside a function.
    module_of = {p.relative_to(ROOT).as_posix(): _module_name(name, p) for name, p in _sources()}
    at_load = [imported for _, _, imported in ALL if not imported.local]
    loads = {i.file for i in at_load if i.module.partition(".")[0] == "triton"}
    while True:
        names = tuple(module_of[file] for file in loads)
        more = {
            i.file
            for i in at_load
            if any(i.module == name or i.module.startswith(f"{name}.") for name in names)
        }
        if more <= loads:
            break
        loads |= more
    assert loads
    wrong = [file for file in loads if file not in TRITON and "/triton" not in file]
    assert not wrong, wrong
    assert all(file.startswith("kernels/xdist_kernels/") for file in loads)


def test_pickle_is_never_imported() -> None:
    wrong = [
        str(i) for _, _, i in ALL if i.module.partition(".")[0] in ("pickle", "dill", "shelve")
    ]
    assert not wrong, "\n".join(wrong)


def test_kernels_and_launchers_folders_are_not_packages() -> None:
    # HuggingFace has a package named `kernels`; ours must not shadow it.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "launchers" / "__init__.py").exists()


def _loaded_by(statement: str) -> set[str]:
    """Top-level packages in sys.modules after a statement in a fresh interpreter."""
    code = (
        f"{statement}\nimport sys\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "launchers")]
    out = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{code}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return set(out.stdout.splitlines()[-1].split())


BASE = {"torch", "numpy", "safetensors", "zarr", "pydantic", "typer", "rich"}


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import xdist", set()),
        ("import xdist.layout, xdist.documents, xdist.mask", {"numpy"}),
        ("import xdist.config", {"pydantic"}),
        (
            "import xdist\nfor name in xdist._HOME: getattr(xdist, name)",
            {"torch", "numpy", "safetensors"},
        ),
        ("import xdist.models, xdist.nn, xdist.memory", {"torch", "numpy", "safetensors"}),
        ("import xdist.testing", {"torch", "numpy", "safetensors"}),
    ],
    ids=["xdist", "integers", "config", "public names", "models", "testing"],
)
def test_base_dependencies_load_late(statement: str, allowed: set[str]) -> None:
    loaded = _loaded_by(statement) & BASE
    assert loaded <= allowed, f"`{statement}` also loads {sorted(loaded - allowed)}"


def test_show_never_loads_torch(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('[run]\nname = "imports"\n', encoding="utf-8")
    loaded = _loaded_by(
        "import sys\n"
        f"sys.argv = ['xdist', 'show', {str(config)!r}]\n"
        "from xdist_launchers.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code"
    )
    assert "torch" not in loaded
