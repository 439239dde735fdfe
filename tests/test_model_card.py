"""Laws of model cards: valid metadata, numbers that the model gives again, code that runs, and nothing disturbed."""

import json
import random
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging

from ebt_transformers import EBTTrainer, transformer_pp_config
from ebt_transformers.assets import checkpoint_path, image_checkpoint_path
from ebt_transformers.modeling_ebt.image_processing_ebt import EBTImageProcessor
from ebt_transformers.training import EBTTrainingArguments, run_clm
from ebt_transformers.training.arguments import EBTImageTrainingArguments
from ebt_transformers.training.build_checkpoint import BLOCK_SIZE, facts_of, summary, write_shipped_card
from ebt_transformers.training.card_measurements import (
    ThinkingMeasurement,
    measure_thinking,
    some_rows,
)
from ebt_transformers.training.card_thinking import verdict
from ebt_transformers.training.data import CausalLMCollator, held_out_blocks
from ebt_transformers.training.model_card import CardFacts, RunFacts, card_measurement, trained_model, write_card


sys.path.append(str(Path(__file__).parent))  # the helper beside this file, under every import mode of pytest
from card_cases import SIDE, VOCAB, image_rows, text_rows, tiny_image_model  # noqa: E402


PICTURE = b"\x89PNG\r\n"
THINKING_SECTIONS = ("## Thinking longer", "## What thinking costs")


@pytest.fixture
def text_trainer(make_model: Callable, tmp_path: Path) -> Callable[..., EBTTrainer]:
    """A trainer of a tiny text model, with validation rows unless told otherwise."""

    def make(model: torch.nn.Module | None = None, run_facts: RunFacts | None = None, **options: object) -> EBTTrainer:
        names = ("train_dataset", "eval_dataset", "data_collator", "callbacks")
        given = {name: options.pop(name) for name in names if name in options}
        values = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "max_steps": 2}
        values |= {"per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3}
        arguments = EBTTrainingArguments(str(tmp_path / "mine"), **{**values, **options})
        return EBTTrainer(
            make_model(vocab_size=VOCAB) if model is None else model,
            arguments,
            processing_class=AutoTokenizer.from_pretrained(checkpoint_path()),
            run_facts=run_facts,
            **{"train_dataset": text_rows(), "eval_dataset": text_rows(), **given},
        )

    return make


@pytest.fixture
def image_trainer(tmp_path: Path) -> EBTTrainer:
    model = tiny_image_model()
    arguments = EBTImageTrainingArguments(
        str(tmp_path / "pictures"), use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no"
    )
    options = {"eval_dataset": image_rows(), "processing_class": EBTImageProcessor.from_model_config(model.config)}
    return EBTTrainer(model, arguments, train_dataset=image_rows(), **options)


@pytest.fixture(params=["text", "image"])
def trainer(request: pytest.FixtureRequest) -> EBTTrainer:
    """One of each kind."""
    if request.param == "image":
        return request.getfixturevalue("image_trainer")
    return request.getfixturevalue("text_trainer")()


def saved_card(trainer: EBTTrainer) -> str:
    trainer.save_model()
    return (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")


# ---- the head --------------------------------------------------------------------------------------------------


def complaint(content: str) -> str | None:
    """What the Hub's check would say, as far as its rules are documented."""
    head = yaml.safe_load(content.split("---\n")[1])
    if head.get("pipeline_tag") not in ("text-generation", "image-to-image"):
        return "unknown pipeline_tag"
    for name in [head.get("base_model"), *head.get("datasets", [])]:
        if name is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            return f"{name} is no name on the Hub"
    for entry in head.get("model-index", []):
        for result in entry["results"]:
            fields = [result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]]
            fields += [metric["type"] for metric in result["metrics"]]
            if not all(isinstance(value, str) and value for value in fields):
                return "model-index misses a field"
            if not all(isinstance(metric["value"], float) for metric in result["metrics"]):
                return "a metric has no value"
    return None


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict]]:
    """A stand-in for the Hub's check of cards; gives the requests it got."""
    seen: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({"path": self.path, **body})
            said = complaint(body["content"])
            self.send_response(200 if said is None else 400)
            self.end_headers()
            self.wfile.write((said or "ok").encode())

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield seen
    server.shutdown()
    server.server_close()


