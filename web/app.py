"""The web demonstration itself: its tabs on one page, served to this machine."""

from dataclasses import dataclass
from typing import Any

import torch

from ..demo import load_checkpoint
from ..demo_image import load_denoiser
from .denoise_tab import DenoiseTab
from .parts import ABOUT, gr
from .text_tab import TextTab


HOST = "127.0.0.1"
SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
MONOSPACE_FONTS = ("ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")
LARGEST_UPLOAD = "20mb"
KEEP_FILES = (3600, 3600)  # seconds: how often uploaded and shown pictures are looked for, and how old they may be
STYLE = """
.gradio-container { max-width: 1280px !important; margin: auto; }
#continuation textarea, #tokens { font-size: 15px; line-height: 1.5; }
#gallery .grid-wrap { max-height: none; }
"""

# how the pages are served: nothing comes from elsewhere, and nothing is kept or told
OFFLINE: dict[str, Any] = {
    "theme": gr.themes.Default(font=SYSTEM_FONTS, font_mono=MONOSPACE_FONTS),
    "css": STYLE,
    "footer_links": [],
    "run_history": False,
    "ssr_mode": False,
    "pwa": False,
    "mcp_server": False,
    "enable_monitoring": False,
    "max_file_size": LARGEST_UPLOAD,
}


def build_app(text_model: str | None = None, image_model: str | None = None) -> gr.Blocks:
    """
    The pages, not yet served.

    Args:
        text_model (`str`, *optional*): a folder or a Hub id; by default the embedded language model.
        image_model (`str`, *optional*): a folder or a Hub id; by default the embedded denoiser.

    Raises:
        FileNotFoundError, ValueError: for a checkpoint that cannot be loaded or does not think.
        ImportError: without diffusers, whose noise the pictures get.

    Example:

    ```python
    >>> from ebt_transformers.web.app import build_app

    >>> app = build_app()
    >>> app.title
    'Energy-Based Transformers'
    ```
    """
    model, tokenizer = load_checkpoint(text_model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    tabs: dict[str, TextTab | DenoiseTab] = {
        "Text": TextTab(model, tokenizer, text_model),
        "Denoise": DenoiseTab(load_denoiser(image_model), image_model),
    }
    with gr.Blocks(title="Energy-Based Transformers", analytics_enabled=False, delete_cache=KEEP_FILES) as app:
        gr.Markdown("# Energy-Based Transformers\nPredictions found by walking downhill on an energy, step by step.")
        for name, tab in tabs.items():
            with gr.Tab(name):
                tab.build()
        with gr.Tab("About"):
            gr.Markdown(ABOUT)
    return app


def _check_port(port: int | None) -> None:
    if port is not None and not 0 < port < 65536:
        raise ValueError(f"The port must be between 1 and 65535, got {port}.")


@dataclass(frozen=True)
class Served:
    """An app that is being served: where, and how to end it."""

    app: gr.Blocks
    address: str

    def close(self) -> None:
        """Stops serving."""
        self.app.close()


def serve(app: gr.Blocks, port: int | None = None, share: bool = False) -> Served:
    """
    Serves the pages to this machine alone, in threads of this process. Nothing is loaded from elsewhere: fonts are
    those of the system, and no usage is reported.

    Args:
        app (`gradio.Blocks`): from [`build_app`].
        port (`int`, *optional*): by default the first free one from 7860.
        share (`bool`, *optional*, defaults to `False`): also under a public address, through the servers of Gradio.

    Raises:
        ValueError: for a port out of range.
        OSError: if the port is taken.
    """
    _check_port(port)
    try:
        _, local, public = app.launch(
            server_name=HOST, server_port=port, share=share, prevent_thread_lock=True, quiet=True, **OFFLINE
        )
    except OSError as error:
        where = "every port from 7860 to 7959" if port is None else f"port {port}"
        raise OSError(f"Cannot serve on {HOST}: {where} is taken. Give another port.") from error
    return Served(app, public or local)


def launch(
    text_model: str | None = None, image_model: str | None = None, port: int | None = None, share: bool = False
) -> None:
    """
    Builds the pages, serves them, and says where; returns when interrupted.

    Args:
        text_model, image_model: as in [`build_app`].
        port, share: as in [`serve`].

    Raises:
        FileNotFoundError, ValueError, ImportError, OSError: as both.
    """
    _check_port(port)
    served = serve(build_app(text_model, image_model), port, share)
    print(f"Open {served.address} in a browser. Ctrl+C ends it.", flush=True)
    try:
        served.app.block_thread()
    finally:
        served.close()


__all__ = ["Served", "build_app", "launch", "serve"]
