"""Recorded runs of the official code, and how this package's results are compared with them."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


HERE = Path(__file__).resolve().parent
COPIED = HERE / "data" / "parity"  # a few small cases, always there
FULL = HERE.parent.parent / "shared" / "parity"  # the whole set, beside the checkout where the project is developed

PAD = 0  # pad and end of text in all recorded runs
LOSS_RTOL = 2e-5

# errors divided by their tolerances, per case: written as a table to the file EBT_PARITY_REPORT names
RATIOS: dict[str, dict[str, float]] = {}

# official options with nothing here for them: the flag a case sets, and so the one its refusal has to name
UNSUPPORTED = {
    "opt_absolute_clamp": "absolute_clamp",
    "opt_act_elu": "ebt_act_func",
    "opt_clamp_futures_grad": "clamp_futures_grad",
    "opt_contrastive_logit": "contrastive_loss",
    "opt_contrastive_onehot": "contrastive_loss",
    "opt_memory_add": "learnable_process_memory",
    "opt_memory_augmented_mlp3": "num_modality_processing_mlp_layers",
    "opt_memory_gate": "learnable_process_memory",
    "opt_memory_residual_gate_linear": "learnable_process_memory",
    "opt_mlp_layers2": "num_modality_processing_mlp_layers",
    "opt_mlp_layers3": "num_modality_processing_mlp_layers",
    "opt_mlp_layers4": "num_modality_processing_mlp_layers",
    "opt_mlp_layers5": "num_modality_processing_mlp_layers",
    "opt_no_normalize": "normalize_initial_condition",
    "opt_norm_dyt": "ebt_norm",
    "opt_norm_ebm_backwards": "ebt_norm",
    "opt_norm_layer": "ebt_norm",
    "opt_norm_none": "ebt_norm",
    "opt_normalize_first_step_only": "normalize_initial_condition_only_first_step",
    "opt_reconstruction_coeff": "reconstruction_coeff",
    "opt_sharpen": "sharpen_predicted_distribution",
    "opt_soften_target": "soften_target_prob_dist",
}


@dataclass(frozen=True)
class Case:
    """One recorded run: a folder with `case.json`, the weights and the tensors of the run."""

    folder: Path

    def __str__(self) -> str:
        return self.folder.name if self.folder.is_relative_to(FULL) else f"copied-{self.folder.name}"

    @cached_property
    def info(self) -> dict[str, Any]:
        """`case.json`."""
        return json.loads((self.folder / "case.json").read_text(encoding="utf-8"))

    @cached_property
    def io(self) -> dict[str, Tensor]:
        """Inputs and outputs."""
        return load_file(self.folder / "io.safetensors")

    @cached_property
    def params(self) -> dict[str, Tensor]:
        """The official state dict."""
        return load_file(self.folder / "params.safetensors")

    @property
    def hparams(self) -> dict[str, Any]:
        """The official flags."""
        return self.info["hparams"]

    @property
    def inputs(self) -> Tensor:
        """Context tokens (B, S)."""
        return self.io["input_ids"][:, :-1]

    @property
    def targets(self) -> Tensor:
        """Next tokens (B, S), -100 where the official loss ignores them."""
        return as_labels(self.io["input_ids"][:, 1:])

    def model(self, **changed: Any) -> Any:
        """The converted model; `changed` are official flags that differ from the recorded ones."""
        from ebt_transformers.modeling_ebt.conversion_ebt import model_from_official

        return model_from_official(self.params, {**self.hparams, **changed}, eos_token_id=PAD)

    def draws(self, run: str, kind: str) -> list[Tensor]:
        """The random numbers of one kind that a run drew, in order."""
        names = [name for name in self.io if name.startswith(f"{run}.rand.") and name.endswith(f".{kind}")]
        return [self.io[name] for name in sorted(names, key=lambda name: int(name.split(".")[-2]))]

    def compare(self, name: str, actual: Tensor) -> None:
        """`actual` against the recorded tensor, within the tolerance stored for it."""
        self.close(name, actual, self.io[name], self.info["suggested_rtol_of_max"][name])

    def close(self, name: str, actual: Tensor, reference: Tensor, rtol: float) -> None:
        """Raises unless max|actual - reference| <= rtol * max|reference|."""
        assert actual.shape == reference.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(reference.shape)}"
        error = (actual.double() - reference.double()).abs().max().item()
        self.within(name, error, rtol * reference.double().abs().max().item())

    def within(self, name: str, error: float, tolerance: float) -> None:
        """Raises unless `error <= tolerance`; remembers the ratio."""
        ratio = 0.0 if error == 0 else error / tolerance if tolerance > 0 else float("inf")
        worst = RATIOS.setdefault(str(self), {})
        kind = name.split(" ")[0]
        worst[kind] = max(worst.get(kind, 0.0), ratio)
        assert error <= tolerance, f"{self}: {name} is off by {error:.3g}, allowed are {tolerance:.3g}"


def as_labels(tokens: Tensor) -> Tensor:
    """Tokens with padding marked as ignored."""
    return tokens.masked_fill(tokens == PAD, -100)


def cases(*prefixes: str) -> list[Case]:
    """The cases whose name starts so: the copies, and the full set where it is."""
    folders = [folder for root in (COPIED, FULL / "dev") if root.is_dir() for folder in sorted(root.iterdir())]
    return [Case(folder) for folder in folders if folder.name.startswith(prefixes) and folder.name != "checkpoint"]


def supported_cases() -> list[Case]:
    """The EBT cases whose options are all carried."""
    skipped = (*UNSUPPORTED, "nlp_baseline", "opt_s2_replay_buffer")
    return [case for case in cases("nlp_", "opt_") if case.folder.name not in skipped]


def checkpoint_folders() -> list[Path]:
    """Folders with checkpoints as the official trainer writes them."""
    return [root / "checkpoint" for root in (COPIED, FULL) if (root / "checkpoint").is_dir()]


# ---- what the official code does, in terms of ours -----------------------------------------------------------------


def evaluation_landscapes(model: Any) -> list[int]:
    """The landscape of every step of an evaluation with the model's defaults."""
    config = model.config
    return [min(step, config.num_landscapes - 1) for step in range(config.default_thinking().steps)]


