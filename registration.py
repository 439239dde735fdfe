"""
Makes the Auto classes and pipelines of transformers know our models: when somebody imports those, and not before.

`import ebt_transformers` alone costs next to nothing, so whoever wants `ThinkingConfig` or `ebt --help` does not wait
for torch. As soon as a module of transformers that holds a registry has been imported (or at once, if it was before),
our module whose classes belong there is imported too, and they are registered. wrapt says when a module has been
imported. Ours import transformers', so either of a pair may be the one that is finished last: each is waited for.

Models are the exception. transformers imports their registry in the middle of importing models of its own, Llama's
among them, which ours build on. Ours are therefore entered by name, and imported when somebody takes them out.
"""

import sys
from collections import UserDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import wrapt


@dataclass(frozen=True)
class Registration:
    """
    What belongs in one registry.

    Args:
        registry (`str`): the module of transformers that holds it.
        home (`str`): the module of ours that is needed to register.
        register (`Callable`): registers, given the two modules.
    """

    registry: str
    home: str
    register: Callable[[Any, Any], None]


@dataclass(frozen=True)
class _NotImported:
    """A model class that nobody has asked for yet."""

    home: str
    name: str

    def take(self) -> type:
        return getattr(import_module(self.home, __package__), self.name)


class _ModelsOnDemand(UserDict):
    """Model classes by config class; takes the place of the dict in which an Auto class keeps registered ones."""

    def __getitem__(self, config: type) -> type:
        value = super().__getitem__(config)
        if isinstance(value, _NotImported):
            value = self.data[config] = value.take()
        return value


def _configs(auto: Any, ours: Any) -> None:
    for config in (ours.EBTConfig, ours.EBTImageConfig, ours.EnergyTransformerConfig):
        auto.AutoConfig.register(config.model_type, config, exist_ok=True)


def _models(auto: Any, ours: Any) -> None:
    text, image, energy = ".modeling_ebt.modeling_ebt", ".modeling_ebt.modeling_ebt_image", ".modeling_et"
    for auto_class, config, home, name in (
        (auto.AutoModel, ours.EBTConfig, text, "EBTModel"),
        (auto.AutoModelForCausalLM, ours.EBTConfig, text, "EBTForCausalLM"),
        (auto.AutoModel, ours.EBTImageConfig, image, "EBTImageModel"),
        (auto.AutoModelForImageToImage, ours.EBTImageConfig, image, "EBTForImageDenoising"),
        (auto.AutoModel, ours.EnergyTransformerConfig, energy, "EnergyTransformerModel"),
        (
            auto.AutoModelForMaskedImageModeling,
            ours.EnergyTransformerConfig,
            energy,
            "EnergyTransformerForImageCompletion",
        ),
        # transformers has no Auto classes for graphs: nodes are tokens with labels, a graph is a sequence with one
        (
            auto.AutoModelForTokenClassification,
            ours.EnergyTransformerConfig,
            energy,
            "EnergyTransformerForNodeClassification",
        ),
        (
            auto.AutoModelForSequenceClassification,
            ours.EnergyTransformerConfig,
            energy,
            "EnergyTransformerForGraphClassification",
        ),
    ):
        model = _NotImported(home, name)
        mapping = auto_class._model_mapping
        if not hasattr(mapping, "_extra_content"):  # some later transformers: its public way, which imports them now
            auto_class.register(config, model.take(), exist_ok=True)
            continue
        if not isinstance(mapping._extra_content, _ModelsOnDemand):
            mapping._extra_content = _ModelsOnDemand(mapping._extra_content)
        mapping._extra_content[config] = model


def _image_processors(auto: Any, ours: Any) -> None:
    from .configuration import EBTImageConfig, EnergyTransformerConfig

    with suppress(ImportError):  # in some versions of transformers the Auto class itself needs pillow or torchvision
        for config in (EBTImageConfig, EnergyTransformerConfig):
            auto.AutoImageProcessor.register(
                config, image_processor_classes={"pil": ours.EBTImageProcessor}, exist_ok=True
            )


def _pipelines(pipelines: Any, ours: Any) -> None:
    import transformers

    for kind in (ours.EnergyScoringPipeline, ours.ImageCompletionPipeline, ours.ImageDenoisingPipeline):
        auto_class = getattr(transformers, kind.AUTO_MODEL)
        pipelines.PIPELINE_REGISTRY.register_pipeline(
            kind.TASK, pipeline_class=kind, pt_model=auto_class, type=kind.INPUT_TYPE
        )


def _adapters(constants: Any, ours: Any) -> None:
    ours.register_with_peft(constants)


def _class_names(asking: Any, ours: Any) -> None:
    # `SFTTrainer("folder")` of TRL and `transformers serve` look a checkpoint's class up by its name in
    # transformers, of which there can be two copies: importing its processors makes a second one
    asking.transformers.EBTForCausalLM = ours.EBTForCausalLM


_AUTO = "transformers.models.auto"
_TEXT_MODEL = f"{__package__}.modeling_ebt.modeling_ebt"
REGISTRATIONS = (
    Registration(f"{_AUTO}.configuration_auto", f"{__package__}.configuration", _configs),
    Registration(f"{_AUTO}.modeling_auto", f"{__package__}.configuration", _models),
    Registration(
        f"{_AUTO}.image_processing_auto", f"{__package__}.modeling_ebt.image_processing_ebt", _image_processors
    ),
    Registration("transformers.pipelines", f"{__package__}.pipelines", _pipelines),
    Registration("peft.utils.constants", f"{__package__}.training.adapters", _adapters),
    Registration("trl.trainer.utils", _TEXT_MODEL, _class_names),
    Registration("transformers.cli.serving.model_manager", _TEXT_MODEL, _class_names),
)
_imported: set[str] = set()


def _after_import(module: ModuleType) -> None:
    _imported.add(module.__name__)
    for one in REGISTRATIONS:
        if module.__name__ == one.registry and one.home not in sys.modules:
            import_module(one.home)  # comes back here when it is done
        elif module.__name__ in (one.registry, one.home) and {one.registry, one.home} <= _imported:
            one.register(sys.modules[one.registry], sys.modules[one.home])


def register_when_imported() -> None:
    """Register everything with the registries that are imported already, and with the others when they are."""
    for name in dict.fromkeys([*(one.home for one in REGISTRATIONS), *(one.registry for one in REGISTRATIONS)]):
        wrapt.register_post_import_hook(_after_import, name)


__all__ = ["REGISTRATIONS", "Registration", "register_when_imported"]
