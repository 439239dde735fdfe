"""
Laws of serving: `transformers serve` answers the OpenAI protocol with a saved model, which thinks as it was told.

The server is transformers' own, unmodified; what is tested is that it finds the model, and that options arrive.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ebt_transformers.assets import checkpoint_path


pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}:\n{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}ROMEO:\n{% endif %}"
)
PROMPT = "JULIET:\nO Romeo, Romeo! wherefore art thou Romeo?\n\nROMEO:\n"
TOKENS = 12


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, saved with its code and a chat template."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(checkpoint_path()).save_pretrained(folder)
    return folder


def expected_text(folder: Path, prompt: str, **options: Any) -> str:
    """What the model says greedily without any server."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, **options)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def greedy(**options: Any) -> dict[str, Any]:
    """Extra body of a request: transformers' own field for a generation config."""
    return {"generation_config": json.dumps({"max_new_tokens": TOKENS, "do_sample": False, **options})}


# ---- without a server process ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Any]:
    """OpenAI's client on the application that `transformers serve` runs, without a network between them."""
    from fastapi.testclient import TestClient
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerationState

    manager, state = ModelManager(device="cpu", force_model=str(folder)), GenerationState(continuous_batching=True)
    handlers = {"completion_handler": CompletionHandler(manager, state), "generation_state": state}
    unused: dict[str, Any] = {"response_handler": None, "transcription_handler": None, "systemone_handler": None}
    app = build_server(manager, ChatCompletionHandler(manager, state), **handlers, **unused)
    with TestClient(app, base_url="http://localhost") as connection:
        yield openai.OpenAI(base_url="http://localhost/v1", api_key="none", http_client=connection, max_retries=0)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_request_says_how_long_to_think(client: Any, folder: Path, steps: int) -> None:
    answer = client.completions.create(model=str(folder), prompt=PROMPT, extra_body=greedy(thinking_steps=steps))
    assert answer.choices[0].text == expected_text(folder, PROMPT, thinking_steps=steps)
    assert answer.usage.completion_tokens == TOKENS


def test_the_answers_above_differ_by_their_thinking(folder: Path) -> None:
    assert expected_text(folder, PROMPT, thinking_steps=1) != expected_text(folder, PROMPT, thinking_steps=4)


def test_a_chat_is_put_into_the_template(client: Any, folder: Path) -> None:
    said = [{"role": "juliet", "content": "O Romeo, Romeo! wherefore art thou Romeo?"}]
    answer = client.chat.completions.create(model=str(folder), messages=said, extra_body=greedy())
    assert answer.choices[0].message.content == expected_text(folder, PROMPT)


def test_streamed_pieces_are_the_answer(client: Any, folder: Path) -> None:
    stream = client.completions.create(model=str(folder), prompt=PROMPT, stream=True, extra_body=greedy())
    pieces = [chunk.choices[0].text for chunk in stream]
    assert len(pieces) > 3 and "".join(pieces) == expected_text(folder, PROMPT)


def test_a_misspelt_option_is_told_to_the_client(client: Any, folder: Path) -> None:
    stream = client.completions.create(
        model=str(folder), prompt=PROMPT, stream=True, extra_body=greedy(thinking_stepps=2)
    )
    with pytest.raises(openai.APIError) as raised:
        list(stream)
    assert "Unknown thinking option(s) stepps. Allowed: steps" in raised.value.body


# ---- continuous batching ---------------------------------------------------------------------------------------


def test_continuous_batching_is_refused_and_a_server_goes_on_without(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(model, "init_continuous_batching")  # what a server asks; `client` above has it switched on
    with pytest.raises(NotImplementedError, match="cannot use continuous batching"):
        model.generate_batch([[5, 6], [7]], max_new_tokens=2)
    with pytest.raises(NotImplementedError, match="Use `generate\\(\\)` with a padded batch"):
        model.continuous_batching_context_manager()
    assert isinstance(model.generate(torch.tensor([[5]]), max_new_tokens=2), torch.Tensor)


# ---- the commands ----------------------------------------------------------------------------------------------

# transformers' command line where our package cannot be imported: what is served brings its code along
COMMAND_LINE = """
import sys
sys.modules["ebt_transformers"] = None
from transformers.cli.transformers import main
main()
"""


def transformers_command(*args: str) -> list[str]:
    return [sys.executable, "-c", COMMAND_LINE, *args]


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    """A real `transformers serve`; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = transformers_command("serve", str(folder), "--trust-remote-code", "--device", "cpu", "--port", str(port))
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 180
        while socket.socket().connect_ex(("127.0.0.1", port)) != 0:
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server did not answer"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.mark.slow
def test_plain_transformers_serve_and_chat(server: str, folder: Path, tmp_path: Path) -> None:
    client = openai.OpenAI(base_url=server, api_key="none", max_retries=0)
    answer = client.completions.create(model=str(folder), prompt=PROMPT, extra_body=greedy(thinking_steps=4))
    assert answer.choices[0].text == expected_text(folder, PROMPT, thinking_steps=4)

    config = tmp_path / "thinking.json"
    config.write_text(json.dumps({"thinking_steps": 4}))
    flags = ["do_sample=false", f"max_new_tokens={TOKENS}", "--generation-config", str(config)]
    chat = subprocess.run(
        transformers_command("chat", str(folder), server, *flags),
        input="O Romeo!\nno\n!exit\n",
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "HF_HUB_OFFLINE": "0", "COLUMNS": "200"},  # offline, it refuses even this machine's server
    )
    said = expected_text(folder, "USER:\nO Romeo!\n\nROMEO:\n", thinking_steps=4)
    assert " ".join(said.split()) in " ".join(chat.stdout.split()), chat.stdout + chat.stderr