def training_landscapes(case: Case, variant: str) -> list[int] | None:
    """The landscape of every step of a recorded training run; None without random numbers of steps."""
    repeats = [int(draw) for draw in case.draws(f"train.{variant}", "randint")]
    if not repeats:
        return None
    landscapes = case.hparams["mcmc_num_steps"]
    repeats = [1] * (landscapes - len(repeats)) + repeats
    return [landscape for landscape, times in enumerate(repeats) for _ in range(times)]


@dataclass(frozen=True)
class AdvancedRun:
    """What `ebt_advanced_inference` does with its flags: a landscape, a step size and a noise for every step."""

    landscapes: list[int]
    noises: list[float]
    scales: list[float]
    step_size: float | None
    candidates: int
    selection: str
    accept_only_lower_energy: bool

    @classmethod
    def from_flags(cls, hparams: Mapping[str, Any], flags: Mapping[str, Any]) -> "AdvancedRun":
        """From the flags of the model and the `infer_*` flags that differ from their defaults."""
        asked, steps = flags.get("infer_ebt_num_steps", 1), hparams["mcmc_num_steps"]
        last = steps - 1
        if hparams["ebt_type"] == "default":
            indices = list(range(asked if asked > 1 else steps))
        else:
            inner = asked if asked != 1 else hparams["randomize_mcmc_num_steps_min"] or 1
            final_only = flags.get("infer_steps_final_landscape", False)
            indices = [
                landscape
                for landscape in range(steps)
                for _ in range(1 if final_only and landscape != last else inner)
            ]
        override = flags.get("infer_ebt_override_alpha", 0)
        alpha_final_only = flags.get("infer_alpha_final_landscape", False) and hparams["ebt_type"] != "default"
        scale = override if 0 < override < 1 else 1.0
        noise = flags.get("infer_langevin_dynamics_noise", 0)
        # "first step" means landscape index 0 there: several steps of a conditioned model
        first_only = flags.get("infer_langevin_first_step", False)
        technique = flags.get("infer_energy_sampling_technique", "min")
        return cls(
            landscapes=[0] * len(indices) if hparams["ebt_type"] == "default" else indices,
            noises=[noise if index == 0 or not first_only else 0.0 for index in indices],
            scales=[1.0 if alpha_final_only and index != last else scale for index in indices],
            step_size=override if override >= 1 else None,
            candidates=flags.get("infer_generated_samples", 1),
            selection={"min": "min_energy", "max": "max_energy", "max_gap": "max_gap"}[technique],
            accept_only_lower_energy=flags.get("infer_accept_lower_energies", False),
        )

    def thinking(self, start: int, stop: int) -> dict[str, Any]:
        """The same steps as thinking options of ours; the noise has to be the same for all of them."""
        assert len(set(self.noises[start:stop])) == 1
        options: dict[str, Any] = {
            "landscapes": self.landscapes[start:stop],
            "noise_std": self.noises[start],
            "accept_only_lower_energy": self.accept_only_lower_energy,
        }
        if self.step_size is not None:
            options["step_size"] = self.step_size
        elif set(self.scales[start:stop]) != {1.0}:
            options["step_size_scale"] = self.scales[start:stop]
        return options

    def stretches(self) -> Iterator[tuple[int, int]]:
        """The steps that one call of ours can take together."""
        start = 0
        for stop in range(1, len(self.noises) + 1):
            ended = stop == len(self.noises) or self.noises[stop] != self.noises[start]
            if ended or self.accept_only_lower_energy:
                yield start, stop
                start = stop

    def __call__(self, model: Any, inputs: Tensor, state: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Final logits (B, S, V), and the energies (B, S) before every step and after the last, of one candidate."""
        energies: list[Tensor] = []
        for start, stop in self.stretches():
            output = model(inputs, initial_candidate=state, thinking=self.thinking(start, stop), output_energies=True)
            energies += output.energies[..., :-1].unbind(-1)
            after = output.energies[..., -1]
            state = output.logits
            if self.accept_only_lower_energy:
                # a rejected step keeps the logits here and their softmax there, which flattens the position
                rejected = output.steps_taken == 0
                previous = state
                state = torch.where(rejected[..., None], torch.softmax(previous, -1), previous)
                if stop == len(self.landscapes):
                    probs = torch.softmax(state, -1)
                    after = model.energy(inputs, candidate_probs=probs, landscape=self.landscapes[-1])
        return state, [*energies, after]


class Replay:
    """Stands in for the descent's source of Gaussian noise: gives recorded draws, in order."""

    def __init__(self, draws: list[Tensor]) -> None:
        self.draws = list(draws)

    def __call__(self, shape: Any, generator: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
        draw = self.draws.pop(0)
        # images have a dimension for candidates here
        assert [side for side in draw.shape if side > 1] == [side for side in shape if side > 1]
        return draw.view(shape).to(device=device, dtype=dtype)


def replay_training(monkeypatch: Any, case: Case, variant: str) -> None:
    """Replays every draw of a recorded training step: noise, step sizes, and steps where the model draws those."""
    from ebt_transformers.modeling_ebt import descent, thinking

    run = f"train.{variant}"
    sizes, steps = case.draws(run, "rand_like"), training_landscapes(case, variant)

    def uniform(shape: tuple[int, ...], device: torch.device) -> Tensor:
        return sizes.pop(0).view(shape).to(device)

    def integer(lowest: int, beyond: int, shape: tuple[int, ...]) -> Tensor:
        assert steps is not None and lowest <= len(steps) < beyond
        return torch.full(shape, len(steps))

    monkeypatch.setattr(descent, "standard_normal", Replay(case.draws(run, "randn_like")))
    monkeypatch.setattr(thinking.torch, "rand", uniform)
    monkeypatch.setattr(thinking.torch, "randint", integer)


def write_report() -> None:
    """Writes `RATIOS` as a Markdown table to the file the environment variable EBT_PARITY_REPORT names."""
    target = os.environ.get("EBT_PARITY_REPORT")
    if not target or not RATIOS:
        return
    lines = ["| case | worst error / tolerance | of |", "|---|---|---|"]
    for case, ratios in sorted(RATIOS.items()):
        kind = max(ratios, key=lambda name: ratios[name])
        lines.append(f"| {case} | {ratios[kind]:.2g} | {kind} |")
    Path(target).write_text("\n".join(lines) + "\n", encoding="utf-8")


def digest_errors(gradient: Tensor, digest: Mapping[str, float]) -> tuple[float, float]:
    """How far the norm and the recorded random projection of a gradient are off."""
    flat = gradient.double().flatten()
    weights = torch.cos(0.7 * torch.arange(flat.numel(), dtype=torch.float64) + 0.3)
    return abs(flat.norm().item() - digest["l2"]), abs((flat @ weights).item() - digest["dot"])


def official_gradients(model: Any) -> dict[str, Tensor]:
    """The gradients of a model, in official names and layout."""
    from ebt_transformers.modeling_ebt import conversion_ebt as conversion

    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return conversion.tensors_to_official(gradients, model.config)


def check_gradients(case: Case, model: Any, variant: str) -> None:
    """All parameter gradients against the recorded ones, or their digests where only those were recorded."""
    recorded = case.info["grad_variants"][variant]
    rtol = recorded["suggested_rtol_of_max"]
    mine = official_gradients(model)
    file = case.folder / f"grads.{variant}.safetensors"
    if file.is_file():
        reference = load_file(file)
        assert set(mine) == set(reference)
        for name, gradient in reference.items():
            case.close(f"gradient {variant} {name}", mine[name], gradient, rtol)
    assert set(mine) == set(recorded["digest"])
    for name, digest in recorded["digest"].items():
        # what an error of `rtol * max` in every element can change the norm by, and the projection unless all conspire
        allowed = rtol * mine[name].abs().max().item() * math.sqrt(mine[name].numel())
        for kind, error in zip(("norm", "projection"), digest_errors(mine[name], digest), strict=True):
            case.within(f"digest {kind} {variant} {name}", error, allowed + 1e-12)


def identifier(value: Any) -> str:
    """A readable id for a parameter of a test."""
    return str(value)
