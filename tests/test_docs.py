"""Laws of the documentation: its code runs, its commands exist, its links lead somewhere, its site builds."""

import functools
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from html.parser import HTMLParser
from importlib import import_module
from io import StringIO
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

import ebt_transformers
from ebt_transformers import cli


ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "ARCHITECTURE.md", "MIGRATION.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md"]
PAGES += [str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^( *)```(python|bash)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
FENCED = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)
NOT_RUN = "# not run by the tests: "
# what `python -m` runs, as the command that is the same
SCRIPTS = {
    "ebt_transformers.cli": [],
    "ebt_transformers.training.run_clm": ["train", "clm"],
    "ebt_transformers.training.run_denoise": ["train", "denoise"],
}


# ---- reading the pages ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A block of code of a page."""

    language: str
    code: str

    @property
    def reason(self) -> str | None:
        """Why the tests do not run it, if they do not."""
        first = self.code.partition("\n")[0]
        return first.removeprefix(NOT_RUN).strip() if first.startswith(NOT_RUN) else None

    def commands(self) -> list[list[str]]:
        """The commands of a shell block, cut into words; one may go on over several lines."""
        commands, pending = [], ""
        for line in self.code.replace("\\\n", " ").splitlines(keepends=True):
            pending += line
            try:
                commands.append(shlex.split(pending, comments=True))
            except ValueError:  # within quotes
                continue
            pending = ""
        assert not pending, f"not a shell command: {pending}"
        return [words for words in commands if words]


@functools.cache
def blocks_of(page: str) -> tuple[Block, ...]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return tuple(Block(found[2], textwrap.dedent(found[3])) for found in BLOCK.finditer(text))


WITH_CODE = [page for page in PAGES if blocks_of(page)]


def package_command(words: list[str]) -> list[str] | None:
    """The arguments of `ebt` that a command is, whatever starts it; None for a command of somebody else."""
    if words[0] == "ebt":
        return words[1:]
    for flag, module in zip(words, words[1:], strict=False):
        if flag == "-m" and module in SCRIPTS:
            return SCRIPTS[module] + words[words.index(module) + 1 :]
    return None


# ---- running the code -------------------------------------------------------------------------------------------


def official_checkpoint() -> dict[str, Any]:
    """What pages about conversion start from: a checkpoint file as the official code writes it."""
    import torch

    from ebt_transformers import EBTConfig, EBTForCausalLM, EBTForImageDenoising, EBTImageConfig, model_to_official

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    models = {
        "last.ckpt": EBTForCausalLM(EBTConfig(vocab_size=1024, **size)),
        "denoiser.ckpt": EBTForImageDenoising(EBTImageConfig(image_size=8, patch_size=4, **size)),
    }
    for name, model in models.items():
        state_dict, hparams = model_to_official(model)
        weights = {f"model.{key}": value for key, value in state_dict.items()}
        torch.save({"state_dict": weights, "hyper_parameters": hparams}, name)
    return {"input_ids": torch.tensor([[1, 2, 3]]), "noisy_images": torch.zeros(2, 3, 8, 8)}


# pages that speak of files and variables a reader has
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "MIGRATION.md": official_checkpoint,
    "docs/howto/convert.md": official_checkpoint,
}


# pages about a library that not every environment has
NEEDED = {
    "docs/howto/evaluate.md": "lm_eval",
    "docs/howto/finetune.md": "trl",
    "docs/howto/lora.md": "peft",
    "docs/howto/web.md": "gradio",
}


@pytest.fixture(scope="session")
def shell(subprocess_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], None]:
    """Runs a script by bash; in it `python` is this one, and `ebt` this checkout's."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "python").symlink_to(sys.executable)
    script = folder / "ebt"
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom ebt_transformers.cli import main\nsys.exit(main())\n")
    script.chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])

    def run(code: str) -> None:
        environment = {**subprocess_env, "PATH": path}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        print(done.stdout)

    return run


def run_command(argv: list[str]) -> None:
    """A command of ours, within this process: the imports are paid once."""
    try:
        status = cli.main(argv)
    except SystemExit as leaving:  # --help
        status = leaving.code or 0
    assert status == 0, f"`ebt {shlex.join(argv)}` ended with {status}"


def run_bash(block: Block, shell: Callable[[str], None]) -> None:
    ours = [package_command(words) for words in block.commands()]
    if all(argv is not None for argv in ours) and not re.search(r"[|<>$;&*`]", block.code):
        for argv in ours:
            run_command(argv)
    elif not is_make(block):  # whose targets exist, says another test
        shell(block.code)


def is_make(block: Block) -> bool:
    return all(words[0] in ("make", ".ci/run") for words in block.commands())


