"""Laws of the web demonstration: what it shows is what the model does, and a browser gets to see it, offline."""

import math
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from ebt_transformers import ThinkingConfig, cli
from ebt_transformers.assets import checkpoint_path, example_picture_path
from ebt_transformers.demo import load_checkpoint
from ebt_transformers.demo_image import denoise_picture, load_denoiser, pixels, read_picture


gr = pytest.importorskip("gradio", reason="gradio is not installed")
from gradio.exceptions import Error as Message  # noqa: E402

from ebt_transformers.web.app import build_app, serve  # noqa: E402
from ebt_transformers.web.denoise_tab import DenoiseTab, captioned_pictures  # noqa: E402
from ebt_transformers.web.denoising import learn_target_energy, watch_picture  # noqa: E402
from ebt_transformers.web.plots import draw_distributions, draw_energies_of_candidates, quoted  # noqa: E402
from ebt_transformers.web.text import entropy, stream_text, top_tokens, watch_text, watch_token  # noqa: E402
from ebt_transformers.web.text_tab import TextTab, token_rows  # noqa: E402


PROMPT = "ROMEO:\n"
# a cached context and a whole one round differently, and steep landscapes make more of it
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def text_model() -> Any:
    return load_checkpoint()


@pytest.fixture(scope="module")
def denoiser() -> Any:
    return load_denoiser(device="cpu")


@pytest.fixture(scope="module")
def small_picture() -> Any:
    return read_picture(example_picture_path()).resize((40, 40))


# ---- text ------------------------------------------------------------------------------------------------------

THINKING = {
    "one candidate": ThinkingConfig(steps=3),
    "several": ThinkingConfig(steps=4, candidates=3),
    "noise": ThinkingConfig(steps=3, candidates=3, noise_std=1.0, seed=5),
    "first landscape alone": ThinkingConfig(steps=1, step_size_scale=0.5),
    "stops early": ThinkingConfig(steps=6, tolerance=1e-3),
}


@pytest.mark.parametrize("kind", THINKING)
def test_energies_and_distributions_are_the_models(text_model: Any, kind: str) -> None:
    model, tokenizer = text_model
    thinking = THINKING[kind]
    text = watch_text(model, tokenizer, PROMPT, thinking, max_new_tokens=4)
    for index, token in enumerate(text.tokens):
        walk = watch_token(model, text, index)
        context = torch.tensor([text.prompt_ids + [one.token for one in text.tokens[:index]]])
        with torch.no_grad():
            output = model(context, thinking=thinking, logits_to_keep=1, output_energies=True)
        assert walk.energies.shape == (thinking.candidates or 1, thinking.steps + 1)
        assert_close(walk.energies[walk.chosen], torch.tensor(token.energies), **CLOSE)
        assert_close(torch.tensor(token.energies[-1]), output.energies[0, -1, -1], **CLOSE)
        assert_close(walk.distributions.sum(-1), torch.ones(thinking.steps + 1))
        assert_close(walk.distributions[-1], output.logits[0, -1].softmax(-1), **CLOSE)
        assert_close(entropy(walk.distributions[-1]), torch.tensor(token.entropy), **CLOSE)
        assert token.steps_taken == int(output.steps_taken[0, -1])


def test_all_candidates_are_those_of_the_model(text_model: Any) -> None:
    """The kept candidate is the one of lowest, or of highest, final energy among the walks that are shown."""
    model, tokenizer = text_model
    for selection, best in (("min_energy", torch.min), ("max_energy", torch.max)):
        thinking = ThinkingConfig(steps=1, candidates=5, selection=selection)
        text = watch_text(model, tokenizer, PROMPT, thinking, max_new_tokens=2)
        walk = watch_token(model, text, 1)
        assert_close(best(walk.energies[:, -1]), torch.tensor(text.tokens[1].energies[-1]), **CLOSE)
        assert len(set(walk.energies[:, 0].tolist())) == 5


def test_distributions_are_those_of_fewer_steps(text_model: Any) -> None:
    model, tokenizer = text_model
    text = watch_text(model, tokenizer, PROMPT, ThinkingConfig(steps=4), max_new_tokens=1)
    walk = watch_token(model, text, 0)
    assert_close(entropy(walk.distributions[0]), torch.tensor(math.log(model.config.vocab_size)))
    for steps in range(1, 5):
        with torch.no_grad():
            logits = model(torch.tensor([text.prompt_ids]), thinking_steps=steps).logits[0, -1]
        assert_close(walk.distributions[steps], logits.softmax(-1), **CLOSE)


