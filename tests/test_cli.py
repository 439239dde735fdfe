"""Laws of the console script: help at once, results as text or JSON, one line for a mistake."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ebt_transformers import cli


SCRIPT = "import sys\nfrom ebt_transformers.cli import main\nsys.exit(main())\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model of the embedded tokenizer, saved."""
    import torch
    from transformers import AutoTokenizer

    from ebt_transformers import EBTConfig, EBTForCausalLM
    from ebt_transformers.assets import checkpoint_path

    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    EBTForCausalLM(EBTConfig(vocab_size=1024, step_size=3.0, **size, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def ebt(subprocess_env, tmp_path):
    """Runs the console script as an installation makes it, in a process of its own."""
    script = tmp_path / "ebt"
    script.write_text(SCRIPT)

    def run(*argv: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(script), *argv]
        return subprocess.run(command, env=subprocess_env, cwd=tmp_path, capture_output=True, text=True)

    return run


def is_one_line(text: str) -> bool:
    return text.endswith("\n") and text.count("\n") == 1


@pytest.mark.parametrize("argv", [("--help",), ("demo", "--help"), ("generate", "--help")])
def test_help_is_there_at_once(ebt, argv):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = ebt(*argv)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "usage: ebt" in done.stdout and not done.stderr
    # processor time: what it takes on a machine that does nothing else
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_help_imports_no_torch(subprocess_env, tmp_path):
    script = tmp_path / "ebt"
    lines = "import sys\nfrom ebt_transformers.cli import main\n{}\nassert 'torch' not in sys.modules\n"
    ending = "try:\n    main(['generate', '--help'])\nexcept SystemExit:\n    pass"
    script.write_text(lines.format(ending))
    subprocess.run([sys.executable, str(script)], env=subprocess_env, check=True, capture_output=True)


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)
    assert cli.main([]) == 2


@pytest.mark.parametrize(
    "argv, hint",
    [
        (["genrate", "x"], "Did you mean generate?"),
        (["--debug", "benchmrk"], "Did you mean benchmark?"),
        (["train", "cml"], "Did you mean clm?"),
        (["benchmark", "generaton"], "Did you mean generation?"),
        (["generate", "x", "--thinking-stepps", "3"], "Did you mean --thinking-steps?"),
        (["generate", "x", "--no_such_thing"], "Unknown argument --no_such_thing."),
    ],
)
def test_typos(argv, hint, capsys):
    assert cli.main(argv) == 2
    shown = capsys.readouterr().err
    assert hint in shown
    assert is_one_line(shown) or argv[0] == "--debug"


def test_version_and_env(capsys, monkeypatch):
    import importlib.metadata

    from ebt_transformers import __version__, reporting

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__
    found = importlib.metadata.version

    def without_peft(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(reporting, "version", without_peft)
    assert cli.main(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["ebt_transformers"] == __version__
    assert lines["peft"] == "not installed"
    assert {"python", "platform", "torch", "transformers", "tokenizers", "huggingface_hub", "cuda"} <= set(lines)


def test_generate_text(checkpoint, capsys):
    assert cli.main(["generate", "ROMEO:", "--model", checkpoint, "--max-new-tokens", "4"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("ROMEO:")
    argv = ["generate", "--stream", "ROMEO:", "--model", checkpoint, "--max-new-tokens", "4"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.strip() == text.strip()


def test_generate_json_and_energies(checkpoint, capsys):
    argv = ["generate", "ROMEO:", "--model", checkpoint, "--max-new-tokens", "4", "--thinking-steps", "3"]
    sampling = ["--sample", "--temperature", "0.9", "--top-k", "20", "--seed", "5"]
    assert cli.main([*argv, *sampling, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert cli.main([*argv, *sampling, "--json", "--output-energies"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["prompt"], result["text"]) == ("ROMEO:", plain["text"])
    assert [len(token["energies"]) for token in result["tokens"]] == [4] * len(result["tokens"])
    assert cli.main([*argv, "--output-energies"]) == 0
    assert "after 3" in capsys.readouterr().out


def test_generate_reads_standard_input(checkpoint, ebt, subprocess_env, tmp_path):
    command = [sys.executable, str(tmp_path / "ebt"), "generate", "-", "--model", checkpoint, "--max-new-tokens", "2"]
    (tmp_path / "ebt").write_text(SCRIPT)
    done = subprocess.run(command, env=subprocess_env, input="First\nCitizen", capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("First\nCitizen")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "./nowhere"], "There is no checkpoint folder ./nowhere."),
        (["--model", "nobody/nothing"], "Cannot load 'nobody/nothing'"),
        (["--thinking-steps", "0"], "`thinking_steps` must be at least 1 for this model"),
        (["--max-new-tokens", "0"], "--max_new_tokens must be at least 1"),
        (["--max-new-tokens", "999"], "Ask for at most"),
        (["--temperature", "0.5"], "with --sample only"),
        (["--stream", "--json"], "contradict"),
    ],
)
def test_mistakes_are_one_line(checkpoint, options, message, capsys):
    model = [] if "--model" in options else ["--model", checkpoint]
    assert cli.main(["generate", "ROMEO:", *model, *options]) == 2
    shown = capsys.readouterr().err
    assert message in shown and is_one_line(shown) and "Traceback" not in shown
    assert cli.main(["generate", "ROMEO:", *model, *options, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_broken_checkpoint_is_one_line(checkpoint, tmp_path, capsys):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / "model.safetensors").write_bytes(b"nonsense")
    assert cli.main(["generate", "x", "--model", str(broken)]) == 2
    shown = capsys.readouterr().err
    assert "Cannot load" in shown and is_one_line(shown)


def test_model_that_does_not_think(checkpoint, tmp_path, capsys):
    from transformers import AutoTokenizer, LlamaForCausalLM

    from ebt_transformers import EBTConfig, transformer_pp_config

    LlamaForCausalLM(transformer_pp_config(EBTConfig.from_pretrained(checkpoint))).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path)
    argv = ["generate", "ROMEO:", "--model", str(tmp_path), "--max-new-tokens", "2"]
    assert cli.main(argv) == 0
    assert cli.main([*argv, "--thinking-steps", "2"]) == 2
    assert "does not think" in capsys.readouterr().err
    assert cli.main([*argv, "--output-energies"]) == 2


def test_train_help_and_its_mistakes(capsys):
    assert cli.main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "clm" in shown and "denoise" in shown
    with pytest.raises(SystemExit) as leaving:
        cli.main(["train", "clm", "--help"])
    assert leaving.value.code == 0
    assert cli.main(["train", "clm", "--output_dir", "x", "--preset", "tremendous", "--do_eval"]) == 2
    assert "tremendous" in capsys.readouterr().err


def test_convert_mistakes(tmp_path, capsys):
    assert cli.main(["convert", str(tmp_path / "none.ckpt"), str(tmp_path / "out")]) == 2
    assert is_one_line(capsys.readouterr().err)


def test_benchmark_without_a_checkout(monkeypatch, tmp_path, capsys):
    assert cli.main(["benchmark", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "generation" in shown and "training_step" in shown and "common" not in shown
    monkeypatch.setattr(cli, "__file__", str(Path(tmp_path) / "cli.py"))
    assert cli.main(["benchmark", "generation"]) == 2
    assert "not part of the installed package" in capsys.readouterr().err