def test_a_card_passes_the_hubs_check(trainer, hub):
    trainer.evaluate()
    card = ModelCard(saved_card(trainer))
    card.validate()
    assert (
        hub[0]["path"] == "/api/validate-yaml" and hub[0]["repoType"] == "model" and "## Limits" in hub[0]["content"]
    )
    card.data.pipeline_tag = "mind-reading"
    with pytest.raises(ValueError, match="unknown pipeline_tag"):
        card.validate()


def test_the_metadata_say_what_was_measured(trainer):
    metrics = trainer.evaluate()
    saved_card(trainer)
    data = ModelCard.load(Path(trainer.args.output_dir) / "README.md").data
    metric, task = ("psnr", "image-to-image") if "eval_psnr" in metrics else ("perplexity", "text-generation")
    assert data.library_name == "transformers" and data.pipeline_tag == task
    assert {"ebt", "energy-based-model"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.task_type, result.metric_type, result.dataset_split) == (task, metric, "validation")
    assert result.metric_value == pytest.approx(metrics[f"eval_{metric}"])
    assert result.dataset_type and result.dataset_name


def test_what_is_given_wins_and_what_is_unknown_is_refused(text_trainer):
    facts = RunFacts(data="a book", dataset="someone/book", license="mit", base_model="someone/model")
    trainer = text_trainer(run_facts=facts)
    trainer.evaluate()
    trainer.save_model()
    card = ModelCard.load(Path(trainer.args.output_dir) / "README.md")
    assert (card.data.license, card.data.base_model, card.data.datasets) == ("mit", "someone/model", ["someone/book"])
    trainer.create_model_card(
        **{"language": "en", "license": "apache-2.0", "tags": "plays", "model_name": "bard", "dataset": "Plays"},
        **{"finetuned_from": "other/model", "tasks": ["text-generation", "fill-mask"], "dataset_tags": "other/plays"},
        dataset_args="all",
    )
    card = ModelCard.load(Path(trainer.args.output_dir) / "README.md")
    data, (result,) = card.data, card.data.eval_results
    assert (data.language, data.license, data.base_model, data.datasets) == (
        *("en", "apache-2.0", "other/model"),
        ["other/plays"],
    )
    assert (data.model_name, data.pipeline_tag) == ("bard", "text-generation")
    assert {"plays", "fill-mask", "ebt"} <= set(data.tags)
    assert (result.dataset_type, result.dataset_name, result.dataset_config) == ("other/plays", "Plays", "all")
    with pytest.raises(TypeError, match="licence.*Allowed: .*license"):
        trainer.create_model_card(licence="mit")


@pytest.mark.parametrize("absolute", [False, True])
def test_folders_are_no_names_on_the_hub(text_trainer, tmp_path, monkeypatch, absolute):
    monkeypatch.chdir(tmp_path)
    Path("runs/base").mkdir(parents=True)
    base = str(Path("runs/base").resolve()) if absolute else "runs/base"
    card = saved_card(text_trainer(run_facts=RunFacts(base_model=base, dataset=base)))
    assert f"**started from**: {base}" in card
    assert ModelCard(card).data.base_model is None and ModelCard(card).data.datasets is None


def test_a_result_that_is_no_number_stays_out_of_the_metadata(make_model, tmp_path):
    facts = CardFacts("tiny", "tiny", results={"eval_perplexity": float("inf"), "test_perplexity": 3.0})
    (result,) = ModelCard.load(write_card(tmp_path, make_model(), facts)).data.eval_results
    assert (result.dataset_split, result.metric_value) == ("test", 3.0)


def test_a_card_for_the_hub_names_the_place_there(text_trainer):
    card = saved_card(text_trainer(hub_model_id="me/thinker"))
    assert 'model="me/thinker"' in card and 'from_pretrained("me/thinker", trust_remote_code=True)' in card
    assert "\n# thinker\n" in card and '"mine"' not in card


# ---- the body --------------------------------------------------------------------------------------------------


