"""The rules of the house, as two tables, read from the source with `ast`: who may import whom, and where a library lives."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "platform" / "counterfake"

# Layer of each room of counterfake; a module may import its own layer and lower ones.
LAYERS = {
    0: "config errors workspace dist memory precision storage telemetry temporary",
    1: "arrays blending boxes changes fingerprint folds grouping rowlists media video face_masks faces tracks images order parts prepare quality records samples staging versions labels locks sources data curation nets",
    2: "audit learners forensics evaluation ensemble checkpoint loop",
    3: "bundle conversion export extractor runtime predictor scoring verdicts provenance outbox tracking gate registry",
    4: "cluster",
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names.split()}

# Libraries with one home: (path prefixes below the root) that may import them.
HOMES = {
    "ray": ("platform/counterfake/cluster", "jobs", "serving"),
    "mlflow": ("platform/counterfake/tracking.py", "platform/counterfake/registry.py"),
    "boto3": ("platform/counterfake/storage/aws.py",),
    "botocore": ("platform/counterfake/storage/aws.py",),
    "prometheus_client": ("platform/counterfake/telemetry.py",),
    "av": ("platform/counterfake/video",),
    "PIL": (
        "platform/counterfake/media.py",
        "platform/counterfake/images.py",
        "platform/counterfake/provenance.py",
    ),
    "typer": ("jobs",),
    "fastapi": ("serving",),
    "matplotlib": ("platform/counterfake/evaluation",),
    "onnx": ("platform/counterfake/runtime.py",),
    "onnxruntime": ("platform/counterfake/runtime.py",),
    "openvino": ("platform/counterfake/runtime.py",),
    "optuna": ("platform/counterfake/cluster/trials.py", "platform/counterfake/cluster/findings.py"),
    "c2pa": ("platform/counterfake/provenance.py",),
    "cryptography": ("platform/counterfake/provenance.py",),
}
FORBIDDEN = {
    "pickle": "weights are safetensors, the rest is JSON",
    "torchvision": "it does not import on the CPU build of torch",
    "cloudpickle": "weights are safetensors, the rest is JSON",
    "joblib": "it unpickles",
}


def sources() -> list[Path]:
    return sorted(p for top in ("platform", "jobs", "serving") for p in (ROOT / top).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted module, line) of every import in a file, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module, node.lineno
            if node.module == "counterfake":
                yield from ((f"counterfake.{alias.name}", node.lineno) for alias in node.names)


def room(path: Path) -> str:
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def test_platform_is_a_folder_and_never_a_package() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists(), (
        "platform/__init__.py shadows the standard library"
    )


def test_the_standard_library_platform_is_found_from_the_repository_root() -> None:
    code = "import platform; assert platform.python_version(), platform.__file__"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_room_has_a_layer() -> None:
    rooms = {room(p) for p in LIBRARY.rglob("*.py")} - {"__init__"}
    assert not rooms - set(LAYER_OF), f"give {sorted(rooms - set(LAYER_OF))} a layer in LAYERS"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_or_sideways(path: Path) -> None:
    top = path.relative_to(ROOT).parts[0]
    wrong = []
    for module, line in imports(path):
        parts = module.split(".")
        if top == "platform" and parts[0] in ("jobs", "serving"):
            wrong.append(f"{path.name}:{line} imports {module}; the library knows no {parts[0]}")
        if top == "platform" and parts[0] == "counterfake" and len(parts) > 1 and parts[1] in LAYER_OF:
            here = LAYER_OF.get(room(path), 0)
            if LAYER_OF[parts[1]] > here:
                wrong.append(
                    f"{path.name}:{line} (layer {here}) imports {module} (layer {LAYER_OF[parts[1]]})"
                )
        if top == "serving" and parts[0] == "jobs":
            wrong.append(f"{path.name}:{line} imports {module}; nothing imports jobs")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_each_library_stays_in_its_home(path: Path) -> None:
    relative = str(path.relative_to(ROOT))
    wrong = []
    for module, line in imports(path):
        library = module.split(".")[0]
        if library in FORBIDDEN:
            wrong.append(f"{relative}:{line} imports {library}: {FORBIDDEN[library]}")
        if library in HOMES and not relative.startswith(HOMES[library]):
            wrong.append(f"{relative}:{line} imports {library}; its home is {', '.join(HOMES[library])}")
    assert not wrong, "\n".join(wrong)


def test_storage_is_entered_by_its_door() -> None:
    inside = LIBRARY / "storage"
    others = (path for path in sources() if inside not in path.parents)
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}; import from counterfake.storage"
        for path in others
        for module, line in imports(path)
        if module.startswith("counterfake.storage.")
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_unpickles() -> None:
    wrong = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "torch.load",
                "np.load",
                "numpy.load",
            ):
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                safe = keywords.get("weights_only") == "True" or keywords.get("allow_pickle") == "False"
                if not safe:
                    wrong.append(
                        f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node.func)} may unpickle"
                    )
    assert not wrong, "\n".join(wrong)


def test_learners_nets_and_presets_load_neither_ray_nor_mlflow() -> None:
    """One step must run in a notebook and on a GPU machine that has only torch."""
    code = (
        "import sys, counterfake.learners, counterfake.nets, counterfake.loop, counterfake.data, counterfake.checkpoint\n"
        "import jobs.train_gan, jobs.train_swap, jobs.train_detector\n"
        "for m in (jobs.train_gan, jobs.train_swap, jobs.train_detector): [p() for p in m.PRESETS.values()]\n"
        "loaded = sorted({n.split('.')[0] for n in sys.modules} & {'ray', 'mlflow', 'boto3', 'sklearn', 'fastapi'})\n"
        "assert not loaded, loaded"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_what_it_is_for(path: Path) -> None:
    if path.read_text().strip():
        assert ast.get_docstring(ast.parse(path.read_text())), (
            f"{path.relative_to(ROOT)} has no module docstring"
        )