def test_tokens_are_those_of_generate(text_model: Any) -> None:
    model, tokenizer = text_model
    encoded = tokenizer(PROMPT, return_tensors="pt")
    length = encoded["input_ids"].shape[1]
    greedy = model.generate(**encoded, thinking_steps=3, max_new_tokens=8, do_sample=False)[0, length:].tolist()
    *_, text = stream_text(model, tokenizer, PROMPT, ThinkingConfig(steps=3), max_new_tokens=8)
    assert [token.token for token in text.tokens] == greedy
    torch.manual_seed(7)
    options = {"do_sample": True, "temperature": 1.5, "top_k": 0}
    sampled = model.generate(**encoded, thinking_steps=3, max_new_tokens=8, **options)[0, length:].tolist()
    text = watch_text(model, tokenizer, PROMPT, ThinkingConfig(steps=3), max_new_tokens=8, temperature=1.5, seed=7)
    assert [token.token for token in text.tokens] == sampled != greedy


def test_the_text_grows_token_by_token_and_ends_when_nobody_listens(text_model: Any) -> None:
    model, tokenizer = text_model
    *growing, text = stream_text(model, tokenizer, PROMPT, ThinkingConfig(steps=1), max_new_tokens=6)
    assert len(growing) == len(text.tokens) == 6
    assert growing[-1] == text.text and all(text.text.startswith(part) for part in growing)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    unfinished = stream_text(model, tokenizer, PROMPT, ThinkingConfig(steps=1), max_new_tokens=200)
    next(unfinished)
    unfinished.close()
    handle.remove()
    assert len(calls) < 100


def test_a_default_of_the_generation_config_counts(text_model: Any) -> None:
    model, tokenizer = text_model
    model.generation_config.thinking_accept_only_lower_energy = True
    try:
        text = watch_text(model, tokenizer, PROMPT, ThinkingConfig(steps=5), max_new_tokens=3)
        walk = watch_token(model, text, 2)
    finally:
        del model.generation_config.thinking_accept_only_lower_energy
    assert text.thinking.accept_only_lower_energy
    assert_close(walk.energies[0], torch.tensor(text.tokens[2].energies), **CLOSE)


@pytest.mark.parametrize(
    ("prompt", "new", "said"),
    [("", 4, "The prompt is empty"), ("word " * 400, 4, "Shorten the prompt"), ("I", 5000, "at most 256 new tokens")],
)
def test_a_bad_prompt_is_a_clear_message(text_model: Any, prompt: str, new: int, said: str) -> None:
    with pytest.raises(Message, match=said):
        list(TextTab(*text_model).generate(prompt, 2, 1, 0, 1, new, 0, 0))


def test_visitors_share_no_text(text_model: Any) -> None:
    """What a visitor sees depends on what that visitor has generated alone."""
    tab = TextTab(*text_model)
    *_, one = tab.generate(PROMPT, 2, 1, 0, 1, 3, 0, 0)
    *_, other = tab.generate("KING RICHARD III:\n", 4, 2, 0, 1, 3, 0, 0)
    assert tab.show(one[0], 1)[0] == one[5] != other[5]
    assert tab.show(other[0], 1)[0] == other[5]
    assert all(update == gr.skip() for update in tab.show(None, 1) + tab.show(one[0], 4))


def test_the_table_has_the_energies(text_model: Any) -> None:
    text = watch_text(*text_model, PROMPT, ThinkingConfig(steps=4), max_new_tokens=3)
    assert text.landscapes == [0, 1, 1, 1] and text.first_on_last_landscape == 1
    for row, token in zip(token_rows(text.tokens, 1), text.tokens, strict=True):
        assert row[1] == quoted(token.text)
        assert [float(value) for value in row[2:5]] == pytest.approx([token.energies[i] for i in (0, 1, 4)], abs=1e-4)
        assert row[5] == 4 and float(row[6]) == pytest.approx(token.entropy, abs=1e-3)


def test_plots_show_what_was_watched(text_model: Any) -> None:
    model, tokenizer = text_model
    text = watch_text(model, tokenizer, PROMPT, ThinkingConfig(steps=4, candidates=3), max_new_tokens=2)
    walk = watch_token(model, text, 1)
    token = text.tokens[1].token
    shown = top_tokens(walk.distributions, 8, token)
    assert len(shown) == 8 and shown[0] == token == int(walk.distributions[-1].argmax())
    assert top_tokens(walk.distributions, 3, 1000)[-1] == 1000
    (axes,) = draw_distributions(walk, token, lambda one: tokenizer.decode([one])).axes
    widths = torch.tensor([bar.get_width() for bar in axes.patches], dtype=torch.float32).view(5, 8)
    assert_close(widths / widths.max(), walk.distributions[:, shown] / walk.distributions[:, shown].max())
    above, below = draw_energies_of_candidates(walk, 1).axes
    (strong,) = (line for line in below.lines if line.get_linewidth() > 2)
    assert_close(torch.as_tensor(strong.get_ydata(), dtype=torch.float32), walk.energies[walk.chosen, 1:])
    assert len(below.lines) == 3 and len(above.lines) == 4  # and the change of landscape
    assert len(draw_energies_of_candidates(walk, 0).axes) == 1


