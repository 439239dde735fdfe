"""Laws of the benchmarks: they run, they say what they ran on, and an interrupted one goes on where it was."""

import argparse
import importlib
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer


FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
TINY = ["--preset", "4xs", "--vocab-size", "64", "--threads", "1"]


def modules_of_benchmarks() -> list[str]:
    """Names under which benchmarks and their parts are imported."""
    own = {path.stem for path in FOLDER.iterdir()}
    return [name for name in sys.modules if name.split(".")[0] in own]


@pytest.fixture
def script(monkeypatch):
    """Imports a benchmark as running it would."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in modules_of_benchmarks():
        monkeypatch.delitem(sys.modules, name)
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)
    for name in modules_of_benchmarks():
        del sys.modules[name]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_generation_runs_and_resumes(script, tmp_path, monkeypatch):
    generation = script("generation")
    path = tmp_path / "generation.jsonl"
    argv = [*TINY, "--contexts", "4", "8", "--steps", "1", "2", "--candidates", "1", "2", "--new-tokens", "2"]
    argv += ["--repeats", "1", "--results", str(path)]
    text = generation.main([*argv, "--cache", "on"])
    rows = rows_of(path)
    assert len(rows) == 2 * (1 + 4)
    assert all(row["seconds_per_token"] > 0 and row["ratio"] > 0 for row in rows)
    assert path.with_suffix(".md").read_text() == text
    for part in ("machine", "versions", "python benchmarks/generation.py --preset 4xs", "seed: 0", "x cached twin"):
        assert part in text
    assert "From context 4 to 8" in text and "floor x twin" in text

    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:7]) + "\n" + lines[7][:20])  # killed while writing
    measured = []
    measure = generation.measure
    monkeypatch.setattr(generation, "measure", lambda *args: measured.append(args) or measure(*args))
    generation.main([*argv, "--cache", "on"])
    assert len(measured) == 3
    generation.main(argv)  # the uncached half is missing
    assert len(measured) == 3 + 10
    generation.main(argv)
    assert len(measured) == 3 + 10
    generation.main([*argv, "--cache", "on", "--seed", "1"])  # other settings, other rows
    assert len(measured) == 3 + 20


def test_self_verification_runs_and_resumes(script, tmp_path, monkeypatch):
    verification = script("self_verification")
    path = tmp_path / "verification.jsonl"
    argv = [*TINY, "--context", "4", "--steps", "1", "2", "--candidates", "2", "8", "--new-tokens", "2"]
    argv += ["--repeats", "1", "--keep", "1", "2", "--results", str(path)]
    asked = []
    times = verification.token_times
    monkeypatch.setattr(verification, "token_times", lambda *args, **said: asked.append(said) or times(*args, **said))
    text = verification.main(argv)
    rows = rows_of(path)
    # one step leaves nothing to prune, and keeping two of two is no pruning
    assert [(row["steps"], row["candidates"], row["keep"]) for row in rows] == [
        *((1, 2, 2), (1, 8, 8)),
        *((2, 2, 2), (2, 2, 1), (2, 8, 8), (2, 8, 1), (2, 8, 2)),
    ]
    assert all(row["seconds_per_token"] > 0 and row["ratio"] > 0 for row in rows)
    assert {said.get("thinking_prune_keep") for said in asked} == {None, 1, 2}
    assert text.count("8 candidates cost") == 2
    monkeypatch.setattr(verification, "measure", lambda *args: pytest.fail("measured again"))
    assert verification.main(argv) == text


def test_notes_of_generation_compare_growth_with_the_twins(script, tmp_path):
    generation, common = script("generation"), script("common")
    results = common.Results(tmp_path / "rows.jsonl", {})
    keys = []
    measured = ((256, 2, 4.0, 1.0), (4096, 2, 9.0, 2.5), (256, 8, 15.0, 1.0), (512, 8, 15.0, 1.0))
    for context, steps, own, twin in measured:
        keys.append({"context": context, "cache": True, "model": "ebt", "steps": steps, "candidates": 1})
        seconds = {"seconds_per_token": own, "twin_seconds_per_token": twin, "ratio": own / twin}
        results.append({**keys[-1], **seconds})
        # neither uncached rows nor several candidates have a say
        for other in ({"cache": False}, {"candidates": 4}):
            keys.append({**keys[-1], **other})
            results.append({**keys[-1], **seconds, "seconds_per_token": 100.0})
    assert generation.notes(results, keys).splitlines()[2:] == [
        "At context 256, 2 steps cost 4.00 times the cached twin (aim: at most 4.5).",
        "At context 256, 8 steps cost 15.00 times the cached twin (aim: at most 14).",
        "From context 256 to 4096 the twin's time per token grows 2.50-fold, that of 2 steps 2.25-fold: 0.90 of it.",
        "From context 256 to 512 the twin's time per token grows 1.00-fold, that of 8 steps 1.00-fold: 1.00 of it.",
    ]


def test_floor_of_generation_counts_keys_and_values(script):
    from ebt_transformers import EBTConfig

    generation, floors = script("generation"), script("floors")
    size = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 3}
    config = EBTConfig(**size, num_attention_heads=4, num_key_value_heads=2, num_landscapes=2)
    # keys and values of 2 heads of width 2, for 5 tokens, in float32
    assert generation.layer_cache_bytes(config, 5) == 2 * (2 * 2) * 5 * 4
    # context: one or two landscapes in the first 2 layers; each step: 3 layers, twice; energy at the end: 3 layers
    assert [generation.ebt_cache_reads(config, steps) for steps in (1, 2, 4)] == [2 + 6, 4 + 12, 4 + 24]
    assert generation.ebt_cache_reads(config, 2, final_energy=True) == 4 + 12 + 3
    assert generation.floor_ratio(config, 0, 2) == floors.decoding_ratio(config, 2)
    assert generation.floor_ratio(config, 0, 2, candidates=4) == floors.decoding_ratio(config, 2, final_energy=True)
    # in a long context nothing else counts
    assert generation.floor_ratio(config, 10**9, 2) == pytest.approx((4 + 12) / 3, rel=1e-5)
    starts = EBTConfig(**size, num_attention_heads=4, candidate_init="proposal", num_landscapes=2)
    assert [generation.ebt_cache_reads(starts, steps) for steps in (0, 2)] == [3, 6 + 12]


def test_uncached_generation_is_uncached(script, make_model):
    generation = script("generation")
    model = make_model()
    seen = []
    encode = model.model._encode_context
    model.model._encode_context = lambda **options: seen.append(options["input_ids"].shape[1]) or encode(**options)
    for cache, lengths in ((True, [4, 1, 1]), (False, [4, 5, 6])):
        seen.clear()
        assert len(generation.token_times(model, torch.ones(1, 4).long(), 2, use_cache=cache)) == 2
        assert seen == lengths


def test_training_step_runs_and_resumes(script, tmp_path, monkeypatch):
    training_step = script("training_step")
    path = tmp_path / "training.jsonl"
    monkeypatch.setattr(
        training_step, "memory_in_subprocess", lambda name, key, _: {"ebt": 30.0, "twin": 10.0}[name] * key["batch"]
    )
    argv = [*TINY, "--batch-sizes", "1", "2", "--contexts", "8", "--repeats", "1", "--results", str(path)]
    text = training_step.main(argv)
    assert len(rows_of(path)) == 2 and "3.00" in text and "memory x twin" in text
    for part in ("all rows: shape 4xs:64, recipe s1", "| batch |", "EBT 30.0 MB, twin 10.0 MB, 3.00 times"):
        assert part in text
    assert "random_steps" not in text and "conditioning |" not in text
    monkeypatch.setattr(training_step, "measure", lambda *args: pytest.fail("measured again"))
    assert training_step.main(argv) == text


def test_training_step_has_a_row_for_every_combination(script, tmp_path, monkeypatch):
    training_step = script("training_step")
    path = tmp_path / "training.jsonl"
    asked = []
    monkeypatch.setattr(training_step, "memory_in_subprocess", lambda *args: asked.append(args[:2]) or 10.0)
    argv = ["--shapes", "4xs:64", "4xs:32", "--recipes", "s1", "s2", "--step-conditionings", "time_embed", "none"]
    argv += ["--batch-sizes", "1", "--contexts", "8", "--repeats", "1", "--threads", "1", "--results", str(path)]
    text = training_step.main(argv)
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| 4xs")
    ]
    assert [line[:4] for line in lines] == [
        [shape, recipe, conditioning, {"s1": "2", "s2": "3"}[recipe]]
        for shape in ("4xs:64", "4xs:32")
        for recipe in ("s1", "s2")
        for conditioning in ("time_embed", "none")
    ]
    assert len(rows_of(path)) == 8 and "random_steps=None" in text
    # variants of an EBT share the memory of their twin
    assert [key["shape"] for name, key in asked if name == "twin"] == ["4xs:64", "4xs:32"]
    for line, row in zip(lines, rows_of(path), strict=True):
        floor = training_step.ebt_training(training_step.config_of(row), 8).total
        floor /= training_step.twin_training(training_step.config_of(row), 8).total
        assert float(line[-5]) == pytest.approx(floor, abs=0.01)
        assert float(line[-4]) == pytest.approx(row["ratio"] / floor, abs=0.01)

    measured = []
    measure = training_step.measure
    monkeypatch.setattr(training_step, "measure", lambda *args: measured.append(args[0]) or measure(*args))
    assert training_step.main(argv) == text and not measured
    # whole graphs know one way only
    more = ["--chunk-sizes", "auto", "0", "--second-orders", "double_backward", "central_difference"]
    chosen = ["--shapes", "4xs:64", "--recipes", "s1", "--step-conditionings", "none", "--precision", "bfloat16"]
    text = training_step.main([*argv, *chosen, *more])
    assert [(key["second_order"], key["chunk_size"]) for key in measured] == [
        ("double_backward", "auto"),
        ("double_backward", 0),
        ("central_difference", "auto"),
    ]
    assert "precision bfloat16" in text and "chunk 0:" in text
    assert "EBT TFLOP/s" in training_step.cells_of(rows_of(path)[-1], on_cuda=True)


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (["--shapes", "xxs"], "'xxs' is no PRESET:VOCABULARY"),
        (["--shapes", "4xs:64", "huge:64"], "'huge:64' is no PRESET:VOCABULARY, as in xxs:50277. Presets: 4xs, 3xs"),
        (["--shapes", "4xs:0"], "a vocabulary has at least 1 token"),
        (["--chunk-sizes", "-1"], "'-1' is neither auto nor a number of candidates"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (
            ["--chunk-sizes", "0", "--second-orders", "central_difference"],
            "takes --second-orders double_backward only",
        ),
    ],
)
def test_training_step_says_what_it_does_not_take(script, tmp_path, capsys, argv, complaint):
    training_step = script("training_step")
    with pytest.raises(SystemExit):
        training_step.main([*argv, "--results", str(tmp_path / "rows.jsonl")])
    assert complaint in " ".join(capsys.readouterr().err.split())


def test_memory_slopes_are_those_of_each_setting(script):
    training_step = script("training_step")
    rest = {"shape": "4xs:64", "step_conditioning": "none", "steps": 2, "second_order": "double_backward"}
    rest |= {"chunk_size": "auto", "precision": "float32", "context": 8}
    rows = [
        {
            **rest,
            "recipe": recipe,
            "batch": batch,
            "ebt_megabytes": 50 + slope * batch,
            "twin_megabytes": 40 + 2 * batch,
        }
        for recipe, slope in (("s1", 5), ("s2", 3))
        for batch in (1, 2, 4)
    ]
    assert training_step.memory_slopes(rows) == [
        "- memory per row of a batch, recipe s1, context 8: EBT 5.0 MB, twin 2.0 MB, 2.50 times",
        "- memory per row of a batch, recipe s2, context 8: EBT 3.0 MB, twin 2.0 MB, 1.50 times",
    ]
    assert training_step.memory_slopes(rows[::3]) == []
    flat = [{**row, "twin_megabytes": 40} for row in rows[:3]]
    assert training_step.memory_slopes(flat)[0].endswith("twin 0.0 MB, no ratio")


def test_memory_is_that_of_the_model(script, monkeypatch, subprocess_env):
    """A model of 16 M parameters with its gradients needs at least 128 MB."""
    training_step = script("training_step")
    monkeypatch.setenv("PYTHONPATH", subprocess_env["PYTHONPATH"])
    argv = ["--shapes", "4xs:50000", "--batch-sizes", "1", "--contexts", "4", "--threads", "1"]
    options = training_step.parse(argv)
    (key,) = training_step.keys_of(options)
    used = training_step.memory_in_subprocess("twin", key, options)
    assert 100 < used < 400
    seen = []
    monkeypatch.setattr(
        training_step, "peak_memory", lambda options: seen.extend(training_step.keys_of(options)) or 1.0
    )
    more = ["--recipes", "s2", "--step-conditionings", "none", "--second-orders", "central_difference", "--steps", "4"]
    options = training_step.parse([*argv, *more, "--chunk-sizes", "3", "--precision", "bfloat16"])
    (key,) = training_step.keys_of(options)

    def run(command, **options):
        training_step.main(command[2:])
        return argparse.Namespace(returncode=0, stdout="1.0")

    monkeypatch.setattr(training_step.subprocess, "run", run)
    training_step.memory_in_subprocess("ebt", key, options)
    assert seen == [key]


# ---- floors: counted work ----------------------------------------------------------------------------------------


# V 10, D 8, A 4 x 2, A_kv 2 x 2, F 4: a layer has 2 * 8 * 4 weights for keys and values,
# and 2 * 8 * 8 + 3 * 8 * 4 others
HAND = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 3, "num_attention_heads": 4}
KEYS, OTHERS, TABLE = 64, 224, 80


def by_hand(recipe: str, **overrides):
    from ebt_transformers import EBTConfig

    return EBTConfig.for_recipe(recipe, **{**HAND, "num_key_value_heads": 2, "random_steps": None, **overrides})


def test_floors_of_training_by_hand(script):
    floors = script("floors")
    config = by_hand("s1")
    assert (floors.table_weights(config), floors.body_weights(config)) == (TABLE, 3 * (KEYS + OTHERS))
    body = 3 * (KEYS + OTHERS)
    # 5 tokens look at 3 of them on average, in 3 layers and two products of width 8
    assert floors.twin_training(config, 5) == floors.Work(3 * TABLE, 3 * body, 3 * 3 * 2 * 8 * 3)

    # two steps on two landscapes, whose texts are a token longer; the last layer has keys and values of them only
    work = floors.ebt_training(config, 5)
    assert work.table == 8 * TABLE
    assert work.body == pytest.approx(2 * 6 * body + 3 * 2 * 6 / 5 * (body - OTHERS))
    looks = 2 * 8
    assert work.attention == pytest.approx(2 * 6 * 3 * looks * 7 + 3 * 2 * 6 / 5 * 2 * looks * 3.5)
    assert work.total == work.table + work.body + work.attention

    # three steps on one landscape without a token of its own; two of them only move
    work = floors.ebt_training(by_hand("s2", step_conditioning="none"), 5)
    assert work.table == 9 * TABLE
    assert work.body == pytest.approx((6 + 2 * 2) * body + 3 * (body - OTHERS))
    assert work.attention == pytest.approx(10 * 3 * looks * 6 + 3 * 2 * looks * 3)

    for second_order in ("forward_over_reverse", "central_difference"):
        other = floors.ebt_training(by_hand("s2", step_conditioning="none", second_order=second_order), 5)
        assert other.body - work.body == pytest.approx(2 * body) and other.table == work.table
    # noise between scored steps: nothing is shared
    assert floors.table_products(by_hand("s1", thinking_steps=4)) == 3 * 4 + 2
    assert floors.table_products(by_hand("s1", thinking_steps=4, thinking_noise_std=1.0)) == 5 * 4


def test_floors_of_decoding_by_hand(script):
    floors = script("floors")
    config = by_hand("s1")
    body = 3 * (KEYS + OTHERS)
    twin = floors.twin_decoding(config)
    assert twin == 4 * (body + TABLE)
    ebt = floors.ebt_decoding(config, 2)
    assert ebt == 4 * (body - OTHERS + 2 * (2 * body + 2 * TABLE))
    assert floors.ebt_decoding(config, 2, final_energy=True) == ebt + 4 * (body + TABLE)
    assert floors.ebt_decoding(config, 2, bytes_per_weight=2) == ebt / 2
    assert floors.decoding_ratio(config, 2) == ebt / twin
    # nothing but its proposal: the twin
    assert floors.decoding_ratio(by_hand("proposal"), 0) == 1


class Products(TorchDispatchMode):
    """Adds up the multiply-adds of matrix products, by what they are part of."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.counts = vocab, {"table": 0, "body": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        first = {"mm": 0, "addmm": 1, "addmm_": 1}.get(func._overloadpacket.__name__)
        if first is not None:
            a, b = args[first : first + 2]
            # the energy head does not count, nor do forward mode's derivatives of weights, which are zero
            if 1 not in (*a.shape, *b.shape) and b.any():
                part = "table" if self.vocab in (*a.shape, *b.shape) else "body"
                self.counts[part] += a.numel() * b.shape[-1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", ["s1", "s2", "proposal"])
@pytest.mark.parametrize("conditioning", ["none", "time_embed"])
@pytest.mark.parametrize("second_order", ["double_backward", "forward_over_reverse", "central_difference"])
def test_floors_are_what_training_computes(script, recipe, conditioning, second_order):
    from ebt_transformers import EBTForCausalLM

    floors = script("floors")
    config = by_hand(
        recipe, vocab_size=41, step_conditioning=conditioning, second_order=second_order, training_chunk_size=7
    )
    model = EBTForCausalLM(config).train()
    with torch.no_grad():
        model.model.energy_head.weight.normal_()  # zero at first in a recipe, and so would be what meets it
    ids = torch.randint(0, 41, (3, 5))
    with Products(41) as products:
        model(input_ids=ids, labels=ids).loss.backward()
    work = floors.ebt_training(config, 5)
    assert products.counts["table"] == 15 * work.table
    assert products.counts["body"] == pytest.approx(15 * work.body)


def test_floors_are_what_training_the_twin_computes(script):
    from transformers import LlamaForCausalLM

    from ebt_transformers import transformer_pp_config

    floors = script("floors")
    config = by_hand("s1", vocab_size=41)
    model = LlamaForCausalLM(transformer_pp_config(config)).train()
    ids = torch.randint(0, 41, (3, 5))
    with Products(41) as products:
        model(input_ids=ids, labels=ids).loss.backward()
    work = floors.twin_training(config, 5)
    assert products.counts == {"table": 15 * work.table, "body": 15 * work.body}


def test_alternate_takes_turns(script):
    common = script("common")
    order: list[str] = []
    first, second, ratio = common.alternate(
        lambda: order.append("a") or [2.0, 4.0, 6.0], lambda: order.append("b") or [2.0], repeats=2
    )
    assert order == ["a", "b"] * 3
    assert (first, second, ratio) == (4.0, 2.0, 2.0)


# ---- image denoising -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def denoisers(tmp_path_factory) -> dict[str, Path]:
    """Tiny random checkpoints of an EBT and a DiT, and images with classes."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("diffusers")
    from PIL import Image

    from ebt_transformers import EBTForImageDenoising, EBTImageConfig
    from ebt_transformers.training.dit_twin import DiTTwin, new_dit

    folder = tmp_path_factory.mktemp("denoisers")
    torch.manual_seed(0)
    shape = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = EBTImageConfig(**shape, step_size=5.0)
    models = EBTForImageDenoising(config), new_dit(config)
    for model in models:  # both start with zeros that hide what the network does
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    models[0].save_pretrained(folder / "ebt")
    DiTTwin(models[1]).save_pretrained(folder / "dit")

    random = np.random.default_rng(0)
    steep = np.arange(20) % 2  # the class: brighter to the right, or to the bottom
    ramp = np.linspace(0, 200, 16)
    pixels = [np.stack([np.tile(ramp, (16, 1)) if s else np.tile(ramp, (16, 1)).T] * 3, -1) for s in steep]
    images = [Image.fromarray((p + random.integers(0, 50)).astype(np.uint8)) for p in pixels]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["down", "right"])})
    table = datasets.Dataset.from_dict({"image": images, "label": steep.tolist()}, features=features)
    table.to_parquet(folder / "images.parquet")
    return {"ebt": folder / "ebt", "dit": folder / "dit", "data": folder / "images.parquet"}


def denoising_argv(denoisers: dict[str, Path], path: Path, *more: str) -> list[str]:
    argv = ["--ebt", str(denoisers["ebt"]), "--dit", f"twin={denoisers['dit']}", "--data", str(denoisers["data"])]
    argv += ["--max-images", "5", "--time-images", "2", "--grid-images", "2", "--rounds", "1", "--threads", "1"]
    return [*argv, "--steps", "1", "2", "--results", str(path), *more]


def test_denoising_runs_and_resumes(script, denoisers, tmp_path, monkeypatch):
    denoising = script("denoising")
    monkeypatch.setitem(denoising.TUNED, "TV", (0.1, 0.4))
    path = tmp_path / "denoising.jsonl"
    more = ["--classical", "noisy", "rescaled", "TV", "--passes", "1", "3"]
    argv = denoising_argv(denoisers, path, *more, "--probe", "--probe-train", "12", "--probe-test", "8")
    text = denoising.main(argv)
    assert path.with_suffix(".md").read_text() == text
    for part in ("machine", "scikit-image", "--max-images 5", "seed: 0", "5 images, 16 x 16", "TV at 0.2"):
        assert part in text
    rows = rows_of(path)
    quality = [row for row in rows if row["kind"] == "quality"]
    # classical, steps, passes; at the second level both protocols of the DiT
    assert len(quality) == 3 + 2 + 2 + 3 + 2 + 2 * 2
    assert {row["protocol"] for row in quality if row["method"] == "twin"} == {"", "paper", "fair"}
    assert all(0 < row["psnr"] < 60 and row["mse"] > 0 and -1 <= row["ssim"] <= 1 for row in quality)
    for name in ("denoising.png", "denoising_0.1.png", "denoising_0.2.png"):
        assert (tmp_path / name).stat().st_size > 10_000 and f"({name})" in text
    assert "ebt, random weights" in text and text.count("\n| 0.2 ") == 9 + 4

    measured = []
    measure = denoising.measure_quality
    monkeypatch.setattr(denoising, "measure_quality", lambda *args: measured.append(args[0].name) or measure(*args))
    assert denoising.main(argv) == text and not measured
    monkeypatch.setattr(denoising, "draw", lambda *args: [])
    lines = path.read_text().splitlines()
    number = next(n for n, row in enumerate(rows) if row["kind"] == "quality" and row["passes"] == 3)
    path.write_text("\n".join(lines[:number]) + "\n" + lines[number][:30])  # killed at the DiT's second number
    denoising.main(argv)
    assert measured == ["twin", "noisy", "rescaled", "TV", "ebt", "ebt"] + ["twin"] * (2 + 2)
    measured.clear()
    text = denoising.main([*argv, "--seeds", "0", "1"])
    assert len(measured) == len(quality) and "2 seeds" in text and "seed: 0, 1" in text


def test_denoised_rows_are_what_the_models_do(script, denoisers, tmp_path):
    from ebt_transformers import EBTForImageDenoising
    from ebt_transformers.configuration.noise_ebt import noise_scheduler
    from ebt_transformers.training.dit_twin import ddim_denoise, load_dit

    denoising = script("denoising")
    path = tmp_path / "denoising.jsonl"
    more = ["--classical", "noisy", "--passes", "4", "200", "--levels", "0.2", "--rounds", "0", "--batch-size", "2"]
    text = denoising.main(denoising_argv(denoisers, path, *more))
    assert "Time was not taken" in text
    rows = {(row["method"], row["protocol"], row["passes"]): row for row in rows_of(path) if row["kind"] == "quality"}

    clean = denoising.load_pictures(str(denoisers["data"]), (16, 16), 3, limit=5).scaled
    noise = denoising.Noise(0.2)
    noisy = noise.add(clean, 0)
    ebt = EBTForImageDenoising.from_pretrained(denoisers["ebt"]).eval()
    dit, own = load_dit(denoisers["dit"])
    stretched, start = noise_scheduler(0.2)
    twice = ddim_denoise(dit, ddim_denoise(dit, noisy, stretched, start, 100), stretched, start, 100)
    expected = {
        ("noisy", "", 0): noisy,
        ("ebt", "", 2): ebt(noisy, thinking_steps=2).reconstruction.detach(),
        ("twin", "paper", 4): ddim_denoise(dit, noisy, stretched, 99, 4),
        ("twin", "paper", 200): twice,
        ("twin", "fair", 4): ddim_denoise(dit, noisy, own, 199, 4),
        ("twin", "fair", 200): ddim_denoise(dit, noisy, own, 199, 200),
    }
    for key, images in expected.items():
        errors = (255 / 2 * (images.clamp(-1, 1) - clean)).square().mean((1, 2, 3))
        psnr = (10 * torch.log10(255**2 / errors)).mean()
        assert rows[key]["psnr"] == pytest.approx(psnr.item(), abs=1e-3), key
        assert rows[key]["mse"] == pytest.approx(errors.mean().item(), rel=1e-3), key


def test_protocols_of_the_dit(script, denoisers):
    denoising = script("denoising")
    dit = denoising.DiTMethod("dit", denoisers["dit"], [1, 100, 150, 200, 300], ["paper", "fair"], "cpu")
    assert dit.protocols(denoising.Noise(0.1)) == {"": [[1], [100, 200, 300]]}
    assert dit.protocols(denoising.Noise(0.2)) == {
        "paper": [[1], [100, 200, 300]],
        "fair": [[1], [100], [150], [200]],  # 300 are no whole number of runs from timestep 199
    }


def test_noise_is_that_of_the_paper_and_of_each_image(script):
    denoising = script("denoising")
    for level, keep, std in ((0.1, 0.947, 0.321), (0.2, 0.812, 0.583)):
        noise = denoising.Noise(level)
        assert (noise.keep, noise.std) == (pytest.approx(keep, abs=1e-3), pytest.approx(std, abs=1e-3))
    clean = torch.full((3, 1, 64, 64), 0.5)
    noisy = noise.add(clean, 7)
    torch.testing.assert_close(noise.add(clean[:2], 7), noisy[:2])
    assert (noisy - noise.keep * clean).std().item() == pytest.approx(noise.std, rel=0.05)
    assert not torch.equal(noise.add(clean, 8), noisy)


def test_flops_count_backward_passes(script, denoisers):
    denoising = script("denoising")
    image = torch.zeros(1, 3, 16, 16)
    forward, flops = denoising.EBTMethod("ebt", denoisers["ebt"], [1, 2], "cpu").flops(image, [1, 2])
    assert flops[2] == 2 * flops[1]
    assert 1.5 < flops[1] / forward < 3.5
    forward, flops = denoising.DiTMethod("dit", denoisers["dit"], [1, 8], ["fair"], "cpu").flops(image, [8])
    # one layer of width 16 on 4 patches: attention projections, feed-forward of four times the width
    assert flops == {8: 8 * forward} and forward > 2 * 4 * (4 + 8) * 16**2


@pytest.mark.parametrize("name", ["BM3D", "TV", "NL means"])
def test_classical_methods_denoise_grey_and_colour(script, name):
    denoising = script("denoising")
    methods = script("denoisers.methods")
    if name == "BM3D":
        pytest.importorskip("bm3d")
    noise, judge = denoising.Noise(0.1), denoising.Judge()
    ramp = torch.linspace(-0.8, 0.8, 24).expand(1, 1, 24, 24)
    for clean in (ramp, torch.cat([ramp, -ramp, ramp.mT], dim=1)):
        tuned = denoising.tune(name, clean, noise, 1, judge) if name in methods.TUNED else None
        noisy = noise.add(clean, 0)
        ((count, denoised),) = denoising.ClassicalMethod(name, tuned).denoise(noisy, noise, "", [0])
        assert count == 0 and denoised.shape == clean.shape
        assert judge(denoised, clean)["psnr"][0] > judge(noisy, clean)["psnr"][0] + 6


def test_pictures_are_cropped_and_named(script, tmp_path):
    denoising = script("denoising")
    from PIL import Image

    values = np.arange(10 * 13 * 3, dtype=np.uint8).reshape(10, 13, 3)
    Image.fromarray(values).save(tmp_path / "a.png")
    load = denoising.load_pictures
    whole = torch.from_numpy(values).permute(2, 0, 1)
    assert torch.equal(load(str(tmp_path), (8, 8), 3).pixels[0], whole[:, 1:9, 2:10])
    tiles = load(str(tmp_path), (4, 5), 3, "tiles")
    assert len(tiles) == 4 and tiles.labels is None
    expected = [whole[:, down : down + 4, right : right + 5] for down in (1, 5) for right in (1, 6)]
    assert all(any(torch.equal(tile, other) for other in tiles.pixels) for tile in expected)
    assert len(load(str(tmp_path), (4, 5), 1, "tiles", limit=3)) == 3
    assert load(str(tmp_path), (16, 16), 1, resize_to=16).pixels.shape == (1, 1, 16, 16)
    with pytest.raises(ValueError, match="10 x 13 pixels.*16 x 16"):
        load(str(tmp_path), (16, 16), 3)


def test_checkpoints_have_names(script, denoisers, tmp_path):
    denoising = script("denoising")
    folder = denoisers["ebt"]
    assert denoising.named_folders([str(folder), f"other={folder}"]) == {"ebt": folder, "other": folder}
    with pytest.raises(ValueError, match="'ebt'.*NAME=DIR"):
        denoising.named_folders([str(folder)] * 2)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        denoising.named_folders([str(tmp_path / "nowhere")])
    argv = denoising_argv(denoisers, tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="twin takes images of 16 x 16"):
        denoising.main([*argv, "--image-size", "8"])
    with pytest.raises(ValueError, match="'ebt'"):
        denoising.main([*argv, "--dit", f"ebt={denoisers['dit']}"])
    with pytest.raises(SystemExit):
        denoising.main(["--data", str(denoisers["data"])])


def test_equal_quality(script):
    denoising = script("denoising")

    def row(kind: str, method: str, passes: int, psnr: float, seconds: float) -> dict:
        return {
            **{"level": 0.1, "kind": kind, "method": method, "protocol": "", "passes": passes, "psnr": psnr},
            **{"seconds": seconds, "flops": 1000 * seconds},
        }

    ebt = [row("ebt", "E", 1, 25.0, 0.002), row("ebt", "E", 2, 27.0, 0.004), row("ebt", "E", 3, 28.0, 0.006)]
    # 200 passes gain nothing over 100
    dit = [row("dit", "D", 1, 24.0, 0.001), row("dit", "D", 100, 26.5, 0.1), row("dit", "D", 200, 26.503, 0.2)]
    lines = denoising.equal_quality([row("classical", "TV", 0, 30.0, 1.0), *ebt, *dit])
    assert lines == [
        ["0.1", "26.50", "D", "E", "2 steps, 4 ms", "D", "100 passes, 100 ms", "25", "25"],
        ["0.1", "28.00", "E", "E", "3 steps, 6 ms", "D", "not reached (26.50)", "", ""],
    ]


def test_linear_probe(script, denoisers):
    pytest.importorskip("sklearn")
    denoising, probe = script("denoising"), script("denoisers.probe")
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 150)
    telling = np.eye(3)[labels] + 0.1 * random.standard_normal((150, 3))
    silent = random.standard_normal((150, 3))
    accuracy = [
        probe.linear_probe(features[:100], labels[:100], features[100:], labels[100:])["top1"]
        for features in (telling, silent)
    ]
    assert accuracy[0] == 1.0 and accuracy[1] < 0.6

    images = torch.rand(2, 3, 16, 16) * 2 - 1
    ebt = denoising.EBTMethod("ebt", denoisers["ebt"], [1], "cpu")
    dit = denoising.DiTMethod("dit", denoisers["dit"], [1], ["fair"], "cpu")
    torch.testing.assert_close(probe.features_of(ebt)(images), ebt.model.model(images).last_hidden_state.mean(1))
    for method in (ebt, dit):
        trained, untrained = probe.features_of(method)(images), probe.untrained(method, 0)(images)
        assert trained.shape == untrained.shape == (2, 16) and not torch.allclose(trained, untrained)
    # the output layer is a function of what the probe sees
    seen = []
    dit.dit.transformer_blocks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    features = probe.features_of(dit)(images)
    torch.testing.assert_close(features, seen[0].mean(1))
    patches = probe.patch_features(8)(images)
    torch.testing.assert_close(patches[0, :8], images[0, 0].unfold(0, 8, 8).unfold(1, 8, 8).mean((0, 1))[0])


def test_several_runs_of_a_method_are_one_row(script, denoisers, tmp_path):
    denoising = script("denoising")
    folder = denoisers["ebt"]
    assert list(denoising.named_folders([f"ebt={folder},{folder}"])) == ["ebt#1", "ebt#2"]
    argv = ["--ebt", f"ebt={folder},{folder}", "--data", str(denoisers["data"]), "--max-images", "4", "--steps", "2"]
    argv += ["--classical", "noisy", "--rounds", "1", "--time-images", "2", "--levels", "0.1"]
    argv += [
        "--target-data",
        str(denoisers["data"]),
        "--target-images",
        "8",
        "--results",
        str(tmp_path / "rows.jsonl"),
    ]
    text = denoising.main(argv)
    lines = [line.split("|") for line in text.splitlines() if line.startswith("| 0.1") and " ebt " in line]
    assert [line[3].strip() for line in lines] == ["", "target"]
    taken = float(lines[1][4])
    assert 0 <= taken <= 2
    kinds = [row["kind"] for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())]
    assert kinds.count("quality") == 1 + 2 * 2


def test_stopping_compares_rules_on_the_same_descents(script, denoisers, tmp_path):
    stopping = script("stopping")
    argv = ["--ebt", str(denoisers["ebt"]), "--data", str(denoisers["data"]), "--target-data", str(denoisers["data"])]
    text = stopping.main(
        [*argv, "--images", "6", "--levels", "0.1", "--most", "2", "--results", str(tmp_path / "s.jsonl")]
    )
    found = {row["rule"]: row["psnr"][0] for row in map(json.loads, (tmp_path / "s.jsonl").read_text().splitlines())}
    assert set(found) == {"1 step", "2 steps", *(f"share {share:g}" for share in stopping.SHARES)}
    assert "## Energies" in text


@pytest.mark.slow
def test_importing_the_package_costs_at_most_a_fifth_of_transformers_and_torch(script, tmp_path):
    path = tmp_path / "import_time.jsonl"
    script("import_time").main(["--repeats", "3", "--results", str(path), "--threads", "1"])
    ratios = {row["work"]: row["ratio"] for row in rows_of(path)}
    assert ratios["import torch, transformers"] == 1
    assert ratios["import torch, transformers, ebt_transformers"] < 1.2
    assert ratios["import ebt_transformers"] < 0.2


@pytest.fixture
def scoring_argv(make_model, tmp_path):
    """Options of the benchmark of scores for a tiny model, with data of a few lines."""
    from ebt_transformers.assets import checkpoint_path

    make_model(vocab_size=1024).save_pretrained(tmp_path / "tiny")
    AutoTokenizer.from_pretrained(checkpoint_path()).save_pretrained(tmp_path / "tiny")
    lines = [f"This is line {number} of a text that has many." for number in range(40)]
    for name, text in (
        ("text/wikitext2_valid_test/test.txt", "\n".join(lines)),
        ("qa/gsm8k/test.jsonl", "\n".join(json.dumps({"question": line, "answer": "7"}) for line in lines)),
    ):
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        (tmp_path / "data" / name).write_text(text)
    argv = ["--pieces", "3", "--tokens", "4", "6", "--continuation", "4", "--vocabulary", "3", "--threads", "1"]
    argv += ["--ebt", str(tmp_path / "tiny"), "--twin", str(tmp_path / "tiny"), "--data", str(tmp_path / "data")]
    return [*argv, "--results", str(tmp_path / "scoring.jsonl")]


def test_scoring_runs_and_resumes(script, scoring_argv, tmp_path, monkeypatch):
    scoring = script("scoring")
    text = scoring.main([*scoring_argv, "--seeds", "0"])
    rows = rows_of(tmp_path / "scoring.jsonl")
    assert [(row["question"], row["tokens"]) for row in rows] == [("auroc", 4), ("auroc", 6), ("accuracy", 4)]
    sets = ["shuffled words", "shuffled characters", "Python", "WikiText", "GSM8K"]
    assert [row["set"] for row in rows[0]["rows"]] == sets
    assert all(0 <= value <= 1 for row in rows[0]["rows"] for value in row["auroc"].values())
    assert all(name in text for name in (*sets, "E(token) - E(prediction)", "twin: nats", "The true continuation"))
    assert (tmp_path / "scoring.png").stat().st_size > 1000
    monkeypatch.setitem(scoring.QUESTIONS, "auroc", lambda *args: pytest.fail("measured again"))
    assert scoring.main([*scoring_argv, "--seeds", "0"]) == text


def test_scores_of_the_benchmark_are_those_of_the_pipeline(script, scoring_argv):
    from ebt_transformers.pipelines import EnergyScoringPipeline

    scoring = script("scoring")
    judge = scoring.Judge(scoring.parse(scoring_argv))
    texts = ["To be, or not to be", "What light, what light!"]
    ids = judge.tokenizer(texts)["input_ids"]
    rows = torch.tensor([[judge.tokenizer.bos_token_id, *row[:6]] for row in ids])
    scores = judge(rows, seed=0)
    pipe = EnergyScoringPipeline(model=judge.model, tokenizer=judge.tokenizer, device="cpu")
    records = pipe([judge.tokenizer.decode(row[1:]) for row in rows], thinking_steps=2)
    for name, ours in (
        ("E(token)", "mean_energy"),
        ("E(token) - E(prediction)", "mean_relative_energy"),
        ("nats, 2 steps", "mean_nll"),
    ):
        assert [record[ours] for record in records] == pytest.approx(scores[name].tolist(), rel=1e-3, abs=1e-5)
    likeliest = scores["E(token) - E(likeliest token)"]
    with torch.no_grad():
        predicted = judge.model(rows[:, :-1], thinking_steps=2).logits.argmax(-1)
        energy = judge.model.energy(rows[:, :-1], candidate_ids=predicted).mean(1)
    torch.testing.assert_close(likeliest, scores["E(token)"] - energy, rtol=1e-3, atol=1e-5)


def test_pieces_begin_at_lines_and_shuffling_keeps_what_is_shuffled(script, scoring_argv):
    scoring = script("scoring")
    tokenizer = AutoTokenizer.from_pretrained(scoring_argv[scoring_argv.index("--ebt") + 1])
    text = "\n".join(f"line {number} has words" for number in range(60))
    rows = scoring.pieces(tokenizer, text, 4, 5, random.Random(0))
    assert rows.shape == (4, 6) and all(tokenizer.decode(row[1:]).startswith("line") for row in rows)
    assert torch.equal(rows, scoring.pieces(tokenizer, text, 4, 5, random.Random(0)))
    assert not torch.equal(rows, scoring.pieces(tokenizer, text, 4, 5, random.Random(1)))
    for shuffle, parts in ((scoring._shuffled_words, str.split), (scoring._shuffled_characters, list)):
        changed = shuffle(text, random.Random(0))
        assert changed != text and sorted(parts(changed)) == sorted(parts(text))
