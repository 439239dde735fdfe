"""
The model under the common model tests that Hugging Face runs on every model of transformers.

A development check, see docs/hf_test_mixins.md. It runs where `TRANSFORMERS_SOURCE` names an unpacked source
distribution of transformers, or a git checkout, of the installed version; the tests themselves are not ours to ship.
"""

import importlib
import os
import sys
import types
import unittest
import unittest.mock
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from ebt_transformers import (
    EBTConfig,
    EBTForCausalLM,
    EBTForImageDenoising,
    EBTImageConfig,
    EBTImageModel,
    EBTModel,
    EnergyTransformerConfig,
    EnergyTransformerForImageCompletion,
)


SOURCE = Path(os.environ.get("TRANSFORMERS_SOURCE", "")).expanduser()
PACKAGE = "transformers_own_tests"
# the source distribution leaves out subfolders of tests/: what is missing there is replaced by nothing
OPTIONAL = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def load_own_tests() -> types.ModuleType:
    """Their `tests/test_modeling_common.py`, with its neighbours as far as they are there."""
    if not os.environ.get("TRANSFORMERS_SOURCE"):
        pytest.skip("TRANSFORMERS_SOURCE is not set, see docs/hf_test_mixins.md", allow_module_level=True)
    folder = SOURCE / "tests"
    if not (folder / "test_modeling_common.py").is_file():
        pytest.skip(f"no tests/test_modeling_common.py in {SOURCE}", allow_module_level=True)
    pytest.importorskip("parameterized", reason="transformers' tests need `pip install parameterized`")
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package
    for name, mixin in OPTIONAL.items():
        if not (folder / (name.replace(".", "/") + ".py")).is_file():
            parent, _, _ = name.partition(".")
            sys.modules.setdefault(f"{PACKAGE}.{parent}", types.ModuleType(f"{PACKAGE}.{parent}"))
            stub = types.ModuleType(f"{PACKAGE}.{name}")
            setattr(stub, mixin, type(mixin, (), {}))
            sys.modules[f"{PACKAGE}.{name}"] = stub
    return importlib.import_module(f"{PACKAGE}.test_modeling_common")


common = load_own_tests()


