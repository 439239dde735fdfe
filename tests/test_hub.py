"""Laws of the Hub: what is pushed comes back, with and without the package, over HTTP from a server of these tests."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard


TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS))

from hub_repositories import Repository  # noqa: E402
from hub_server import HubServer  # noqa: E402


@dataclass
class Published:
    """A Hub after `hub_publish.py` has been there."""

    hub: HubServer
    folder: Path
    report: dict[str, Any]

    def repository(self, name: str) -> Repository:
        return self.hub.repositories["model", f"user/{name}"]

    def files(self, name: str, branch: str = "main") -> set[str]:
        repository = self.repository(name)
        return set(repository.commits[repository.branches[branch]].files)

    def card(self, name: str) -> ModelCard:
        repository = self.repository(name)
        file = repository.commits[repository.branches["main"]].files["README.md"]
        return ModelCard((self.hub.folder / file.oid).read_text(encoding="utf-8"))


def run(script: str, *arguments: object, env: dict[str, str], cwd: Path) -> str:
    """What a script prints."""
    command = [sys.executable, str(TESTS / script), *map(str, arguments)]
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, subprocess_env: dict[str, str]) -> Iterator[Published]:
    folder = tmp_path_factory.mktemp("hub")
    with HubServer(folder / "contents") as hub:
        env = {**hub.environment(folder / "home"), "PYTHONPATH": subprocess_env["PYTHONPATH"]}
        run("hub_publish.py", folder / "report.json", folder / "expected.pt", env=env, cwd=folder)
        yield Published(hub, folder, json.loads((folder / "report.json").read_text(encoding="utf-8")))


# ---- with the package ------------------------------------------------------------------------------------------


def test_a_pushed_model_comes_back(published: Published) -> None:
    assert published.report["text"]["main"]
    assert published.report["image"]["model"] and published.report["image"]["processor"]
    assert published.report["image"]["pipeline"].startswith("ebt_transformers.")  # what is installed is what is run
    assert "16" in published.report["image"]["pipeline"]


def test_old_revisions_come_back_by_tag_branch_and_commit(published: Published) -> None:
    text = published.report["text"]
    assert text["tag"] and text["branch"] and text["commit"] and text["main_is_not_the_first"]
    assert text["titles"][0] == "Better weights"


def test_a_bare_push_makes_a_card_with_tags_library_and_task(published: Published) -> None:
    wanted = {"tags": ["transformers", "ebt", "energy-based-model", "toy"], "library": "transformers"}
    assert published.report["text"]["new_card"] == {**wanted, "task": "text-generation"}
    assert published.report["text"]["class_tags"] is None  # the tag of one model is no tag of others
    for name, task in (("image", "image-to-image"), ("denoiser", "image-to-image"), ("pipe", "text-generation")):
        head = published.card(name).data
        assert {"ebt", "energy-based-model"} <= set(head.tags) and head.library_name == "transformers"
        assert name == "pipe" or head.pipeline_tag == task


def test_a_second_push_keeps_what_was_written_by_hand(published: Published) -> None:
    card = published.card("text")
    assert "# Written by hand" in card.text and card.data.license == "apache-2.0"
    kept = published.report["text"]["kept_card"]
    assert set(kept["tags"]) == {"transformers", "ebt", "energy-based-model", "mine"}
    assert (kept["task"], kept["library"]) == ("text-generation", "transformers")


def test_a_trainer_pushes_its_model_card_and_tokenizer(published: Published) -> None:
    assert published.report["run"]["same"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "modeling_ebt.py"} <= published.files("trained")
    card = published.card("trained")
    assert {"ebt", "energy-based-model"} <= set(card.data.tags)
    assert (card.data.pipeline_tag, card.data.library_name) == ("text-generation", "transformers")
    assert "user/trained" in card.text and "Energy-Based" in card.text


def test_every_push_of_a_run_can_be_loaded(published: Published) -> None:
    repository = published.repository("trained")
    pushed = [commit for commit in repository.commits.values() if "model.safetensors" in commit.files]
    assert len(pushed) >= 2
    assert all({"modeling_ebt.py", "configuration_ebt.py"} <= set(commit.files) for commit in pushed)


def test_what_is_missing_is_said_to_be_missing(published: Published) -> None:
    errors = published.report["errors"]
    assert "user/nobody is not a local folder and is not a valid model identifier" in errors["repository"]
    assert "v9 is not a valid git identifier" in errors["revision"]
    assert "user/image does not appear to have a file named model-2.safetensors" in errors["file"]


def test_a_private_model_needs_the_token(published: Published) -> None:
    assert published.repository("secret").private
    assert published.report["secret"]
    assert "not a valid model identifier" in published.report["errors"]["secret"]


# ---- without the package ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def visited(published: Published) -> Published:
    """Everything loaded with remote code, and one download interrupted."""
    published.hub.requests.clear()
    published.hub.cut("model.safetensors", after=10_000)
    env = published.hub.environment(published.folder / "visitor", token=False)
    run("hub_visit.py", published.folder / "expected.pt", "everything", env=env, cwd=published.folder)
    return published


def test_models_and_pipelines_load_without_the_package(visited: Published) -> None:
    assert {"image_denoising.py", "image_tiles.py", "noise_ebt.py", "modeling_ebt_image.py"} <= visited.files(
        "denoiser"
    )
    assert visited.files("denoiser") == visited.files("denoiser-again")


def test_an_interrupted_download_goes_on_where_it_was(visited: Published) -> None:
    weights = [asked for method, path, asked in visited.hub.requests if method == "GET" and "large-files" in path]
    assert weights[:2] == [None, "bytes=8192-"]  # two whole chunks had arrived; what came of it gave the right logits


def test_the_cache_serves_when_the_hub_is_gone(visited: Published) -> None:
    with HubServer(visited.folder / "gone") as gone:
        address = gone.endpoint
    env = {**visited.hub.environment(visited.folder / "visitor", token=False), "HF_ENDPOINT": address}
    said = run("hub_visit.py", visited.folder / "expected.pt", "models", env=env, cwd=visited.folder)
    assert "loaded without the package" in said


# ---- what the documentation says -------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_on_pushing_runs(repository_root: Path, subprocess_env: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    page = (repository_root / "docs" / "howto" / "push.md").read_text(encoding="utf-8")
    (tmp_path / "page.py").write_text("\n".join(re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)))
    with HubServer(tmp_path / "contents", user="me") as hub:
        env = {**hub.environment(tmp_path / "home"), "PYTHONPATH": subprocess_env["PYTHONPATH"]}
        command = [sys.executable, "page.py"]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        pushed = {name for _, name in hub.repositories}
    names = "my-ebt", "my-denoiser", "my-writer", "my-run", "my-adapter", "secret"
    assert pushed == {f"me/{name}" for name in names}
