"""What every test gets: this checkout as ``ebt_transformers``, no network, a fixed seed, one thread."""

import importlib
import importlib.util
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402


if TYPE_CHECKING:
    from ebt_transformers import EBTForCausalLM

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
# pytest imports the root `__init__.py` under the folder's own name: the same module, or every class would exist twice
for alias in (ROOT.name, "__init__"):
    sys.modules.setdefault(alias, importlib.import_module(PACKAGE))
torch.set_num_threads(1)  # tiny models: handing work to a second thread takes longer than the work


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


TINY: dict[str, Any] = {
    "vocab_size": 41,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "step_size": 3.0,
}

# every conditioning, embedding, update rule and kind of grouped attention at least once
VARIANTS: dict[str, dict[str, Any]] = {
    "none-linear-replace-mha": {
        "step_conditioning": "none",
        "num_landscapes": 1,
        "thinking_steps": 2,
        "num_key_value_heads": 4,
    },
    "none-shared-residual-gqa": {
        "step_conditioning": "none",
        "num_landscapes": 1,
        "thinking_steps": 2,
        "candidate_embedding": "shared",
        "update": "residual",
    },
    "time_embed-linear-residual-mqa": {"num_key_value_heads": 1, "update": "residual"},
    "time_embed-shared-replace-gqa": {"candidate_embedding": "shared"},
    "adaln-shared-residual-gqa": {
        "step_conditioning": "adaln",
        "candidate_embedding": "shared",
        "update": "residual",
    },
    "adaln_zero-linear-replace-gqa": {"step_conditioning": "adaln_zero"},
    "time_embed-linear-residual-anchored": {"candidate_anchor": "token", "update": "residual"},
    "none-shared-replace-anchored": {
        "step_conditioning": "none",
        "num_landscapes": 1,
        "thinking_steps": 2,
        "candidate_embedding": "shared",
        "candidate_anchor": "token",
    },
    "time_embed-linear-residual-proposal": {"candidate_init": "proposal", "update": "residual"},
}


def build_model(**overrides: Any) -> "EBTForCausalLM":
    """A tiny random model in evaluation mode, the same for the same arguments."""
    from ebt_transformers import EBTConfig, EBTForCausalLM

    torch.manual_seed(1)
    model = EBTForCausalLM(EBTConfig(**{**TINY, **overrides})).eval()
    if model.config.step_conditioning == "adaln_zero" or model.config.starts_at_prediction:
        # their own start is a flat energy: move away from it, as the first training steps do
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modulation" in name or "energy_head" in name:
                    parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="session")
def make_model() -> "Callable[..., EBTForCausalLM]":
    """Builds tiny random models: `make_model(update="residual")`."""
    return build_model


@pytest.fixture(params=list(VARIANTS))
def any_model(request: pytest.FixtureRequest) -> "EBTForCausalLM":
    """One tiny model of every variant of the architecture."""
    return build_model(**VARIANTS[request.param])