class EBTModelTester:
    """What their tests ask about a model: a tiny config, inputs that fit it, and its sizes."""

    batch_size = 5
    seq_length = 7
    is_training = True
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    variant: ClassVar[dict[str, Any]] = {}

    def get_config(self) -> EBTConfig:
        """A tiny model."""
        return EBTConfig(
            **{
                "vocab_size": self.vocab_size,
                "hidden_size": self.hidden_size,
                "intermediate_size": 37,
                "num_hidden_layers": self.num_hidden_layers,
                "num_attention_heads": self.num_attention_heads,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
                "step_size": 0.5,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                **self.variant,
            }
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[EBTConfig, dict[str, torch.Tensor]]:
        """A config, and keyword arguments for forward."""
        shape = (self.batch_size, self.seq_length)
        ids = common.ids_tensor(shape, self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# their tests that do not apply to us (by how their names begin), and why; docs/hf_test_mixins.md has the same table
NOT_APPLICABLE: dict[str, str] = {
    "test_gradient_checkpointing_enable_disable": "looks for GradientCheckpointingLayer; a whole step is recomputed",
    "test_training_gradient_checkpointing": "looks for GradientCheckpointingLayer; a whole step is recomputed",
    "test_model_rope_scaling_from_config": "gives more tokens than max_position_embeddings, which raises here",
}


class EBTCommonTests(common.ModelTesterMixin, common.GenerationTesterMixin):
    """Their tests, on both our models; one subclass for every way an EBT is told its landscape."""

    all_model_classes = (EBTModel, EBTForCausalLM)
    test_can_init_all_missing_weights_before_2023 = True  # they run it for a source file with a year only
    variant: ClassVar[dict[str, Any]] = {}
    not_applicable: ClassVar[dict[str, str]] = {}

    def setUp(self) -> None:
        """A tester for each test, with our classes among the names their tests look up."""
        for name, reason in {**NOT_APPLICABLE, **self.not_applicable}.items():
            if self._testMethodName.startswith(name):
                self.skipTest(f"does not apply: {reason}")
        self.model_tester = EBTModelTester()
        self.model_tester.variant = self.variant
        for names, model_class in (
            (common.MODEL_MAPPING_NAMES, EBTModel),
            (common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, EBTForCausalLM),
        ):
            patch = unittest.mock.patch.dict(names, {EBTConfig.model_type: model_class.__name__})
            patch.start()
            self.addCleanup(patch.stop)


class UnconditionedTest(EBTCommonTests, unittest.TestCase):
    """One landscape."""

    variant = {"step_conditioning": "none", "num_landscapes": 1, "thinking_steps": 2}


class StepTokenTest(EBTCommonTests, unittest.TestCase):
    """A learned token in front of the context, anchored candidates."""

    variant = {"candidate_anchor": "token"}
    not_applicable = {
        "test_attention_outputs": "attention has one more column, that of the step token",
        "test_retain_grad_hidden_states_attentions": "hidden states are reported without the step token: a slice",
    }


class AdaptiveNormTest(EBTCommonTests, unittest.TestCase):
    """Modulated norms, tied embeddings, the residual update."""

    variant = {"step_conditioning": "adaln", "candidate_embedding": "shared", "update": "residual"}
    not_applicable = {
        "test_retain_grad_hidden_states_attentions": "hidden states are those of the last landscape: a slice",
        "test_load_save_without_tied_weights": "candidate_embedding='shared' without tying is a contradiction",
    }


class ProposalTest(EBTCommonTests, unittest.TestCase):
    """One landscape, and candidates that start at what the context predicts."""

    variant = {
        **{"step_conditioning": "none", "num_landscapes": 1, "thinking_steps": 2},
        **{"candidate_init": "proposal", "update": "residual"},
    }


class EBTImageModelTester:
    """The same for images."""

    batch_size = 5
    is_training = True
    num_channels = 3
    image_size = 16
    patch_size = 4
    seq_length = 16
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    variant: ClassVar[dict[str, Any]] = {}

    def get_config(self) -> EBTImageConfig:
        """A tiny model."""
        return EBTImageConfig(
            **{
                "image_size": self.image_size,
                "patch_size": self.patch_size,
                "num_channels": self.num_channels,
                "hidden_size": self.hidden_size,
                "intermediate_size": 37,
                "num_hidden_layers": self.num_hidden_layers,
                "num_attention_heads": self.num_attention_heads,
                "step_size": 0.5,
                **self.variant,
            }
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[EBTImageConfig, dict[str, torch.Tensor]]:
        """A config, and keyword arguments for forward."""
        shape = [self.batch_size, self.num_channels, self.image_size, self.image_size]
        return self.get_config(), {"pixel_values": common.floats_tensor(shape)}


NOT_APPLICABLE_TO_IMAGES: dict[str, str] = {
    "test_model_get_set_embeddings": "images have no table of embeddings",
}


class EBTImageCommonTests(common.ModelTesterMixin):
    """Their tests on an image model."""

    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True  # they run it for a source file with a year only
    not_applicable: ClassVar[dict[str, str]] = {}

    def setUp(self) -> None:
        """A tester for each test, with our classes among the names their tests look up."""
        for name, reason in {**NOT_APPLICABLE, **NOT_APPLICABLE_TO_IMAGES, **self.not_applicable}.items():
            if self._testMethodName.startswith(name):
                self.skipTest(f"does not apply: {reason}")
        self.model_tester = EBTImageModelTester()
        names = {EBTImageConfig.model_type: EBTImageModel.__name__}
        patch = unittest.mock.patch.dict(common.MODEL_MAPPING_NAMES, names)
        patch.start()
        self.addCleanup(patch.stop)

    def _prepare_for_class(self, inputs_dict: Any, model_class: Any, return_labels: bool = False) -> dict[str, Any]:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is EBTForImageDenoising:
            inputs["labels"] = torch.zeros_like(inputs["pixel_values"])
        return inputs


class ImageModelTest(EBTImageCommonTests, unittest.TestCase):
    """The transformer: an image in, energies out."""

    all_model_classes = (EBTImageModel,)


class ImageDenoisingTest(EBTImageCommonTests, unittest.TestCase):
    """The model that descends them."""

    all_model_classes = (EBTForImageDenoising,)
    not_applicable = {
        "test_attention_outputs": "attentions change with every step and are not returned",
        "test_hidden_states_output": "hidden states change with every step and are not returned",
        "test_model_outputs_equivalence": "asks for hidden states; an argument there is no use for raises",
        "test_retain_grad_hidden_states_attentions": "they change with every step and are not returned",
        "test_eager_matches_sdpa_inference": "compares hidden states, which are not returned",
    }


class EnergyTransformerTester(EBTImageModelTester):
    """The same for an Energy Transformer for images."""

    num_hidden_layers = 1

    def get_config(self) -> EnergyTransformerConfig:
        """A tiny model."""
        return EnergyTransformerConfig.for_images(
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_channels=self.num_channels,
            hidden_size=self.hidden_size,
            num_memories=37,
            num_attention_heads=self.num_attention_heads,
            thinking_steps=2,
        )


class ImageCompletionTest(common.ModelTesterMixin, unittest.TestCase):
    """The Energy Transformer that completes images."""

    all_model_classes = (EnergyTransformerForImageCompletion,)
    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True  # they run it for a source file with a year only
    not_applicable: ClassVar[dict[str, str]] = {
        "test_attention_outputs": "attentions change with every step and are not returned",
        "test_hidden_states_output": "hidden states change with every step and are not returned",
        "test_model_outputs_equivalence": "asks for hidden states; an argument there is no use for raises",
        "test_retain_grad_hidden_states_attentions": "they change with every step and are not returned",
    }

    def setUp(self) -> None:
        """A tester for each test."""
        for name, reason in {**NOT_APPLICABLE, **NOT_APPLICABLE_TO_IMAGES, **self.not_applicable}.items():
            if self._testMethodName.startswith(name):
                self.skipTest(f"does not apply: {reason}")
        self.model_tester = EnergyTransformerTester()

    def _prepare_for_class(self, inputs_dict: Any, model_class: Any, return_labels: bool = False) -> dict[str, Any]:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels:  # a loss takes masked patches
            patches = (self.model_tester.image_size // self.model_tester.patch_size) ** 2
            inputs["bool_masked_pos"] = torch.arange(patches).expand(len(inputs["pixel_values"]), -1) % 2 == 0
        return inputs