@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_runs(
    page: str, shell: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page in NEEDED:
        pytest.importorskip(NEEDED[page])
    monkeypatch.chdir(tmp_path)  # some write files
    namespace = {"__name__": "__main__", **GIVEN.get(page, dict)()}
    for block in blocks_of(page):
        if block.reason is not None:
            continue
        if block.language == "python":
            exec(compile(block.code, page, "exec"), namespace)
        else:
            run_bash(block, shell)


def test_code_that_is_not_run_is_the_exception_and_says_why() -> None:
    every = [(page, block) for page in WITH_CODE for block in blocks_of(page)]
    left_out = [(page, block.language, block.reason) for page, block in every if block.reason is not None]
    print(*left_out, sep="\n")
    assert all(len(reason) >= 10 for _, _, reason in left_out)
    elsewhere = [re.search(r"tests/\w+\.py", reason) for _, _, reason in left_out]
    assert all((ROOT / found[0]).is_file() for found in elsewhere if found)
    assert elsewhere.count(None) <= len(every) / 4


# ---- commands that are not run ----------------------------------------------------------------------------------


@functools.cache
def help_of(*command: str) -> str:
    """The options of `ebt COMMAND`, as its help prints them."""
    if command[:1] == ("benchmark",) and len(command) > 1:  # imports much: read instead
        files = (ROOT / "benchmarks" / f"{name}.py" for name in (command[1], "common"))
        return " ".join(re.findall(r'"(--[\w-]+)"', "".join(file.read_text(encoding="utf-8") for file in files)))
    printed = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setenv("COLUMNS", "1000")  # a long name would be broken
        run_command([*command, "--help"])
    own = printed.getvalue()
    if command[:1] != ("train",):
        return own
    # the help of training points to transformers for the Trainer's own options
    return own + " ".join(f" --{field.name}" for field in fields(ebt_transformers.EBTImageTrainingArguments))


def check_options(argv: list[str]) -> None:
    """Every option of a command is one that its help lists."""
    command = list(takewhile(lambda word: not word.startswith("-") and not word.isupper(), argv))
    if command:
        assert command[0] in cli.COMMANDS, f"there is no command `ebt {command[0]}`"
        command = command[: 2 if command[0] in ("train", "benchmark") else 1]
    known = {option.replace("-", "_") for option in re.findall(r"--[\w-]+", help_of(*command))}
    given = {word.partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    assert given <= known | {"__help", "__debug"}, f"`ebt {shlex.join(argv)}`: unknown {sorted(given - known)}"


def spans(page: str) -> Iterator[str]:
    """Code within the text of a page."""
    text = FENCED.sub("", (ROOT / page).read_text(encoding="utf-8"))
    return (" ".join(found.split()) for found in re.findall(r"`([^`]+)`", text))


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_options_exist(page: str) -> None:
    commands = [words for block in blocks_of(page) if block.language == "bash" for words in block.commands()]
    commands += [shlex.split(span) for span in spans(page) if span.startswith(("ebt ", "make "))]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for words in commands:
        argv = package_command(words)
        if argv is not None:
            check_options(argv)
        elif words[0] == "make":
            assert words[1] in targets, f"{page}: there is no `make {words[1]}`"
        elif "-m" in words and "ebt_transformers" in words[words.index("-m") + 1]:
            assert importlib.util.find_spec(words[words.index("-m") + 1]), f"{page}: {shlex.join(words)}"


# ---- links ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = FENCED.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://")):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


def test_the_tests_named_in_the_paper_index_exist() -> None:
    """Its last column has a file of tests, and the name of one of them in words."""
    page = ROOT / "docs" / "paper_index.md"
    named = re.findall(r"\[`test_\w+`\]\((\S+)\): ([\w ]+) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(named) >= 15
    for file, words in named:
        tests = (page.parent / file).read_text(encoding="utf-8")
        assert f"def test_{words.replace(' ', '_')}(" in tests, f"{file} has no test: {words}"


# ---- the site ---------------------------------------------------------------------------------------------------


class Loaded(HTMLParser):
    """The addresses that a browser fetches by itself when it shows a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        fetched = given.get("href") if tag == "link" and given.get("rel") != "canonical" else given.get("src")
        self.addresses += [fetched] if fetched else []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation site, built as `make docs` does: any warning fails."""
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) >= 20
    for page in pages:
        reader = Loaded()
        reader.feed(page.read_text(encoding="utf-8"))
        assert reader.addresses
        assert not [address for address in reader.addresses if "//" in address], page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    reference = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    anchors = {anchor.rpartition(".")[2] for anchor in re.findall(r'id="ebt_transformers\.([\w.]+)"', reference)}
    names = {*ebt_transformers.__all__, "EBTDenoisingPipeline"}
    for module in ("assets", "configuration", "metrics", "modeling_ebt", "pipelines", "training"):
        names |= set(import_module(f"ebt_transformers.{module}").__all__)
    assert names <= anchors, sorted(names - anchors)


def test_files_outside_the_pages_are_shown_where_a_page_links_them(site: Path) -> None:
    code = (site / "source" / "modeling_ebt" / "descent.py.html").read_text(encoding="utf-8")
    assert "energy_and_gradient" in code
    assert 'href="source/modeling_ebt/' in (site / "concepts.html").read_text(encoding="utf-8")


def test_the_glossary_is_that_of_the_architecture(site: Path) -> None:
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    text = hooks["section"]((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), "Glossary")
    assert text.startswith("# Glossary\n") and text.count("\n## ") == 0
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    page = (site / "glossary.html").read_text(encoding="utf-8")
    assert page.count("<tr>") == len(rows)  # one of them, the header; the rule below it starts with |-


def test_docstrings_become_lists_and_links() -> None:
    pytest.importorskip("griffe", reason="the extra docs is not installed")
    module = runpy.run_path(str(ROOT / "docs" / "docstrings.py"))
    docstring = (
        "Walks.\n\nArgs:\n    a, b (`int`): from\n        here.\n    c: to [`EBTConfig`].\n\nReturns:\n    `x`."
    )
    expected = "**Arguments**\n\n- **`a, b`** (`int`): from\n    here.\n- **`c`**: to [`EBTConfig`].\n"
    assert expected in module["as_markdown"](docstring)
    linked = module["linked"]("[`EBTConfig`] [`~x.EBTConfig.y`] [`nobody`]", {"EBTConfig": "e.EBTConfig"})
    assert linked == "[`EBTConfig`][e.EBTConfig] `x.EBTConfig.y` `nobody`"


def test_the_picture_is_what_its_script_draws() -> None:
    draw = runpy.run_path(str(ROOT / "docs" / "images" / "draw_concept.py"))["draw"]
    assert draw() == (ROOT / "docs" / "images" / "concept.svg").read_text(encoding="utf-8")