def test_a_card_has_everything_a_reader_needs(trainer):
    trainer.train()
    trainer.evaluate()
    card = saved_card(trainer)
    sections = ("Use", "Results", "Limits", "Training", "Model", "Versions", "Citation")
    for part in (*THINKING_SECTIONS, *(f"## {name}\n" for name in sections), "2507.02092", "@software{"):
        assert part in card
    assert "import ebt_transformers" in card and "trust_remote_code=True" in card
    assert "| step " in card and "![Mean energy and " in card
    picture = Path(trainer.args.output_dir) / "energy.png"
    assert picture.read_bytes().startswith(PICTURE) and picture.stat().st_size < 60_000


def test_the_code_of_a_card_runs(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.arange(SIDE * SIDE * 3, dtype=np.uint8).reshape(SIDE, SIDE, 3)).save("noisy.png")
    blocks = re.findall(r"```python\n(.*?)```", saved_card(trainer), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "card", "exec"), {})


def test_a_card_without_the_code_does_not_promise_it(make_model, tmp_path):
    model = make_model()
    facts = CardFacts("tiny", "tiny")
    assert "trust_remote_code" in write_card(tmp_path, model, facts).read_text()
    (tmp_path / "config.json").write_text("{}")
    assert "trust_remote_code" not in write_card(tmp_path, model, facts).read_text()


def test_a_twin_gets_a_card_without_thinking(text_trainer):
    from transformers import LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    trainer = text_trainer(LlamaForCausalLM(transformer_pp_config("4xs", vocab_size=VOCAB, **shape)))
    trainer.evaluate()
    card = saved_card(trainer)
    assert "thinking" not in card.lower() and "validation perplexity" in card
    assert not (Path(trainer.args.output_dir) / "energy.png").exists()
    assert ModelCard(card).data.tags is None


def test_facts_survive_json(text_trainer):
    facts = CardFacts("a", "b/a", RunFacts("data", limits=["none"]), {"eval_loss": 1.0}, [{"step": 1, "loss": 2.0}])
    assert CardFacts.from_dict(json.loads(json.dumps(facts.to_dict()))) == facts
    measured = card_measurement(text_trainer())
    assert ThinkingMeasurement.from_dict(json.loads(json.dumps(asdict(measured)))) == measured


