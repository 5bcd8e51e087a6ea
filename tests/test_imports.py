"""The order of the rooms, read from the source: imports run one way, and no module imports in a circle.

A room may import what stands before it in `ORDER`, and itself. Every import counts, wherever it stands in a file.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (
    "errors",
    "lasting",
    "files",
    "locks",
    "finished",
    "ranks",
    "lives",
    "leaving",
    "config",
    "data",
    "model",
    "losses",
    "stages",
    "engine",
    "checkpoint",
    "train",
    "report",
    "inference",
    "plan",
    "doctor",
    "node_check",
    "commands",
    "cli",
    "__main__",
)
DATA_PREP_MAY = (
    "rxt_dist.config",
    "rxt_dist.data.dialogues",
    "rxt_dist.data.inputs",
    "rxt_dist.data.interactions",
    "rxt_dist.data.manifest",
    "rxt_dist.data.origin",
    "rxt_dist.data.packing",
    "rxt_dist.data.rows",
    "rxt_dist.data.sealing",
    "rxt_dist.data.verify",
    "rxt_dist.data.writer",
    "rxt_dist.errors",
    "rxt_dist.files",
    "rxt_dist.locks",
)
# What its verbs may import besides: the order of a run and its steps, and arguments that all verbs share.
DATA_VERBS_MAY = (
    "rxt_dist.commands.arguments",
    "rxt_dist.data.dataset",
    "rxt_dist.data.dialogue_rows",
    "rxt_dist.data.masking",
    "rxt_dist.data.mixture",
    "rxt_dist.data.sampler",
)
LAUNCH_MAY = (
    "rxt_dist.commands.arguments",
    "rxt_dist.config",
    "rxt_dist.errors",
    "rxt_dist.files",
    "rxt_dist.finished",
    "rxt_dist.lives",
    "rxt_dist.locks",
    "rxt_dist.ranks",
    "rxt_dist.report.chain",
    "rxt_dist.train.chain_dir",
    "rxt_dist.train.events",
    "rxt_dist.train.run_dir",
)
# The rooms of data_prep, in the same way.
DATA_PREP_ORDER = (
    "readers",
    "languages",
    "corpora",
    "units",
    "pictures",
    "synthetic",
    "recall",
    "tokenizing",
    "cleaning",
    "building",
    "documents",
    "shards",
    "interactions",
    "megatron",
    "commands",
)
COLLECTIVE_ROOMS = ("rxt_dist/engine", "rxt_dist/checkpoint", "rxt_dist/doctor.py", "rxt_dist/node_check.py")


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def imports(path: Path) -> set[str]:
    """Dotted names of all that a file imports, wherever in it; `from a import b` gives `a` and `a.b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports_of(path: Path, package: str) -> list[str]:
    return sorted(name for name in imports(path) if name == package or name.startswith(package + "."))


def room(module: str) -> str:
    return module.split(".")[1]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", sources("rxt_dist"), ids=name_of)
def test_rooms_import_one_way(path: Path) -> None:
    own = path.relative_to(ROOT / "rxt_dist").parts[0].removesuffix(".py")
    if own == "__init__":
        assert imports_of(path, "rxt_dist") == []
        return
    assert own in ORDER, f"{path}: a new room; give it a place in ORDER"
    allowed = set(ORDER[: ORDER.index(own) + 1])
    inside = [name for name in imports_of(path, "rxt_dist") if name.count(".") and room(name) in ORDER]
    assert [name for name in inside if room(name) not in allowed] == []


def test_the_package_imports_nothing_around_it() -> None:
    wrong = [
        f"{name_of(path)}: {package}"
        for path in sources("rxt_dist")
        for package in ("data_prep", "launch")
        if imports_of(path, package)
    ]
    assert wrong == []


def test_data_preparation_launchers_and_plans_load_no_torch() -> None:
    """Not by what they import either. A verb may, when it runs: `show --mlm` masks as training does."""
    plans = ["rxt_dist.stages.joint_work"]
    modules = [*plans, *(module_of(path) for path in sources("data_prep", "launch", "rxt_dist/plan"))]
    code = f"import sys, {', '.join(modules)}; assert not {{'torch', 'deepspeed'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("path", sources("data_prep"), ids=name_of)
@pytest.mark.slow
def test_data_preparation_knows_the_shard_format_only(path: Path) -> None:
    allowed = DATA_PREP_MAY + (DATA_VERBS_MAY if ROOT / "data_prep/commands" in path.parents else ())
    outside = [
        name
        for name in imports_of(path, "rxt_dist")
        if name not in ("rxt_dist", "rxt_dist.data") and not name.startswith(allowed)
    ]
    assert outside == []
    assert imports_of(path, "torch") == imports_of(path, "deepspeed") == []


@pytest.mark.parametrize("path", sources("data_prep"), ids=name_of)
def test_rooms_of_data_preparation_import_one_way(path: Path) -> None:
    own = path.relative_to(ROOT / "data_prep").parts[0].removesuffix(".py")
    if own == "__init__":
        return
    assert own in DATA_PREP_ORDER, f"{path}: a new room; give it a place in DATA_PREP_ORDER"
    allowed = set(DATA_PREP_ORDER[: DATA_PREP_ORDER.index(own) + 1])
    found = [name for name in imports_of(path, "data_prep") if name.count(".")]
    assert [name for name in found if room(name) not in allowed] == []


@pytest.mark.parametrize("path", sources("launch"), ids=name_of)
def test_launchers_know_a_run_by_its_configuration(path: Path) -> None:
    assert [name for name in imports_of(path, "rxt_dist") if "." in name and not name.startswith(LAUNCH_MAY)] == []
    assert imports_of(path, "data_prep") == imports_of(path, "torch") == imports_of(path, "deepspeed") == []


def graph(files: Sequence[Path]) -> dict[str, set[str]]:
    """For each module those of `files` that it imports, wherever in it: at the top, in a function, for its types.

    That a module's package is imported before it is no edge: a package that lists its modules would be a circle.
    """
    modules = {module_of(path): path for path in files}
    edges: dict[str, set[str]] = {}
    for module, path in modules.items():
        named: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                # A module of a package, or a name in a module.
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= {name if name in modules else str(node.module) for name in whole}
        edges[module] = {name for name in named if name in modules} - {module}
    return edges


def circles(edges: Mapping[str, set[str]]) -> list[str]:
    """Walks `a > b > a` through imports; none where there is no circle."""
    found: list[str] = []
    finished: set[str] = set()

    def follow(module: str, way: list[str]) -> None:
        if module in way:
            found.append(" > ".join([*way[way.index(module) :], module]))
        elif module not in finished:
            for name in sorted(edges[module]):
                follow(name, [*way, module])
            finished.add(module)

    for module in sorted(edges):
        follow(module, [])
    return found


@pytest.mark.slow
def test_no_module_imports_in_a_circle() -> None:
    assert circles(graph(sources("rxt_dist", "data_prep", "launch"))) == []


def test_a_circle_is_found_wherever_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    texts = {
        "__init__": "from p.top import thing",
        "top": "import p.middle",
        "middle": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p import bottom",
        "bottom": "def late():\n    from p.top import thing",
        "beside": "from p.bottom import late",
    }
    (tmp_path / "p").mkdir()
    for name, text in texts.items():
        (tmp_path / f"p/{name}.py").write_text(text)
    files = sorted((tmp_path / "p").glob("*.py"))
    assert circles(graph(files)) == ["p.top > p.middle > p.bottom > p.top"]
    (tmp_path / "p/bottom.py").write_text("")
    assert circles(graph(files)) == []


def test_only_the_engine_imports_deepspeed() -> None:
    importers = [path for path in sources("rxt_dist", "data_prep", "launch") if imports_of(path, "deepspeed")]
    assert [name_of(path) for path in importers if ROOT / "rxt_dist/engine" not in path.parents] == []


def test_only_engine_and_checkpoint_call_collectives() -> None:
    importers = [name_of(path) for path in sources("rxt_dist") if imports_of(path, "torch.distributed")]
    assert [name for name in importers if not name.startswith(COLLECTIVE_ROOMS)] == []


def test_only_the_registry_names_a_stage() -> None:
    """What others know of a stage is its contract. Of the kinds those are looked for that name nothing else."""
    kinds = {"joint", "sft", "decoder-sft", "smat"}
    own = [ROOT / "rxt_dist/config/stages.py", *sources("rxt_dist/stages")]
    found = {path: kinds & _texts(path) for path in sources("rxt_dist", "data_prep", "launch") if path not in own}
    assert {name_of(path): named for path, named in found.items() if named} == {}
    assert "joint" in _texts(own[0])


def _texts(path: Path) -> set[object]:
    return {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}


VERBS = [
    *sources("rxt_dist/commands", "data_prep/commands"),
    *(ROOT / file for file in ("launch/commands.py", "launch/slurm/commands.py", "rxt_dist/cli.py")),
]


@pytest.mark.parametrize("path", VERBS, ids=name_of)
def test_verbs_import_nothing_heavy_at_the_top(path: Path) -> None:
    light = sys.stdlib_module_names | {"typer", "rxt_dist", "data_prep", "launch"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in top} <= light
    rooms = {name: room(name) for name in top if name.startswith(("rxt_dist.", "data_prep.", "launch."))}
    wrong = [name for name, own in rooms.items() if own not in ("commands", "errors", "lives", "leaving")]
    assert [name for name in wrong if name not in ("launch.slurm.commands", "launch.slurm.arguments")] == []
