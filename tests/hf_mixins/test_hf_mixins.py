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

from ebt_transformers import EBTConfig, EBTForCausalLM, EBTModel


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