def test_without_matplotlib_the_numbers_stay(text_trainer, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trainer = text_trainer()
    card = saved_card(trainer)
    assert "| 2 (default) " in card and "energy.png" not in card
    assert not (Path(trainer.args.output_dir) / "energy.png").exists()


# ---- nothing disturbed -----------------------------------------------------------------------------------------


def test_a_measurement_leaves_everything_as_it_was(text_trainer, make_model):
    def drawing(rows: list) -> dict:
        random.random(), np.random.rand(), torch.rand(1)
        return CausalLMCollator(0)(rows)

    model = make_model(vocab_size=VOCAB, thinking_noise_std=0.1).train()
    model.step_size.eval()
    trainer = text_trainer(model, data_collator=drawing)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert card_measurement(trainer) is not None
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert model.training and model.model.training and not model.step_size.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_card_on_the_way_changes_nothing_about_training(text_trainer, make_model):
    class Writes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 1:
                trainer.create_model_card()

    results = []
    for callbacks in ([], [Writes()]):
        # dropout-free, but training starts its candidates at random
        trainer = text_trainer(make_model(vocab_size=VOCAB, candidate_init="normal"), callbacks=callbacks, max_steps=3)
        trainer.train()
        results.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
    assert (Path(trainer.args.output_dir) / "energy.png").is_file()
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@pytest.mark.parametrize("kind", ["none", "broken", "sharded"])
def test_where_nothing_can_be_measured_the_card_says_so(text_trainer, monkeypatch, kind):
    def broken(rows: list) -> dict:
        raise RuntimeError("no such column")

    warnings: list[str] = []
    monkeypatch.setattr(logging.get_logger("ebt_transformers.training.model_card"), "warning", warnings.append)
    trainer = text_trainer(**{"none": {"eval_dataset": None}, "broken": {"data_collator": broken}}.get(kind, {}))
    if kind == "sharded":
        monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    trainer.create_model_card()
    card = (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")
    assert "was not measured" in card and "energy.png" not in card and "FLOPs" not in card
    assert "| 8              |             10 |               8 |" in card
    assert warnings == (
        ["The model card has no measurement of thinking: RuntimeError: no such column"] if kind == "broken" else []
    )


def test_adapters_are_measured_inside_the_model_they_adapt(text_trainer, make_model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(make_model(vocab_size=VOCAB), config)
    trainer = text_trainer(adapted)
    assert trained_model(trainer) is adapted.get_base_model()
    batch = CausalLMCollator(0)(text_rows())
    with torch.no_grad():
        expected = adapted.eval()(**batch, thinking_steps=4).loss.item()
    assert card_measurement(trainer).losses[3] == pytest.approx(expected, rel=1e-5)
    card = saved_card(trainer)
    assert ModelCard(card).data.library_name == "peft" and "**trained parameters**" in card
    assert "trust_remote_code" not in card  # an adapter brings no code


# ---- the shipped cards -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [checkpoint_path(), image_checkpoint_path()], ids=["text", "image"])
def test_the_shipped_cards_are_complete_and_valid(folder, hub):
    card = ModelCard.load(folder / "README.md")
    card.validate()
    assert card.data.license == "apache-2.0" and card.data.eval_results
    for part in (*THINKING_SECTIONS, "## Limits", "## Licence", "## Citation", "![", "| step "):
        assert part in card.text
    assert (folder / "energy.png").stat().st_size <= 60_000
    recorded = ThinkingMeasurement.from_dict(json.loads((folder / "results.json").read_text())["thinking"])
    assert verdict(recorded) in card.text


def test_the_shipped_text_card_reports_what_its_model_does():
    recorded = json.loads((checkpoint_path() / "results.json").read_text(encoding="utf-8"))
    expected = ThinkingMeasurement.from_dict(recorded["thinking"])
    model = AutoModelForCausalLM.from_pretrained(checkpoint_path())
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    rows = some_rows(held_out_blocks(tokenizer, BLOCK_SIZE, "validation"))
    measured = measure_thinking(model, CausalLMCollator(tokenizer.pad_token_id)(rows))
    assert measured.losses == pytest.approx(expected.losses, abs=2e-3)
    assert measured.energies == pytest.approx(expected.energies, abs=2e-3)
    assert measured.flops == pytest.approx(expected.flops)
    losses = {split: recorded["ebt"][f"{split}_loss_by_steps"] for split in ("validation", "test")}
    twin = {split: {"0": recorded["twin"][f"{split}_loss"]} for split in ("validation", "test")}
    assert summary(losses, twin) in (checkpoint_path() / "README.md").read_text(encoding="utf-8")


def test_the_card_of_the_shipped_model_is_written_from_what_is_recorded_beside_it(tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "tiny_ebt"
    shutil.copytree(checkpoint_path(), folder)
    for name in ("README.md", "energy.png"):
        (folder / name).unlink()
    write_shipped_card(folder)
    card, shipped = ((place / "README.md").read_text(encoding="utf-8") for place in (folder, checkpoint_path()))
    # another machine may round the last digit of what is measured the other way
    without_digits = [re.sub(r"[-\d.]+", "0", text) for text in (card, shipped)]
    assert without_digits[0] == without_digits[1] and (folder / "energy.png").is_file()


def test_what_a_run_says_about_itself_is_found_in_its_files(tmp_path):
    shape = "hidden_size=16,intermediate_size=16,num_hidden_layers=1,num_attention_heads=2"
    options = "--use_cpu --disable_tqdm true --block_size 16 --max_steps 2 --max_train_samples 8 --max_eval_samples 2"
    best = "--eval_strategy steps --eval_steps 1 --save_steps 1 --load_best_model_at_end true"  # as the shipped one
    argv = [*options.split(), *best.split(), "--output_dir", str(tmp_path / "run"), "--config_overrides", shape]
    run_clm.main(argv)
    facts = facts_of(tmp_path / "run")
    trained = json.loads((tmp_path / "run" / "all_results.json").read_text(encoding="utf-8"))
    assert facts.results["eval_loss"] == trained["eval_loss"] and "test_perplexity" in facts.results
    assert facts.training["steps"].startswith("2 of 2, 8 sequences") and facts.training["recipe"] == "s1"
    assert facts.run.command.startswith("ebt train clm --output_dir tiny_ebt") and facts.title == "tiny_ebt"
