"""Laws of the distribution: what is shipped is what is in the repository, and nothing else."""

import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
PACKAGE = SETUP["PACKAGE"]
NOT_SHIPPED = {"benchmarks", "docs", "examples", "tests"}
# A pattern rather than the names themselves, so that this file passes its own test.
MACHINE_PATH = re.compile(r"(?<![\w.$}~-])/(?:w[o]rk|f[a]rm|o[p]t/(?:wheels|pypi)|r[o]ot|h[o]me/\w+|U[s]ers/\w+)/")


def repository_files() -> list[Path]:
    """Files of the repository, relative to its root: tracked and new ones, not those that git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return sorted(Path(name) for name in set(listed.split("\0")) if name and (ROOT / name).is_file())


@pytest.fixture(scope="module")
def files() -> list[Path]:
    return repository_files()


def test_every_package_folder_is_shipped(files):
    folders = {path.parent.as_posix() for path in files if path.name == "__init__.py" and path.parent != Path(".")}
    assert {f for f in folders if f.split("/")[0] not in NOT_SHIPPED} == {
        name.replace(".", "/") for name in SETUP["SUBPACKAGES"]
    }


def test_root_modules_are_known(files):
    """A new module at the root is either named in setup.py or kept out of the wheel on purpose."""
    assert {path.stem for path in files if path.parent == Path(".") and path.suffix == ".py"} == {
        *SETUP["ROOT_MODULES"],
        "setup",
    }


def test_wheel_holds_the_package_and_nothing_else(files, tmp_path):
    source, target = tmp_path / "source", tmp_path / "wheels"
    for path in files:  # a copy: a build leaves folders behind, and would take what an earlier one has left
        (source / path.parent).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, source / path)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.endswith("/")}
        (metadata_name,) = (name for name in held if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(metadata_name).decode()
        entry_points = archive.read(metadata_name.replace("METADATA", "entry_points.txt")).decode()
        for name in held:
            assert not MACHINE_PATH.search(archive.read(name).decode("utf-8", "replace")), name

    shipped = {*(Path(f"{name}.py") for name in SETUP["ROOT_MODULES"]), Path("py.typed")}
    for subpackage in SETUP["SUBPACKAGES"]:
        folder = Path(subpackage.replace(".", "/"))
        shipped |= {path for path in files if path.parent == folder and path.suffix == ".py"}
    shipped |= {path for path in files if path.parts[0] == "assets"}
    dist_info = {name for name in held if ".dist-info/" in name}
    assert held - dist_info == {f"{PACKAGE}/{path.as_posix()}" for path in shipped}
    assert {Path(name).name for name in dist_info} >= {"LICENSE", "METADATA", "RECORD", "entry_points.txt"}
    assert f"ebt = {PACKAGE}.cli:main" in entry_points
    requirements = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    assert not [r for r in requirements if re.search(r"<|==(?!.*extra)", r.split(";")[0])], "upper pins"


def test_assets_are_there_and_consistent():
    from transformers import AutoTokenizer

    from ebt_transformers import assets

    text = assets.shakespeare_path().read_text(encoding="utf-8")
    splits = assets.shakespeare_splits()
    assert list(splits) == ["train", "validation", "test"]
    assert "".join(splits.values()) == text
    assert all(part.endswith("\n") for part in splits.values())
    assert [round(100 * len(part) / len(text)) for part in splits.values()] == [90, 5, 5]

    tokenizer = AutoTokenizer.from_pretrained(assets.checkpoint_path())
    assert len(tokenizer) == tokenizer.vocab_size == 1024
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 256)
    for sample in (text, "Any  text ,\tdon't\r\n\n\u00e9\u65e5\U0001f642 <|pad|>"):
        assert tokenizer.decode(tokenizer(sample, verbose=False)["input_ids"]) == sample


def test_tokenizer_is_what_its_script_builds(tmp_path):
    from ebt_transformers.assets import build_tokenizer, checkpoint_path

    build_tokenizer.main(["--output", str(tmp_path)])
    built = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    assert built == (checkpoint_path() / "tokenizer.json").read_text(encoding="utf-8")


def test_no_machine_paths(files):
    named = []
    for path in files:
        content = (ROOT / path).read_bytes()
        if b"\0" not in content:  # a text file
            for number, line in enumerate(content.decode("utf-8", "replace").split("\n"), 1):
                if MACHINE_PATH.search(line):
                    named.append(f"{path}:{number}: {line.strip()[:100]}")
    assert not named


def test_no_large_files(files):
    assert not [path for path in files if (ROOT / path).stat().st_size > 25 * 2**20]


def test_metadata_agrees():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"$', project, re.MULTILINE)[1]
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    # Named without being there it would break every build; there without being named it would be missing on PyPI.
    assert ('readme = "README.md"' in project) == (ROOT / "README.md").is_file()


def test_constraints_pin_exactly():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r'[\w.-]+==[\w.!]+( ; python_version >= "3\.\d+")?', line) for line in pins)
    assert {"torch", "transformers", "tokenizers", "datasets"} <= {line.split("==")[0] for line in pins}


def test_the_package_says_the_version_it_is_installed_with() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    source = (ROOT / "__init__.py").read_text(encoding="utf-8")
    version = project.split('\nversion = "', 1)[1].split('"', 1)[0]
    assert f'__version__ = "{version}"' in source