# ---- pictures --------------------------------------------------------------------------------------------------


def test_a_picture_walks_as_with_fewer_steps(denoiser: Any, small_picture: Any) -> None:
    walk = watch_picture(denoiser, small_picture, 0.2, 3, seed=1)
    measured, pictures = denoise_picture(denoiser, small_picture, 0.2, [1, 2, 3], seed=1)
    assert_close(walk.pictures[0], pictures["noisy"])
    for count, sample in enumerate(measured.samples, 1):
        assert_close(walk.pictures[count], pictures[str(count)], rtol=0, atol=1e-4)
        assert walk.psnrs[count] == pytest.approx(sample.psnr, abs=1e-2)
    assert walk.psnrs[0] == pytest.approx(measured.noisy_psnr)
    assert walk.energies == pytest.approx(measured.samples[-1].energies, abs=1e-4)
    shown = captioned_pictures(walk)
    assert [caption.split(":")[0] for _, caption in shown] == ["noisy", "1 step", "2 steps", "3 steps"]
    assert shown[2][0].tobytes() == pixels(walk.pictures[2]).tobytes()


def test_a_picture_stops_at_its_target_energy(denoiser: Any, small_picture: Any) -> None:
    target = learn_target_energy(denoiser, 0.1)
    walk = watch_picture(denoiser, small_picture, 0.1, 8, target)
    assert walk.steps_taken < 8
    energies = denoiser(small_picture, add_noise_level=0.1, thinking_steps=1, output_energies=True)["energies"]
    assert energies[0] > target  # it has something to do
    assert watch_picture(denoiser, small_picture, 0.1, 8, energies[0] + 10).steps_taken == 0


def test_a_bad_picture_is_a_clear_message(denoiser: Any, tmp_path: Path) -> None:
    tab = DenoiseTab(denoiser)
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    for arguments, said in (
        ((str(broken), 0.2, 2, False, None, 0), "Cannot read broken.png as a picture. Upload a PNG"),
        ((None, 0.2, 2, False, None, 0), "There is no picture"),
        ((str(example_picture_path()), 0.2, 2, True, None, 0), "There is no target energy"),
        ((str(example_picture_path()), 1.2, 2, False, None, 0), "must be above 0 and at most 1"),
    ):
        with pytest.raises(Message, match=said):
            tab.denoise(*arguments)


# ---- the command -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--web", "--levels", "0.1"], "--levels has an effect with --image only"),
        (["--web", "--prompt", "x"], "--prompt has an effect without --web only"),
        (["--web", "--seed", "0"], "--seed has an effect without --web only"),
        (["--port", "7860"], "--port has an effect with --web only"),
        (["--image", "--share"], "--share has an effect with --web only"),
        (["--image", "--web"], "--image and --web are different demonstrations"),
        (["--web", "--port", "99999"], "The port must be between 1 and 65535, got 99999"),
        (["--web", "--image_model", "no/such/folder"], "There is no checkpoint folder no/such/folder"),
    ],
)
def test_options_without_effect_are_refused(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", *argv]) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1


def test_the_command_names_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("ebt_transformers.web")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["demo", "--web"]) == 2
    assert 'pip install "ebt-transformers[web]"' in capsys.readouterr().err


def test_options_reach_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    from ebt_transformers.web import app

    seen: dict[str, Any] = {}
    monkeypatch.setattr(app, "launch", lambda **options: seen.update(options))
    assert cli.main(["demo", "--web", "--model", "a", "--image-model", "b", "--port", "8000"]) == 0
    assert seen == {"text_model": "a", "image_model": "b", "port": 8000}


# ---- a browser -------------------------------------------------------------------------------------------------

FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --no-first-run --disable-component-update"
LOCAL = re.compile(r"(http|ws)://127\.0\.0\.1:\d+/|data:|blob:")
PATIENCE = 30_000  # milliseconds


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    served = serve(build_app(str(checkpoint_path())))
    yield served.address
    served.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("there is no browser `chromium`")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=executable, args=[*FLAGS.split(), "--disable-sync"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page of one visitor; at the end nothing may have been asked of others, or gone wrong in the console."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(PATIENCE)
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda socket: asked.append(socket.url))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(address)
    yield page
    page.close()
    assert asked and not [url for url in asked if not LOCAL.match(url)]
    assert not wrong


