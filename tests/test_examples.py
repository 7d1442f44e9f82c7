import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hubconf
import train
from disout import Disout

ROOT = Path(train.__file__).parent
FILES = [
    "disout.py",
    "disout_cpu.py",
    *(f"disout_attach/{name}" for name in ("__init__.py", "graph.py", "hooks.py", "py.typed")),
]
FILES += ["disout_attach/readers.py", "disout_attach/values.py"]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_readme_prints_the_examples_as_they_are(path):
    assert f"```python\n{path.read_text()}```" in (ROOT / "examples/README.md").read_text()


def test_the_package_installs_modules_that_need_torch_alone(tmp_path):
    """Without the network: the build's own requirements are installed already."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--quiet"]
    source = tmp_path / "source"
    (source / "disout_attach").mkdir(parents=True)
    for name in ("pyproject.toml", "LICENSE", *FILES):
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*command, "--target", tmp_path / "installed", source], check=True)
    installed = [path for path in (tmp_path / "installed").glob("disout*/*") if ".dist-info" not in str(path)]
    installed += (tmp_path / "installed").glob("*.py")
    names = {path.relative_to(tmp_path / "installed").as_posix() for path in installed if path.name != "__pycache__"}
    assert names == set(FILES)
    [metadata] = (tmp_path / "installed").glob("*.dist-info/METADATA")
    assert [line for line in metadata.read_text().splitlines() if line.startswith("Requires-Dist")] == [
        "Requires-Dist: torch>=2.11"
    ]


def test_the_hub_gives_the_networks():
    listed = [name for name in dir(hubconf) if callable(getattr(hubconf, name)) and name[0] != "_"]  # as torch.hub.list
    assert listed == ["cnn_disout", "resnet56_disout"]
    model = torch.hub.load(str(ROOT), "resnet56_disout", source="local", num_classes=100)
    assert sum(parameter.numel() for parameter in model.parameters()) == 861_428
    assert [module.dist_prob for module in model.modules() if hasattr(module, "dist_prob")] == [0.09] * 18
    with pytest.raises(FileNotFoundError, match="7 classes"):
        torch.hub.load(str(ROOT), "resnet56_disout", source="local", num_classes=7, pretrained=True)
    cnn = torch.hub.load(str(ROOT), "cnn_disout", source="local", num_classes=100, alpha=2.0)
    assert cnn.fc3.out_features == 100
    assert [(layer.dist_prob, layer.block_size, layer.alpha) for layer in (cnn.hidden1, cnn.hidden2)] == [
        (0.3, 1, 2)
    ] * 2


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_the_hub_and_packages_of_the_users_own_with_the_same_names(tmp_path, first):
    for package in ("models", "utils"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f"NAME = 'their {package}'\n")
    (tmp_path / "models/cnn.py").write_text("NAME = 'their cnn'\n")
    (tmp_path / "disout.py").write_text("NAME, Disout = 'their disout', None\n")  # such as the authors'
    (tmp_path / "disout_cpu.py").write_text("raise ImportError\n")
    ours = f"import torch; model = torch.hub.load({str(ROOT)!r}, 'cnn_disout', source='local')"
    theirs = "import disout, models.cnn, utils; names = (disout.NAME, models.cnn.NAME, utils.NAME)"
    lines = [theirs, ours] if first == "theirs" else [ours, theirs]
    check = "assert names == ('their disout', 'their cnn', 'their utils'); assert model.hidden1.alpha"
    subprocess.run([sys.executable, "-c", "\n".join([*lines, check])], cwd=tmp_path, check=True)


def test_the_hub_gives_each_version_its_own_network(tmp_path):
    models = []
    for version in ("1", "2"):
        for name in (
            "hubconf.py",
            "disout.py",
            "disout_cpu.py",
            *(str(path.relative_to(ROOT)) for path in ROOT.glob("models/*.py")),
        ):
            copy = tmp_path / version / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(f"{(ROOT / name).read_text(encoding='utf-8')}\nVERSION = {version}\n", encoding="utf-8")
        models.append(torch.hub.load(str(tmp_path / version), "cnn_disout", source="local"))
    for version, model in enumerate(models, 1):
        assert {sys.modules[type(part).__module__].VERSION for part in (model, model.hidden1)} == {version}
        again = pickle.loads(pickle.dumps(model))
        assert type(again) is type(model) and type(again.hidden1) is type(model.hidden1)
    assert sys.modules["disout"].Disout is Disout
    cpu = [sys.modules[type(model.hidden1).__module__].disout_cpu for model in models]
    assert [module.VERSION for module in cpu] == [1, 2] and sys.modules["disout_cpu"] not in cpu
