"""Laws of the examples: each runs as a newcomer would run it, offline, and shows what it promises."""

import re
import runpy
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
# options that make an example short, and what it must have printed or written
SCRIPTS = {
    "think_longer": (["--max_new_tokens", "3"], r"'thinking_candidates': 4}: mean energy -?[\d.]+ -> -?[\d.]+", None),
    "rank_continuations": ([], r"' all the people' +(\| +-?[\d.]+ ){3}", None),
    "denoise_picture": ([], r"4 steps: energy (-?[\d.]+ -> ){4}", "denoised.png"),
    "train_text": (["--max_steps", "2"], r"perplexity by thinking steps: \{1: ", "runs/example_text/README.md"),
    "train_denoiser": (["--max_steps", "2"], r"Held-out PSNR: ", "runs/example_images/preprocessor_config.json"),
    "complete_images": (["--max_steps", "2"], r"Held-out PSNR of masked patches: ", "completion.png"),
    "fine_tune_lora": (["--max_steps", "2"], r"after:  JULIET", "runs/example_lora/adapter_model.safetensors"),
    "own_energy": ([], r"near \(3\.0, 2\.0\)", "descent.png"),
}
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))


def test_every_example_is_tested_and_listed() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SCRIPTS)
    listed = set(re.findall(r"\]\(([^)]+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    assert listed == {*(f"{name}.py" for name in SCRIPTS), *(f"notebooks/{path.name}" for path in NOTEBOOKS)}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options, shown, written = SCRIPTS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert re.search(shown, capsys.readouterr().out)
    if written is not None:
        assert (tmp_path / written).stat().st_size > 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_and_print_what_they_hold(path: Path, tmp_path: Path, subprocess_env: dict[str, str]) -> None:
    """Run anew, a notebook shows the outputs that are stored in it: the same text, and as many pictures."""
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    stored = nbformat.read(path, as_version=4)
    run = nbformat.from_dict(stored)
    environment = {**subprocess_env, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    place = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(run, timeout=120, resources=place).execute(env=environment)
    for old, new in zip(stored.cells, run.cells, strict=True):
        assert _outputs(new) == _outputs(old)


def _outputs(cell: dict) -> list[str]:
    """What a reader sees under a cell: all it printed as one text, then its pictures and values in order."""
    printed, shown = "", []
    for output in cell.get("outputs", []):
        if output.get("output_type") == "stream":
            # how many pieces a kernel sends its prints in depends on the moment
            printed += output["text"] if output["name"] == "stdout" else ""
        else:
            shown.append("picture" if "image/png" in output["data"] else output["data"].get("text/plain", ""))
    # digits far behind the point depend on the processor
    return [re.sub(r"(\.\d)\d+", r"\1", text).strip() for text in (printed, *shown)]