def choose(page: Any, **values: float) -> None:
    """Types numbers beside sliders."""
    for name, value in values.items():
        field = page.locator(f"#{name} input[type=number]").first
        field.fill(str(value))
        field.press("Tab")


def generate(page: Any, prompt: str, **values: float) -> None:
    page.locator("#prompt textarea").fill(prompt)
    choose(page, **values)
    page.click("#generate")


def test_a_visitor_watches_a_text_being_thought(page: Any, text_model: Any) -> None:
    from playwright.sync_api import expect

    thinking = ThinkingConfig(steps=3, candidates=2)
    text = watch_text(*text_model, "JULIET:\n", thinking, max_new_tokens=6)
    generate(page, "JULIET:\n", steps=3, candidates=2, new=6)
    expect(page.locator("#distributions img")).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#energies img")).to_be_visible()
    expect(page.locator("#continuation textarea")).to_have_value(text.text)
    expect(page.locator("#tokens .token")).to_have_count(6)
    expect(page.locator("#table [data-testid=cell-4-4]")).to_have_text(f"{text.tokens[4].energies[-1]:.4f}")
    line, bars = page.locator("#token_line"), page.locator("#distributions img")
    clicks = {4: page.locator("#tokens .token").nth(4), 2: page.locator("#table [data-testid=cell-2-1]")}
    for index in (0, *clicks):
        token, before = text.tokens[index], bars.get_attribute("src") or ""
        if index in clicks:
            clicks[index].click()
            expect(bars).not_to_have_attribute("src", before)
        expect(line).to_contain_text(f"Token {index + 1} of 6")
        expect(line).to_contain_text(f"{token.energies[0]:.4f} at the start")
        expect(line).to_contain_text(f"{token.energies[1]:.4f} → {token.energies[-1]:.4f}")


def test_a_visitor_watches_a_picture_being_denoised(page: Any, denoiser: Any) -> None:
    from playwright.sync_api import expect

    page.get_by_role("tab", name="Denoise").click()
    choose(page, level=0.3, image_steps=2)
    page.click("#denoise")
    expect(page.locator("#curves img")).to_be_visible(timeout=PATIENCE)
    expect(page.locator("#gallery .grid-container img")).to_have_count(3)
    walk = watch_picture(denoiser, read_picture(example_picture_path()), 0.3, 2)
    expect(page.locator("#gallery")).to_contain_text(f"2 steps: {walk.psnrs[2]:.1f} dB")
    expect(page.locator("#picture_line")).to_contain_text(f"Noisy {walk.psnrs[0]:.2f} dB")
    page.get_by_role("tab", name="About").click()
    expect(page.get_by_text("What is an Energy-Based Transformer?")).to_be_visible()


def test_a_mistake_is_a_message_on_the_page(page: Any, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    message = page.get_by_test_id("toast-body").last
    generate(page, "", steps=1)
    expect(message).to_contain_text("The prompt is empty. Type some text")
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    page.get_by_role("tab", name="Denoise").click()
    page.get_by_label("Remove Image").click()
    page.locator("#picture input[type=file]").set_input_files(broken)
    expect(page.locator("#picture img")).to_have_count(1)
    page.click("#denoise")
    expect(message).to_contain_text("Cannot read broken.png as a picture")


@pytest.mark.slow
def test_visitors_do_not_see_each_others_texts(page: Any, browser: Any, address: str) -> None:
    from playwright.sync_api import expect

    other = browser.new_context().new_page()
    other.goto(address)
    for visitor, prompt, new in ((page, "JULIET:\n", 5), (other, "KING:\n", 3)):
        generate(visitor, prompt, steps=1, new=new)
        expect(visitor.locator("#token_line")).to_contain_text(f"Token 1 of {new}", timeout=PATIENCE)
    page.locator("#tokens .token").nth(4).click()
    expect(page.locator("#token_line")).to_contain_text("Token 5 of 5")
    expect(other.locator("#token_line")).to_contain_text("Token 1 of 3")
    other.context.close()


@pytest.mark.slow
def test_a_stopped_text_ends_early_and_is_shown(page: Any) -> None:
    from playwright.sync_api import expect

    line = page.locator("#token_line")
    generate(page, "JULIET:\n", steps=1, new=3)
    expect(line).to_contain_text("Token 1 of 3", timeout=PATIENCE)
    generate(page, "JULIET:\n", steps=16, candidates=8, new=200)
    expect(line).to_contain_text("Thinking ...")
    assert page.locator("#tokens .token").count() == 0  # nothing of the text before
    page.click("#stop")
    expect(line).to_contain_text("Token 1 of", timeout=PATIENCE)
    assert 1 <= page.locator("#tokens .token").count() < 150
