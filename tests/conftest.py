"""What every test gets: this checkout as ``ebt_transformers``, no network, a fixed seed, two threads."""

import importlib.util
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402


PACKAGE = "ebt_transformers"
ROOT = Path(__file__).resolve().parent.parent


def load_package() -> None:
    """Make the package mean this checkout, installed or not (EBT_TEST_INSTALLED=1: what is installed)."""
    found = importlib.util.find_spec(PACKAGE)
    installed = found is not None and found.origin is not None
    if installed and (os.environ.get("EBT_TEST_INSTALLED") == "1" or Path(found.origin).resolve().parent == ROOT):
        return
    init, folders = ROOT / "__init__.py", [str(ROOT)]
    spec = importlib.util.spec_from_file_location(PACKAGE, init, submodule_search_locations=folders)
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)


load_package()
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Start every test from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository_root() -> Path:
    """The folder of this checkout."""
    return ROOT


@pytest.fixture(scope="session")
def parity_root() -> Path | None:
    """The folder with the full set of parity cases beside the checkout, or None where it is absent."""
    folder = ROOT.parent / "shared" / "parity" / "dev"
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def subprocess_env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment variables under which a new Python process can import this checkout, installed or not."""
    folder = tmp_path_factory.mktemp("import_path")
    (folder / PACKAGE).symlink_to(ROOT, target_is_directory=True)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    yield {**os.environ, "PYTHONPATH": path}
