"""The code that a saved pipeline carries, so that it loads where this package is not installed."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from transformers import Pipeline

from ..configuration.thinking_ebt import ThinkingConfig
from ..modeling_ebt.pretrained import HUB_TASKS, complete_card


RELATIVE_IMPORT = re.compile(r"^(\s*from )(\.+)([\w.]+)(?= import )", re.MULTILINE)


def carry_code(module: str, folder: Path) -> list[Path]:
    """
    Copies a module and all modules it imports relatively, wherever they are, side by side into one folder, as code of
    a checkpoint has to lie. transformers does so itself, but for modules that are side by side already.

    Args:
        module (`str`): name of an imported module; it and those it imports name modules, not packages, in
            their relative imports, and no two files have one name.
        folder (`Path`): where to.

    Returns:
        `list[Path]`: the files written.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> import ebt_transformers.pipelines.image_denoising
    >>> from ebt_transformers.pipelines.carried_code import carry_code

    >>> files = carry_code("ebt_transformers.pipelines.image_denoising", Path(tempfile.mkdtemp()))
    >>> [file.name for file in files][:3]
    ['image_denoising.py', 'noise_ebt.py', 'thinking_ebt.py']
    ```
    """
    waiting, done = [Path(str(sys.modules[module].__file__))], {}
    while waiting:
        source = waiting.pop(0)
        if source.name in done:
            continue
        code = source.read_text(encoding="utf-8")
        for _, dots, name in RELATIVE_IMPORT.findall(code):
            waiting.append(source.parents[len(dots) - 1].joinpath(*name.split(".")).with_suffix(".py"))
        done[source.name] = RELATIVE_IMPORT.sub(lambda found: f"{found[1]}.{found[3].rpartition('.')[2]}", code)
    for filename, code in done.items():
        (folder / filename).write_text(code, encoding="utf-8")
    return [folder / filename for filename in done]


class PipelineWithCode(Pipeline):
    """
    A pipeline that thinks, and is saved with its code. A class sets the attributes below.

    Args:
        args, kwargs: of transformers' `Pipeline`.

    Attributes:
        TASK (`str`): the name it is registered by.
        AUTO_MODEL (`str`): the name of the Auto class that loads its model.
        INPUT_TYPE (`str`): `"text"` or `"image"`.
        SAVED_BESIDE (`tuple[str, ...]`): what is saved with the model, by the names of the attributes.
    """

    TASK: ClassVar[str]
    AUTO_MODEL: ClassVar[str]
    INPUT_TYPE: ClassVar[str]
    SAVED_BESIDE: ClassVar[tuple[str, ...]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # done its work, and now holding classes, which no config can be saved with
        vars(self.model.config).pop("custom_pipelines", None)

    def _take_thinking(self, options: dict[str, Any]) -> ThinkingConfig:
        """What a call's options say about thinking, taken out of them; it wins over what the construction said."""
        flat = {name: options.pop(name) for name in list(options) if name.startswith("thinking_")}
        thinking = ThinkingConfig.from_call(options.pop("thinking", None), flat)
        # which is still under way when there are none
        constructed = getattr(self, "_forward_params", {}).get("thinking", ThinkingConfig())
        return thinking.merged_over(constructed)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """
        Saves the model, what goes before it (tokenizer or image processor) and the code of all and of the pipeline.
        `pipeline(model=folder, trust_remote_code=True)` loads them, also where this package is not installed. Where
        it is, `pipeline(TASK, model=folder, pipeline_class=...)` with the class does so without running code from the
        folder.

        Args:
            save_directory (`str` or `PathLike`): a folder, made if need be.
            push_to_hub (`bool`, *optional*, defaults to `False`): also push to `repo_id`, or the folder's name.
            kwargs: of `push_to_hub` with it; else of `save_pretrained` of the model and of what goes before it.
        """
        folder = Path(save_directory)
        saving = {} if push_to_hub else kwargs
        folder.mkdir(parents=True, exist_ok=True)
        own = next(owner for owner in type(self).__mro__ if "TASK" in vars(owner))
        module = own.__module__
        impl = f"{Path(str(sys.modules[module].__file__)).stem}.{own.__name__}"
        config = self.model.config
        config.custom_pipelines = {self.TASK: {"impl": impl, "pt": [self.AUTO_MODEL], "type": self.INPUT_TYPE}}
        try:
            self.model.save_pretrained(folder, **saving)
        finally:
            del config.custom_pipelines  # a model that is saved alone brings no pipeline
        for name in self.SAVED_BESIDE:
            getattr(self, name).save_pretrained(folder, **saving)
        # not the base class's, which copies only code that lies side by side
        carry_code(module, folder)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    def push_to_hub(self, repo_id: str, *, tags: Sequence[str] = (), **kwargs: Any) -> str:
        """
        Uploads what `save_pretrained` saves.

        Args:
            repo_id (`str`): `"user/name"`.
            tags (sequence of `str`, *optional*): for the model card, besides the model's own.
            kwargs: of transformers' `push_to_hub`: `private`, `revision`, `token`, `commit_message`, ...

        Returns:
            What tells of the commit, with its address.
        """
        own = getattr(self.model, "model_tags", None) or []
        return super().push_to_hub(repo_id, tags=list(dict.fromkeys([*own, *tags])), **kwargs)

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        complete_card(Path(working_dir) / "README.md", HUB_TASKS[self.AUTO_MODEL])
        return super()._upload_modified_files(working_dir, *args, **kwargs)


__all__ = ["PipelineWithCode", "carry_code"]
